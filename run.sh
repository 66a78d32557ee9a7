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
#   smoke                                  one twentieth of nano, for a first look
#   nano_unlimited                         nano without a cap: an ensemble
#   tiny limited two_hour                  100M tokens on 8xH100 for 15, 60 or 120 minutes
#   unlimited unlimited_snapshots          100M tokens on any number of nodes
#
# The first start makes .venv and installs requirements.txt into it, again only when that file changes; the
# nano tracks build data/nano when it isn't there. data/ and runs/ lie in this folder, wherever it is started
# from. One process is started for each visible GPU, and one when there is none, always through torchrun.
# A mistake in the input prints one line and exits with 2; signal N, here or in a process, exits with 128 + N.
#
# Environment
#   PYTHON               the interpreter that makes .venv, 3.10 or newer (default: python3)
#   NPROC                processes to start on this node (default: see above)
#   OMP_NUM_THREADS      CPU threads for each process (default: the physical cores, shared out evenly)
#   PET_...              torchrun's arguments, by its own convention; on each of 8 nodes, for example:
#                        PET_NNODES=8 PET_RDZV_BACKEND=c10d PET_RDZV_ENDPOINT=HOST:29500 ./run.sh unlimited
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

# torchrun without its report of a failed worker, which has spoken for itself, and with its exit code.
torchrun='
import sys
sys.path.pop(0)  # the directory it is started from
import logging, signal
signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an interrupted import
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main
for module in "multiprocessing.api", "agent.server.api":
    logging.getLogger("torch.distributed.elastic." + module).setLevel(logging.CRITICAL)
try:
    main()
except ChildFailedError as report:
    rank, failure = report.get_first_failure()
    if failure.exitcode > 0:
        sys.exit(failure.exitcode)
    print(f"error: rank {rank} was ended: {failure.message}", file=sys.stderr)
    sys.exit(128 - failure.exitcode)
except SignalException as death:
    sys.exit(128 + death.sigval)
'

launch() {
    export PET_NPROC_PER_NODE=${PET_NPROC_PER_NODE:-${NPROC:-$(visible_gpus)}}
    [[ $PET_NPROC_PER_NODE != 0 ]] || PET_NPROC_PER_NODE=1
    if [[ ! ${OMP_NUM_THREADS-} && $PET_NPROC_PER_NODE =~ ^[0-9]+$ ]]; then
        OMP_NUM_THREADS=$(($(physical_cores) / PET_NPROC_PER_NODE))
        export OMP_NUM_THREADS=$((OMP_NUM_THREADS > 0 ? OMP_NUM_THREADS : 1))
    fi
    [[ ${PET_NNODES-}${PET_RDZV_ENDPOINT-}${PET_MASTER_ADDR-} ]] || export PET_STANDALONE=1
    # Slurm announces the end of a job's time with SIGUSR1; torchrun passes on the others by itself.
    export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}
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
for flag; do
    case $flag in
        -h | --help) dataset='' NPROC=1 ;;
        --data | --data=* | --eval | --eval=* | --plan) dataset='' ;; # these bring their data, or need none
    esac
done

set_up >&2
[[ ! $dataset || -d data/$dataset ]] || "$venv_python" data/prepare.py "$dataset"
case $command in
    data) cd "$caller" && exec "$venv_python" "$root/data/prepare.py" "$@" ;;
    test) exec "$venv_python" -m pytest "${@:-tests}" ;;
    *) launch --track "$command" "$@" ;;
esac
