"""Runs that are interrupted, and go on as if they had not been.

Equal means bit-equal: each test ends a run in some way, resumes it, and compares all that it leaves behind
with that of the same run, unbroken. SLOWRUN_KILLS=20 tries more kills than a usual test run does.
"""

import errno
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
from unittest import mock

import numpy as np
import pytest

import logbook
from common import refused
from conftest import slow
from test_run import (  # noqa: F401
    ENVIRONMENT,
    SHORT,
    SOURCES,
    T,
    leftovers,
    losses,
    make_dataset,
    make_project,
    metrics,
    nursery,
    poke,
    project,
    result_of,
    train,
)

KILLS = int(os.environ.get("SLOWRUN_KILLS", 1))
# Not of the run, but of the machine: what --resume does not know. A state is due after each step; the ranks
# hear of that one step later, and then save: after steps 2, 4, 5 (an epoch's end), 7, 9, 10.
MACHINE = "--dtype float32 --no-compile --save-every 0".split()
RUN = [*SHORT, *MACHINE]  # ten steps; the last five replay layers
STUDENTS = "--members 3 --distill 0.5 --average-kind weights".split()  # the second and the third learn


# ---- Runs and their comparison -----------------------------------------------------------------------------

def contents(run):
    """{name: content} of all files but those that tell the time; in the others the clocks are left out."""
    clocks = {"seconds", "train_seconds", "wall_seconds", "gpu_seconds", "segments", "date"}
    timeless = lambda text: {key: value for key, value in json.loads(text).items() if key not in clocks}
    files = {}
    for path in run.rglob("*"):
        name = str(path.relative_to(run))
        if re.fullmatch(r"metrics\w*\.jsonl|result\.json", name):
            lines = path.read_text().splitlines() if "metrics" in name else [path.read_text()]
            files[name] = list(map(timeless, lines))
        elif path.is_file():
            files[name] = None if re.fullmatch(r"log\w*\.txt|run\.json", name) else path.read_bytes()
    return files

def assert_equal(run, reference):
    """Everything that a run leaves behind is what the other left, clocks aside; and there is nothing else."""
    ours, theirs = contents(run), contents(reference)
    assert ours.keys() == theirs.keys() and leftovers(run) == []
    assert any(name.endswith(".pt") for name in ours)
    for name in ours:
        assert ours[name] == theirs[name], name

# Places in the sources at which a process ends itself when DIE names them: before the line that has this.
PLACES = {
    "run.json": 'write_json(folder / "run.json", before)',
    "the lock": "lock = os.open(folder",
    "log.txt": 'head = b""',
    "the first step": "gc.freeze()",
    "a member's start": "stream = Stream(",
    "a micro-batch": "if n == len(batch):",
    "member {member} step {step + 1}": "squares = optimizer.step(",
    "a state's progress": 'write_json(temporary / "progress.json"',
    "a state's last name": "temporary.rename(",
    "a state's end": "for old in sorted(self.folder.glob(",
    "an average": "optimizer.take_average()",
    "a checkpoint": 'record["sha256"] = write_atomic(',
    "a checkpoint's scores": 'record["scores"] = write_atomic(',
    "a checkpoint's record": 'write_json(path.with_suffix(".json")',
    "predictor.json": 'write_json(self.folder / "predictor.json"',
    "an old checkpoint's end": "path.with_suffix(suffix).unlink(",
    "a state": "run.save_state()",
    "the members so far": "so_far = self.write_predictor(",
    "scoring": "members = t.write_predictor(",
    "result.json": 'write_json(self.folder / "result.json"',
}
DIE = '''

def die(place, visits={}):
    """
    Sends itself the signal DIE_BY when it comes to the place DIE for the DIE_AT-th time, on DIE_RANKS; rests
    there whenever it comes to the place REST.
    """
    visits[place], want = visits.get(place, 0) + 1, os.environ.get
    if want("RANK", "0") in want("DIE_RANKS", "0123"):
        if (want("DIE"), want("DIE_AT", "1")) == (place, str(visits[place])):
            os.kill(os.getpid(), int(want("DIE_BY", signal.SIGKILL)))
        if want("REST") == place:
            time.sleep(0.4)

ROOT = '''

def death(place):
    """-> the environment that lets a process end at a place, or (place, visit), or nowhere (None)."""
    place, visit = place if isinstance(place, tuple) else (place, 1)
    return {"DIE": place, "DIE_AT": visit} if place else {}

