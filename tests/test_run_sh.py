"""run.sh, run as a user runs it: a copy of it in a folder with a space in its name, started from elsewhere.

Two folders serve: in `project` .venv/bin/python only writes down how it was called, so that what run.sh
decides is seen in milliseconds; in `real` it is this interpreter, for a stub train_gpt.py under torchrun.
"""

import json
import os
import platform
import pty
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from conftest import slow

ROOT = Path(__file__).resolve().parent.parent
TRACKS = json.loads((ROOT / "records/tracks.json").read_text())
FILES = ["run.sh", "requirements.txt", "requirements-test.txt", ".ci/run", "records/tracks.json",
         "cluster/torchrun.py"]
PARALLEL = "-m pytest -n 2 --dist loadfile --no-loadscope-reorder"  # how `./run.sh test` runs the whole suite
OURS = ("PET_", "TORCHELASTIC_", "CUDA_VISIBLE_DEVICES", "NPROC", "OMP_NUM_THREADS", "MALLOC_", "PYTHON",
        "CDPATH")
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith(OURS)}

# What stands in for .venv/bin/python: it logs each call in one line, and leaves behind what the call would.
RECORDER = f"""#!/bin/sh
case "$*" in
-c*) exec "{sys.executable}" "$@" ;;
"-m pip --version") exit ;;
esac
root=$(dirname "$(dirname "$(dirname "$0")")")
call=$(echo "$*" | sed "s|$root/||g; s|^cluster/torchrun.py ||")
echo "$call" >>"$root/calls.log"
pwd >"$root/directory.log"
env | grep -E '^(PET_|OMP_NUM_THREADS|MALLOC_)' >"$root/environment.log"
case "$call" in
"data/prepare.py nano") mkdir -p "$root/data/nano" ;;
"-m pip install"*) echo "pip is talkative"; sleep ${{PIP_SECONDS-0}}; exit ${{PIP_EXIT-0}} ;;
esac
"""
# What stands in for python3: real but for `-m venv`, which puts the recorder in place.
VENV_MAKER = f"""#!/bin/sh
[ "$1 $2" = "-m venv" ] || exec "{sys.executable}" "$@"
mkdir -p "$3/bin" && cp "$(dirname "$0")/recorder" "$3/bin/python"
"""

def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)

@pytest.fixture
def folder(tmp_path):
    """A clone before its first start: no .venv, no data."""
    folder = tmp_path / "a project"
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    write(folder / "recorder", RECORDER)
    write(folder / "python3", VENV_MAKER)
    return folder

@pytest.fixture
def project(folder):
    """A clone whose .venv is complete, and whose python is the recorder."""
    write(folder / ".venv/bin/python", RECORDER)
    for requirements in folder.glob("requirements*.txt"):
        shutil.copy(requirements, folder / ".venv")
    return folder

