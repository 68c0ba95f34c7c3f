"""A parent of which every layer keeps other sizes: its plan, and the same cut of the Hugging Face model by masking."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_prune.checkpoint.reader import Checkpoint, open_checkpoint
from megatron_prune.methods.base import Compensation, Selection
from megatron_prune.structured import apply
from megatron_prune.structured.plan import PruningPlan
from tests.reference import float64

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


def with_means(kept: Selection, *, head: int = 12, of: tuple[int, int] = (12, 192)) -> Selection:
    """``kept``, with made-up mean inputs of all that it removes."""
    assert kept.heads is not None and kept.ffn is not None
    draw = random.Random(4)

    def means(sets: tuple[tuple[int, ...], ...], whole: int, each: int) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(draw.gauss(0, 1) for _ in range((whole - len(one)) * each)) for one in sets)

    return replace(kept, compensation=Compensation(means(kept.heads, of[0], head), means(kept.ffn, of[1], 1)))


def plan(parent: Checkpoint, kept: Selection) -> PruningPlan:
    return PruningPlan(
        method="minitron-width", settings={}, seed=None, ratio=None, ratio_of="linears", source=parent.shape,
        target=kept.shape(parent.shape), parent=parent.fingerprint(), kept_layers=kept.layers, kept_hidden=kept.hidden,
        kept_heads=kept.heads, kept_ffn=kept.ffn, compensation=kept.compensation,
    )  # fmt: skip


def cut(parent: Path, folder: Path, sizes: Any = SIZES, *, biases: bool = False) -> Path:
    """The checkpoint of the parent that keeps ``selection(sizes)``; with ``biases`` for means of the rest."""
    kept = with_means(selection(sizes)) if biases else selection(sizes)
    apply.apply_plan(parent, plan(open_checkpoint(parent), kept), folder)
    return folder


def really_cut(of: Path | torch.nn.Module, kept: Selection, *, head: int = 12) -> Any:
    """transformers' model in float64 with smaller matrices. A part that is gone stays, and adds nothing."""
    model: Any = float64(of)
    assert kept.heads is not None and kept.ffn is not None
    means = kept.compensation or Compensation()
    per_group = model.config.num_attention_heads // model.config.num_key_value_heads
    for place, (layer, heads, ffn) in enumerate(zip(model.model.layers, kept.heads, kept.ffn, strict=True)):
        groups = sorted({one // per_group for one in heads})
        of_heads, of_groups = ([h * head + i for h in some for i in range(head)] for some in (heads, groups))
        attention, mlp = layer.self_attn, layer.mlp
        for block, readers, writer, inputs, mean in (
            (attention, (("q_proj", of_heads), ("k_proj", of_groups), ("v_proj", of_groups)), "o_proj", of_heads,
             means.heads),
            (mlp, (("gate_proj", ffn), ("up_proj", ffn)), "down_proj", ffn, means.ffn),
        ):  # fmt: skip
            whole, bias = getattr(block, writer).weight.detach(), getattr(block, writer).bias
            if not inputs:
                getattr(block, writer).weight.data.zero_()
                continue
            gone = sorted(set(range(whole.shape[1])) - set(inputs))
            if mean is not None:
                more = whole[:, gone] @ torch.tensor(mean[place], dtype=torch.float64)
                bias = more if bias is None else bias.detach() + more
            for name, rows in readers:
                setattr(block, name, _linear(getattr(block, name).weight.detach()[list(rows)]))
            setattr(block, writer, _linear(whole[:, list(inputs)], bias))
    return model


def _linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.nn.Linear:
    made = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    made.weight.data.copy_(weight)
    if bias is not None:
        made.bias.data.copy_(bias)
    return made


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