@pytest.fixture(scope="module")
def mortal(project, tmp_path_factory):  # noqa: F811
    """A clone whose processes can be told where to end."""
    sources = SOURCES | {"logbook.py": SOURCES["logbook.py"].replace("\nROOT = ", DIE, 1)}
    for place, text in PLACES.items():
        [name] = (name for name in sources if text in sources[name])
        module = '' if name == "logbook.py" else "sys.modules['logbook']."
        call = rf"\1{module}die(f{place!r})\n\1\2"
        sources[name], number = re.subn(rf"^( *)(.*{re.escape(text)})", call, sources[name], flags=re.M)
        assert number == 1, place
    clone = make_project(tmp_path_factory.mktemp("mortal") / "clone", sources["train_gpt.py"])
    for name in "harness.py", "logbook.py":
        (clone / name).write_text(sources[name])
    shutil.copytree(project / "data/short", clone / "data/short")
    return clone

@pytest.fixture(scope="module")
def unbroken(mortal, train):  # noqa: F811
    """{ranks: the folder of a run that nothing interrupted}"""
    for ranks in 1, 2:
        outcome = train(mortal, *RUN, "--run-name", f"unbroken{ranks}", ranks=ranks)
        assert set(outcome.codes) == {0} and outcome.stderr == "", outcome.stderr
    return {ranks: mortal / f"runs/unbroken{ranks}" for ranks in (1, 2)}

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
def begin(mortal, nursery, train):  # noqa: F811
    """
    begin(name, *flags, ranks=1, **environment) starts a run and returns when it has come to its first step:
    .pids of its ranks, .run its folder, .end() waits and -> the Outcome.
    """
    with ThreadPoolExecutor(1) as pool:

        def begin(name, *flags, ranks=1, **environment):
            run = mortal / "runs" / name
            plans = count(run / "log.txt", "\nplan ")
            future = pool.submit(train, mortal, *flags, ranks=ranks, **environment)
            wait_for(lambda: count(run / "log.txt", "\nplan ") > plans or future.done())
            return SimpleNamespace(pids=children(nursery.pid), run=run, end=future.result, done=future.done)

        yield begin

@pytest.fixture(scope="module")
def stopped(mortal, train):  # noqa: F811
    """stopped(name, at, *flags, ranks=1) -> the folder of a run that a signal has stopped in a step."""

    def stopped(name, at, *flags, ranks=1):
        outcome = train(mortal, *RUN, *flags, "--run-name", name, ranks=ranks, DIE=at, DIE_BY=signal.SIGTERM)
        assert set(outcome.codes) <= {75, -signal.SIGTERM} and "Traceback" not in outcome.stderr
        return mortal / "runs" / name

    return stopped

@pytest.fixture(scope="module")
def stopped_once(stopped):
    run = stopped("stopped", "member 0 step 7")
    assert states(run) == ["step_0000005", "step_0000007"]
    return run

def has_state(run):
    """A run that ends before its first state leaves nothing to resume, and its name to be used again."""
    return any(run.glob("state/step_???????"))

def states(run):
    return sorted(path.name for path in (run / "state").iterdir())


# ---- Signals -----------------------------------------------------------------------------------------------

def test_a_run_that_is_stopped_at_every_step(unbroken, begin):
    """Through the border of an epoch, into the cyclic tail and the replayed layers, after the last step."""
    flags = [*RUN, "--run-name", "stops"]
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
        flags = [*MACHINE, "--resume", "stops"]
    assert number > 2
    assert_equal(started.run, unbroken[1])

def test_a_signal_to_one_rank_stops_all(unbroken, begin, train, mortal):  # noqa: F811
    started = begin("stopped_two", *RUN, "--run-name", "stopped_two", ranks=2, DIE="member 0 step 3",
                    DIE_BY=signal.SIGTERM, DIE_RANKS="1")
    assert set(started.end().codes) <= {75, -signal.SIGTERM}
    assert steps_logged(started.run) == 4
    outcome = train(mortal, *MACHINE, "--resume", ranks=2)  # the newest
    assert outcome.codes == [0, 0] and "resume at step 4" in outcome.stdout
    assert_equal(started.run, unbroken[2])

