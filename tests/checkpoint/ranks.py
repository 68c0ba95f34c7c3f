"""Functions of ranks that use Megatron itself: save a model, load one, compute logits."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

SIZES = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 48,
    "kv_channels": 10,
}
STORED_ARGS = SIZES | {
    "group_query_attention": True,
    "padded_vocab_size": 128,
    "vocab_size": 125,
    "layernorm_epsilon": 3e-4,
    "swiglu": True,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "untie_embeddings_and_output_weights": True,
    "params_dtype": torch.float32,
    "consumed_train_samples": 640,
    "load": "/somewhere",
}


def build(tp: int, pp: int, *, seed: int = 0) -> Any:
    """This rank's stage of a small GPT with Megatron's local layers; nothing of ours is involved."""
    from megatron_prune.engine import cpu

    cpu.prepare()
    from megatron.core import parallel_state as mpu
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    torch.distributed.init_process_group("gloo")
    mpu.initialize_model_parallel(tp, pp)
    config = TransformerConfig(
        **SIZES,
        use_cpu_initialization=True,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=False,
        normalization="RMSNorm",
        add_bias_linear=False,
        pipeline_dtype=torch.float32,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
    )
    torch.manual_seed(seed + mpu.get_pipeline_model_parallel_rank())
    import queue

    results: Any = queue.Queue()  # Megatron's own is served by a process that imports the main module
    filesystem_async.get_write_results_queue = lambda mp_mode="spawn": results
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=STORED_ARGS["padded_vocab_size"],
        max_sequence_length=64,
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )


def save(folder: str, tp: int, pp: int, metadata: dict[str, Any]) -> None:
    """Save a random model as Megatron does, at this layout, with an optimizer-like tensor next to it."""
    model = build(tp, pp)
    from megatron.core import dist_checkpointing, parallel_state

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = {
        "model": model.sharded_state_dict(metadata=metadata | {"dp_cp_group": group}),
        "optimizer": dist_checkpointing.ShardedTensor.from_rank_offsets(
            "optimizer.state.exp_avg.decoder", torch.ones(3), replica_id=torch.distributed.get_rank()
        ),
        "args": Namespace(**STORED_ARGS),
        "iteration": 20,
        "checkpoint_version": 3.0,
    }
    if torch.distributed.get_rank() == 0:
        Path(folder).mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(state, folder, async_strategy="mcore", verify_integrity=True)


def load(folder: str, tp: int, pp: int) -> dict[str, torch.Tensor]:
    """Load ``folder`` with Megatron's own loader at this layout; this rank's parameters by local name."""
    model = build(tp, pp, seed=99)
    from megatron.core import dist_checkpointing, parallel_state

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    wanted = {"model": model.sharded_state_dict(metadata={"dp_cp_group": group})}
    # Its default strictness: a key that the checkpoint lacks is an error.
    state = dist_checkpointing.load(wanted, folder, verify_integrity=True)
    model.load_state_dict(state["model"], strict=True)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def masked_logits(load: str, tp: int, pp: int, tokens: torch.Tensor) -> torch.Tensor | None:
    """The same for a save of ``learn-masks``, under its masks in evaluation mode."""
    from megatron_prune.methods.sheared_llama import kinds
    from megatron_prune.training import learned_file

    learned = learned_file.read(Path(load) / learned_file.FILE)

    def mask(model: list[torch.nn.Module]) -> None:
        from megatron_prune.training.gates import Gated

        gated = Gated(model, learned.shape, kinds(learned.shape, learned.target))
        log_alpha = learned.state.log_alpha
        gated.current = gated.evaluation({k.name: gated.shards.cut(k, log_alpha[k.name]) for k in gated.shards.kinds})

    return logits(load, tp, pp, tokens, mask)


def logits(load: str, tp: int, pp: int, tokens: torch.Tensor, change: Any = None) -> torch.Tensor | None:
    """Logits [b, s, padded vocabulary] of ``tokens`` [b, s] from Megatron, on the last stage only."""
    from megatron_prune.engine import cpu, runtime

    cpu.prepare()
    assert os.environ["WORLD_SIZE"] == str(tp * pp)
    flags = {
        "--load": load,
        "--tensor-model-parallel-size": tp,
        "--pipeline-model-parallel-size": pp,
        "--seq-length": tokens.shape[1],
        "--micro-batch-size": len(tokens),
        "--train-iters": 1,
        "--lr": 1.0,
    }
    argv = [*(str(word) for pair in flags.items() for word in pair)]
    args = runtime.start("logits", argv)
    runtime.initialize(args)
    from megatron.core import parallel_state as mpu
    from megatron.core.pipeline_parallel import get_forward_backward_func

    model = runtime.load_model(args)
    if change is not None:
        change(model)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    found: list[torch.Tensor] = []

    def step(_: Any, stage: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        return stage(tokens, positions, None), lambda output, non_loss_data: found.append(output)

    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(()),
            model=model[0],
            num_microbatches=1,
            seq_length=tokens.shape[1],
            micro_batch_size=len(tokens),
            forward_only=True,
            collect_non_loss_data=True,
        )
    if not mpu.is_pipeline_last_stage():
        return None
    parts = [torch.empty_like(found[0]) for _ in range(tp)]
    torch.distributed.all_gather(parts, found[0].contiguous(), group=mpu.get_tensor_model_parallel_group())
    return torch.cat(parts, dim=-1)
