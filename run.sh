#!/usr/bin/env bash
# Slowrun: set-up and launch.
#
#   ./run.sh [TRACK] [FLAGS]     train; FLAGS go to train_gpt.py (./run.sh nano --help lists them)
#   ./run.sh data NAME [FLAGS]   build a dataset: nano (a minute) or fineweb100M (a long download)
#   ./run.sh test [ARGUMENTS]    run the tests; ARGUMENTS go to pytest
#   ./run.sh --help              print this
#
# TRACK is one of
#   nano                                   the default: the full recipe on 1M tokens, minutes on two CPU cores
#   smoke                                  one thirtieth of nano, for a first look
#   nano_unlimited                         the same data, any compute: an ensemble of such models
#   tiny                                   100M tokens on 8xH100 for 15 minutes
#   limited                                the same for 60 minutes
#   two_hour                               the same for 120 minutes
#   unlimited                              100M tokens, up to 64 H100 for 7 days: an ensemble
#   unlimited_snapshots                    the same by snapshots, of which held-out training tokens choose
# ./run.sh TRACK --plan [FLAGS] says what it takes, without training. The tracks of 100M tokens need
# ./run.sh data fineweb100M first.
#
# The first start makes .venv and installs requirements.txt into it, again only when that file changes; the
# nano tracks build data/nano when it isn't there. data/ and runs/ lie in this folder, wherever it is started
# from. One process is started for each visible GPU, and one when there is none, always through torchrun.
#
# A run saves its state every five minutes. When one of its processes is killed, all start again from there.
# SIGTERM, SIGINT (Ctrl-C), SIGHUP and SIGUSR1 make it save one at once and exit with 75: the same command with
# --resume goes on. A mistake in the input exits with 2, a loss that is not finite with 3, a process that does
# not answer with 4, each with one line; what else ends by signal N exits with 128 + N.
#
# Environment
#   PYTHON               the interpreter that makes .venv, 3.10 or newer (default: python3)
#   NPROC                processes to start on this node (default: see above)
#   OMP_NUM_THREADS      CPU threads for each process (default: the physical cores, shared out evenly)
#   PET_MAX_RESTARTS     how often all start again after one was killed (default: 3)
#   PET_...              torchrun's arguments, by its own convention; on each of 8 nodes, for example:
#                        PET_NNODES=8 PET_RDZV_BACKEND=c10d PET_RDZV_ENDPOINT=HOST:29500 ./run.sh limited
#   PIP_EXTRA_INDEX_URL  https://download.pytorch.org/whl/cpu saves a machine without GPU the CUDA libraries
set -euo pipefail
caller=$PWD
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
root=$PWD
venv_python=$root/.venv/bin/python

# ---- Set-up --------------------------------------------------------------------------------------

fail() {
    echo "error: $1" >&2
    exit 2
}

# The stamp is a copy of the requirements.txt that .venv holds. It is written last, so that an interrupted
# installation is done again.
installed() { [[ -x $venv_python ]] && cmp -s requirements.txt .venv/requirements.txt; }

set_up() {
    ! installed || return 0
    local python=${PYTHON:-python3}
    command -v "$python" >/dev/null ||
        fail "$python is missing; install it: sudo apt-get install python3-venv (macOS: brew install python)"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$python is older than Python 3.10; name a newer one: PYTHON=python3.12 ./run.sh"
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$python has no venv module; install it with: sudo apt-get install $(basename "$python")-venv"
    echo "installing requirements.txt into .venv (once, some minutes)"
    # Of two starts at once the second waits here. flock(2) locks the open file, which this shell shares with
    # the process that asks for it: the lock lasts until descriptor 9 is closed; no crash leaves it behind.
    exec 9>>requirements.txt
    "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
    if ! installed; then
        "$python" -m venv .venv
        "$venv_python" -m pip install --disable-pip-version-check -r requirements.txt ||
            fail "requirements.txt could not be installed (pip says why above); then start again"
        cp requirements.txt .venv/requirements.txt.tmp
        mv .venv/requirements.txt.tmp .venv/requirements.txt
    fi
    exec 9>&-
}

# ---- Launch --------------------------------------------------------------------------------------

visible_gpus() {
    local gpus
    gpus=$(nvidia-smi -L 2>/dev/null | grep '^GPU ') || true
    if [[ $gpus && ${CUDA_VISIBLE_DEVICES+set} ]]; then # CUDA ignores what follows the first invalid device
        gpus=$(tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | sed '/^-/,$d')
    fi
    grep -c . <<<"$gpus" || true
}

physical_cores() {
    if [[ $(uname) == Darwin ]]; then
        sysctl -n hw.physicalcpu
    else # nproc: no more than this process may use
        { lscpu -p=CORE,SOCKET | grep -v '^#' | sort -u | wc -l; nproc; } | sort -n | head -1
    fi
}

