"""
Starts a script once for each rank, by torch's elastic agent. It is torchrun with three differences:

* Signals are passed on to the ranks, which save a state and end the run; no rank is killed for taking its
  time. SIGHUP reaches them as SIGTERM. A signal that comes before there are ranks ends this process.
* Only the death of a rank makes all of them start again, up to PET_MAX_RESTARTS times. A rank that ends by
  itself has said why, and its error would only come again. On Linux no rank outlives this process.
* torchrun's report of a failed rank is left out. Where a rank can't speak for itself, one line says what
  happened. The exit code is that of the first rank that failed, 128 + N where signal N ended it.

./run.sh starts it as below; torchrun's arguments come from the environment, by torch's own convention
(PET_NPROC_PER_NODE for --nproc-per-node, and so on).

    .venv/bin/python cluster/torchrun.py train_gpt.py --track limited
"""
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an interrupted import

import ctypes
import functools
import logging
import sys

from torch.distributed import launcher, run
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent dies
NO_ANSWER = 4         # the exit code of a rank that waited for another one in vain

def end_with_parent():
    """Runs in each rank before its program does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

class Agent(LocalElasticAgent):
    """Starts the ranks of this node, waits for them, and starts them again when one was killed."""
    stopped = False  # by a signal, which was passed on

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for number in signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # which nohup has set
                signal.signal(number, self.pass_on)

    def pass_on(self, number, frame):
        """The handler of all these signals."""
        Agent.stopped, self._remaining_restarts = True, 0
        ranks = self._pcontext.subprocess_handlers.values() if self._pcontext else ()
        running = [rank.proc for rank in ranks if rank.proc.poll() is None]
        for process in running:
            process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)
        if not running:
            sys.exit(128 + number)

    def _monitor_workers(self, group):
        """torch asks this every 0.1 s how the ranks do; it restarts them as long as restarts remain."""
        result = super()._monitor_workers(group)
        codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
        # SIGTERM is what torch ends the other ranks with.
        killed = [rank for rank in codes if codes[rank] < 0 and codes[rank] != -signal.SIGTERM]
        if codes and (max(codes.values()) > 0 or not killed):
            self._remaining_restarts = 0
        elif codes and self._remaining_restarts:
            rank, name = killed[0], signal.Signals(-codes[killed[0]]).name
            print(f"rank {rank} was ended by {name}; starting again from the last state", file=sys.stderr)
        return result

def explain(report):
    """Says of a torch.distributed ChildFailedError what no rank could say; -> the exit code."""
    rank, failure = report.get_first_failure()
    code = failure.exitcode
    if code == NO_ANSWER:  # the ranks that waited have ended; the one that hung had to be killed
        hung = [rank for rank, failure in report.failures.items() if failure.exitcode == -signal.SIGKILL]
        named = ", ".join(map(str, hung)) or "of another node"
        print(f"error: rank {named} does not answer; --resume goes on from the last state", file=sys.stderr)
    if code < 0 and not Agent.stopped:
        print(f"error: rank {rank} was ended by {signal.Signals(-code).name}", file=sys.stderr)
    return code if code > 0 else 128 - code

def main(argv=None):
    """Runs the script with its arguments, argv or those of the command line; exits as its ranks did."""
    for module in "multiprocessing.api", "agent.server.api":
        logging.getLogger("torch.distributed.elastic." + module).setLevel(logging.CRITICAL)
    subprocess_handler.Popen = functools.partial(subprocess_handler.Popen, preexec_fn=end_with_parent)
    launcher.api.LocalElasticAgent = Agent
    try:
        run.main(argv)
    except ChildFailedError as report:
        sys.exit(explain(report))

if __name__ == "__main__":
    main()