def test_second_ctrl_c_quits_at_once(begin):
    """A step of a thousand micro-batches takes long enough to see it."""
    started = begin("impatient", *RUN, "--run-name", "impatient", "--device-batch", 1, "--batch-tokens",
                    1000 * T, "--epochs", "99")
    wait_for(lambda: count(started.run / "log.txt", "\nstart ") or started.done())
    os.kill(started.pids[0], signal.SIGINT)
    time.sleep(1.2)
    os.kill(started.pids[0], signal.SIGINT)
    assert started.end().codes == [128 + signal.SIGINT]
    assert steps_logged(started.run) == 0


# ---- Kills -------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("pgrep"), reason="pgrep finds the ranks")
def test_kills_at_random_moments(project, tmp_path):  # noqa: F811
    """Of one rank, of both, of torchrun, whatever they do at the time: starting, saving, scoring."""
    clone = make_project(tmp_path / "clone")
    shutil.copytree(project / "data/short", clone / "data/short")

    def start(*arguments):
        command = ["/bin/bash", f"{clone}/run.sh", "limited", *MACHINE, *arguments]
        environment = ENVIRONMENT | {"NPROC": "2", "PET_MAX_RESTARTS": "99"}
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)

    rng, tried, runs = np.random.default_rng(0), 0, 0
    new = [*RUN, *STUDENTS, *"--members 2 --meta-sequences 4 --run-name".split()]
    with open(tmp_path / "errors", "w") as errors:
        assert start(*new, "unbroken").wait() == 0
        while tried < KILLS:
            run, kills = clone / f"runs/killed{runs}", []
            process = start(*new, run.name)
            for victim in rng.permutation(["a rank", "all ranks", "torchrun"])[:2]:
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
                    process = start(*(["--resume"] if has_state(run) else new), run.name)
            assert process.wait() in (0, -signal.SIGKILL), (kills, (tmp_path / "errors").read_text())
            assert_equal(run, clone / "runs/unbroken")
            tried, runs = tried + len(kills), runs + 1
            print(f"{tried} kills so far, {runs} runs, all of them equal: {', '.join(kills)}")
    assert len(list((clone / "runs").iterdir())) == 1 + runs
    assert "Traceback" not in (tmp_path / "errors").read_text()

def test_killed_in_every_place(mortal, unbroken, train):  # noqa: F811
    """A process is killed just before each of them; the next one goes on, and is killed before the next."""
    assert_survives(mortal, train, "mortal", unbroken[1], [], [
        "the lock", "run.json", "log.txt", "the first step", "a state's progress", "a state's last name",
        "a state's end", ("a state", 3), "a checkpoint", "a checkpoint's record", "predictor.json", "scoring",
        "result.json"])

def test_an_ensemble_killed_in_every_place(mortal, train):  # noqa: F811
    """At the end of its first student; at the start of the second, whose teacher that is."""
    flags = [*STUDENTS, "--epochs", "1", "--average", "1"]
    assert train(mortal, *RUN, *flags, "--run-name", "all_members").codes == [0]
    assert_survives(mortal, train, "mortal_students", mortal / "runs/all_members", flags, [
        ("an average", 2), "a checkpoint", "a checkpoint's scores", "a checkpoint's record",
        "the members so far", "predictor.json", ("a member's start", 2), "member 2 step 3", "result.json"])

def assert_survives(mortal, train, name, reference, flags, places):  # noqa: F811
    for place in [*places, None]:
        begun = has_state(mortal / "runs" / name)
        arguments = [*MACHINE, "--resume", name] if begun else [*RUN, *flags, "--run-name", name]
        outcome = train(mortal, *arguments, **death(place))
        assert outcome.stderr == "" and outcome.codes == [-signal.SIGKILL if place else 0], (place, outcome)
    assert_equal(mortal / "runs" / name, reference)

@pytest.mark.parametrize("place", [slow("run.json"), "scoring"])
def test_torchrun_starts_the_ranks_again(mortal, unbroken, train, place):  # noqa: F811
    """The same command goes on with the run of its launch, if that has begun; and never does one twice."""
    name = "launch" + place[-4:]
    launch = {"TORCHELASTIC_RUN_ID": name}
    assert train(mortal, *RUN, "--run-name", name, **death(place), **launch).codes == [-signal.SIGKILL]
    for number in 1, 2:
        outcome = train(mortal, *RUN, "--run-name", name, TORCHELASTIC_RESTART_COUNT=number, **launch)
        assert outcome.codes == [0] and outcome.stderr == "", outcome.stderr
        assert ("val loss" in outcome.stdout) == (number == 1)
        assert_equal(mortal / "runs" / name, unbroken[1])

