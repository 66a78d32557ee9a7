"""A run as people see it: run.sh in a terminal of 80 columns, watched and interrupted."""
import re
import time

import pexpect
import pytest

from test_run import ENVIRONMENT, SHORT, nursery, project, train  # noqa: F401

SOON = 2  # seconds; one on a machine that does nothing else

@pytest.fixture
def terminal(project):  # noqa: F811
    """terminal(*flags) starts ./run.sh smoke there; at the end it is gone."""
    started = []

    def terminal(*flags):
        command = [f"{project}/run.sh", "smoke", *map(str, SHORT), *flags]
        started.append(pexpect.spawn("/bin/bash", command, env=ENVIRONMENT, dimensions=(24, 80), timeout=60,
                                     encoding="utf-8"))
        return started[-1]

    yield terminal
    for child in started:
        child.close(force=True)

def test_what_is_shown_fits_into_80_columns(terminal):
    child = terminal("--run-name", "shown")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0, child.before
    shown = re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", child.before)
    lines = re.split(r"[\r\n]+", shown)
    assert max(map(len, lines)) <= 80, max(lines, key=len)
    for bar in "scoring val", "scoring audit", r"\d+/10 .*step", "loss \\d":
        assert re.search(bar, shown), bar
    assert "val loss" in shown

@pytest.mark.slow
@pytest.mark.parametrize("place", ["preparing", "scoring val", "epoch +1/99"])
def test_ctrl_c_is_acknowledged_at_once_and_obeyed_after_the_step(terminal, place):
    child = terminal("--run-name", re.sub(r"\W", "", place), "--epochs", "99")
    child.expect(place)
    child.sendintr()
    began = time.monotonic()
    child.expect(r"\n\r?stopping after this step; Ctrl-C again quits at once\r\n")
    assert time.monotonic() - began < SOON
    child.expect(r"[\r\n]stopped by a signal after step \d+; to go on: ./run.sh smoke --resume \w+\r\n")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 75
