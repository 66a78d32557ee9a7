"""run.sh, run as a user runs it: a copy of it in a folder with a space in its name, started from elsewhere.

Two folders serve: in `project` .venv/bin/python only writes down how it was called, so that what run.sh
decides is seen in milliseconds; in `real` it is this interpreter, for a stub train_gpt.py under torchrun.
"""

import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TRACKS = "nano smoke nano_unlimited tiny limited two_hour unlimited unlimited_snapshots".split()
SUITE = "-n 2 --dist loadfile --no-loadscope-reorder tests"  # what `./run.sh test` runs
OURS = ("PET_", "TORCHELASTIC_", "CUDA_VISIBLE_DEVICES", "NPROC", "OMP_NUM_THREADS", "PYTHON", "CDPATH")
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith(OURS)}

# What stands in for .venv/bin/python: it logs each call in one line, and leaves behind what the call would.
RECORDER = """#!/bin/sh
[ "$1" = -c ] && shift 2
root=${0%/.venv/bin/python}
program=${1#"$root/"}
shift
echo "$program $*" >>"$root/calls.log"
env | grep -E '^(PET_|OMP_NUM_THREADS)' >"$root/environment.log"
case "$program $*" in
"data/prepare.py nano") mkdir -p "$root/data/nano" ;;
"-m pip"*) sleep ${PIP_SECONDS-0}; exit ${PIP_EXIT-0} ;;
esac
"""
# What stands in for python3: real but for `-m venv`, which puts the recorder in place.
VENV_MAKER = f"""#!/bin/sh
[ "$1 $2" = "-m venv" ] || exec "{sys.executable}" "$@"
mkdir -p "$3/bin" && cp recorder "$3/bin/python"
"""


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def folder(tmp_path):
    """A clone before its first start: no .venv, no data."""
    folder = tmp_path / "a project"
    (folder / ".ci").mkdir(parents=True)
    for name in "run.sh", "requirements.txt", ".ci/run":
        shutil.copy(ROOT / name, folder / name)
    write(folder / "recorder", RECORDER)
    write(folder / "python3", VENV_MAKER)
    return folder


@pytest.fixture
def project(folder):
    """A clone whose .venv is complete, and whose python is the recorder."""
    write(folder / ".venv/bin/python", RECORDER)
    shutil.copy(folder / "requirements.txt", folder / ".venv")
    return folder