def test_torchrun_starts_the_ranks_of_a_resumed_run_again(unbroken, stopped, train, mortal):
    """A rank that is lost after the end, or before it, of a run that was started with --resume."""
    run, launch = stopped("resumed_launch", "member 0 step 3"), {"TORCHELASTIC_RUN_ID": "resumed"}
    command = [*MACHINE, "--resume", run.name]
    assert train(mortal, *command, **death("scoring"), **launch).codes == [-signal.SIGKILL]
    for number in 1, 2:
        outcome = train(mortal, *command, TORCHELASTIC_RESTART_COUNT=number, **launch)
        assert outcome.codes == [0] and outcome.stderr == "", outcome.stderr
        assert ("val loss" in outcome.stdout) == (number == 1)
        assert_equal(run, unbroken[1])


# ---- Every kind of run -------------------------------------------------------------------------------------

# {name: (ranks, flags, where a signal stops it, or it is killed, in turn)}. An epoch has 39 sequences. A run
# that is stopped in a member's last step stands between two members.
KINDS = {
    "students with averages": (1, f"""--batch-tokens {3 * T} --members 3 --first-epochs 1 --drop-first
        --distill 0.5 --temperature 1.5 --average 1 --average-kind ema --grad-clip 1 --mix logits""",
        ["member 0 step 13", "member 1 step 14", "member 2 step 1"]),
    "snapshots": (1, f"""--members 4 --restarts --epochs 1 --replay-from-epoch 1 --average 1 --distill 0.45
        --perturb 0.25 --batch-tokens-ends {16 * T} --fitness-tokens 66 --top 2""",
        ["member 0 step 1", "member 2 step 3"]),
    "a blend": (1, f"--batch-tokens {3 * T} --epochs 4 --average-kind blend",
                ["member 0 step 50", "member 0 step 52"]),
    "weights in bfloat16": (1, """--dtype bfloat16 --epochs 3 --average-kind weights --average-weights equal
        --window-stages 1,0.25,0.5 3,0.5,1 --passes 2 --mtp head --values table --xsa learned
        --gate-optimizer adamw --optimizer adamw""", ["member 0 step 7", ("an old checkpoint's end", 2)]),
}

@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_goes_on(mortal, train, kind):  # noqa: F811
    ranks, flags, ends = KINDS[kind]
    name, flags = re.sub(r"\W", "_", kind), flags.split()
    machine = [*MACHINE, *flags[:2]] if flags[0] == "--dtype" else MACHINE
    run, reference = mortal / "runs" / name, mortal / "runs" / f"all_{name}"
    outcome = train(mortal, *RUN, *flags, "--run-name", reference.name, ranks=ranks)
    assert set(outcome.codes) == {0} and outcome.stderr == "", outcome.stderr
    arguments = [*RUN, *flags, "--run-name", name]
    for number, place in enumerate(ends):
        end = [signal.SIGTERM, signal.SIGKILL][number % 2]
        outcome = train(mortal, *arguments, ranks=ranks, **death(place), DIE_BY=end)
        assert set(outcome.codes) <= {75, -signal.SIGTERM, -signal.SIGKILL}, (place, outcome)
        assert "Traceback" not in outcome.stderr, (place, outcome)
        arguments = [*machine, "--resume", name]
        assert all((run / "checkpoints" / checkpoint).exists() for checkpoint in predicting(run))
    outcome = train(mortal, *arguments, ranks=ranks)
    assert set(outcome.codes) == {0} and outcome.stderr == "", outcome.stderr
    assert_equal(run, reference)
    assert predicting(run) == [member["checkpoint"] for member in result_of(run)["members"]]

def predicting(run):
    """The checkpoints that the ruler would load."""
    specs = [json.loads(path.read_text()) for path in run.glob("checkpoints/predictor.json")]
    return [member["checkpoint"] for spec in specs for member in spec["members"]]


# ---- Two teams ---------------------------------------------------------------------------------------------

TEAMS = "--ranks-per-member 2 --members 4 --distill 0.5 --epochs 1 --average 1 --average-kind weights".split()