@pytest.fixture
def real(project):
    """A clone whose .venv is this one, with data/nano; a test gives it its train_gpt.py."""
    write(project / ".venv/bin/python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (project / "data/nano").mkdir(parents=True)
    return project

def start(folder, *arguments, script="run.sh", stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/",
          user=None, **environment):
    """The started process; from another directory, and in a session of its own."""
    return subprocess.Popen(
        ["/bin/bash", str(folder / script), *arguments],
        cwd=cwd,
        env=ENVIRONMENT | environment,
        stdout=stdout,
        stderr=stderr,
        user=user,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # tests may run under nohup
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


# ---- Commands ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_the_manual_and_needs_no_setup(folder, flag):
    code, stdout, stderr = run(folder, flag)
    assert (code, stderr) == (0, "")
    assert stdout.startswith("Slowrun") and "set -euo" not in stdout
    assert all(f"{track}: {rules['rule']}" in stdout.splitlines() for track, rules in TRACKS.items())
    assert not (folder / ".venv").exists()

@pytest.mark.parametrize("track", ["limitd", ""])
def test_unknown_track_lists_the_tracks(folder, track):
    error = one_error(run(folder, track))
    assert all(name in error.split() for name in TRACKS)
    assert not (folder / ".venv").exists()

@pytest.mark.parametrize("track", TRACKS)
def test_track_and_its_data(project, track):
    """Of the datasets only the small one is built unasked, and once."""
    small = TRACKS[track]["dataset"] == "nano"
    launch = f"train_gpt.py --track {track} --seed 3"
    for expected in ["data/prepare.py nano"] * small + [launch], *[[launch]] * small:
        assert run(project, track, "--seed", "3")[0] == 0
        assert calls(project) == expected
        (project / "calls.log").unlink()

@pytest.mark.parametrize("flags", ["--data x", "--data=x", "--seed 3 -h"])
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

@pytest.mark.parametrize("arguments, called", [
    ("data fineweb100M --tokens 5", "data/prepare.py fineweb100M --tokens 5"),
    ("data nano0.25M", "data/prepare.py nano0.25M"),
    ("data fresh x", "data/prepare.py fresh x"),
    ("data verify x", "data/prepare.py verify x"),
    ("data --help", "data/prepare.py --help"),
    *((f"{command} a b --flag", f"records/leaderboard.py {command} a b --flag")
      for command in "compare add check render diff reproduce runs power efficiency".split()),
    ("ruler a --help", "records/ruler.py a --help"),
    ("eval a", "records/ruler.py eval a"),
    ("sample a", "sample.py a"),
    ("export a", "sample.py export a"),
])
def test_commands(project, tmp_path, arguments, called):
    """In the directory of the caller, so that the paths that he gives are found."""
    assert run(project, *arguments.split(), cwd=tmp_path)[0] == 0
    assert calls(project) == [called]
    assert (project / "directory.log").read_text().strip() == str(tmp_path)

def test_the_test_command(project, tmp_path):
    (tmp_path / "test_x.py").touch()
    given = {"": f"{PARALLEL} tests", "--all -k word": f"{PARALLEL} tests --all -k word",
             "test_x.py -x": "-m pytest test_x.py -x",
             "test_x.py::test_y --all": "-m pytest test_x.py::test_y --all"}
    for arguments in given:
        assert run(project, "test", *arguments.split(), cwd=tmp_path)[0] == 0
    assert calls(project) == ["data/prepare.py nano", *given.values()]

def test_continuous_integration(project):
    assert run(project, script=".ci/run")[0] == 0
    assert calls(project) == ["data/prepare.py nano", f"{PARALLEL} tests --all",
                              "records/leaderboard.py check", "records/leaderboard.py render --check",
                              "-m ruff check"]

@pytest.mark.parametrize("arguments, settings, named", [
    ("nano", {"NPROC": "abc"}, "NPROC=abc"),
    ("nano", {"NPROC": "-1"}, "NPROC=-1"),
    ("nano", {"NPROC": "0"}, "NPROC=0"),
    ("nano", {"OMP_NUM_THREADS": "abc"}, "OMP_NUM_THREADS=abc"),
    ("nano --track limited", {}, "./run.sh limited"),
    ("nano --seed 3 --track=limited", {}, "./run.sh limited"),
    ("data bogus", {}, "bogus"),
    ("data", {}, "fineweb100M"),
    ("test nope.py", {}, "nope.py"),
    ("test nope.py::test_x -x", {}, "nope.py"),
])
def test_mistakes_leave_nothing_behind(folder, arguments, settings, named):
    before = sorted(folder.rglob("*"))
    assert named in one_error(run(folder, *arguments.split(), **settings))
    assert sorted(folder.rglob("*")) == before

def test_through_a_link(project, tmp_path):
    """Of a link to a link; both are relative to their own folders."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/slowrun").symlink_to("../first")
    (tmp_path / "first").symlink_to(f"{project.name}/run.sh")
    assert run(tmp_path, "limited", script="bin/slowrun")[0] == 0
    assert calls(project) == ["train_gpt.py --track limited"]
    assert list(tmp_path.rglob(".venv")) == [project / ".venv"]


# ---- Set-up ------------------------------------------------------------------------------------------------

def test_python_missing(folder, tmp_path):
    for tool in "readlink", "sed", "cmp":
        write(tmp_path / "bin" / tool, f'#!/bin/sh\nexec {shutil.which(tool)} "$@"\n')
    error = one_error(run(folder, PATH=str(tmp_path / "bin")))
    assert "python3 is missing" in error and "apt-get install python3-venv" in error

@pytest.mark.parametrize("refused, said", [("version_info", "older than"), ("ensurepip", "no venv module")])
def test_python_unfit(folder, refused, said):
    write(folder / "python3", f'#!/bin/sh\ncase "$*" in *{refused}*) exit 1 ;; esac\n')
    assert said in one_error(run(folder, PYTHON=str(folder / "python3")))
    assert not (folder / ".venv").exists()

def test_no_permission_to_write(folder):
    """In a folder that anybody can reach, by a user who may not write there."""
    user = {"user": 65534} if os.geteuid() == 0 else {}
    with tempfile.TemporaryDirectory() as reachable:
        clone = Path(reachable) / "clone"
        shutil.copytree(folder, clone)
        os.chmod(reachable, 0o755)
        os.chmod(clone, 0o555)
        process = start(clone, **user)
        stdout, stderr = process.communicate(timeout=60)
        assert "no permission to write" in one_error((process.returncode, stdout, stderr))
        assert not (clone / ".venv").exists()
        os.chmod(clone, 0o755)

def installed(folder):
    """The requirements files that were given to pip."""
    return [call.split()[-1] for call in calls(folder) if call.startswith("-m pip install")]

def test_installs_once_and_again_when_the_requirements_change(folder):
    """What only tests need comes with the first test."""
    python = str(folder / "python3")
    expected = []
    for command, name in ("runs", "requirements.txt"), ("test", "requirements-test.txt"):
        for fresh in [name], [], "changed", []:
            if fresh == "changed":
                with open(folder / name, "a") as requirements:
                    requirements.write("another==1.0\n")
                fresh = [name]
            expected += fresh
            assert run(folder, command, PYTHON=python)[0] == 0
            assert installed(folder) == expected

def test_the_interpreter_of_the_venv_stays(folder):
    """Whatever PYTHON is by then."""
    assert run(folder, "runs", PYTHON=str(folder / "python3"))[0] == 0
    assert run(folder, "test", PYTHON="no-such-python")[0] == 0

def test_pip_is_quiet_when_it_works(folder):
    code, _, stderr = run(folder, "runs", PYTHON=str(folder / "python3"))
    assert (code, stderr) == (0, "installing requirements.txt into .venv (once, some minutes)\n")
    assert (folder / ".venv/pip.log").read_text() == "pip is talkative\n"

def test_a_terminal_sees_the_seconds(folder):
    terminal, stderr = pty.openpty()
    process = start(folder, "runs", stderr=stderr, PYTHON=str(folder / "python3"), PIP_SECONDS="2.5")
    process.communicate(timeout=60)
    _, *shown = os.read(terminal, 10_000).decode().replace("\r\n", "\n").split("\r")
    assert process.returncode == 0
    shown_seconds = [int(text.split()[-2]) for text in shown]
    assert len(shown) >= 2 and shown_seconds[0] <= 1 and shown_seconds == sorted(set(shown_seconds))
    assert all(text.startswith("installing requirements.txt into .venv: ") for text in shown)
    assert shown[-1].endswith("\n")

def test_failed_installation_is_explained_and_done_again(folder):
    python = str(folder / "python3")
    code, _, stderr = run(folder, "runs", PYTHON=python, PIP_EXIT="1")
    _, pip, error = stderr.splitlines()
    assert (code, pip) == (2, "pip is talkative")
    assert error.startswith("error: requirements.txt could not be installed")
    assert calls(folder)[-1].startswith("-m pip")  # it went no further
    assert run(folder, "runs", PYTHON=python)[0] == 0
    assert installed(folder) == ["requirements.txt"] * 2

def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)

def test_killed_installation_is_done_again(folder):
    python = str(folder / "python3")
    process = start(folder, "runs", PYTHON=python, PIP_SECONDS="60")
    wait_for(lambda: installed(folder))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert run(folder, "runs", PYTHON=python)[0] == 0
    assert installed(folder) == ["requirements.txt"] * 2

def test_two_starts_at_once_install_once(folder):
    python = str(folder / "python3")
    first = start(folder, "runs", PYTHON=python, PIP_SECONDS="1.5")
    wait_for(lambda: installed(folder))
    second = start(folder, "runs", PYTHON=python)
    for process in second, first:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert calls(folder).count("records/leaderboard.py runs") == 2
    assert installed(folder) == ["requirements.txt"]


# ---- Ranks and threads -------------------------------------------------------------------------------------

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

@pytest.mark.parametrize("gpus, settings, heap", [
    (0, {}, {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2147483647"}),
    (0, {"MALLOC_MMAP_MAX_": "9"}, {"MALLOC_MMAP_MAX_": "9", "MALLOC_TRIM_THRESHOLD_": "2147483647"}),
    (1, {}, {}),
])
def test_without_a_gpu_the_heap_keeps_its_memory(project, tmp_path, gpus, settings, heap):
    write(tmp_path / "bin/nvidia-smi", "#!/bin/sh\n" + gpus * "echo 'GPU 0: NVIDIA H100'\n")
    run(project, "limited", PATH=f"{tmp_path / 'bin'}:{ENVIRONMENT['PATH']}", **settings)
    found = environment(project).items()
    assert heap == {key: value for key, value in found if key.startswith("MALLOC_")}

@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="variables of glibc")
def test_a_rank_faults_the_memory_of_a_big_tensor_in_once(real):
    (real / "train_gpt.py").write_text(
        "import resource, torch\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "made = []\n"
        "for trial in range(20):\n"
        "    before = faults()\n"
        "    torch.ones(2 ** 24)\n"
        "    made.append(faults() - before)\n"
        "print(min(made))\n")  # a busy system may take pages away in between
    assert int(run(real)[1]) < 1000 < 2 ** 26 / resource.getpagesize()

def test_rendezvous_settings_pass_through(project):
    cluster = {"PET_NNODES": "2", "PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": "host:29500"}
    run(project, "unlimited", **cluster)
    assert cluster.items() <= environment(project).items()
    assert "PET_STANDALONE" not in environment(project)


# ---- Under the real torchrun -------------------------------------------------------------------------------

def test_arguments_ranks_terminal_and_directory(real, tmp_path):
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    (real / "train_gpt.py").write_text(
        "import os, sys\n"
        "import harness\n"
        "if os.environ['RANK'] == '1':\n"
        "    print(harness.SIBLING, os.environ['WORLD_SIZE'], sys.argv[1:], os.getcwd(), os.isatty(1))\n")
    (elsewhere / "logging.py").write_text("raise ImportError('shadows the standard library')\n")
    (elsewhere / "harness.py").write_text("SIBLING = False\n")
    (real / "harness.py").write_text("SIBLING = True\n")
    terminal, stdout = pty.openpty()
    code, _, stderr = run(real, "nano", "--run-name", "a b", NPROC="2", stdout=stdout, cwd=elsewhere)
    assert (code, stderr) == (0, "")
    expected = f"True 2 {['--track', 'nano', '--run-name', 'a b']} {elsewhere} True"
    assert os.read(terminal, 10_000).decode().strip() == expected

def test_users_mistake_is_one_line_and_exit_code_2(real):
    (real / "train_gpt.py").write_text(
        "import os, sys\n"
        "if os.environ['RANK'] == '0':\n"
        "    print('error: no such thing; ./run.sh mends it', file=sys.stderr)\n"
        "sys.exit(2)\n")
    assert one_error(run(real, NPROC="2")) == "error: no such thing; ./run.sh mends it\n"

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

@pytest.mark.slow
def test_killed_rank_is_named_when_it_was_killed_too_often(real):
    (real / "train_gpt.py").write_text(KILLED_TWICE)
    code, _, stderr = run(real, NPROC="2", cwd=real, PET_MAX_RESTARTS="1")
    assert code == 128 + signal.SIGKILL
    assert stderr.splitlines()[1:] == ["error: rank 1 was ended by SIGKILL"]

def test_a_rank_that_ends_by_itself_is_not_started_again(real):
    source = KILLED_TWICE.replace("os.kill(os.getpid(), signal.SIGKILL)", "sys.exit(75)")
    (real / "train_gpt.py").write_text(source)
    assert run(real, NPROC="2", cwd=real) == (75, "", "")
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

@pytest.mark.parametrize("name, sent", [
    ("SIGINT", "SIGINT"),
    slow("SIGUSR1", "SIGUSR1"),
    ("SIGHUP", "SIGTERM"),
])
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

@pytest.mark.slow
def test_a_rank_that_does_not_answer_is_named(real):
    """By the launcher that we ship, but that torch kills after 2 seconds instead of 30."""
    launcher, line = real / "cluster/torchrun.py", "PR_SET_PDEATHSIG ="
    sooner = "from torch.distributed.elastic.multiprocessing import PContext\n"
    sooner += "PContext.close.__defaults__ = None, 2\n"
    launcher.write_text(launcher.read_text().replace(line, sooner + line))
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


# ---- Form --------------------------------------------------------------------------------------------------

def test_shellcheck():
    shellcheck = Path(sys.executable).parent / "shellcheck"  # the venv's
    scripts = [ROOT / name for name in ("run.sh", ".ci/run", "cluster/slurm.sh")]
    result = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")
