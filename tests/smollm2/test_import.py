"""A published model, SmolLM2-135M, through import: transformers' logits and losses at several layouts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_prune.convert.huggingface import export_hf
from tests import reference
from tests.checkpoint import ranks
from tests.training.small import layout

S, WINDOWS = 256, 3


@pytest.mark.slow  # losses are in every run, at the same layouts
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (3, 1), (1, 2)])
def test_logits_equal_transformers(model, checkpoint, distributed, tp, pp):
    tokens = torch.randint(model.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = model(tokens).logits
    found = distributed(ranks.logits, tp * pp, str(checkpoint), tp, pp, tokens)[-1]
    assert (found[..., : model.config.vocab_size] - expected).abs().max() < 1e-3


def test_perplexity_equals_transformers_to_four_digits(model, checkpoint, corpus, tmp_path, job):
    losses = reference.window_losses(model, corpus, S, WINDOWS)
    expected = float(np.exp(np.mean(losses)))
    assert 8 < expected < 40  # a model that knows English
    argv = ["evaluate", "--load", checkpoint, "--data-path", corpus, "--labels", "text",
            "--seq-length", S, "--windows", WINDOWS]  # fmt: skip
    for tp, pp in ((1, 1), (3, 1), (1, 2)):
        output = tmp_path / f"{tp}-{pp}"
        job([*argv, "--output", output, *layout(tp, pp)], nproc=tp * pp).ok()
        found = json.loads(output.read_text())["corpora"]["text"]["perplexity"]
        assert found == pytest.approx(expected, rel=5e-5), (tp, pp)


def test_export_after_import_is_bit_identical(source, checkpoint, tmp_path):
    export_hf(checkpoint, tmp_path / "back")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_its_gguf_says_what_llama_cpps_converter_said(checkpoint, packaged, tmp_path) -> None:
    """The packaged file was made by llama.cpp: names, shapes, numbers, tokens; and norms, which are not quantised."""
    from gguf import GGUFReader

    theirs = GGUFReader(packaged)
    ours = GGUFReader(export_hf(checkpoint, tmp_path / "exported", gguf=True) / "model.gguf")
    shapes = [{one.name: one.shape.tolist() for one in file.tensors} for file in (ours, theirs)]
    assert shapes[0] == shapes[1]
    norms = [
        {one.name: one.data for one in file.tensors if one.name.endswith("norm.weight")} for file in (ours, theirs)
    ]
    assert len(norms[0]) == 61 and all(np.array_equal(norms[0][name], norms[1][name]) for name in norms[0])
    asked = [name for name in theirs.fields if name.startswith(("llama.", "tokenizer."))]
    assert [name for name in asked if name not in ours.fields] == ["tokenizer.ggml.add_space_prefix"], (
        "of SentencePiece"
    )
    shared = [name for name in asked if name in ours.fields]
    differ = [name for name in shared if ours.fields[name].contents() != theirs.fields[name].contents()]
    assert differ == ["tokenizer.ggml.pre"], "transformers reads this rule, smollm, as that of GPT-2"