@pytest.fixture(scope="module")
def teams(mortal, train):  # noqa: F811
    """The folder of a run of two teams of two ranks: members 0 and 2, and members 1 and 3."""
    outcome = train(mortal, *RUN, *TEAMS, "--run-name", "teams", ranks=4)
    assert outcome.codes == [0] * 4 and outcome.stderr == "", outcome.stderr
    return mortal / "runs/teams"

@pytest.mark.slow
def test_each_of_two_teams_goes_on(mortal, teams, train):  # noqa: F811
    """When a rank of one is killed, the other is stopped wherever it is."""
    arguments = [*RUN, *TEAMS, "--run-name", "ended_teams"]
    for place, victim in ("member 1 step 3", 3), ("member 2 step 4", 0):
        outcome = train(mortal, *arguments, ranks=4, DIE=place, DIE_RANKS=victim)
        assert outcome.codes[victim] == -signal.SIGKILL and "Traceback" not in outcome.stderr, outcome
        arguments = [*MACHINE, *TEAMS[:2], "--resume", "ended_teams"]
    outcome = train(mortal, *arguments, ranks=4)
    assert outcome.codes == [0] * 4 and outcome.stderr == "", outcome.stderr
    assert_equal(mortal / "runs/ended_teams", teams)

@pytest.mark.slow
def test_a_team_that_is_ahead_changes_nothing(teams, begin):
    """The first one is held in its first member until the other has ended its last."""
    started = begin("ahead", *RUN, *TEAMS, "--run-name", "ahead", ranks=4, DIE="member 0 step 3",
                    DIE_BY=signal.SIGSTOP, DIE_RANKS="0")
    wait_for(lambda: (started.run / "checkpoints/member_0003.json").exists() or started.done())
    os.kill(started.pids[0], signal.SIGCONT)
    outcome = started.end()
    assert outcome.codes == [0] * 4 and outcome.stderr == "", outcome.stderr
    assert_equal(started.run, teams)


# ---- Another number of ranks, two at once ------------------------------------------------------------------

@pytest.mark.parametrize("ranks", [1, slow(4)])
def test_two_ranks_go_on_as(unbroken, stopped, train, mortal, ranks):  # noqa: F811
    run = stopped(f"two_as_{ranks}", "member 0 step 3", ranks=2)
    outcome = train(mortal, *MACHINE, "--resume", run.name, ranks=ranks)
    assert set(outcome.codes) == {0}, outcome.stderr
    np.testing.assert_allclose(losses(run), losses(unbroken[2]), rtol=5e-6)

def test_foreign_optimizer_wants_as_many_ranks(stopped, train, mortal):  # noqa: F811
    run = stopped("foreign", "member 0 step 3", "--optimizer", "torch.optim:AdamW", ranks=2)
    outcome = train(mortal, *MACHINE, "--resume", run.name)
    assert outcome.codes == [2]
    assert re.fullmatch(r"error: [^\n]*2 ranks[^\n]*\n", outcome.stderr), outcome.stderr

@pytest.mark.slow
def test_only_one_process_trains_in_a_folder(begin, mortal):  # noqa: F811
    first = begin("alone", *RUN, "--run-name", "alone", "--epochs", "99")
    outcome = train_alone(mortal, "--resume", "alone")
    os.kill(first.pids[0], signal.SIGTERM)
    assert (outcome.returncode, outcome.stderr) == (
        2, "error: another process is training in runs/alone; stop it first\n")
    assert first.end().codes == [75]

def train_alone(clone, *flags):
    """Beside the nursery, which does one thing at a time."""
    command = [sys.executable, f"{clone}/train_gpt.py", *MACHINE, *flags]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)


# ---- Damage ------------------------------------------------------------------------------------------------

def newest_state(run):
    return max((run / "state").glob("step_*"))

def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)

DAMAGES = [
    lambda state: flip(state / "__0_0.distcp"),
    lambda state: flip(state / ".metadata"),
    lambda state: flip(state / "progress.json"),
    lambda state: flip(state / "manifest.json"),
    lambda state: os.truncate(state / "__0_0.distcp", 1000),
    lambda state: os.truncate(state / "__0_0.distcp", 0),
    lambda state: os.truncate(state / "manifest.json", 100),
    lambda state: (state / "manifest.json").unlink(),
    lambda state: (state / "__0_0.distcp").unlink(),
]

