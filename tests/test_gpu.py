"""
What only a GPU can show, where there is one; without CUDA all of it is skipped. `./run.sh TRACK --rehearse`
asks much of this of a track at its full size.

SLOWRUN_GPU=cpu runs on a CPU what has a meaning there: it keeps these tests from rotting between two GPUs.
"""
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from test_resume import assert_equal, death, mortal  # noqa: F401
from test_run import (  # noqa: F401
    ENVIRONMENT,
    ROOT,
    SHORT,
    SOURCE,
    Outcome,
    make_project,
    metrics,
    project,
    result_of,
)

DEVICE = os.environ.get("SLOWRUN_GPU", "cuda")
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="there is no GPU")
HERE = {"CUDA_VISIBLE_DEVICES": "0"} if DEVICE == "cuda" else {}
HALF = ["--dtype", "bfloat16"] * (DEVICE == "cuda")  # or the flash kernels would not run
SMALL = """--n-layer 4 --n-head 2 --n-embd 128 --seq-len 512 --batch-tokens 8192 --meta-sequences 8
    --device-batch 4""".split()

def run(folder, *flags, script="train_gpt.py", **environment):
    """In a process of its own: that from which the other tests fork has found no GPU."""
    environment = ENVIRONMENT | HERE | {name: str(value) for name, value in environment.items()}
    done = subprocess.run([sys.executable, f"{folder}/{script}", *map(str, flags)], env=environment,
                          capture_output=True, text=True, timeout=600)
    return Outcome([done.returncode], done.stdout, done.stderr)

def finished(outcome):
    assert set(outcome.codes) == {0}, outcome.stdout + outcome.stderr
    return outcome.stdout

@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """It can plan and rehearse, and has no data."""
    folder = make_project(tmp_path_factory.mktemp("gpu") / "a clone")
    (folder / "data").mkdir()
    for name in "plan.py", "rehearse.py", "data/tokens.json":
        shutil.copy(ROOT / name, folder / name)
    return folder

ON_GPU = ["limited", "tiny", "two_hour", "unlimited"] * (DEVICE == "cuda")  # with 50,257 words

@pytest.mark.parametrize("track", ["nano", *ON_GPU])
def test_every_technique_is_right_here(clone, track):
    """Attention, loss, gradients, polar factor and sums beside the CPU's; twice the same step."""
    replay = [] if track == "tiny" else ["--replay", "2-2"]
    flags = ["--track", track, *SMALL, *replay, "--no-compile"]
    said = finished(run(clone, *flags, script="rehearse.py"))
    assert "WRONG" not in said and "holds" in said

def test_memory_is_what_the_plan_says(clone):
    """Of tensors, as torch counts them; on a CPU a rehearsal says what the whole process holds."""
    if DEVICE == "cpu":
        pytest.skip("a CPU's allocator does not count")
    flags = ["--track", "limited", *SMALL, "--replay", "2-2"]
    gib = lambda said: float(re.search(r"^memory +([\d.]+) ", said, re.M)[1])
    measured = gib(finished(run(clone, *flags, script="rehearse.py")))
    planned = gib(finished(run(clone, *flags, "--ranks", 1, script="plan.py")))
    assert measured == pytest.approx(planned, rel=0.15)

def test_a_run_learns(project):  # noqa: F811
    finished(run(project, *SHORT[:-1], *HALF, "--epochs", 6, "--run-name", "gpu"))
    result = result_of(project / "runs/gpu")
    first, *_, last = metrics(project / "runs/gpu", "eval")
    assert result["machine"]["device"] == DEVICE and last["loss"] < first["loss"] - 0.3

def test_nothing_compiles_and_nothing_waits_inside_a_step(project, tmp_path):  # noqa: F811
    """The host reads a step's report when the next one is under way, and before that waits for nothing."""
    wait = "torch.cuda.set_sync_debug_mode({!r})\n" if DEVICE == "cuda" else "pass  # {}\n"
    source = SOURCE
    for line, code in (
        ("    place = 0  #", "    torch.compiler.set_stance('fail_on_recompile')\n"),
        ("        for n, (sequences, noise)", "        " + wait.format("error")),
        ("        # A step's report", "        " + wait.format("default")),
    ):
        assert source.count(line) == 1
        source = source.replace(line, code + line)
    folder = make_project(tmp_path / "watched", source)
    (folder / "data").symlink_to(project / "data")
    finished(run(folder, *SHORT[:-1], *HALF, "--max-steps", 4, "--run-name", "watched"))

def test_a_run_that_is_stopped_goes_on_to_the_same_bits(mortal):  # noqa: F811
    flags = [*SHORT, *HALF, "--save-every", 0]
    finished(run(mortal, *flags, "--run-name", "gpu_whole"))
    end = death("member 0 step 7") | {"DIE_BY": signal.SIGTERM}
    assert run(mortal, *flags, "--run-name", "gpu_parts", **end).codes == [75]
    said = finished(run(mortal, "--save-every", 0, "--no-compile", "--resume", "gpu_parts"))
    assert "resume at step 7" in said
    assert_equal(mortal / "runs/gpu_parts", mortal / "runs/gpu_whole")
