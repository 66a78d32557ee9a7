"""What the files of this project look like: how long they may be, their blank lines, what the linter says."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
LISTED = subprocess.run(["git", "ls-files", "*.py", "*.sh"], cwd=ROOT, capture_output=True, text=True)
FILES = [name for name in LISTED.stdout.split() if (ROOT / name).exists()]
PYTHON = [name for name in FILES if name.endswith(".py")]
LINES = {"train_gpt.py": 1590, "harness.py": 650, "logbook.py": 650, "run.sh": 170, "README.md": 170}

needs_git = pytest.mark.skipif(not FILES, reason="not a git checkout: which files are the project's?")

def lines_of(name):
    return (ROOT / name).read_text().splitlines()

@pytest.mark.parametrize("name", LINES)
def test_budget_of_lines(name):
    if not (ROOT / name).exists():
        pytest.skip(f"there is no {name}")
    assert len(lines_of(name)) <= LINES[name]

@needs_git
def test_lines_within_110_columns():
    long = [f"{name}:{number}" for name in FILES
            for number, line in enumerate(lines_of(name), 1) if len(line) > 110]
    assert not long

def misplaced_blank_lines(lines):
    """Numbers of banners without two blank lines before them, and of functions and classes without one."""
    for i, line in enumerate(lines):
        before, above = lines[max(0, i - 3):i], itertools.takewhile(bool, reversed(lines[:i]))
        if before and before[-1].startswith("#") or any(text.startswith("@") for text in above):
            continue  # this line belongs to a comment or a decorator
        blank = len(before) - max((n for n, text in enumerate(before, 1) if text), default=0)
        wanted = 2 if line.startswith("# ---- ") else 1 if re.match("def |class |@", line) else blank
        if blank != wanted:
            yield i + 1

def test_misplaced_blank_lines():
    good = ["import os", "", "", "# ---- Title ----", "", "def f():", "    pass", "",
            "@g", "@h", "class C:", "    pass"]
    assert list(misplaced_blank_lines(good + ["", "# about i", "def i(): pass"])) == []
    bad = ["import os", "", "# ---- Title ----", "", "", "def f():", "    pass", "class C:",
           "    pass", "@g", "def h():"]
    assert list(misplaced_blank_lines(bad)) == [3, 6, 8, 10]

@needs_git
def test_one_blank_line_between_functions_and_two_before_a_banner():
    misplaced = [f"{name}:{number}" for name in PYTHON for number in misplaced_blank_lines(lines_of(name))]
    assert not misplaced

def test_linter():
    command = [sys.executable, "-m", "ruff", "check", "--output-format", "concise", "."]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, ""), result.stdout

@pytest.mark.parametrize("name", ["ci", "records"])
def test_workflows_call_what_there_is(name):
    """Every command of the workflows is a file of this repository, which may be executed."""
    workflow = yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    commands = [step["run"].split()[0] for step in steps if "run" in step]
    assert commands and all((ROOT / command).stat().st_mode & 0o111 for command in commands)

def test_cloud_task():
    task = yaml.safe_load((ROOT / "cluster/sky.yaml").read_text())
    assert task["resources"]["accelerators"] == "H100:8" and task["resources"]["use_spot"]
    assert list(task["file_mounts"]) == ["~/runs"]

@pytest.mark.slow
def test_cloud_task_as_skypilot_reads_it():
    sky = pytest.importorskip("sky", reason="SkyPilot is not installed; cluster/README.md says how to try it")
    task = sky.Task.from_yaml(str(ROOT / "cluster/sky.yaml"))
    [machine] = task.resources
    assert machine.accelerators == {"H100": 8} and machine.use_spot
    assert machine.job_recovery["max_restarts_on_errors"] == 0 and list(task.storage_mounts) == ["~/runs"]

@pytest.mark.parametrize("left, called", [
    (None, "limited --seed 43 --run-name sky_job_1"),
    ("run.json", "limited --seed 43 --resume sky_job_1"),
    ("result.json", None),
])
def test_cloud_task_goes_on_with_its_run(tmp_path, left, called):
    """In a new machine, whose folder of runs is the bucket."""
    script = yaml.safe_load((ROOT / "cluster/sky.yaml").read_text())["run"]
    (tmp_path / "run.sh").write_text('#!/bin/sh\necho "$@" >called\n')
    (tmp_path / "run.sh").chmod(0o755)
    run = tmp_path / "home/runs/sky_job_1"
    run.mkdir(parents=True)
    if left:
        (run / left).touch()
    environment = {"HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin", "TRACK": "limited",
                   "FLAGS": "--seed 43", "SKYPILOT_TASK_ID": "job-1"}
    subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, check=True)
    record = tmp_path / "called"
    assert (record.read_text().strip() if record.exists() else None) == called
