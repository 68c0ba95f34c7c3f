"""Arguments that a command line omits come from the checkpoint that it names, which must be a checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune.checkpoint.model_arguments import FORGOTTEN
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.convert.huggingface import export_hf, import_hf
from megatron_prune.errors import CheckpointError
from tests import tiny
from tests.checkpoint import plants, small

NAMES = ("num_layers", "layernorm_epsilon", "rotary_base", "vocab_size", "seq_length", "bf16", "fp16", "tokenizer_type")
RECIPE = "--micro-batch-size 1 --global-batch-size 2 --train-iters 1 --lr 0.1 --mock-data --save-interval 1".split()


def parsed(lines: list[list[str]]) -> list[dict[str, Any]]:
    """In a rank: the arguments that Megatron gets for each command line of ``pretrain``."""
    from megatron_prune.engine import runtime
    from megatron_prune.preflight.dry_run import in_child

    def work(words: list[str]) -> dict[str, Any]:
        args = runtime.start("pretrain", [*RECIPE, *words])
        return {name: getattr(args, name) for name in NAMES} | {"tokenizer_model": str(args.tokenizer_model)}

    return [in_child(lambda words=words: work(words)) for words in lines]


def test_what_is_not_said_comes_from_the_checkpoint(distributed, tiny_hf, tmp_path) -> None:
    imported = tmp_path / "imported"
    import_hf(tiny_hf("llama-gqa", layers=4), imported, dtype=torch.bfloat16)
    trained = small.write(tmp_path / "trained", small.ARGS | {"seq_length": 24, "max_position_embeddings": 64})
    here = str(imported)
    lines = [
        ["--load", here],
        ["--pretrained-checkpoint", here, "--load", str(tmp_path / "new"), "--save", str(tmp_path / "new")],
        ["--shape-from", here, "--use-checkpoint-args"],
        ["--load", here, "--seq-length", "16", "--fp32", "--rotary-base=700", "--norm-epsilon", "3e-4"],
        ["--load", here, "--rotary-base", "5", "--use-checkpoint-args"],
        ["--pretrained-checkpoint", here, "--eod-mask-loss"],
        ["--load", str(trained), "--vocab-size", "100"],
        ["--load", str(trained), "--pretrained-checkpoint", here, "--vocab-size", "100"],
    ]
    (found,) = distributed(parsed, 1, lines)
    model = {"num_layers": 4, "layernorm_epsilon": 3e-4, "rotary_base": 700.0, "vocab_size": tiny.VOCABULARY}
    model |= {"seq_length": 128, "bf16": True, "fp16": False, "tokenizer_type": "NullTokenizer"}
    for got in found[:3]:
        assert model.items() <= got.items(), got
    said = {"seq_length": 16, "bf16": False}
    assert (model | said).items() <= found[3].items(), found[3]
    assert found[4]["rotary_base"] == 700.0  # as Megatron's users know it
    assert found[5]["tokenizer_type"] == "HuggingFaceTokenizer"
    assert found[5]["tokenizer_model"] == str(open_checkpoint(imported).huggingface)
    for got in found[6:]:  # the run's own save takes precedence over its start
        assert got["seq_length"] == 24 and got["num_layers"] == small.ARGS["num_layers"] and not got["bf16"], got


def test_a_command_line_without_a_model_is_refused(distributed, tiny_hf, tmp_path) -> None:
    """Refused in one line: Megatron ends such a run with an assertion, or trains a wrong model."""
    hf, empty = str(tiny_hf("llama-gqa", layers=4)), tmp_path / "empty"
    empty.mkdir()
    trained = str(small.write(tmp_path / "trained"))
    shape = "--num-layers 2 --hidden-size 8 --num-attention-heads 2 --max-position-embeddings 16384".split()
    evaluate = ["--data-path", "none", "--output", "none"]
    foreign = f"{hf} is a Hugging Face model .*convert import --hf {hf} --save"
    cases = [
        ("pretrain", RECIPE, "--num-layers: .*--load, --pretrained-checkpoint or --shape-from.*--num-attention-heads"),
        ("pretrain", [*RECIPE, *shape[2:]], "--num-layers: "),
        ("pretrain", [*RECIPE, *shape], "--seq-length: .*16384"),
        ("pretrain", [*RECIPE, "--load", str(empty)], f"--num-layers: .*no checkpoint in --load {empty}"),
        ("pretrain", [*RECIPE, "--load", trained, "--rotary-base=5"], r"--rotary-base: expected 10000, as in .*got 5"),
        ("pretrain", [*RECIPE, "--shape-from", trained, "--window-size", "8,0"], "--window-size: expected no such"),
        ("evaluate", ["--load", trained, "--num-query-groups", "4", *evaluate], "--num-query-groups: expected 2, "),
        ("sparsify", ["--load", trained, "--method", "magnitude", "--ratio", "0.5", "--save", "none",
                      "--position-embedding-type", "none"], "--position-embedding-type: expected rope, "),
        ("pretrain", [*RECIPE, "--load", hf], foreign),
        ("pretrain", [*RECIPE, "--load", hf, "--save", hf], foreign),
        ("pretrain", [*RECIPE, "--pretrained-checkpoint", hf], foreign),
        ("pretrain", [*RECIPE, "--shape-from", hf], foreign),
        ("evaluate", ["--load", hf, *evaluate], foreign),
        ("evaluate", ["--load", str(empty), "--seq-length", "8", *evaluate], "--num-layers: "),
        ("calibrate", ["--load", hf, "--calibration-data-path", "none", "--output", "s.safetensors"], foreign),
        ("sparsify", ["--load", hf, "--method", "magnitude", "--ratio", "0.5", "--save", "none"], foreign),
        ("plan", ["--load", hf, "--method", "random", "--ratio", "0.5", "--output", "none"], foreign),
    ]  # fmt: skip
    (ends,) = distributed(plants.run_verbs, 1, cases)
    for (verb, words, says), (code, said) in zip(cases, ends, strict=True):
        assert code == 2, (verb, words, said)
        assert len(said.strip().splitlines()) == 1, said
        assert re.search(says, said), (verb, words, said)


def test_a_megatron_checkpoint_is_not_imported(tiny_parent: Path, tiny_hf: Any, tmp_path: Path) -> None:
    for folder in (tiny_parent, tiny_parent / "release"):
        with pytest.raises(
            CheckpointError,
            match=f"{folder}: expected .* got a Megatron .*convert export --load {folder} --hf",
        ):
            import_hf(folder, tmp_path / "made")
    with pytest.raises(CheckpointError, match="is a Hugging Face model .*convert import"):
        export_hf(tiny_hf("llama-gqa", layers=4), tmp_path / "made")
    assert not list(tmp_path.iterdir())


LLAMA_LIKE = {
    "use_rope_scaling": True, "rope_scaling_factor": 3.0, "layernorm_epsilon": 0.25, "init_method_std": 0.5,
    "embedding_init_method_std": 0.3, "make_vocab_size_divisible_by": 3, "vocab_size": 101, "qk_layernorm": True,
    "window_size": (4, 0), "window_attn_skip_freq": [1, 0, 1, 0], "no_rope_freq": [0, 1, 0, 1],
    "rotary_seq_len_interpolation_factor": 2, "rotary_percent": 0.5, "rotary_base": 77, "add_qkv_bias": True,
    "rotary_interleaved": True,
}  # fmt: skip
YARN = {
    "position_embedding_type": "yarn", "rotary_scaling_factor": 3.0, "mscale": 0.7, "mscale_all_dim": 0.2,
    "yarn_original_max_position_embeddings": 48, "yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0,
    "yarn_correction_range_round_to_int": False,
}  # fmt: skip
GPT_LIKE = {
    "swiglu": False, "normalization": "LayerNorm", "bias_gelu_fusion": True, "layernorm_zero_centered_gamma": True,
    "add_bias_linear": True, "add_qkv_bias": True, "position_embedding_type": "learned_absolute",
    "parallel_residual": True,
}  # fmt: skip
SQUARED = {"swiglu": False, "squared_relu": True, "bias_gelu_fusion": False, "apply_layernorm_1p": True}
MODELS = [LLAMA_LIKE, YARN, GPT_LIKE, SQUARED]


def restored(roots: list[str], names: list[list[str]]) -> list[dict[str, Any]]:
    """In a rank: the named arguments of the model that each checkpoint alone gives."""
    from megatron_prune.engine import runtime
    from megatron_prune.preflight.dry_run import in_child

    def work(root: str, wanted: list[str]) -> dict[str, Any]:
        args = runtime.start("pretrain", [*RECIPE, "--seq-length", "16", "--shape-from", root])
        return {name: getattr(args, name) for name in wanted}

    return [
        in_child(lambda root=root, wanted=wanted: work(root, wanted)) for root, wanted in zip(roots, names, strict=True)
    ]


def test_what_changes_a_model_is_restored_from_its_checkpoint(distributed, tmp_path) -> None:
    """Every argument of ``FORGOTTEN``; the others are refused, which tests/checkpoint/test_model_arguments.py holds."""
    assert set(FORGOTTEN) <= {name for model in MODELS for name in model}
    fitting = {"max_position_embeddings": 64}
    roots = [str(small.write(tmp_path / str(i), small.ARGS | fitting | model)) for i, model in enumerate(MODELS)]
    wanted = [sorted(set(model) - {"apply_layernorm_1p"}) for model in MODELS]
    wanted[3].append("layernorm_zero_centered_gamma")  # the earlier name of the same argument
    (found,) = distributed(restored, 1, roots, wanted)
    for model, got in zip([*MODELS[:3], SQUARED | {"layernorm_zero_centered_gamma": True}], found, strict=True):
        for name, value in got.items():
            assert (tuple(value) if isinstance(value, tuple | list) else value) == (
                tuple(model[name]) if isinstance(model[name], tuple | list) else model[name]
            ), name
