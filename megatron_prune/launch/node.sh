#!/usr/bin/env bash
# One node of a job: its torchrun agent, and a way for it to end well.
#
#     PET_NNODES=2 PET_NPROC_PER_NODE=8 PET_RDZV_ID=run1 PET_RDZV_ENDPOINT=first-node:29500 \
#         bash launch/node.sh pretrain <flags>          # the same line on every node, in any order
#
# torchrun reads its own options from PET_…, which is how Kubeflow's PyTorchJob passes them too. Rendezvous is c10d:
# nodes get their rank when they come. When a rank or a node dies, all agents stop their ranks and wait until the nodes
# are complete again, PET_MAX_RESTARTS times; the ranks then go on from the last save, at the same samples.
#
# PET_NNODES=MIN:MAX lets a job go on with fewer nodes: it waits for the others for last_call_timeout (PET_RDZV_CONF, 30
# seconds), and takes them in when they come back. The batch must divide for every number of nodes, and TP and PP stay:
# optimizer state loads at another number of data-parallel ranks as it is, and at another TP or PP after
# megatron-prune reshard-optimizer. account.json says how many ranks each attempt had.
#
# The agent on the host of PET_RDZV_ENDPOINT holds the rendezvous' store (where that is one machine for all, the first).
# A job outlives every node but that one: without it all agents end within seconds, and not with 0. Whoever started the
# job starts it again (Slurm requeues it, Kubernetes restarts its pods), and it goes on from the last save.
#
# SIGTERM and SIGUSR1 go to the ranks alone. Under --exit-signal-handler Megatron finishes its step, saves, and leaves
# with 0 on all nodes; who starts the job again looks into account.json, never at exit codes.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

export PET_NNODES="${PET_NNODES:-1}" PET_NPROC_PER_NODE="${PET_NPROC_PER_NODE:-gpu}"
export PET_RDZV_BACKEND="${PET_RDZV_BACKEND:-c10d}" PET_RDZV_ENDPOINT="${PET_RDZV_ENDPOINT:-localhost:29500}"
export PET_RDZV_ID="${PET_RDZV_ID:-megatron-prune}" PET_MAX_RESTARTS="${PET_MAX_RESTARTS:-3}"

agent=
tell_ranks() {
    [ -n "$agent" ] || return 0
    local rank
    for rank in $(pgrep -P "$agent"); do kill -TERM "$rank" 2>/dev/null; done
}
trap tell_ranks TERM USR1

case " $* " in
*" --exit-signal-handler "*)
    # Slurm signals every process of a step. The agent must not end its ranks while they save.
    export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGINT}"
    (trap '' TERM USR1; exec "${PYTHON:-python}" -m torch.distributed.run -m megatron_prune "$@") &
    ;;
*)
    "${PYTHON:-python}" -m torch.distributed.run -m megatron_prune "$@" &
    ;;
esac
agent=$!
while true; do
    wait "$agent"
    code=$?
    kill -0 "$agent" 2>/dev/null || exit "$code" # otherwise a signal ended the wait, and not the agent
done
