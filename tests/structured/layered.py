"""A parent of which every layer keeps other sizes: its plan, and the same cut of the Hugging Face model by masking."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from megatron_prune.checkpoint.reader import Checkpoint, open_checkpoint
from megatron_prune.methods.base import Selection
from megatron_prune.structured import apply
from megatron_prune.structured.plan import PruningPlan

# Query groups (of 6, two heads each) and FFN channels (of 192) of the four layers. A single group: fewer than TP = 2.
SIZES = ((6, 50), (0, 192), (1, 64), (4, 0))


def selection(sizes: Any = SIZES, *, heads_per_group: int = 2, of: tuple[int, int] = (6, 192)) -> Selection:
    """Scattered groups and channels of these numbers."""
    draw = random.Random(3)
    heads, ffn = [], []
    for groups, channels in sizes:
        chosen = sorted(draw.sample(range(of[0]), groups))
        heads.append(tuple(g * heads_per_group + h for g in chosen for h in range(heads_per_group)))
        ffn.append(tuple(sorted(draw.sample(range(of[1]), channels))))
    return Selection(tuple(range(len(sizes))), heads=tuple(heads), ffn=tuple(ffn))


def plan(parent: Checkpoint, kept: Selection) -> PruningPlan:
    return PruningPlan(
        method="minitron-width", settings={}, seed=None, ratio=None, ratio_of="linears", source=parent.shape,
        target=kept.shape(parent.shape), parent=parent.fingerprint(), kept_layers=kept.layers, kept_hidden=kept.hidden,
        kept_heads=kept.heads, kept_ffn=kept.ffn,
    )  # fmt: skip


def cut(parent: Path, folder: Path, sizes: Any = SIZES) -> Path:
    """The checkpoint of the parent that keeps ``selection(sizes)``."""
    apply.apply_plan(parent, plan(open_checkpoint(parent), selection(sizes)), folder)
    return folder


def masked(folder: Path, kept: Selection, *, head: int = 12) -> Any:
    """transformers' model in float64 whose removed heads and channels are zero where the next matrix reads them."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    assert kept.heads is not None and kept.ffn is not None
    with torch.no_grad():
        for layer, heads, ffn in zip(model.model.layers, kept.heads, kept.ffn, strict=True):
            for matrix, channels in (
                (layer.self_attn.o_proj, [h * head + i for h in heads for i in range(head)]),
                (layer.mlp.down_proj, list(ffn)),
            ):
                alive = torch.zeros(matrix.weight.shape[1], dtype=torch.bool)
                alive[channels] = True
                matrix.weight[:, ~alive] = 0
    return model


def megatron_logits(folder: str, tokens: torch.Tensor, tp: int) -> torch.Tensor | None:
    """In a rank: logits of a checkpoint whose layers differ, built, checked and loaded by Megatron alone."""
    from argparse import Namespace

    from megatron_prune.engine import cpu

    cpu.prepare()
    from megatron.core import dist_checkpointing
    from megatron.core import parallel_state as mpu
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import get_gpt_heterogeneous_layer_spec
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region, model_parallel_cuda_manual_seed
    from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
    from megatron.training.arguments import validate_model_config_args_from_heterogeneous_config

    checkpoint = open_checkpoint(folder)
    args, shape = Namespace(**checkpoint.args), checkpoint.shape
    args.use_rotary_position_embeddings = True  # which it asks for, and then ignores
    validate_model_config_args_from_heterogeneous_config(args)
    torch.distributed.init_process_group("gloo")
    mpu.initialize_model_parallel(tp)
    model_parallel_cuda_manual_seed(1)
    config = HeterogeneousTransformerConfig(
        num_layers=shape.num_layers, hidden_size=shape.hidden_size, num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups, kv_channels=shape.kv_channels, ffn_hidden_size=shape.ffn_hidden_size,
        use_cpu_initialization=True, gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        bias_activation_fusion=False, normalization="RMSNorm", layernorm_epsilon=args.layernorm_epsilon,
        add_bias_linear=False, tensor_model_parallel_size=tp, hidden_dropout=0.0, attention_dropout=0.0,
        heterogeneous_layers_config_encoded_json=args.heterogeneous_layers_config_encoded_json,
    )  # fmt: skip
    model = GPTModel(
        config, get_gpt_heterogeneous_layer_spec(config), vocab_size=shape.padded_vocab_size, max_sequence_length=128,
        position_embedding_type="rope", rotary_base=int(args.rotary_base), rope_scaling=True,
        rope_scaling_factor=args.rope_scaling_factor, share_embeddings_and_output_weights=shape.tied,
    ).eval()  # fmt: skip
    wanted = {"model": model.sharded_state_dict(metadata={"dp_cp_group": mpu.get_data_parallel_group(True)})}
    model.load_state_dict(dist_checkpointing.load(wanted, str(checkpoint.directory))["model"], strict=True)
    with torch.no_grad():
        found = model(tokens, torch.arange(tokens.shape[1])[None].expand_as(tokens), None)
        return gather_from_tensor_model_parallel_region(found)
