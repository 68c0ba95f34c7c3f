# Sourced by node.sh with its command line: environment of Megatron, PyTorch and NCCL on every node. Variables that are
# already set are kept.

# One hardware queue, so that a kernel is issued before the communication that it overlaps with. Megatron refuses
# tensor or context parallelism without it on Hopper and older, and FSDP with it. The run itself sets it too, for bare
# torchrun and for studies (megatron_prune/engine/arguments.py).
case " $* " in
*" --use-torch-fsdp2 "* | *" --use-megatron-fsdp "*) ;;
*) export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}" ;;
esac

# The sizes of activations change with every micro-batch; expandable segments avoid fragmentation.
# Megatron refuses them with NCCL's user buffers, and refuses CUDA graphs with them if NCCL registers graph buffers. An
# asynchronous save sends CUDA tensors to its own process, which cannot open such segments in an unprivileged container
# ("pidfd_getfd: Operation not permitted", pytorch#165685, #179220): this package refuses that pair.
case " $* " in
*" --use-nccl-ub "* | *" --async-save "*) ;;
*)
    export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
    export NCCL_GRAPH_REGISTER="${NCCL_GRAPH_REGISTER:-0}"
    ;;
esac

# A collective that hangs ends its rank after --distributed-timeout-minutes, and torchrun restarts the job.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
# The last collectives of every rank, written when one hangs: they show which rank is missing.
export TORCH_NCCL_TRACE_BUFFER_SIZE="${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"

# Agents share one TCPStore by default and never look its address up again: a replacement node then waits for an
# address that is never written, and the job dies at its first restart (seen with PyTorch 2.15).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"

# WARN prints failures only; INFO also prints the network and the rings at the start: check them once.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# 2^22 x 4.096 µs = 17 s before an InfiniBand packet counts as lost, so that a flapping link does not end the job.
export NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT:-22}"

# Set these for your network; NCCL guesses wrong if a node has several:
#   NCCL_SOCKET_IFNAME=eth0          the interface of the first handshake (GLOO_SOCKET_IFNAME likewise, for gloo)
#   NCCL_IB_HCA=mlx5_0,mlx5_3,…      the adapters of the compute network, not those of storage
#   NCCL_IB_GID_INDEX=3              RoCE v2
#   NCCL_NVLS_ENABLE=0               frees the memory of NVLink SHARP if every GB counts

# Data loading and tokenizing share the cores with eight ranks.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
