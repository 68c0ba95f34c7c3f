# Sourced by node.sh, with its command line: what Megatron, PyTorch and NCCL are told on every node. What is set
# already stays.

# One hardware queue, so that a kernel is issued before the communication that it overlaps with. Megatron refuses
# tensor or context parallelism without it on Hopper and older, and FSDP with it.
case " $* " in
*" --use-torch-fsdp2 "* | *" --use-megatron-fsdp "*) ;;
*) export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}" ;;
esac

# Activations come and go in other sizes with every micro-batch; growing segments leave no holes between them.
# Megatron refuses them with NCCL's user buffers, and CUDA graphs with them while NCCL registers a graph's buffers.
case " $* " in
*" --use-nccl-ub "*) ;;
*)
    export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
    export NCCL_GRAPH_REGISTER="${NCCL_GRAPH_REGISTER:-0}"
    ;;
esac

# A collective that hangs ends its rank after --distributed-timeout-minutes, and torchrun restarts the job.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
# The last collectives of every rank, written out when one hangs: they say which rank did not come.
export TORCH_NCCL_TRACE_BUFFER_SIZE="${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"

# Agents share one TCPStore by default and remember its address for good: a node that is replaced then waits for an
# address that nobody writes again, and the job dies at its first restart (seen with PyTorch 2.15).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"

# WARN says what failed and nothing else; INFO says at start which network and which rings are used: look once.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# 2^22 x 4.096 µs = 17 s before an InfiniBand packet counts as lost: a link that flaps does not end the job.
export NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT:-22}"

# Set these for your network; NCCL guesses, and guesses wrong where a node has several:
#   NCCL_SOCKET_IFNAME=eth0          the interface of the first handshake (GLOO_SOCKET_IFNAME the same, for gloo)
#   NCCL_IB_HCA=mlx5_0,mlx5_3,…      the adapters of the compute network, not those of storage
#   NCCL_IB_GID_INDEX=3              RoCE v2
#   NCCL_NVLS_ENABLE=0               gives back the memory of NVLink SHARP where every GB counts

# Data loading and tokenizing share the cores with eight ranks.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