def test_damaged_states_are_named_and_an_older_one_used(unbroken, stopped_once, train, mortal):  # noqa: F811
    """A state for each damage, all of them newer than one that is sound."""
    run = mortal / "runs/damaged"
    shutil.copytree(stopped_once, run)
    older, newer = (stopped_once / "state" / name for name in states(run))
    damaged = [run / f"state/step_{int(newer.name[5:]) + n:07d}" for n in range(len(DAMAGES))]
    for state, damage in zip(damaged, DAMAGES):
        shutil.copytree(newer, state, dirs_exist_ok=True)
        damage(state)
    outcome = train(mortal, *MACHINE, "--resume", "damaged")
    assert outcome.codes == [0] and outcome.stderr == "", outcome.stderr
    named = re.findall(r"^state  (\w+) is unsound: .+; going back", outcome.stdout, re.M)
    assert named == [state.name for state in reversed(damaged)]
    assert f"resume at step {int(older.name[5:])}," in outcome.stdout
    assert_equal(run, unbroken[1])

@pytest.mark.parametrize("errors", [2, 3])
def test_a_disk_that_does_not_answer_is_asked_again(tmp_path, capsys, errors):
    """A state that could not be read is not taken for a damaged one, and stays under its name."""
    state, failures = tmp_path / "state/step_0000001", iter(range(errors))
    state.mkdir(parents=True)
    (state / "manifest.json").write_text(json.dumps({"progress.json": logbook.sha256(b"{}")}))
    (state / "progress.json").write_text("{}")

    def digest(array):
        if next(failures, None) is not None:
            raise OSError(errno.EIO, "Input/output error")
        return hashlib.sha256(array).hexdigest()

    keeper = SimpleNamespace(folder=tmp_path / "state", log=print)
    with mock.patch.object(logbook, "digest", digest), mock.patch.object(logbook.time, "sleep"):
        if errors < 3:
            assert logbook.Keeper.newest(keeper) == (state, {})
        else:
            said = refused(capsys, lambda: logbook.Keeper.newest(keeper))
            assert "cannot read the state" in said and "Input/output error" in said
    assert state.is_dir()

def test_when_all_states_are_damaged_it_deletes_nothing(stopped_once, train, mortal):  # noqa: F811
    run = mortal / "runs/all_damaged"
    shutil.copytree(stopped_once, run)
    for state in (run / "state").iterdir():
        flip(state / "__0_0.distcp")
    for _ in range(2):
        outcome = train(mortal, *MACHINE, "--resume", run.name)
        assert outcome.codes == [2]
        assert re.fullmatch("error: no state in [^\n]+ --run-name\n", outcome.stderr), outcome.stderr
        assert states(run) == ["step_0000005.bad", "step_0000007.bad"]

@pytest.mark.parametrize("damage, said", [
    (lambda run: os.truncate(run / "metrics.jsonl", 100), "metrics.jsonl has lost lines"),
    (lambda run: os.unlink(run / "metrics.jsonl"), "metrics.jsonl has lost lines"),
    (lambda run: poke(run / "metrics.jsonl", 5, b"}"), "metrics.jsonl is damaged"),
], ids="cut gone damaged".split())
def test_damaged_metrics_are_named(stopped_once, train, mortal, damage, said):  # noqa: F811
    run = mortal / "runs/no_metrics"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(stopped_once, run)
    damage(run)
    outcome = train(mortal, *MACHINE, "--resume", run.name)
    assert outcome.codes == [2] and re.fullmatch(f"error: [^\n]*{said}[^\n]*\n", outcome.stderr), outcome

def test_a_run_that_cannot_be_read_hinders_no_other(mortal, train):  # noqa: F811
    (mortal / "runs/broken").mkdir()
    (mortal / "runs/broken/run.json").write_text("{")
    outcome = train(mortal, *RUN, "--max-steps", "1", "--run-name", "beside")
    shutil.rmtree(mortal / "runs/broken")
    assert outcome.codes == [0]
    assert re.fullmatch("skipped [^\n]*broken/run.json[^\n]*\n", outcome.stderr), outcome.stderr

@pytest.fixture(scope="module")
def student(stopped):
    """The folder of a run that was stopped while its second member learned from the first."""
    return stopped("student", "member 1 step 2", *STUDENTS, "--epochs", "1", "--average", "1")

