"""Imported models against transformers: Megatron's logits at several layouts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_prune.convert.huggingface import import_hf
from tests.checkpoint import ranks
from tests.tiny import HF_MODELS, VOCABULARY

LAYOUTS = ((1, 1), (2, 1), (1, 2))
CASES = [(name, tp, pp) for name in HF_MODELS for tp, pp in LAYOUTS]


def reference(folder: Path, **rope) -> torch.nn.Module:
    """The model of a Hugging Face directory, with changes to its RoPE parameters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    config.rope_parameters.update(rope)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


@pytest.fixture(scope="session")
def imported(tmp_path_factory, tiny_hf):
    made = {}

    def get(name, **options):
        key = (name, *options.items())
        if key not in made:
            made[key] = import_hf(tiny_hf(name), tmp_path_factory.mktemp("imported") / name, **options).root
        return made[key]

    return get


@pytest.mark.parametrize(("name", "tp", "pp"), CASES)
def test_logits_equal_transformers(name, tp, pp, tiny_hf, imported, distributed):
    tokens = torch.randint(VOCABULARY, (2, 100), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = reference(tiny_hf(name))(tokens).logits
    found = distributed(ranks.logits, tp * pp, str(imported(name)), tp, pp, tokens)[-1]
    assert expected.std() > 0.1  # large enough weights for distinct logits
    assert (found[..., :VOCABULARY] - expected).abs().max() < 1e-3


def test_scaled_rope_is_not_forgotten(tiny_hf, imported, distributed):
    """The factor (32) changes the logits by far more than the tolerance above."""
    tokens = torch.randint(VOCABULARY, (1, 100), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        other = reference(tiny_hf("llama-gqa-tied-rope"), factor=8.0)(tokens).logits
    found = distributed(ranks.logits, 1, str(imported("llama-gqa-tied-rope")), 1, 1, tokens)[-1]
    assert (found[..., :VOCABULARY] - other).abs().max() > 1e-3
