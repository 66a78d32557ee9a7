"""Runs that are interrupted, and go on as if they had not been.

Equal means bit-equal: each test ends a run in some way, resumes it, and compares losses, checkpoints and
result with those of the same run, unbroken. SLOWRUN_KILLS=20 tries more kills than a usual test run does.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_run import (ENVIRONMENT, SHORT, SOURCE, T, TINY, leftovers, losses, make_dataset, make_project,
                      metrics, nursery, project, result_of, train)  # noqa: F401

KILLS = int(os.environ.get("SLOWRUN_KILLS", 3))
RUN = [*SHORT, "--save-every", "0"]  # a state after each step; of ten, the last five replay layers


# ---- Runs and their comparison -------------------------------------------------------------------


def assert_equal(run, reference):
    """Everything that a run leaves behind is what the other left, clocks aside; and there is nothing else."""
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in reference.iterdir())
    assert leftovers(run) == []
    clocks = {"seconds", "train_seconds", "wall_seconds", "date", "machine"}
    timeless = lambda row: {key: value for key, value in row.items() if key not in clocks}
    assert timeless(result_of(run)) == timeless(result_of(reference))
    for kind in "step", "eval", "final":
        assert list(map(timeless, metrics(run, kind))) == list(map(timeless, metrics(reference, kind)))
    checkpoints = [sorted(folder.glob("checkpoints/*.pt")) for folder in (run, reference)]
    assert [path.name for path in checkpoints[0]] == [path.name for path in checkpoints[1]] != []
    for paths in zip(*checkpoints):
        ours, theirs = (torch.load(path, weights_only=True) for path in paths)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    documents = [np.load(folder / "doc_losses.npz") for folder in (run, reference)]
    assert all((documents[0][name] == documents[1][name]).all() for name in documents[1])


@pytest.fixture(scope="module")
def unbroken(project, train):  # noqa: F811
    """{ranks: the folder of a run that nothing interrupted}"""
    for ranks in 1, 2:
        outcome = train(project, *RUN, "--run-name", f"unbroken{ranks}", ranks=ranks)
        assert set(outcome.codes) == {0} and outcome.stderr == "", outcome.stderr
    return {ranks: project / f"runs/unbroken{ranks}" for ranks in (1, 2)}


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def children(pid, command="."):
    """The process ids of a process's children that run the command, oldest first."""
    found = subprocess.run(["pgrep", "-P", str(pid), "-f", command], capture_output=True, text=True).stdout
    return sorted(map(int, found.split()))


