"""rehearse.py: its table and its verdict, on one rank and on two, and that it sees what is wrong."""
import json
import re
import shutil
import time
import types
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference as ref
import rehearse
import train_gpt
from common import normal
from test_model import assert_close
from test_run import ROOT, SOURCE, make_project, nursery, train  # noqa: F401

FLAGS = """--track nano --seq-len 32 --batch-tokens 256 --n-layer 2 --n-head 2 --n-embd 32 --replay 1-1
    --no-compile --dtype float32""".split()

@pytest.fixture
def clone(tmp_path):
    """make(source): a clone without data."""
    def make(source=SOURCE):
        folder = make_project(tmp_path / "a clone", source)
        (folder / "data").mkdir()
        for name in "plan.py", "rehearse.py", "data/tokens.json":
            shutil.copy(ROOT / name, folder / name)
        return folder
    return make

@pytest.mark.slow
def test_it_says_whether_it_is_right_and_holds(clone, train):  # noqa: F811
    """On two ranks; the two others are of one."""
    folder = clone()
    before = sorted(folder.rglob("*"))
    outcome = train(folder, *FLAGS, script="rehearse.py", ranks=2)
    assert set(outcome.codes) == {0} and outcome.stderr == "", outcome.stderr
    assert sorted(folder.rglob("*")) == before
    lines = outcome.stdout.splitlines()
    assert "WRONG" not in outcome.stdout and "the same bits" in outcome.stdout
    assert len(re.findall(r"^ *\d+ steps of [\d,]+ ms: [\d,]+ tokens/s", outcome.stdout, re.M)) == 2
    assert re.search(r"^sums and gathers +\d+ ms by themselves, [\d.]+ GB/s; the step hides \d+% of that$",
                     outcome.stdout, re.M)
    minutes, scoring = map(float, re.search(r"([\d.]+) min of training, ([\d.]+) min", lines[-2]).groups())
    assert minutes > 0 and scoring > 0 and lines[-1].endswith("training_flops: holds")

def test_what_is_wrong_is_named(clone, train):  # noqa: F811
    """A kernel that sees one key too many."""
    source = SOURCE.replace("(distance > window)", "(distance > window + 1)")
    assert source != SOURCE
    outcome = train(clone(source), *FLAGS, script="rehearse.py")
    assert outcome.codes == [1] and "not right here: attention" in outcome.stdout

@pytest.mark.parametrize("window", [7, 100, 200, 500])
def test_kernels_of_a_gpu_by_their_meaning(window):
    """FlexAttention not compiled, and torch's plain product in the place of cuDNN, which a CPU lacks."""
    q, k, v = (normal(2, 200, 2, 16, seed=seed).float() for seed in range(3))
    expected = ref.windowed_attention(q.double(), k.double(), v.double(), window, 0.3)
    with mock.patch.object(torch, "compile", lambda function, **_: function):
        assert_close(rehearse.flex.__wrapped__()(q, k, v, window, 0.3).double(), expected, 1e-5)
    plain = types.SimpleNamespace(CUDNN_ATTENTION=rehearse.SDPBackend.MATH)
    with mock.patch.object(rehearse, "SDPBackend", plain):
        if window < 200:
            with pytest.raises(ValueError, match="no window"):
                rehearse.cudnn()(q, k, v, window, 0.3)
        else:
            assert_close(rehearse.cudnn()(q, k, v, window, 0.3).double(), expected, 1e-5)

def test_the_fastest_right_kernel_of_each_window():
    own = train_gpt.block_attention

    def slow(*arguments):
        time.sleep(0.05)
        return own(*arguments)

    def wrong(q, k, v, window, scale):
        return own(q, k, v, window + 1, scale)

    def whole(q, k, v, window, scale):
        if window < q.size(1):
            raise ValueError("it knows no window")
        return slow(q, k, v, window, scale)

    def missing():
        raise ImportError("no such package")

    makers = {"slow": lambda: slow, "wrong": lambda: wrong, "missing": missing, "whole": lambda: whole}
    said, shape = [], (2, 64, 2, 16)
    here = torch.device("cpu"), torch.float32
    assert rehearse.time_kernels(makers, [16], shape, *here, said.append) == {16: "slow"}
    assert [line.split("  ")[0] for line in said] == [f"{name}, window 16" for name in makers]
    assert "WRONG" in said[1] and "no such package" in said[2] and "no window" in said[3]
    makers = {"slow": makers["slow"], "own": lambda: own}
    assert rehearse.time_kernels(makers, [16, 64], shape, *here, said.append) == {16: "own", 64: "own"}

@given(st.integers(1, 64), st.floats(0, 10), st.floats(0.1, 10), st.floats(0, 100))
def test_the_largest_device_batch_fits_and_the_next_does_not(sequences, fixed, each, most):
    batch = max(b for b in (1, 2, 4) if sequences % b == 0)
    found = rehearse.largest_batch(sequences, batch, fixed, fixed + batch * each, most)
    needs = {b: fixed + b * each for b in range(1, sequences + 1) if sequences % b == 0}
    rounding = 1e-9 * (most + fixed + each)
    assert found == batch or needs[found] <= most + rounding
    assert all(b <= found or needs[b] > most - rounding for b in needs) or needs[1] > most - rounding

def test_a_cap_that_does_not_hold_is_code_1(clone, train):  # noqa: F811
    folder = clone()
    tracks = json.loads((folder / "records/tracks.json").read_text())
    tracks["nano"]["cap"] = {"gpu_seconds": 0.01}
    (folder / "records/tracks.json").write_text(json.dumps(tracks))
    outcome = train(folder, *FLAGS, script="rehearse.py")
    assert outcome.codes == [1] and outcome.stdout.rstrip().endswith("minutes of a GPU: DOES NOT HOLD")
