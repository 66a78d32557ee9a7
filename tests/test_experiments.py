"""records/nano/experiments.py: what it runs, with a launcher that invents losses from the flags it gets."""

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import logbook
import train_gpt

ROOT = Path(__file__).resolve().parent.parent

LAUNCHER = """#!/usr/bin/env python3
import json, pathlib, sys
root, arguments = pathlib.Path(__file__).parent, sys.argv[1:]
with open(root / "called", "a") as file:
    print(*arguments, file=file)
if arguments[0] == "data":
    sys.exit((root / "data" / arguments[1]).mkdir())
if (root / "stop").exists():
    sys.exit(75)
folder = root / "runs" / arguments[-1]
folder.mkdir(parents=True, exist_ok=True)
(folder / "result.json").write_text(json.dumps({"val_loss": 4.5, "audit_loss": 4.4}))
"""

@pytest.fixture(scope="module")
def experiments():
    spec = importlib.util.spec_from_file_location("experiments", ROOT / "records/nano/experiments.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module

@pytest.mark.parametrize("kind", ["once", "often"])
def test_it_finds_the_best_setting_and_makes_no_run_twice(experiments, kind, monkeypatch, tmp_path):
    """Where the loss has one valley, and where a width diverges."""
    best = {"lr_scale": 0.25, "batch_tokens": 8192, "n_embd": 256, "weight_decay": 0.01, "epochs": 8}
    made = []

    def run(queue, name, flags):
        made.append(name)
        given = dict(flag[2:].replace("-", "_").split("=") for flag in flags)
        away = [abs(math.log2(float(given[field]) / best[field])) for field in best if field in given]
        loss = 4 + sum(away) + int(given["seed"]) / 1000
        return (math.inf, math.inf) if given["n_embd"] == "384" else (loss, loss - 1)

    monkeypatch.setattr(experiments.Queue, "run", run)
    monkeypatch.setattr(experiments, "HERE", tmp_path)
    experiments.EXPERIMENTS[kind](2)
    rows = json.loads((tmp_path / "baseline.json").read_text())[kind]
    assert [row["tokens"] for row in rows] == list(experiments.TEXT.values())
    for row in rows:
        assert {field: row["settings"][field] for field in best if field in row["settings"]} == {
            field: value for field, value in best.items() if kind == "often" or field != "epochs"}
        assert row["val"] == pytest.approx([4.042, 4.043, 4.044]) and row["seeds"] == [42, 43, 44]
        assert row["audit"] == pytest.approx([3.042, 3.043, 3.044])
    assert len(set(made)) == len(made) and max(map(len, made)) <= 100

def test_a_stopped_queue_goes_on(tmp_path):
    """With the state of the run that was stopped, and without what was done before."""
    for folder in "records/nano", "data/nano":
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / "data/shards.py", tmp_path / "data")
    script = shutil.copy(ROOT / "records/nano/experiments.py", tmp_path / "records/nano")
    (tmp_path / "run.sh").write_text(LAUNCHER)
    (tmp_path / "run.sh").chmod(0o755)
    start = lambda *words: subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
    (tmp_path / "stop").touch()
    assert start("preset").returncode == 75
    (tmp_path / "stop").unlink()
    (tmp_path / "runs/preset_nano0.1M_s42/state/0").mkdir(parents=True)
    assert start("preset", "--jobs", "2").returncode == 0
    calls = (tmp_path / "called").read_text().splitlines()
    assert calls.count("data nano2.79M") == 1 and "data nano" not in calls
    runs = [call for call in calls if call.startswith("nano")]
    first = "--dataset=nano0.1M --seed=42 --run-name preset_nano0.1M_s42"
    assert runs[0] == f"nano {first}" and sorted(runs[1:])[-1] == "nano --resume preset_nano0.1M_s42"
    assert len(set(runs)) == len(runs) == 10
    assert start("preset").returncode == 0 and "preset     9 runs are done" in start().stdout
    assert (tmp_path / "called").read_text().splitlines() == calls

def test_the_plain_model_is_plain(experiments):
    """The grids' flags are the contestant's, and nothing that the records have added is left."""
    for field, grid in experiments.OFTEN.items():
        for value in grid:
            flag = f"--{field.replace('_', '-')}={value:g}"
            args = logbook.parse_args(train_gpt.Config, train_gpt.TRACKS, [*experiments.PLAIN, flag])
            c = train_gpt.Config(**args.fields)
            assert math.isclose(getattr(c, field), value)
    kinds = {name.split(".", 2)[-1] for name, _ in train_gpt.GPT(c, 4096).named_parameters()}
    assert kinds == {"embed", "head", "lam", "mu", *(f"attn.{part}" for part in "qkvo"),
                     *(f"mlp.{part}" for part in ("gate", "up", "out"))}
    assert {row.optimizer for row in train_gpt.param_table(c)} == {"adamw"}
    assert c.average == 1 and not c.replayed and c.xsa == "none" and c.window(0, 0) == c.seq_len