def running(pid):
    """It runs or sleeps: it isn't gone, and no zombie."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    return state != "" and not state.startswith("Z")


def count(path, text):
    return path.read_text().count(text) if path.exists() else 0


def steps_logged(run):
    return count(run / "metrics.jsonl", '"kind": "step"')


@pytest.fixture
def begin(project, nursery, train):  # noqa: F811
    """
    begin(name, *flags, ranks=1) starts a run and returns when it has come to its first step: .pids of its
    ranks, .run its folder, .end() waits and -> the Outcome.
    """
    with ThreadPoolExecutor(1) as pool:

        def begin(name, *flags, ranks=1):
            run = project / "runs" / name
            plans = count(run / "log.txt", "\nplan ")
            future = pool.submit(train, project, *RUN, *flags, ranks=ranks)
            wait_for(lambda: count(run / "log.txt", "\nplan ") > plans or future.done())
            return SimpleNamespace(pids=children(nursery.pid), run=run, end=future.result, done=future.done)

        yield begin


@pytest.fixture
def stopped(begin, project):  # noqa: F811
    """stopped(name, ranks=1) -> the folder of a run that a signal has stopped after four steps or more."""

    def stopped(name, ranks=1):
        started = begin(name, "--run-name", name, ranks=ranks)
        wait_for(lambda: steps_logged(started.run) > 3 or started.done())
        os.kill(started.pids[-1], signal.SIGTERM)
        assert set(started.end().codes) <= {75, -signal.SIGTERM}
        assert 3 < steps_logged(started.run) < 10
        return started.run

    return stopped


def states(run):
    return sorted(path.name for path in (run / "state").iterdir())


# ---- Signals -------------------------------------------------------------------------------------


def test_a_run_that_is_stopped_at_every_step(unbroken, begin):
    """Through the border of an epoch, into the cyclic tail and the replayed layers, after the last step."""
    flags = ["--run-name", "stops"]
    for number in range(12):
        started = begin("stops", *flags)
        os.kill(started.pids[0], [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1][number % 3])
        outcome = started.end()
        if outcome.codes == [0]:
            break
        assert outcome.codes == [75]
        done = steps_logged(started.run)
        told = rf"stopped by a signal after step {done - 1}; [^\n]*--resume stops\n"
        assert re.fullmatch(told, outcome.stderr)
        assert states(started.run)[-1] == f"step_{done:07d}" and len(states(started.run)) <= 2
        flags = ["--resume", "stops"]
    assert number > 2
    assert_equal(started.run, unbroken[1])


def test_a_signal_to_one_rank_stops_all(unbroken, stopped, train, project):  # noqa: F811
    run = stopped("stopped_two", ranks=2)
    outcome = train(project, *RUN, "--resume", ranks=2)  # the newest
    assert outcome.codes == [0, 0] and "resume at step" in outcome.stdout
    assert_equal(run, unbroken[2])


def test_second_ctrl_c_quits_at_once(begin):
    """A step of a thousand micro-batches takes long enough to see it."""
    started = begin("impatient", "--run-name", "impatient", "--device-batch", 1, "--batch-tokens", 1000 * T,
                    "--epochs", "99")
    wait_for(lambda: count(started.run / "log.txt", "\nstart ") or started.done())
    os.kill(started.pids[0], signal.SIGINT)
    time.sleep(1.2)
    os.kill(started.pids[0], signal.SIGINT)
    assert started.end().codes == [128 + signal.SIGINT]
    assert steps_logged(started.run) == 0


# ---- Kills ---------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("pgrep"), reason="pgrep finds the ranks")
def test_kills_at_random_moments(project, tmp_path):  # noqa: F811
    """Of one rank, of both, of torchrun, whatever they do at the time: starting, saving, scoring."""
    clone = make_project(tmp_path / "clone")
    shutil.copytree(project / "data/short", clone / "data/short")

    def start(*arguments):
        command = ["/bin/bash", f"{clone}/run.sh", "limited", *RUN, "--epochs", "12", *arguments]
        environment = ENVIRONMENT | {"NPROC": "2", "PET_MAX_RESTARTS": "99"}
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)

    rng, tried, runs = np.random.default_rng(0), 0, 0
    with open(tmp_path / "errors", "w") as errors:
        assert start("--run-name", "unbroken").wait() == 0
        while tried < KILLS:
            run, kills = clone / f"runs/killed{runs}", []
            process = start("--run-name", run.name)
            for victim in rng.permutation(["a rank", "all ranks", "torchrun"]):
                moment = rng.integers(len(metrics(clone / "runs/unbroken", "step")))
                while steps_logged(run) < moment and process.poll() is None:
                    time.sleep(0.005)
                time.sleep(rng.choice([0.05, 0.5, 6]) * rng.random())
                pids = [process.pid] if victim == "torchrun" else children(process.pid, "train_gpt.py")
                if process.poll() is not None or not pids:
                    continue
                kills.append(f"{victim} at step {steps_logged(run)}")
                for pid in rng.permutation(pids)[:1 if victim == "a rank" else None]:
                    os.kill(pid, signal.SIGKILL)
                if victim == "torchrun" and process.wait() and not (run / "result.json").exists():
                    process = start("--resume" if (run / "run.json").exists() else "--run-name", run.name)
            assert process.wait() in (0, -signal.SIGKILL), (kills, (tmp_path / "errors").read_text())
            assert_equal(run, clone / "runs/unbroken")
            tried, runs = tried + len(kills), runs + 1
            print(f"{tried} kills so far, {runs} runs, all of them equal: {', '.join(kills)}")
    assert len(list((clone / "runs").iterdir())) == 1 + runs
    assert "Traceback" not in (tmp_path / "errors").read_text()


# Places in train_gpt.py at which the process kills itself when DIE names them: before the line that is there.
PLACES = {
    "run.json": '        write_json(folder / "run.json", run |',
    "the lock": '    lock = os.open(folder',
    "log.txt": '            head = f"source train_gpt.py',
    "the first step": '    gc.collect()\n    gc.freeze()',
    "an epoch's checkpoint": '                write_atomic(folder / checkpoint_name(epoch), save)',
    "an epoch's state": '            log.plot()\n            save_state(step + 1)',
    "a state's progress": '            write_json(temporary / "progress.json"',
    "a state's last name": '            temporary.rename(',
    "a state's end": '            for old in sorted(self.folder.glob(',
    "scoring": '    scores, documents, losses = {}, {}, {}',
    "result.json": '        write_json(log.folder / "result.json", r)',
}


@pytest.fixture(scope="module")
def mortal(project, tmp_path_factory):  # noqa: F811
    source = SOURCE
    for place, line in PLACES.items():
        assert source.count(line) == 1, place
        indent = line[:len(line) - len(line.lstrip())]
        death = f'{indent}os.environ.get("DIE") == {place!r} and os.kill(os.getpid(), 9)\n'
        source = source.replace(line, death + line)
    clone = make_project(tmp_path_factory.mktemp("mortal") / "clone", source)
    shutil.copytree(project / "data/short", clone / "data/short")
    return clone


@pytest.fixture(scope="module")
def immortal(mortal, train):  # noqa: F811
    assert train(mortal, *RUN, "--run-name", "unbroken").codes == [0]
    return mortal / "runs/unbroken"


@pytest.mark.parametrize("place", PLACES)
def test_killed_just_before(mortal, immortal, train, place):  # noqa: F811
    name = re.sub(r"\W", "_", place)
    assert train(mortal, *RUN, "--run-name", name, DIE=place).codes == [-signal.SIGKILL]
    again = ["--resume", name] if (mortal / "runs" / name / "run.json").exists() else ["--run-name", name]
    outcome = train(mortal, *RUN, *again)
    assert outcome.codes == [0] and outcome.stderr == "", outcome.stderr
    assert_equal(mortal / "runs" / name, immortal)


@pytest.mark.parametrize("place", ["run.json", "an epoch's state"])
def test_torchrun_starts_the_ranks_again(mortal, immortal, train, place):  # noqa: F811
    """The same command goes on with the run of its launch, if that has begun; and never does one twice."""
    name = "launch" + place[-5:]
    launch = {"TORCHELASTIC_RUN_ID": name}
    assert train(mortal, *RUN, "--run-name", name, DIE=place, **launch).codes == [-signal.SIGKILL]
    for number in 1, 2:
        outcome = train(mortal, *RUN, "--run-name", name, TORCHELASTIC_RESTART_COUNT=number, **launch)
        assert outcome.codes == [0] and outcome.stderr == "", outcome.stderr
        assert ("val loss" in outcome.stdout) == (number == 1)
        assert_equal(mortal / "runs" / name, immortal)


# ---- Another number of ranks, two at once --------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 4])
def test_two_ranks_go_on_as(unbroken, stopped, train, project, ranks):  # noqa: F811
    run = stopped(f"two_as_{ranks}", ranks=2)
    outcome = train(project, *RUN, "--resume", run.name, ranks=ranks)
    assert set(outcome.codes) == {0}, outcome.stderr
    np.testing.assert_allclose(losses(run), losses(unbroken[2]), rtol=5e-6)


def test_only_one_process_trains_in_a_folder(begin, train, project):  # noqa: F811
    first = begin("alone", "--run-name", "alone", "--epochs", "99")
    outcome = train_alone(project, "--epochs", "99", "--resume", "alone")
    os.kill(first.pids[0], signal.SIGTERM)
    assert (outcome.returncode, outcome.stderr) == (
        2, "error: another process is training in runs/alone; stop it first\n")
    assert first.end().codes == [75]


def train_alone(project, *flags):  # noqa: F811
    """Beside the nursery, which does one thing at a time."""
    command = [sys.executable, f"{project}/train_gpt.py", *RUN, *flags]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)


# ---- Damage --------------------------------------------------------------------------------------


def newest_state(run):
    return max((run / "state").glob("step_*"))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [
    lambda state: flip(state / "__0_0.distcp"),
    lambda state: flip(state / ".metadata"),
    lambda state: flip(state / "progress.json"),
    lambda state: flip(state / "manifest.json"),
    lambda state: os.truncate(state / "__0_0.distcp", 1000),
    lambda state: os.truncate(state / "__0_0.distcp", 0),
    lambda state: os.truncate(state / "manifest.json", 100),
    lambda state: (state / "manifest.json").unlink(),
    lambda state: (state / "__0_0.distcp").unlink(),
], ids="part metadata progress manifest cut empty manifest-cut no-manifest no-part".split())
def test_damaged_state_is_named_and_older_used(unbroken, stopped_once, train, project, damage):  # noqa: F811
    run = project / "runs/damaged"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(stopped_once, run)
    older, newer = states(run)
    damage(run / "state" / newer)
    outcome = train(project, *RUN, "--resume", "damaged")
    assert outcome.codes == [0] and outcome.stderr == "", outcome.stderr
    assert re.search(rf"^state  {newer} is unsound: .+; going back", outcome.stdout, re.M)
    assert f"resume at step {int(older[5:])}," in outcome.stdout
    assert_equal(run, unbroken[1])


@pytest.fixture(scope="module")
def stopped_once(project, train):  # noqa: F811
    """The folder of a run that was killed after its seventh step, with its two states."""
    source = SOURCE.replace("        bar.update()\n", "        bar.update()\n        if step == 7:\n"
                            "            keeper.wait()\n            os.kill(os.getpid(), 9)\n")
    (project / "train_gpt.py").write_text(source)
    try:
        assert train(project, *RUN, "--run-name", "killed").codes == [-signal.SIGKILL]
    finally:
        (project / "train_gpt.py").write_text(SOURCE)
    run = project / "runs/killed"
    settings = json.loads((run / "run.json").read_text())
    settings["source_sha256"] = hashlib.sha256(SOURCE.encode()).hexdigest()
    (run / "run.json").write_text(json.dumps(settings))
    assert states(run) == ["step_0000006", "step_0000007"]
    return run


def test_when_all_states_are_damaged_it_starts_anew(unbroken, stopped_once, train, project):  # noqa: F811
    run = project / "runs/all_damaged"
    shutil.copytree(stopped_once, run)
    for state in (run / "state").iterdir():
        flip(state / "__0_0.distcp")
    outcome = train(project, *RUN, "--resume", run.name)
    assert outcome.codes == [0] and outcome.stdout.count(" is unsound: ") == 2
    assert_equal(run, unbroken[1])


# ---- Disks ---------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(project, stopped_once, tmp_path):  # noqa: F811
    """A clone whose runs/ are a disk with the killed run and not enough room for a third state."""
    clone = make_project(tmp_path / "clone")
    shutil.copytree(project / "data/short", clone / "data/short")
    state = sum(path.stat().st_size for path in newest_state(stopped_once).iterdir())
    rest = sum(path.stat().st_size for path in stopped_once.rglob("*") if path.is_file())
    size = f"size={(rest + state // 2) // 1024 + 100}k"
    mount = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(clone / "runs")]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    shutil.copytree(stopped_once, clone / "runs/small")
    yield clone
    subprocess.run(["umount", clone / "runs"], check=True)


def test_disk_that_is_full_during_a_state(unbroken, small_disk, train):  # noqa: F811
    run = small_disk / "runs/small"
    before = {path: path.read_bytes() for path in (run / "state").rglob("step_*/*")}
    for ranks in 1, 2:
        outcome = train(small_disk, *RUN, "--resume", "small", ranks=ranks)
        assert outcome.codes[0] == 2, outcome.stderr
        assert re.fullmatch(r"error: cannot write [^\n]+\n", outcome.stderr), outcome.stderr
        assert all(path.read_bytes() == content for path, content in before.items())
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk / "runs"], check=True)
    assert train(small_disk, *RUN, "--resume", "small").codes == [0]
    assert_equal(run, unbroken[1])


@pytest.mark.parametrize("ranks", [1, 2])
def test_read_only_disk(small_disk, train, ranks):  # noqa: F811
    subprocess.run(["mount", "-o", "remount,ro", small_disk / "runs"], check=True)
    outcome = train(small_disk, *RUN, "--resume", "small", ranks=ranks)
    assert outcome.codes[0] == 2 and outcome.stdout == ""
    assert re.fullmatch(r"error: cannot write [^\n]*Read-only[^\n]*\n", outcome.stderr), outcome.stderr


# ---- A run goes on only as what it was -----------------------------------------------------------


@pytest.mark.parametrize("flags, said", [
    ("--resume killed --lr-scale 2 --seed 43", "lr_scale was 1.0, is 2.0; seed was 42, is 43"),
    ("--resume killed --track smoke", "track was nano, is smoke"),
    ("--resume killed --data data/other", "data was "),
    ("--resume nothing", "no run to resume in runs/nothing"),
    ("--resume unbroken1", "is complete"),
    ("--resume --track limited", "no run of the track limited is unfinished"),
])
def test_refused(unbroken, stopped_once, train, project, flags, said):  # noqa: F811
    if not (project / "data/other").exists():
        make_dataset(project / "data/other", "other", train=1_300, val=620, audit=510)
    flags = flags.replace("data/other", str(project / "data/other")).split(" --data ")
    before = {path: path.stat().st_mtime_ns for path in stopped_once.rglob("*") if path.name != "lock"}
    outcome = train(project, *RUN, *flags[0].split(), *(["--data", flags[1]] if flags[1:] else []))
    assert outcome.codes == [2] and outcome.stdout == ""
    assert re.fullmatch(r"error: [^\n]+\n", outcome.stderr) and said in outcome.stderr, outcome.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_edited_source(unbroken, stopped_once, train, project):  # noqa: F811
    run = project / "runs/edited"
    shutil.copytree(stopped_once, run)
    (project / "train_gpt.py").write_text(SOURCE + "# one more line\n")
    try:
        outcome = train(project, *RUN, "--resume", "edited")
        assert outcome.codes == [2] and "--resume-anyway" in outcome.stderr
        assert train(project, *RUN, "--resume", "edited", "--resume-anyway").codes == [0]
    finally:
        (project / "train_gpt.py").write_text(SOURCE)
    assert (losses(run) == losses(unbroken[1])).all()
    # No record: the log holds the source that the run began with.
    logged = re.search(rb"sha256 (\w+)\n", (run / "log.txt").read_bytes())[1].decode()
    assert logged != result_of(run)["source_sha256"]


# ---- Trouble that ends a run ---------------------------------------------------------------------


def test_states_are_kept_when_a_loss_is_not_finite(project, train):  # noqa: F811
    flags = ["--epochs", "9", "--lr-embed", 100, "--run-name", "explodes"]
    outcome = train(project, *RUN, *flags)
    assert outcome.codes == [3]
    step = int(re.fullmatch(r"error: [^\n]+ is (?:nan|inf) at step (\d+); [^\n]+\n", outcome.stderr)[1])
    assert step > 1 and f"step_{step:07d}" in states(project / "runs/explodes")
    again = train(project, *RUN, *flags[:-2], "--resume", "explodes")
    assert again.codes == [3] and f" at step {step};" in again.stderr


def test_a_rank_that_hangs_ends_the_run(begin):
    """In time, with a code of its own, by which run.sh knows to name it."""
    started = begin("hangs", "--run-name", "hangs", "--epochs", "99", "--timeout", "0.05", ranks=2)
    wait_for(lambda: steps_logged(started.run) > 2 or started.done())
    began = time.monotonic()
    os.kill(started.pids[1], signal.SIGSTOP)
    try:
        wait_for(lambda: not running(started.pids[0]), seconds=40)
    finally:
        os.kill(started.pids[1], signal.SIGKILL)
    assert time.monotonic() - began > 3
    outcome = started.end()
    assert outcome.codes == [4, -signal.SIGKILL] and outcome.stderr == "", outcome
    assert states(started.run)
