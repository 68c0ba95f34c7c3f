"""Models whose layers differ, as Hugging Face directories: transformers computes the same, and they come back whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.convert.config import config_from_args
from megatron_prune.convert.huggingface import export_hf, import_hf
from megatron_prune.errors import CheckpointError
from tests.structured import layered
from tests.tiny import VOCABULARY

# The first layer has no attention: a cache must not take its length from it.
SIZES = ((0, 50), (6, 192), (1, 64), (4, 0))
PUBLISHED = ((6, 256), (6, 0), (0, 512), (6, 512))  # in multiples of 256, which the published form can say
TOKENS = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(5))


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, trust_remote_code=True).eval()


@pytest.fixture(scope="module")
def exported(tiny_hf: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, ...]]:
    """``exported(sizes, width)``: the parent as Hugging Face has it, its cut, and the export of that."""
    made: dict[Any, tuple[Path, ...]] = {}

    def get(sizes: Any, width: int) -> tuple[Path, ...]:
        if sizes not in made:
            folder = tmp_path_factory.mktemp("layered")
            parent = tiny_hf("llama-gqa", layers=4, intermediate_size=width)
            import_hf(parent, folder / "parent")
            kept = layered.selection(sizes, of=(6, width))
            plan = layered.plan(open_checkpoint(folder / "parent"), kept)
            layered.apply.apply_plan(folder / "parent", plan, folder / "cut")
            made[sizes] = (parent, folder / "cut", export_hf(folder / "cut", folder / "hf"))
        return made[sizes]

    return get


@pytest.mark.parametrize(("sizes", "width", "kind"), [(SIZES, 192, "layered-llama"), (PUBLISHED, 512, "nemotron-nas")])
def test_transformers_computes_the_masked_parent(
    exported: Callable[..., tuple[Path, ...]], tmp_path: Path, sizes: Any, width: int, kind: str
) -> None:
    parent, cut, hf = exported(sizes, width)
    config = json.loads((hf / "config.json").read_text())
    assert config["model_type"] == kind and (hf / "modeling_layered_llama.py").is_file()
    with torch.no_grad():
        expected = layered.masked(parent, layered.selection(sizes, of=(6, width)))(TOKENS).logits
        found = load(hf)(TOKENS).logits
    assert expected.std() > 0.1 and (found - expected).abs().max() < 1e-9
    back = import_hf(hf, tmp_path / "back")
    assert back.shape == open_checkpoint(cut).shape and back.full_hash() == open_checkpoint(cut).full_hash()
    export_hf(tmp_path / "back", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == config


def test_generation_with_a_cache_is_that_without(exported: Callable[..., tuple[Path, ...]]) -> None:
    model = load(exported(SIZES, 192)[2])
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(
        model.generate(TOKENS, **settings, use_cache=True), model.generate(TOKENS, **settings, use_cache=False)
    )


def test_the_published_form_says_what_megatron_reads(exported: Callable[..., tuple[Path, ...]]) -> None:
    """Against Megatron's own reading of the published models' ``block_configs``."""
    from megatron.core.transformer.heterogeneous.heterogeneous_config import AttentionConfig, MLPConfig

    config = json.loads((exported(PUBLISHED, 512)[2] / "config.json").read_text())
    assert config["architectures"] == ["DeciLMForCausalLM"]
    for block, (groups, ffn) in zip(config["block_configs"], PUBLISHED, strict=True):
        attention = AttentionConfig.build_config_from_dict(block, config["num_attention_heads"])
        mlp = MLPConfig.build_config_from_dict(block, config["hidden_size"])
        assert (attention.num_query_groups or 0, attention.no_op) == (groups, not groups)
        assert (mlp.ffn_hidden_size or 0, mlp.no_op) == (ffn, not ffn)


def test_equal_layers_are_imported_as_a_llama(exported: Callable[..., tuple[Path, ...]], tmp_path: Path) -> None:
    parent = exported(PUBLISHED, 512)[0]
    shutil.copytree(parent, tmp_path / "hf")
    config = json.loads((parent / "config.json").read_text())
    block = {"attention": {"n_heads_in_group": 2, "no_op": False}, "ffn": {"ffn_mult": 8.0, "no_op": False}}
    config |= {"model_type": "nemotron-nas", "block_configs": [block] * 4, "intermediate_size": None}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"num_key_value_heads": None}))
    found = import_hf(tmp_path / "hf", tmp_path / "checkpoint")
    assert found.shape == import_hf(parent, tmp_path / "llama").shape
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "llama"


def test_what_no_llama_computes_is_refused(exported: Callable[..., tuple[Path, ...]]) -> None:
    args = open_checkpoint(exported(SIZES, 192)[1]).args
    assert config_from_args(args, torch.float32)["model_type"] == "layered-llama"
    with pytest.raises(CheckpointError, match="add_qkv_bias=True, but LayeredLlamaForCausalLM only supports False"):
        config_from_args({**args, "add_qkv_bias": True}, torch.float32)


def test_windows_of_published_models_are_refused(exported: Callable[..., tuple[Path, ...]], tmp_path: Path) -> None:
    hf = Path(shutil.copytree(exported(PUBLISHED, 512)[2], tmp_path / "hf"))
    config = json.loads((hf / "config.json").read_text())
    config["block_configs"][0]["attention"]["window_length"] = 512
    (hf / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="layer 0: expected attention over all tokens"):
        import_hf(hf, tmp_path / "checkpoint")