# torchrun with three differences. Signals are passed on, for the ranks to save a state and end the run, and
# nobody is killed for taking his time. Only the death of a rank makes it start all of them again. Its report
# of a failed rank, which has spoken for itself, is left out; the exit code is that rank's.
torchrun='
import sys
sys.path.pop(0)  # the directory it is started from
import ctypes, functools, logging, os, signal
signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an interrupted import
from torch.distributed import launcher, run
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
for module in "multiprocessing.api", "agent.server.api":
    logging.getLogger("torch.distributed.elastic." + module).setLevel(logging.CRITICAL)

def end_with_parent():
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no rank outlives this process

subprocess_handler.Popen = functools.partial(subprocess_handler.Popen, preexec_fn=end_with_parent)

class Agent(LocalElasticAgent):
    stopped = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for number in signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self.pass_on)

    def pass_on(self, number, frame):
        Agent.stopped, self._remaining_restarts = True, 0
        ranks = self._pcontext.subprocess_handlers.values() if self._pcontext else ()
        running = [rank.proc for rank in ranks if rank.proc.poll() is None]
        for process in running:
            process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)
        if not running:
            sys.exit(128 + number)

    def _monitor_workers(self, group):
        result = super()._monitor_workers(group)
        codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
        killed = [rank for rank in codes if codes[rank] < 0 and codes[rank] != -signal.SIGTERM]
        if codes and (max(codes.values()) > 0 or not killed):
            self._remaining_restarts = 0
        elif codes and self._remaining_restarts:
            name = signal.Signals(-codes[killed[0]]).name
            print(f"rank {killed[0]} was ended by {name}; starting again from the last state", file=sys.stderr)
        return result

launcher.api.LocalElasticAgent = Agent
try:
    run.main()
except ChildFailedError as report:
    rank, failure = report.get_first_failure()
    code = failure.exitcode
    if code == 4:  # the ranks that could not reach it have ended; it had to be killed
        hung = [rank for rank, failure in report.failures.items() if failure.exitcode == -signal.SIGKILL]
        named = ", ".join(map(str, hung)) or "of another node"
        print(f"error: rank {named} does not answer; --resume goes on from the last state", file=sys.stderr)
    if code < 0 and not Agent.stopped:
        print(f"error: rank {rank} was ended by {signal.Signals(-code).name}", file=sys.stderr)
    sys.exit(code if code > 0 else 128 - code)
'

launch() {
    export PET_NPROC_PER_NODE=${PET_NPROC_PER_NODE:-${NPROC:-$(visible_gpus)}}
    [[ $PET_NPROC_PER_NODE != 0 ]] || PET_NPROC_PER_NODE=1
    if [[ ! ${OMP_NUM_THREADS-} && $PET_NPROC_PER_NODE =~ ^[0-9]+$ ]]; then
        OMP_NUM_THREADS=$(($(physical_cores) / PET_NPROC_PER_NODE))
        export OMP_NUM_THREADS=$((OMP_NUM_THREADS > 0 ? OMP_NUM_THREADS : 1))
    fi
    [[ ${PET_NNODES-}${PET_RDZV_ENDPOINT-}${PET_MASTER_ADDR-} ]] || export PET_STANDALONE=1
    export PET_MAX_RESTARTS=${PET_MAX_RESTARTS:-3} PET_SIGNALS_TO_HANDLE=''
    # Without it the ranks of a second start may read the addresses that those of the first left in the store.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    cd "$caller"
    exec "$venv_python" -c "$torchrun" "$root/train_gpt.py" "$@"
}

# ---- Commands ------------------------------------------------------------------------------------

command=nano
if [[ $# -gt 0 && ($1 != -* || $1 == -h || $1 == --help) ]]; then
    command=$1
    shift
fi
case $command in
    -h | --help) exec sed -n '2,/^set /s/^# \{0,1\}//p' run.sh ;;
    nano | smoke | nano_unlimited | test) dataset=nano ;;
    tiny | limited | two_hour | unlimited | unlimited_snapshots | data) dataset='' ;; # no 100M by surprise
    *) fail "no track '$command'; choose from: nano smoke nano_unlimited tiny limited two_hour unlimited\
 unlimited_snapshots" ;;
esac
plan=''
for flag; do
    shift
    case $flag in
        -h | --help) dataset='' NPROC=1 ;;
        --data | --data=* | --eval | --eval=*) dataset='' ;; # these bring their data
        --plan)
            dataset='' plan=yes
            continue # it goes to no program
            ;;
    esac
    set -- "$@" "$flag"
done

set_up >&2
[[ ! $dataset || -d data/$dataset ]] || "$venv_python" data/prepare.py "$dataset"
case $command in
    data) cd "$caller" && exec "$venv_python" "$root/data/prepare.py" "$@" ;;
    test)
        (($#)) || set -- -n 2 --dist loadfile --no-loadscope-reorder tests # two files at a time
        exec "$venv_python" -m pytest "$@"
        ;;
    *)
        [[ $plan ]] || launch --track "$command" "$@"
        cd "$caller" && exec "$venv_python" "$root/plan.py" --track "$command" "$@"
        ;;
esac
