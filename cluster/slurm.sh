#!/usr/bin/env bash
# Slowrun on Slurm: sbatch --nodes 4 --gpus-per-node 8 --time 24:00:00 cluster/slurm.sh TRACK [FLAGS]
#
# TRACK and FLAGS are those of ./run.sh. The job's run is runs/slurm_JOB, on a folder that all nodes share.
# Five minutes before the time is up, or when it is preempted (PreemptMode=REQUEUE), the job saves a state and
# is queued again; it goes on with its run when it starts again, also after `scontrol requeue JOB` and when a
# node has failed. `scancel JOB` ends it, with a state saved.
#SBATCH --job-name=slowrun
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
set -uo pipefail
cd "$SLURM_SUBMIT_DIR" || exit

track=$1 run=slurm_$SLURM_JOB_ID
shift
export PET_NNODES=$SLURM_JOB_NUM_NODES PET_RDZV_BACKEND=c10d PET_RDZV_ID=$SLURM_JOB_ID
PET_RDZV_ENDPOINT=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -1):$((20000 + SLURM_JOB_ID % 10000))
export PET_RDZV_ENDPOINT
if [[ -e runs/$run/run.json ]]; then
    again=(--resume "$run")
else
    again=(--run-name "$run")
fi

srun ./run.sh "$track" "$@" "${again[@]}" &
step=$!
trap 'scancel --signal=USR1 "$SLURM_JOB_ID.0"' USR1 # to all nodes; the ranks save and end with 75
trap 'ended=1' TERM # the ranks got it too: Slurm cancels the job, or queues it again itself
while kill -0 $step 2>/dev/null; do wait $step; done # a signal ends a wait before its time
wait $step
code=$?
[[ $code != 75 || ${ended-} ]] || scontrol requeue "$SLURM_JOB_ID"
exit $code
