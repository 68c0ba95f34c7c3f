"""Forms of a config.json that transformers reads: an import reads the same model, or is refused.

A seeded sample of variations of every family's config (missing, old, new and null keys, and both forms at once), by
transformers' logits before the import and after the export.
"""

from __future__ import annotations

import json
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.convert.huggingface import export_hf, import_hf
from megatron_prune.errors import CheckpointError
from tests.convert import family_models
from tests.convert.family_models import FAMILY_MODELS, logits

LINEAR = {"rope_type": "linear", "factor": 3.0}
OLD_LINEAR = {"type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GONE = object()  # the key is left out
KEYS: dict[str, tuple[Any, ...]] = {
    "rope_scaling": (GONE, GONE, None, {}, LINEAR, OLD_LINEAR, YARN, LLAMA3, LINEAR | {"rope_theta": 99.0}),
    "rope_parameters": (GONE, None, {}, {"rope_type": "default", "rope_theta": 500.0}, LINEAR | {"rope_theta": 300.0},
                        {"rope_theta": 200.0}, OLD_LINEAR, YARN | {"original_max_position_embeddings": 64}, LLAMA3),
    "rope_theta": (GONE, GONE, 1234.0, None),
    "original_max_position_embeddings": (GONE, GONE, GONE, 32),
    "partial_rotary_factor": (GONE, GONE, 0.5, None),
    "rotary_pct": (GONE, GONE, 0.5, None), "rotary_emb_base": (GONE, GONE, 777),
    "tie_word_embeddings": (GONE, True, False, None),
    "attention_bias": (GONE, None), "mlp_bias": (GONE, None), "use_sliding_window": (GONE, False, None),
    "sliding_window": (GONE, GONE, 24, None), "rms_norm_eps": (GONE,), "norm_eps": (GONE,), "layer_norm_eps": (GONE,),
    "use_parallel_residual": (GONE, False), "initializer_range": (GONE,), "hidden_act": (GONE,), "use_cache": (GONE,),
    "no_rope_layer_interval": (GONE, 2), "no_rope_layers": (GONE, None, [1, 1, 0, 1]), "layer_types": (GONE, None),
    "max_window_layers": (GONE, 1), "scale_attn_weights": (GONE,), "use_bias": (GONE,), "head_dim": (GONE, None, 16),
}  # fmt: skip
VARIATIONS = 6  # of every family
TOKENS = torch.arange(2 * 48).view(2, 48) * 7 % 97


def vary(config: dict[str, Any], seed: str) -> dict[str, Any]:
    """One to four keys changed: of those it has, and of those that transformers has had."""
    chance = random.Random(seed)
    known = [key for key in KEYS if key in config or key in ("rope_scaling", "rope_theta", "partial_rotary_factor",
                                                              "original_max_position_embeddings")]  # fmt: skip
    if "rope_parameters" not in config:
        known = [key for key in known if "rope" not in key and "original" not in key and "rotary" not in key]
    for key in chance.sample(known, min(len(known), chance.randint(1, 4))):
        value = chance.choice(KEYS[key])
        config = {k: v for k, v in config.items() if k != key} | ({} if value is GONE else {key: value})
    return config


@pytest.fixture(scope="module")
def family_model(tmp_path_factory):
    written: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in written:
            written[name] = family_models.write(tmp_path_factory.mktemp("forms") / name, name)
        return written[name]

    return get


def check(folder: Path, out: Path) -> str:
    """How the import went: "equal", "refused", or "transformers refuses"."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = logits(folder, TOKENS)
    except Exception:  # whatever it may be
        expected = None
    try:
        import_hf(folder, out / "checkpoint")
    except CheckpointError:
        return "refused"
    if expected is None:
        return "transformers refuses"
    export_hf(out / "checkpoint", out / "hf")
    torch.testing.assert_close(logits(out / "hf", TOKENS), expected, rtol=1e-4, atol=1e-4)
    return "equal"


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_variations_are_read_as_transformers_reads_them(name, family_model, tmp_path):
    model, outcomes, wrong = family_model(name), [], []
    config = json.loads((model / "config.json").read_text())
    for number in range(VARIATIONS):
        folder = tmp_path / f"{number}"
        shutil.copytree(model, folder)
        varied = vary(config, f"{name} {number}")
        (folder / "config.json").write_text(json.dumps(varied))
        try:
            outcomes.append(check(folder, tmp_path / f"{number}-out"))
        except AssertionError as error:
            changed = {key: (config.get(key), varied.get(key, "left out")) for key in config | varied
                       if config.get(key) != varied.get(key, GONE)}  # fmt: skip
            wrong.append(f"{changed}: {str(error).splitlines()[3:5]}")
        shutil.rmtree(folder)
    assert not wrong, "\n".join(wrong)
    assert "equal" in outcomes, outcomes


def head_of(config: dict[str, Any]) -> str:
    return "embed_out.weight" if config["model_type"] == "gpt_neox" else "lm_head.weight"


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "llama-biases"])
def test_a_head_that_differs_from_the_embedding_is_not_tied(name, family_model, tmp_path):
    folder = shutil.copytree(family_model(name), tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    embedding = next(tensor for key, tensor in tensors.items() if key.endswith(("embed_tokens.weight", "wte.weight")))
    for head, tied in ((embedding.clone(), True), (embedding.flip(0), False)):
        safetensors.torch.save_file(tensors | {head_of(config): head.contiguous()}, file, {"format": "pt"})
        out = tmp_path / f"{tied}"
        assert check(folder, out) == "equal"
        assert open_checkpoint(out / "checkpoint").shape.tied == tied


def test_the_single_file_is_read_where_an_index_is_there_too(family_model, tmp_path):
    folder = shutil.copytree(family_model("qwen3"), tmp_path / "hf")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file({k: t * 2 for k, t in tensors.items()}, folder / "other.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "other.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert check(folder, tmp_path / "out") == "equal"
