"""tests/bench.py prints its table; what the figures are is the machine's affair."""
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

import bench as bench_py
import train_gpt
from common import refused
from test_run import ROOT, make_dataset

pytestmark = pytest.mark.slow  # it measures

@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Runs the bench of a clone whose dataset is small."""
    folder = tmp_path_factory.mktemp("bench")
    for name in "tests", "records":
        (folder / name).mkdir()
    for name in "train_gpt.py harness.py logbook.py plan.py tests/bench.py records/tracks.json".split():
        shutil.copy(ROOT / name, folder / name)
    make_dataset(folder / "data/nano", "nano", train=20_000, val=3_080, audit=2_500)
    command = [sys.executable, folder / "tests/bench.py", "--track", "smoke"]
    # To compile takes most of a minute; with the heap's settings it need not start itself again.
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    heap = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2147483647"}
    return lambda *arguments, env=environment | heap: subprocess.run(
        [*command, *arguments], capture_output=True, text=True, env=env)

def test_a_table_of_the_parts_that_were_asked_for(bench):
    outcome = bench("attention", "optimizer", "--rounds", "1")
    assert outcome.returncode == 0, outcome.stderr
    rows = re.findall(r"^(\w.*?)  .*?([\d.]+)%", outcome.stdout, re.M)
    assert [name for name, _ in rows] == ["attention 128", "attention 512", "optimizer", "2048^3 product"]
    assert all(0 < float(share) <= 100 for _, share in rows)

def test_a_profile_of_a_part(bench):
    outcome = bench("score", "--profile")
    assert outcome.returncode == 0, outcome.stderr
    title, *rows = outcome.stdout.splitlines()[1:]
    shares = {row[:24].strip(): float(row[24:].split("%")[0]) for row in rows}
    assert title.startswith("score: ") and sum(shares.values()) == pytest.approx(100, abs=0.5)
    assert min(shares["head"], shares["attention"], shares["trunk matmuls"]) > 0
    assert shares["optimizer"] == shares["data"] == 0

@pytest.mark.parametrize(("arguments", "said"), [
    (["heads"], "there is no part heads"), (["--rounds", "0"], "--rounds and --threads are 1 or more"),
])
def test_mistakes(monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--threads", "1", *arguments])
    monkeypatch.setattr(bench_py, "make_parts", lambda *_: {"head": None})
    monkeypatch.setattr(train_gpt, "setup_compile", lambda *_: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    assert refused(capsys, bench_py.main) == f"error: {said}; see python tests/bench.py --help\n"
