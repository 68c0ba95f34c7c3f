"""Models with windows, layers without RoPE, YaRN, learned positions, biases, norms of heads or a parallel residual are
decoded from their cache as transformers decodes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.convert import family_models
from tests.structured import layered
from tests.training.small import layout

PROMPTS = [(5, 17, 300, 41), tuple(range(40, 75)), (7,), (9, 9, 9, 120, 6)]  # shorter and longer than the window
NEW = 40
WINDOWS = "mistral-window"
PACKED = ["llama-yarn", "llama-biases", "smollm3", "qwen3", "gpt2", "nemotron", "pythia"]  # engine/decoding.py


def generated(checkpoint: str, stages: int) -> tuple[bool, dict[int, list[int]]]:
    """In a rank: whether its layers read packed prompts; greedy continuations, in batches of two."""
    from megatron_prune import verbs
    from megatron_prune.engine import cpu

    cpu.prepare()
    from megatron_prune.engine import runtime
    from megatron_prune.evaluation import evaluate

    words = ["--load", checkpoint, "--seq-length", "128", *layout(1, stages)]
    args = runtime.start("evaluate", words, verbs.EvaluateSettings(output="none"), complete=evaluate._complete)
    runtime.initialize(args)
    model = runtime.load_model(args)
    cpu.fuse(model)
    from megatron_prune.engine import decoding
    from megatron_prune.evaluation import generation

    asked = [generation.GenerationRequest(prompt, NEW, (), frozenset()) for prompt in PROMPTS]
    return decoding.is_attached(model), generation.generate(model, asked, 2, None)


@pytest.mark.slow
@pytest.mark.parametrize("name", [WINDOWS, *PACKED])
def test_greedy_texts_are_those_of_transformers(name: str, distributed, tmp_path: Path) -> None:
    import torch
    import transformers

    from megatron_prune.convert.huggingface import import_hf

    source = family_models.write(tmp_path / "hf", name)
    checkpoint = import_hf(source, tmp_path / "checkpoint").root
    model = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    expected = [
        model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None)[0, len(prompt) :]
        for prompt in PROMPTS
    ]
    for packed, found in distributed(generated, 2, str(checkpoint), 2):
        assert packed == (name in PACKED)
        assert [found[number] for number in range(len(PROMPTS))] == [row.tolist() for row in expected]


@pytest.mark.slow
@pytest.mark.parametrize("ends", [((0, 50), (0, 60)), ((0, 50), (2, 0)), ((6, 50), (2, 60))])
def test_layers_that_differ_are_decoded_too(ends, tiny_hf, distributed, tmp_path: Path) -> None:
    """The first layer has no attention, nor has the last, or the last has no MLP, or all have both."""
    import torch

    from megatron_prune.convert.huggingface import import_hf

    sizes, source = (ends[0], (4, 192), (1, 64), ends[1]), tiny_hf("llama-gqa", layers=4)
    import_hf(source, tmp_path / "parent")
    cut = layered.cut(tmp_path / "parent", tmp_path / "cut", sizes)
    model = layered.masked(source, layered.selection(sizes))
    expected = [
        model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None)[0, len(prompt) :]
        for prompt in PROMPTS
    ]
    for packed, found in distributed(generated, 2, str(cut), 2):
        assert packed == all(groups and channels for groups, channels in sizes)
        assert [found[number] for number in range(len(PROMPTS))] == [row.tolist() for row in expected]
