#!/usr/bin/env bash
# Slowrun: set-up and launch.
#
#   ./run.sh [TRACK] [FLAGS]    train (nano is the default); ./run.sh TRACK --help lists the flags
#   ./run.sh TRACK --plan       what it would take, without training; --rehearse: tried out, on this machine
#   ./run.sh data NAME          build a dataset: nano (seconds), fineweb100M (a long download)
#   ./run.sh test [--all]       the tests, or the slow ones too; other arguments go to pytest
#   ./run.sh runs               what is in runs/; commands take a run by its name there or by a path
#   ./run.sh compare A B        two runs or records: is it a gain, and what differs
#   ./run.sh eval RUN           scores a run again, or on another text
#   ./run.sh sample RUN         lets it write; export RUN makes safetensors of it
#   ./run.sh ruler RUN          scores it independently, as every record is
#   ./run.sh add RUN...         files a record; beside it: check, render, diff, reproduce, power, efficiency
#
# All of these answer to --help. data/ and runs/ lie in this folder, wherever it is started from; nano tracks
# build data/nano themselves. The first start makes .venv; requirements that have changed are installed anew.
#
# A run saves its state every five minutes, and goes on from there by itself when a process of it was killed.
# Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 save and end it with 75: the same command with --resume goes on. Further
# exit codes: 2 a mistake in the input, 3 a loss that is not finite, 4 a process that hangs, 128 + its signal.
#
#   PYTHON               the interpreter that makes .venv, 3.10 or newer (default: python3)
#   NPROC                processes on this node (default: one for each visible GPU, or one)
#   OMP_NUM_THREADS      CPU threads of each process (default: the physical cores, shared out evenly)
#   PET_MAX_RESTARTS     how often all start again after one was killed (default: 3)
#   PET_...              torchrun's other arguments; cluster/README.md has those of several nodes
#   PIP_EXTRA_INDEX_URL  https://download.pytorch.org/whl/cpu saves a machine without GPU the CUDA libraries
set -euo pipefail
script=$(readlink -f "${BASH_SOURCE[0]}")
root=${script%/*}
venv_python=$root/.venv/bin/python

fail() {
    echo "error: $1" >&2
    exit 2
}

# ---- Set-up --------------------------------------------------------------------------------------

# .venv has a copy of each requirements file that it fulfils. The copy is written last, so that an interrupted
# installation is done again.
installed() { [[ -x $venv_python ]] && cmp -s "$root/$1" "$root/.venv/$1"; }

find_python() { # .venv's own where there is one
    python=$venv_python
    ! "$python" -m pip --version &>/dev/null || return 0
    python=${PYTHON:-python3}
    command -v "$python" >/dev/null ||
        fail "$python is missing; install it: sudo apt-get install python3-venv (macOS: brew install python)"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$python is older than Python 3.10; name a newer one: PYTHON=python3.12 ./run.sh"
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$python has no venv module; install it with: sudo apt-get install $(basename "$python")-venv"
}

count_seconds() { # until it is ended, or this script has
    while kill -0 $$ 2>/dev/null; do
        printf '\rinstalling %s into .venv: %d s ' "$1" $SECONDS
        sleep 1
    done
}

install() {
    ! installed "$1" || return 0
    [[ -w $root && -w $root/requirements.txt ]] || fail "no permission to write in $root; use your own clone"
    find_python
    echo "installing $1 into .venv (once, some minutes)"
    # Of two starts at once the second waits here. flock(2) locks the open file, which this shell shares with
    # the process that asks for it: the lock lasts until descriptor 9 is closed; no crash leaves it behind.
    exec 9>>"$root/requirements.txt"
    "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
    if ! installed "$1"; then
        [[ $python == "$venv_python" ]] || "$python" -m venv "$root/.venv"
        local log=$root/.venv/pip.log code=0
        [[ ! -t 1 ]] || { SECONDS=0 && count_seconds "$1"; } 9>&- & # it holds no lock
        "$venv_python" -m pip install --disable-pip-version-check -r "$root/$1" &>"$log" || code=$?
        [[ ! -t 1 ]] || { kill $! && wait $!; } 2>/dev/null || echo
        ((!code)) || { tail -n 15 "$log" && fail "$1 could not be installed; more is in .venv/pip.log"; }
        cp "$root/$1" "$root/.venv/$1.tmp"
        mv "$root/.venv/$1.tmp" "$root/.venv/$1"
    fi
    exec 9>&-
}

# ---- Ranks and threads ---------------------------------------------------------------------------

visible_gpus() {
    local gpus
    gpus=$(nvidia-smi -L 2>/dev/null | grep '^GPU ') || true
    if [[ $gpus && ${CUDA_VISIBLE_DEVICES+set} ]]; then # CUDA ignores what follows the first invalid device
        gpus=$(tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | sed '/^-/,$d')
    fi
    grep -c . <<<"$gpus" || true
}

physical_cores() {
    [[ $(uname) != Darwin ]] || { sysctl -n hw.physicalcpu && return; }
    { lscpu -p=CORE,SOCKET | grep -v '^#' | sort -u | wc -l; nproc; } | sort -n | head -1 # nproc: may be used
}

set_environment() { # for cluster/torchrun.py
    local gpus
    gpus=$(visible_gpus)
    export PET_NPROC_PER_NODE=${PET_NPROC_PER_NODE:-${NPROC:-$((gpus ? gpus : 1))}}
    if [[ ! ${OMP_NUM_THREADS-} && $PET_NPROC_PER_NODE =~ ^[0-9]+$ ]]; then
        OMP_NUM_THREADS=$(($(physical_cores) / PET_NPROC_PER_NODE))
        export OMP_NUM_THREADS=$((OMP_NUM_THREADS > 0 ? OMP_NUM_THREADS : 1))
    fi
    [[ ${PET_NNODES-}${PET_RDZV_ENDPOINT-}${PET_MASTER_ADDR-} ]] || export PET_STANDALONE=1
    export PET_MAX_RESTARTS=${PET_MAX_RESTARTS:-3} PET_SIGNALS_TO_HANDLE=''
    # Without it the ranks of a second start may read the addresses that those of the first left in the store.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    ((!gpus)) || return 0 # on a CPU glibc keeps what tensors free: to fault it in anew took a tenth of a step
    export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_-0} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_-2147483647}
}

# ---- Commands ------------------------------------------------------------------------------------

number() { # is $1 unset, empty, or a number from 1?
    [[ ! ${!1-} || ${!1} =~ ^[1-9][0-9]{0,3}$ ]] || fail "$1=${!1} is no number from 1 to 9999"
}

command=nano dataset=''
[[ $# == 0 || ($1 == -* && $1 != -h && $1 != --help) ]] || { command=$1 && shift; }
case $command in
    -h | --help)
        sed -n '2,/^set /s/^# \{0,1\}//p' "$script"
        echo
        exec sed -n 's/^"\([a-z_]*\)": .*"rule": "\(.*\)"}.*/\1: \2/p' "$root/records/tracks.json" ;;
    compare | add | check | render | diff | reproduce | runs | power | efficiency)
        program=("$root/records/leaderboard.py" "$command") ;;
    ruler) program=("$root/records/ruler.py") ;;
    eval) program=("$root/records/ruler.py" eval) ;;
    sample) program=("$root/sample.py") ;;
    export) program=("$root/sample.py" export) ;;
    data)
        program=("$root/data/prepare.py")
        [[ ${1-} =~ ^(nano|fineweb|fresh$|verify$|-) ]] || fail "no dataset '${1-}': nano or fineweb100M" ;;
    test)
        dataset=nano program=(-m pytest -n 2 --dist loadfile --no-loadscope-reorder "$root/tests")
        for argument; do
            file=${argument%%::*}
            [[ -e $file || $file != *.py ]] || fail "no file $file to test"
            [[ ! -e $file ]] || program=(-m pytest)
        done ;;
    *)
        program=("$root/cluster/torchrun.py" "$root/train_gpt.py" --track "$command")
        tracks=$(sed -n 's/^"\([a-z_]*\)": .*"dataset": "\([^"]*\)".*/\1 \2/p' "$root/records/tracks.json")
        while read -r track data; do [[ $track != "$command" ]] || dataset=$data; done <<<"$tracks"
        [[ $dataset ]] || fail "no track '$command'; choose from: $(cut -d ' ' -f 1 <<<"$tracks" | xargs)"
        number NPROC
        number OMP_NUM_THREADS
        for flag; do
            shift
            case $flag in
                --track | --track=*) fail "the track is the first word, as in ./run.sh limited" ;;
                -h | --help) dataset='' NPROC=1 ;;
                --data | --data=*) dataset='' ;; # it brings its data
                --plan) dataset='' program=("$root/plan.py" --track "$command") ;;
                --rehearse) dataset='' program[1]=$root/rehearse.py ;;
            esac
            [[ $flag == --plan || $flag == --rehearse ]] || set -- "$@" "$flag" # it goes to no program
        done ;;
esac

install requirements.txt >&2
[[ $command != test ]] || install requirements-test.txt >&2
[[ $dataset != nano || -d $root/data/nano ]] || "$venv_python" "$root/data/prepare.py" nano # no other one
[[ ${program[0]} != */torchrun.py ]] || set_environment
exec "$venv_python" "${program[@]}" "$@"