@pytest.mark.parametrize("name, damage", [
    ("member_0000.pt", flip),
    slow("member_0000.pt", lambda path: os.truncate(path, 1000)),
    slow("member_0000.pt", lambda path: os.truncate(path, 0)),
    slow("member_0000.pt", os.unlink),
    ("member_0000.json", os.unlink),
    ("member_0000.json", lambda path: path.write_text("[1]")),
    slow("member_0000.npz", flip),
], ids="flip cut empty gone no-record no-member scores".split())
def test_damaged_teacher_is_named(student, train, mortal, name, damage):  # noqa: F811
    run = mortal / "runs/no_teacher"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(student, run)
    damage(run / "checkpoints" / name)
    outcome = train(mortal, *MACHINE, "--resume", run.name)
    assert outcome.codes == [2], outcome
    assert re.fullmatch(rf"error: [^\n]*{name}[^\n]*\n", outcome.stderr), outcome.stderr
    assert not (run / "result.json").exists() and leftovers(run) == []

@pytest.mark.slow
def test_second_team_names_its_damaged_teacher(stopped, train, mortal):  # noqa: F811
    run = stopped("team_without_teacher", "member 3 step 2", *TEAMS, ranks=4)
    flip(run / "checkpoints/member_0001.pt")
    outcome = train(mortal, *MACHINE, *TEAMS[:2], "--resume", run.name, ranks=4)
    assert 2 in outcome.codes[2:]
    assert re.search(r"^error: [^\n]*member_0001.pt[^\n]*\n", outcome.stderr, re.M), outcome.stderr


# ---- Disks -------------------------------------------------------------------------------------------------

@pytest.fixture
def small_disk(mortal, stopped_once, tmp_path):
    """A clone whose runs/ are a disk with the stopped run and not enough room for a third state."""
    clone = shutil.copytree(mortal, tmp_path / "clone", ignore=shutil.ignore_patterns("runs"))
    (clone / "runs").mkdir()
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
        outcome = train(small_disk, *MACHINE, "--resume", "small", ranks=ranks)
        assert outcome.codes[0] == 2, outcome.stderr
        assert re.fullmatch(r"error: cannot write [^\n]+\n", outcome.stderr), outcome.stderr
        assert all(path.read_bytes() == content for path, content in before.items())
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk / "runs"], check=True)
    assert train(small_disk, *MACHINE, "--resume", "small").codes == [0]
    assert_equal(run, unbroken[1])

@pytest.mark.parametrize("ranks", [1, 2])
def test_read_only_disk(small_disk, train, ranks):  # noqa: F811
    subprocess.run(["mount", "-o", "remount,ro", small_disk / "runs"], check=True)
    outcome = train(small_disk, *MACHINE, "--resume", "small", ranks=ranks)
    assert outcome.codes[0] == 2 and outcome.stdout == ""
    assert re.fullmatch(r"error: cannot write [^\n]*Read-only[^\n]*\n", outcome.stderr), outcome.stderr


# ---- A run goes on only as what it was ---------------------------------------------------------------------

@pytest.mark.parametrize("flags, ranks, said", [
    ("--resume stopped --lr-scale 2 --seed 43", 1, "seed was 42, is 43; lr_scale was 1.0, is 2.0"),
    ("--resume stopped --config teacher.json", 1, "distill was 0.0, is 0.5"),
    ("--resume stopped --track smoke", 1, "smoke has no unfinished run to resume (stopped)"),
    ("--resume stopped --data data/other", 1, "data was "),
    ("--resume stopped --dtype bfloat16", 1, "dtype was float32, is bfloat16"),
    ("--resume stopped --ranks-per-member 1", 2, "teams was 1, is 2"),
    ("--resume nothing", 1, "no unfinished run to resume (nothing)"),
    ("--resume unbroken1", 1, "is complete"),
    ("--run-name crowd --ranks-per-member 1", 2, "2 teams"),
    ("--resume --track limited", 1, "limited has no unfinished run to resume"),
])
def test_refused(unbroken, stopped_once, train, mortal, flags, ranks, said):  # noqa: F811
    if not (mortal / "data/other").exists():
        make_dataset(mortal / "data/other", "other", train=1_300, val=620, audit=510)
        (mortal / "data/teacher.json").write_text('{"n_layer": 2, "distill": 0.5}')
    flags = [str(mortal / "data" / flag[5:]) if flag.startswith("data/") else flag for flag in
             flags.replace("teacher.json", "data/teacher.json").split()]
    before = {path: path.stat().st_mtime_ns for path in stopped_once.rglob("*") if path.name != "lock"}
    outcome = train(mortal, *RUN, *flags, ranks=ranks)
    assert 2 in outcome.codes and outcome.stdout == ""
    assert re.fullmatch(r"error: [^\n]+\n", outcome.stderr) and said in outcome.stderr, outcome.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before

