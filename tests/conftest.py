"""What the tests share. Here torch runs on one thread and compiles nothing; the processes that tests start
do as a user's would.

A test that takes seconds without being the only one to protect something is marked `slow`, and runs only with
--all.
"""
import contextlib
import functools
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
torch.set_num_threads(1)
torch.compiler.set_stance("force_eager")

from logbook import parse_args  # noqa: E402
from train_gpt import TRACKS, Config  # noqa: E402

LEFT_OUT = pytest.StashKey[int]()

def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the slow tests too")

def pytest_configure(config):
    config.addinivalue_line("markers", "slow: runs only with --all")
    config.stash[LEFT_OUT] = 0

def pytest_collection_modifyitems(config, items):
    """Without --all no slow tests; the longest files first: then two workers end at about the same time."""
    slow = [] if config.getoption("--all") else [item for item in items if item.get_closest_marker("slow")]
    items[:] = [item for item in items if item not in slow]
    config.hook.pytest_deselected(items=slow)
    config.stash[LEFT_OUT] = len(slow)
    longest = ["test_resume", "test_tracks", "test_run", "test_plan", "test_model", "test_published"]
    items.sort(key=lambda item: longest.index(item.path.stem) if item.path.stem in longest else len(longest))

def pytest_sessionfinish(session):
    """A worker of pytest-xdist tells the process that has started it."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left out"] = session.config.stash[LEFT_OUT]

@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Every worker has collected all tests."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left out", 0)

def pytest_terminal_summary(terminalreporter, config):
    if count := config.stash[LEFT_OUT]:
        terminalreporter.write_line(f"{count} slow tests were left out: ./run.sh test --all runs them")

slow = functools.partial(pytest.param, marks=pytest.mark.slow)

def slow_but(always, values):
    """Parameters of a test: the values, slow but for those that always run."""
    return [value if value in always else slow(value) for value in values]

@pytest.fixture(scope="session")
def one_rank():
    """torch.distributed of a single process, for what is written for ranks."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()

@contextlib.contextmanager
def exact():
    """What says float32 computes in float64: formulas can be compared to the last digit. Also a decorator."""
    default = torch.get_default_dtype()
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(default)

def normal(*shape, seed=0, dtype=torch.float64):
    """Standard normal numbers, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)

def command_line(*flags):
    """-> the Config and the arguments that the flags of train_gpt.py make."""
    args = parse_args(Config, TRACKS, list(map(str, flags)))
    return Config(**args.fields), args

def refused(capsys, make):
    """The one line of standard error with which make() ends the program."""
    with pytest.raises(SystemExit) as stop:
        make()
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    return err
