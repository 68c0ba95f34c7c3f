#!/usr/bin/env bash
# One node of a job: its torchrun agent, with a clean shutdown.
#
#     PET_NNODES=2 PET_NPROC_PER_NODE=8 PET_RDZV_ID=run1 PET_RDZV_ENDPOINT=first-node:29500 \
#         bash launch/node.sh pretrain <flags>          # the same line on every node, in any order
#
# torchrun reads its options from PET_…, as Kubeflow's PyTorchJob passes them too. Rendezvous is c10d: nodes get their
# rank when they join. When a rank or a node dies, all agents stop their ranks and wait until the nodes are complete
# again, up to PET_MAX_RESTARTS times; the ranks then resume from the last save, at the same samples.
#
# PET_NNODES=MIN:MAX lets a job continue with fewer nodes: it waits for the others for last_call_timeout (PET_RDZV_CONF,
# 30 seconds), and admits them when they come back. The batch must divide for every number of nodes, and TP and PP stay:
# optimizer state loads unchanged at another number of data-parallel ranks, and at another TP or PP after
# megatron-prune reshard-optimizer. account.json records the number of ranks of each attempt.
#
# The agent on the host of PET_RDZV_ENDPOINT holds the rendezvous store. A job survives the loss of every node but that
# one: without it all agents exit within seconds with a nonzero code. Slurm then requeues the job, Kubernetes restarts
# its pods, and it resumes from the last save.
#
# A run that is refused (exit code 2) is not restarted, and this script exits with 2. Any other failure exits with
# MEGATRON_PRUNE_RETRY_CODE where it is set (Kubernetes: pytorchjob.yaml), otherwise with torchrun's code.
#
# SIGTERM and SIGUSR1 go to the ranks only. With --exit-signal-handler Megatron finishes its step, saves, and exits with
# code 0 on all nodes; a restart decides by account.json, never by exit codes.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

export PET_NNODES="${PET_NNODES:-1}" PET_NPROC_PER_NODE="${PET_NPROC_PER_NODE:-gpu}"
export PET_RDZV_BACKEND="${PET_RDZV_BACKEND:-c10d}" PET_RDZV_ENDPOINT="${PET_RDZV_ENDPOINT:-localhost:29500}"
export PET_RDZV_ID="${PET_RDZV_ID:-megatron-prune}" PET_MAX_RESTARTS="${PET_MAX_RESTARTS:-3}"

# On one machine: a torchrun whose store no other machine reaches. The store of c10d listens on all addresses, and the
# agent unpickles what is in it.
run=(-m megatron_prune.engine.agent)
if [ "$PET_NNODES" = 1 ]; then run=(-m megatron_prune.engine.launch -); fi

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
    (trap '' TERM USR1; exec "${PYTHON:-python}" "${run[@]}" -m megatron_prune "$@") &
    ;;
*)
    "${PYTHON:-python}" "${run[@]}" -m megatron_prune "$@" &
    ;;
esac
agent=$!
while true; do
    wait "$agent"
    code=$?
    kill -0 "$agent" 2>/dev/null || break # otherwise a signal ended the wait, not the agent
done
case "$code" in 0 | 2) exit "$code" ;; esac
exit "${MEGATRON_PRUNE_RETRY_CODE:-$code}"