def test_edited_source(unbroken, stopped_once, train, mortal):  # noqa: F811
    """It is no record then, even if the edit is taken back later."""
    run, source = mortal / "runs/edited", (mortal / "train_gpt.py").read_text()
    shutil.copytree(stopped_once, run)
    (mortal / "train_gpt.py").write_text(source + "# one more line\n")
    try:
        outcome = train(mortal, *MACHINE, "--resume", "edited")
        assert outcome.codes == [2] and "--resume-anyway" in outcome.stderr
        end = {"DIE": "member 0 step 8", "DIE_BY": signal.SIGTERM}
        assert train(mortal, *MACHINE, "--resume", "edited", "--resume-anyway", **end).codes == [75]
    finally:
        (mortal / "train_gpt.py").write_text(source)
    assert train(mortal, *MACHINE, "--resume", "edited").codes == [0]
    assert (losses(run) == losses(unbroken[1])).all()
    new = set(result_of(run)["violations"]) - set(result_of(unbroken[1])["violations"])
    assert new == {"a source was edited while it ran"}


# ---- Trouble that ends a run -------------------------------------------------------------------------------

def test_states_are_kept_when_a_loss_is_not_finite(mortal, train):  # noqa: F811
    outcome = train(mortal, *RUN, *"--epochs 9 --lr-embed 1000 --lr-scale 100 --run-name explodes".split())
    assert outcome.codes == [3]
    step = int(re.fullmatch(r"error: [^\n]+ is (?:nan|inf) at step (\d+); [^\n]+\n", outcome.stderr)[1])
    kept = states(mortal / "runs/explodes")
    assert step > 2 and step - 1 <= int(kept[-1][5:]) <= step
    again = train(mortal, *MACHINE, "--resume", "explodes")
    assert again.codes == [3] and f" at step {step};" in again.stderr
    assert states(mortal / "runs/explodes") == kept

def test_a_rank_that_hangs_ends_the_run(begin):
    """In time, with a code of its own, by which run.sh knows to name it."""
    started = begin("hangs", *RUN, *"--run-name hangs --epochs 99 --timeout 0.05".split(), ranks=2)
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

LONE = ["--ranks-per-member", 1, *TEAMS[2:]]  # teams of one rank, which no collective tells of each other

@pytest.mark.slow
@pytest.mark.parametrize("hung, at, epochs", [
    (0, "member 0 step 3", 99), (1, "member 3 step 3", 1),
])
def test_a_team_that_hangs_ends_the_run(begin, hung, at, epochs):
    """Whether the other trains or waits for members."""
    name = f"lone{at[7]}"
    started = begin(name, *RUN, *LONE, "--epochs", epochs, "--run-name", name, "--timeout", 0.05, ranks=2,
                    DIE=at, DIE_BY=signal.SIGSTOP, DIE_RANKS=hung)
    try:
        wait_for(lambda: not running(started.pids[1 - hung]))
    finally:
        os.kill(started.pids[hung], signal.SIGKILL)
    outcome = started.end()
    assert outcome.codes[1 - hung] == 4 and outcome.stderr == "", outcome
    log = started.run / f"log{'_1' * (hung == 0)}.txt"
    assert count(log, f"\nteam {hung} of 2 does not answer\n") == 1

@pytest.mark.slow
def test_a_team_that_is_slow_does_not(begin):
    """The other waits twice as long as --timeout, and even a step takes longer; but no micro-batch does."""
    flags = f"--run-name slow --timeout 0.08 --device-batch 1 --batch-tokens {39 * T}".split()
    started = begin("slow", *RUN, *LONE, *flags, ranks=2, REST="a micro-batch", DIE_RANKS=1)
    wait_for(lambda: (started.run / "checkpoints/member_0000.json").exists() or started.done())
    time.sleep(10)
    for pid in started.pids:
        os.kill(pid, signal.SIGKILL)
    assert started.end().codes == [-signal.SIGKILL] * 2
    assert not (started.run / "checkpoints/member_0001.json").exists()
    assert count(started.run / "log.txt", "\nteam 1 of 2 does not answer\n") == 0
