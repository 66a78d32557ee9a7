"""cluster/slurm.sh on a real Slurm of one node, which the test starts (Debian: slurmctld slurmd munge)."""

import os
import shutil
import socket
import subprocess
import time

import pytest
from test_resume import RUN, assert_equal, steps_logged, wait_for
from test_run import ENVIRONMENT, ROOT, make_project, project, run_sh

TOOLS = "munged slurmctld slurmd sbatch scontrol".split()
pytestmark = pytest.mark.skipif(
    not os.environ.get("SLOWRUN_SLURM") or os.geteuid() != 0 or not all(map(shutil.which, TOOLS)),
    reason="starts Slurm's daemons: only with SLOWRUN_SLURM=1, Slurm installed, as root")


@pytest.fixture
def slurm(tmp_path):
    """slurm(command, ..., **options of subprocess.run) -> its output, by a cluster of this machine."""
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
        AuthInfo=socket={munge}
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

    def slurm(*command, **options):
        return subprocess.run(command, env=environment, capture_output=True, text=True, **options).stdout

    daemons = []
    with open(tmp_path / "log", "w") as log:
        for command in commands:
            daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            time.sleep(1)
    wait_for(lambda: "idle" in slurm("sinfo", "--noheader", "--format=%T"))
    yield slurm
    slurm("scancel", "--user=root")
    for daemon in reversed(daemons):
        daemon.terminate()
        daemon.wait()


def test_a_requeued_job_goes_on(slurm, project, tmp_path):
    clone = make_project(tmp_path / "clone")
    shutil.copytree(project / "data/short", clone / "data/short")
    shutil.copytree(ROOT / "cluster", clone / "cluster")
    flags = ["limited", *RUN, "--epochs", "20"]
    assert run_sh(clone, *flags, "--run-name", "unbroken", NPROC="2").codes == [0]
    job = slurm("sbatch", "--parsable", "cluster/slurm.sh", *flags, cwd=clone).strip()
    run = clone / f"runs/slurm_{job}"
    for restarts, interrupt in enumerate([["scontrol", "requeue", job],
                                          ["scancel", "--batch", "--signal=USR1", job]], 1):
        before = steps_logged(run)
        wait_for(lambda: steps_logged(run) > before + 2)
        slurm(*interrupt)
        state = lambda: slurm("scontrol", "show", "job", job)
        wait_for(lambda: f"Restarts={restarts} " in state() and "Reason=BeginTime" in state())
        assert not (run / "result.json").exists()
        slurm("scontrol", "update", f"JobId={job}", "StartTime=now")
    wait_for(lambda: "JobState=COMPLETED" in slurm("scontrol", "show", "job", job), seconds=200)
    assert_equal(run, clone / "runs/unbroken")
