"""cluster/slurm.sh on a real Slurm of one node, which the test starts (Debian: slurmctld slurmd munge)."""

import os
import re
import shutil
import socket
import subprocess
import time

import pytest

from test_resume import MACHINE, RUN, assert_equal, steps_logged, wait_for
from test_run import ENVIRONMENT, ROOT, make_project, project, run_sh  # noqa: F401

TOOLS = "munged slurmctld slurmd sbatch scontrol".split()
pytestmark = pytest.mark.skipif(
    not os.environ.get("SLOWRUN_SLURM") or os.geteuid() != 0 or not all(map(shutil.which, TOOLS)),
    reason="starts Slurm's daemons: only with SLOWRUN_SLURM=1, Slurm installed, as root")

@pytest.fixture
def slurm(tmp_path):
    """
    slurm(command, ..., **options of subprocess.run) -> its output, by a cluster of this machine. A job waits
    there for cred_expire seconds before it starts again, until the nodes have forgotten that they were told
    to end it: two minutes, were they not given. A StartTime=now would now and then be too early, and fail it.
    """
    host = socket.gethostname().split(".")[0]
    munge, conf = f"{tmp_path}/munge.socket", tmp_path / "slurm.conf"
    (tmp_path / "munge.key").write_bytes(os.urandom(128))
    (tmp_path / "munge.key").chmod(0o400)
    tmp_path.chmod(0o755)
    conf.write_text(f"""
        ClusterName=test
        SlurmctldHost={host}(127.0.0.1)
        SlurmctldPort=26817
        SlurmdPort=26818
        SlurmUser=root
        AuthInfo=socket={munge},cred_expire=20
        SchedulerParameters=sched_interval=2
        ProctrackType=proctrack/linuxproc
        TaskPlugin=task/none
        MpiDefault=none
        ReturnToService=2
        StateSaveLocation={tmp_path}/state
        SlurmdSpoolDir={tmp_path}/spool
        SlurmctldPidFile={tmp_path}/slurmctld.pid
        SlurmdPidFile={tmp_path}/slurmd.pid
        NodeName={host} NodeAddr=127.0.0.1 CPUs=1
        PartitionName=all Nodes={host} Default=YES
    """)
    keys = [f"--{name}-file={tmp_path}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    commands = [["munged", "--foreground", "--force", f"--socket={munge}", *keys],
                ["slurmctld", "-D", "-f", conf], ["slurmd", "-D", "-f", conf]]
    environment = ENVIRONMENT | {"SLURM_CONF": str(conf), "NPROC": "2"}
    (tmp_path / "state").mkdir()

    def slurm(*command, check=True, **options):
        options |= {"env": environment, "stdout": subprocess.PIPE, "text": True, "check": check}
        return subprocess.run(command, **options).stdout

    daemons = []
    with open(tmp_path / "log", "w") as log:
        for command in commands:
            daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            time.sleep(1)
    try:
        wait_for(lambda: "idle" in slurm("sinfo", "--noheader", "--format=%T", check=False))
        yield slurm
        slurm("scancel", "--user=root")
        wait_for(lambda: not slurm("squeue", "--noheader"))
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()

@pytest.fixture
def clone(project, tmp_path):
    clone = make_project(tmp_path / "clone")
    shutil.copytree(project / "data/short", clone / "data/short")
    shutil.copytree(ROOT / "cluster", clone / "cluster", dirs_exist_ok=True)
    return clone

def comes_to(slurm, job, state, seconds=100):
    """Waits for a state of the job; -> how often it has been started again."""
    for _ in range(seconds):
        shown = slurm("scontrol", "show", "job", job)
        now, restarts = re.search(r"JobState=(\w+)", shown)[1], int(re.search(r"Restarts=(\d+)", shown)[1])
        if now == state:
            return restarts
        assert now in ("PENDING", "RUNNING", "COMPLETING"), shown
        time.sleep(1)
    raise AssertionError(shown)

def test_a_requeued_job_goes_on(slurm, clone):
    """By hand; and when there are less than the five minutes left at which Slurm is to send SIGUSR1."""
    flags = ["limited", *RUN, "--epochs", "160"]  # Slurm looks at time limits once in half a minute
    assert run_sh(clone, *flags, "--run-name", "unbroken", NPROC="2").codes == [0]
    job = slurm("sbatch", "--parsable", "cluster/slurm.sh", *flags, cwd=clone).strip()
    run = clone / f"runs/slurm_{job}"
    for restarts, change in enumerate([["requeue", job], ["update", f"JobId={job}", "TimeLimit=5"]], 1):
        before = steps_logged(run)
        wait_for(lambda: steps_logged(run) > before + 2)
        slurm("scontrol", *change)
        assert comes_to(slurm, job, "PENDING") == restarts
        assert not (run / "result.json").exists()
    slurm("scontrol", "update", f"JobId={job}", "TimeLimit=UNLIMITED")
    assert comes_to(slurm, job, "COMPLETED", seconds=600) == 2
    assert_equal(run, clone / "runs/unbroken")

def test_a_cancelled_job_ends(slurm, clone):
    """Its run can go on by hand."""
    flags = ["limited", *RUN, "--epochs", "20"]
    job = slurm("sbatch", "--parsable", "cluster/slurm.sh", *flags, cwd=clone).strip()
    run = clone / f"runs/slurm_{job}"
    wait_for(lambda: steps_logged(run) > 2)
    slurm("scancel", job)
    assert comes_to(slurm, job, "CANCELLED") == 0
    assert run_sh(clone, "limited", *MACHINE, "--resume", run.name, NPROC="2").codes == [0]
