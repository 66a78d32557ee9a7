"""plan.py: what it prints, what it refuses, and whether its memory is what a run measures.

Measured is what torch's profiler sees real runs of train_gpt.py allocate and free on the CPU.
"""
import json
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest

import plan
from common import refused
from test_run import (  # noqa: F401
    ENVIRONMENT,
    ROOT,
    losses,
    make_dataset,
    make_project,
    nursery,
    train,
)

REPLAY = "--replay 1-1 --replay-from-epoch 1"

@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """It has no data: a plan needs none."""
    folder = make_project(tmp_path_factory.mktemp("plan") / "a clone")
    shutil.copy(ROOT / "plan.py", folder)
    (folder / "data").mkdir()
    shutil.copy(ROOT / "data/tokens.json", folder / "data")
    return folder

@pytest.mark.parametrize("command, parameters, cap, gib", [
    ("nano", 3_932_478, "training_flops", 2),  # 1.4 in float32, where bfloat16 is not in hardware
    # An H100 has 79.6 GiB, 2.5 of them for CUDA and NCCL.
    pytest.param("unlimited_snapshots --ranks 64 --ranks-per-member 8", 1_870_172_811, "gpu_seconds", 77,
                 marks=pytest.mark.slow),
    # Eight of its thirty layers trace as all of them do: 11 pairs are missing.
    pytest.param("limited --device-batch 1 --checkpointing --n-layer 8 --replay 4-5",
                 1_443_722_775 - 11 * 81_201_069, "gpu_seconds", 7.5, marks=pytest.mark.slow),
])
def test_plan(clone, train, command, parameters, cap, gib):  # noqa: F811
    before = sorted(clone.rglob("*"))
    outcome = train(clone, "--track", *command.split(), script="plan.py")
    assert outcome.codes == [0] and outcome.stderr == "", outcome.stderr
    assert sorted(clone.rglob("*")) == before
    assert max(map(len, outcome.stdout.splitlines())) <= 100
    whole = outcome.stdout.replace("\n" + 13 * " ", " ")
    lines = dict(re.findall(r"^(\w[^ ]*(?: [^ ]+)?) {2,}(.*)$", whole, re.M))
    assert ("price" in lines) == ("fits 80 GB: yes" in lines["memory"]) == (command != "nano")
    count, *parts = (int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", lines["parameters"]))
    assert count == sum(parts) == parameters
    total, *parts = (float(size) for size in re.findall(r"([\d,.]+) GiB", lines["memory"]))
    assert total == pytest.approx(sum(parts), abs=0.0006 * len(parts)) and 0 < total < gib
    # Of this CPU, in the dtype of its runs: a product in another one can be a thousand times slower.
    assert float(re.search(r"of ([\d.e-]+) TFLOP/s", lines["time"])[1]) > 0.01
    assert re.fullmatch(rf"{cap} \S+ of \S+: (holds|DOES NOT HOLD)", lines["cap"])

@pytest.mark.parametrize("flags, said", [
    ("--ranks 0", "--ranks 0"),
    ("--ranks 8 --ranks-per-member 3", "--ranks-per-member 3"),
    ("--ranks 7", "7 ranks can't share"),
    ("--mfu 0", "--mfu 0"),
    ("--price -3", "--price -3"),
    ("--dataset another", "nano, fineweb100M"),
    ("--device-batch 7", "--device-batch 7"),
    ("--dataset nano --n-embd 56 --n-layer 2 --replay none --no-compile --optimizer torch.optim:Adafactor",
     "--optimizer adamw"),
])
def test_refused(capsys, flags, said):
    assert said in refused(capsys, lambda: plan.main(["--track", "limited", *flags.split()]))


# ---- Memory ------------------------------------------------------------------------------------------------

# Each case is forked from a process that has imported torch once. Only what is no part of a step is left out.
MEASURE = """
import contextlib, json, os, re, sys, io
from pathlib import Path
from types import SimpleNamespace
from torch.profiler import ProfilerActivity, profile
import torch, harness, logbook, plan, train_gpt

torch.set_num_threads(1)
harness.ROOT = logbook.ROOT = Path.cwd()
logbook.Keeper.save = lambda *_: None
logbook.RunLog.plot = harness.Run.speak = lambda *_, **__: None

def measured(flags):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        train_gpt.main(SimpleNamespace(name=None), flags)
    recorded.export_chrome_trace("trace.json")
    events = json.loads(Path("trace.json").read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]")

def planned(flags):
    with contextlib.redirect_stdout(io.StringIO()) as output:
        plan.main(flags)
    return float(re.search(r"^memory +([\\d.]+) GiB", output.getvalue(), re.M)[1]) * 2 ** 30

for flags in json.loads(sys.argv[1]):
    for function in measured, planned:
        if not (child := os.fork()):
            result = function(flags)
            with open("results", "a") as file:
                print(function.__name__, result, file=file)
            os._exit(0)
        os.waitpid(child, 0)
"""
SMALL = "--seq-len 256 --batch-tokens 4096 --n-layer 2 --n-head 2 --n-embd 64 --lr-scale 1 --max-steps 2"
FEW = f"""--track nano {SMALL} --replay none --mtp none --values none --device-batch 16 --max-steps 4
    --dtype float32"""  # graphs to compile
CASES = {
    "teacher": f"""--track nano_unlimited {SMALL} {REPLAY} --batch-tokens 1024 --device-batch 4 --ngram 0
        --distill 0.7 --average-kind blend --checkpointing --no-compile""",
    "compiled": FEW,
    "eager": f"{FEW} --no-compile",
    "episodes": """--track nano --seq-len 32 --batch-tokens 128 --n-layer 4 --replay none --n-head 2
        --n-embd 256 --mtp none --device-batch 1 --meta-norm 0.1 --meta-sequences 2 --max-steps 2 --no-compile
        """,
}

@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(The folder in which all cases have run, {case: the planned memory divided by the measured})."""
    folder = tmp_path_factory.mktemp("memory")
    make_dataset(folder / "data/nano", "nano", train=60_000, val=300, audit=300)
    manifest = folder / "data/nano/manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"vocab_size": 4096}))
    (folder / "records").mkdir()
    shutil.copy(ROOT / "records/tracks.json", folder / "records")
    cases = json.dumps([[*shlex.split(flags), "--run-name", name] for name, flags in CASES.items()])
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", MEASURE, cases], cwd=folder, env=environment,
                          capture_output=True, text=True)
    rows = [line.split() for line in (folder / "results").read_text().splitlines()]
    assert [name for name, _ in rows] == ["measured", "planned"] * len(CASES), done.stderr
    return folder, {case: float(planned) / float(measured) for case, (_, measured), (_, planned)
                    in zip(CASES, rows[::2], rows[1::2])}

@pytest.mark.slow
def test_memory_is_what_runs_measure(measured):
    assert all(abs(ratio - 1) < 0.15 for ratio in measured[1].values()), measured[1]

@pytest.mark.slow
def test_compiled_is_eager(measured):
    """The same losses, from the graphs that take so long to compile."""
    runs = measured[0] / "runs"
    if "\ncompiled\n" not in (runs / "compiled/log.txt").read_text():
        pytest.skip("no C++ compiler here")
    np.testing.assert_allclose(losses(runs / "compiled"), losses(runs / "eager"), rtol=5e-6)
