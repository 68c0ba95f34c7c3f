#!/usr/bin/env bash
# Is this node fit for a job? Prints what is wrong and exits with code 1. Run on every node before a job starts.
#
#     bash launch/health.sh [DIRECTORY]      # where the run will be saved
#
# HEALTH_GPUS: expected number of GPUs (default: the processes that torchrun starts, or 8).
set -uo pipefail
node=$(hostname)
wrong=0
complain() { echo "health: $node: $*" >&2; wrong=1; }

wanted=${HEALTH_GPUS:-${PET_NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}}
if command -v nvidia-smi >/dev/null; then
    # A GPU that fell off the bus makes nvidia-smi fail or hang.
    found=$(timeout 60 nvidia-smi --query-gpu=index --format=csv,noheader | wc -l)
    [ "$found" -eq "$wanted" ] || complain "$found GPUs answer, $wanted are wanted"
    while IFS=', ' read -r gpu errors used; do
        [[ "$errors" =~ ^[0-9]+$ ]] && [ "$errors" -gt 0 ] && complain "GPU $gpu: $errors uncorrected memory errors"
        [[ "$used" =~ ^[0-9]+$ ]] && [ "$used" -gt 2048 ] && complain "GPU $gpu: $used MiB are taken by another process"
    done < <(timeout 60 nvidia-smi --format=csv,noheader,nounits \
        --query-gpu=index,ecc.errors.uncorrected.volatile.total,memory.used)
elif [ "$wanted" -gt 0 ]; then
    complain "there is no nvidia-smi, $wanted GPUs are wanted"
fi

# NCCL and data loaders share memory through it; containers start with 64 MB.
shared=$(df --output=avail -B1M /dev/shm 2>/dev/null | tail -n 1)
[ "${shared:-0}" -ge "${HEALTH_SHM_MB:-8192}" ] || complain "/dev/shm has ${shared:-0} MB, ${HEALTH_SHM_MB:-8192} are wanted"

case "${1:-}" in
*://*) set -- ;; # an object store, which the run itself checks
esac
if [ $# -gt 0 ]; then
    mkdir -p "$1" && probe=$(mktemp "$1/.health.XXXXXX") && rm -f "$probe" || complain "$1 cannot be written to"
fi
exit "$wrong"