@pytest.fixture
def real(project):
    """A clone whose .venv is this one, with data/nano; a test gives it its train_gpt.py."""
    write(project / ".venv/bin/python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (project / "data/nano").mkdir(parents=True)
    return project


def start(folder, *arguments, script="run.sh", stdout=subprocess.PIPE, cwd="/", **environment):
    """The started process; from another directory, and in a session of its own."""
    return subprocess.Popen(
        ["/bin/bash", str(folder / script), *arguments],
        cwd=cwd,
        env=ENVIRONMENT | environment,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the tests themselves may run under nohup
    )


def run(folder, *arguments, **options):
    """(exit code, stdout, stderr)"""
    process = start(folder, *arguments, **options)
    stdout, stderr = process.communicate(timeout=60)
    return process.returncode, stdout, stderr


def calls(folder):
    """How .venv/bin/python was called, one string a call."""
    log = folder / "calls.log"
    return log.read_text().splitlines() if log.exists() else []


def environment(folder):
    """The environment of its last call."""
    return dict(line.split("=", 1) for line in (folder / "environment.log").read_text().splitlines())


def one_error(result):
    """The text of the one line of a user's mistake."""
    code, stdout, stderr = result
    assert (code, stdout) == (2, "")
    assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    return stderr


# ---- Commands ------------------------------------------------------------------------------------

@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_the_manual_and_needs_no_setup(folder, flag):
    code, stdout, stderr = run(folder, flag)
    assert (code, stderr) == (0, "")
    assert all(track in stdout.split() for track in TRACKS)
    assert stdout.startswith("Slowrun") and "set -euo" not in stdout
    assert not (folder / ".venv").exists()


@pytest.mark.parametrize("track", ["limitd", ""])
def test_unknown_track_lists_the_tracks(folder, track):
    error = one_error(run(folder, track))
    assert all(name in error.split() for name in TRACKS)
    assert not (folder / ".venv").exists()


@pytest.mark.parametrize("track", TRACKS)
def test_track_and_its_data(project, track):
    builds = ["data/prepare.py nano"] if track in ("nano", "smoke", "nano_unlimited") else []
    launches = [f"train_gpt.py --track {track} --seed 3"]
    for expected in builds + launches, launches:  # the second start finds the data
        assert run(project, track, "--seed", "3")[0] == 0
        assert calls(project) == expected
        (project / "calls.log").unlink()


@pytest.mark.parametrize("flags", ["--data x", "--data=x", "--eval x", "--eval=x", "--seed 3 -h"])
def test_no_data_built_where_none_is_needed(project, flags):
    assert run(project, "nano", *flags.split())[0] == 0
    assert calls(project) == [f"train_gpt.py --track nano {flags}"]


@pytest.mark.parametrize("arguments", ["nano --plan --ranks 4", "nano --ranks 4 --plan", "--plan --ranks 4"])
def test_plan_is_neither_launched_nor_needs_data(project, arguments):
    assert run(project, *arguments.split())[0] == 0
    assert calls(project) == ["plan.py --track nano --ranks 4"]
    assert not any(name.startswith("PET_") for name in environment(project))


@pytest.mark.parametrize("arguments", [[], ["--seed", "3"]])
def test_nano_is_the_default(project, arguments):
    assert run(project, *arguments)[0] == 0
    assert calls(project)[-1].split() == ["train_gpt.py", "--track", "nano", *arguments]


def test_data_and_test_commands(project):
    run(project, "data", "fineweb100M", "--tokens", "5")
    run(project, "test")
    run(project, "test", "tests/test_x.py", "-x")
    run(project, script=".ci/run")
    assert calls(project) == [
        "data/prepare.py fineweb100M --tokens 5",
        "data/prepare.py nano",
        f"-m pytest {SUITE}",
        "-m pytest tests/test_x.py -x",
        f"-m pytest {SUITE}",
    ]


# ---- Set-up --------------------------------------------------------------------------------------

def test_python_missing(folder, tmp_path):
    for tool in "dirname", "cmp":
        write(tmp_path / "bin" / tool, f'#!/bin/sh\nexec {shutil.which(tool)} "$@"\n')
    error = one_error(run(folder, PATH=str(tmp_path / "bin")))
    assert "python3 is missing" in error and "apt-get install python3-venv" in error


@pytest.mark.parametrize("refused, said", [("version_info", "older than"), ("ensurepip", "no venv module")])
def test_python_unfit(folder, refused, said):
    write(folder / "python3", f'#!/bin/sh\ncase "$*" in *{refused}*) exit 1 ;; esac\n')
    assert said in one_error(run(folder, PYTHON=str(folder / "python3")))
    assert not (folder / ".venv").exists()


def installations(folder):
    return sum(call.startswith("-m pip install") for call in calls(folder))


def test_installs_once_and_again_when_the_requirements_change(folder):
    python = str(folder / "python3")
    for expected in 1, 1:
        assert run(folder, "test", PYTHON=python)[0] == 0
        assert installations(folder) == expected
    with open(folder / "requirements.txt", "a") as requirements:
        requirements.write("another==1.0\n")
    for expected in 2, 2:
        assert run(folder, "test", PYTHON=python)[0] == 0
        assert installations(folder) == expected


def test_failed_installation_is_done_again(folder):
    python = str(folder / "python3")
    code, _, stderr = run(folder, "test", PYTHON=python, PIP_EXIT="1")
    assert code == 2 and stderr.splitlines()[-1].startswith("error: requirements.txt could not be installed")
    assert calls(folder)[-1].startswith("-m pip")  # it went no further
    assert run(folder, "test", PYTHON=python)[0] == 0
    assert installations(folder) == 2


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_killed_installation_is_done_again(folder):
    python = str(folder / "python3")
    process = start(folder, "test", PYTHON=python, PIP_SECONDS="60")
    wait_for(lambda: installations(folder) == 1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert run(folder, "test", PYTHON=python)[0] == 0
    assert installations(folder) == 2


def test_two_starts_at_once_install_once(folder):
    python = str(folder / "python3")
    first = start(folder, "test", PYTHON=python, PIP_SECONDS="1.5")
    wait_for(lambda: installations(folder) == 1)
    second = start(folder, "test", PYTHON=python)
    for process in second, first:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert calls(folder).count(f"-m pytest {SUITE}") == 2
    assert installations(folder) == 1


# ---- Ranks and threads ---------------------------------------------------------------------------

@pytest.mark.parametrize("gpus, settings, ranks", [
    (0, {}, 1),
    (8, {}, 8),
    (8, {"CUDA_VISIBLE_DEVICES": "3,5"}, 2),
    (8, {"CUDA_VISIBLE_DEVICES": "1,-1,2"}, 1),
    (8, {"CUDA_VISIBLE_DEVICES": ""}, 1),
    (0, {"CUDA_VISIBLE_DEVICES": "0,1"}, 1),
    (8, {"NPROC": "4"}, 4),
    (8, {"PET_NPROC_PER_NODE": "2"}, 2),
])
def test_one_rank_per_visible_gpu(project, tmp_path, gpus, settings, ranks):
    lines = "".join(f"echo 'GPU {i}: NVIDIA H100 (UUID: GPU-{i})'\n" for i in range(gpus))
    write(tmp_path / "bin/nvidia-smi", f"#!/bin/sh\n{lines or 'echo NVIDIA-SMI has failed; exit 9'}")
    run(project, "limited", PATH=f"{tmp_path / 'bin'}:{ENVIRONMENT['PATH']}", **settings)
    assert environment(project)["PET_NPROC_PER_NODE"] == str(ranks)
    assert environment(project)["PET_STANDALONE"] == "1"


def test_help_is_printed_by_one_rank(project):
    run(project, "limited", "--help", NPROC="8")
    assert environment(project)["PET_NPROC_PER_NODE"] == "1"


def test_physical_cores_are_shared_out(project):
    def threads(**settings):
        run(project, "limited", **settings)
        return int(environment(project)["OMP_NUM_THREADS"])

    alone = threads(NPROC="1")
    assert 1 <= alone <= os.cpu_count()
    assert threads(NPROC="2") == max(1, alone // 2)
    assert threads(NPROC="1000") == 1
    assert threads(NPROC="1", OMP_NUM_THREADS="7") == 7


def test_rendezvous_settings_pass_through(project):
    cluster = {"PET_NNODES": "2", "PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": "host:29500"}
    run(project, "unlimited", **cluster)
    assert cluster.items() <= environment(project).items()
    assert "PET_STANDALONE" not in environment(project)


# ---- Under the real torchrun ---------------------------------------------------------------------

def test_arguments_ranks_terminal_and_directory(real, tmp_path):
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    (real / "train_gpt.py").write_text(
        "import os, sys\n"
        "if os.environ['RANK'] == '1':\n"
        "    print(os.environ['WORLD_SIZE'], sys.argv[1:], os.getcwd(), sys.stdout.isatty(), flush=True)\n")
    (elsewhere / "logging.py").write_text("raise ImportError('shadows the standard library')\n")
    terminal, stdout = pty.openpty()
    code, _, stderr = run(real, "nano", "--run-name", "a b", NPROC="2", stdout=stdout, cwd=elsewhere)
    assert (code, stderr) == (0, "")
    expected = f"2 {['--track', 'nano', '--run-name', 'a b']} {elsewhere} True"
    assert os.read(terminal, 10_000).decode().strip() == expected


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_users_mistake_is_one_line_and_exit_code_2(real, ranks):
    (real / "train_gpt.py").write_text(
        "import os, sys\n"
        "if os.environ['RANK'] == '0':\n"
        "    print('error: no such thing; ./run.sh mends it', file=sys.stderr)\n"
        "sys.exit(2)\n")
    assert one_error(run(real, NPROC=ranks)) == "error: no such thing; ./run.sh mends it\n"


def test_traceback_is_kept(real):
    (real / "train_gpt.py").write_text("raise RuntimeError('a bug')\n")
    code, _, stderr = run(real)
    assert code == 1
    assert stderr.startswith("Traceback") and stderr.endswith("RuntimeError: a bug\n")
    assert "torch" not in stderr


KILLED_TWICE = """
import os, pathlib, signal, sys, time
with open('starts' + os.environ['RANK'], 'a') as starts:
    starts.write('x')
restarts, other = int(os.environ['TORCHELASTIC_RESTART_COUNT']), pathlib.Path('starts0')
if os.environ['RANK'] == '1' and restarts < 2:
    while not other.exists() or len(other.read_text()) <= restarts:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(1)
"""


def test_killed_rank_starts_all_ranks_again(real):
    (real / "train_gpt.py").write_text(KILLED_TWICE)
    code, _, stderr = run(real, NPROC="2", cwd=real)
    assert code == 0
    assert stderr == "rank 1 was ended by SIGKILL; starting again from the last state\n" * 2
    assert [(real / f"starts{rank}").read_text() for rank in range(2)] == ["xxx", "xxx"]


def test_killed_rank_is_named_when_it_was_killed_too_often(real):
    (real / "train_gpt.py").write_text(KILLED_TWICE)
    code, _, stderr = run(real, NPROC="2", cwd=real, PET_MAX_RESTARTS="1")
    assert code == 128 + signal.SIGKILL
    assert stderr.splitlines()[1:] == ["error: rank 1 was ended by SIGKILL"]


@pytest.mark.parametrize("code", [1, 2, 3, 75])
def test_a_rank_that_ends_by_itself_is_not_started_again(real, code):
    source = KILLED_TWICE.replace("os.kill(os.getpid(), signal.SIGKILL)", f"sys.exit({code})")
    (real / "train_gpt.py").write_text(source)
    assert run(real, NPROC="2", cwd=real) == (code, "", "")
    assert (real / "starts1").read_text() == "x"


STOPS = """
import os, pathlib, signal, sys, time
rank = os.environ['RANK']
def stop(number, frame):
    time.sleep(0.5)
    pathlib.Path('stopped' + rank).write_text(signal.Signals(number).name)
    sys.exit(75)
for number in signal.SIGINT, signal.SIGTERM, signal.SIGUSR1:
    signal.signal(number, stop)
pathlib.Path(f'started{rank}').write_text(str(os.getpid()))
time.sleep(60)
"""


def started(real):
    """The process ids of its two ranks, once they are there."""
    files = [real / f"started{rank}" for rank in range(2)]
    wait_for(lambda: all(file.exists() and file.read_text() for file in files))
    return [int(file.read_text()) for file in files]


@pytest.mark.parametrize("name, sent", [("SIGINT",) * 2, ("SIGTERM",) * 2, ("SIGUSR1",) * 2, ("SIGHUP", "SIGTERM")])
def test_signals_reach_the_ranks_and_are_waited_for(real, name, sent):
    (real / "train_gpt.py").write_text(STOPS)
    process = start(real, NPROC="2", cwd=real)
    started(real)
    process.send_signal(getattr(signal, name))
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (75, "")
    assert [(real / f"stopped{rank}").read_text() for rank in range(2)] == [sent] * 2


def test_signal_before_the_ranks_can_handle_it(real):
    (real / "train_gpt.py").write_text(STOPS.replace("signal.signal(number, stop)", "pass"))
    process = start(real, NPROC="2", cwd=real)
    started(real)
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (128 + signal.SIGTERM, "")


def running(pid):
    """Is there such a process, and not as a zombie, which nobody may collect in a container?"""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    return state != "" and not state.startswith("Z")


@pytest.mark.skipif("SLOWRUN_KILLS" not in os.environ, reason="torchrun waits for 30 seconds before it kills")
def test_a_rank_that_does_not_answer_is_named(real):
    (real / "train_gpt.py").write_text(
        "import os, signal, sys, time\n"
        "if os.environ['RANK'] == '1':\n"
        "    os.kill(os.getpid(), signal.SIGSTOP)\n"
        "time.sleep(1)\n"
        "sys.exit(4)\n")
    error = "error: rank 1 does not answer; --resume goes on from the last state\n"
    assert run(real, NPROC="2") == (4, "", error)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends the children of a killed process")
def test_ranks_do_not_outlive_a_killed_torchrun(real):
    (real / "train_gpt.py").write_text(STOPS)
    process = start(real, NPROC="2", cwd=real)
    ranks = started(real)
    process.kill()
    process.communicate()
    wait_for(lambda: not any(map(running, ranks)), seconds=5)


# ---- Style ---------------------------------------------------------------------------------------

@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck():
    result = subprocess.run(["shellcheck", ROOT / "run.sh", ROOT / ".ci/run"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")
