"""Padding of the vocabulary counts neither in an evaluated loss nor in a training step.

Calibration and scores of candidates are compared with transformers where they are tested; the tiny models are padded.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_prune.checkpoint.layout import weights
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.checkpoint.writer import CheckpointWriter
from megatron_prune.convert.huggingface import import_hf
from tests import reference
from tests.tiny import VOCABULARY
from tests.training.small import GLOBAL_BATCH, MODEL, SEQ_LENGTH, layout, recipe

S, WINDOWS = 32, 5
ROWS = ("embedding.word_embeddings.weight", "output_layer.weight")


def model_in_float64(source: Path):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64).eval()


def rewrite(source: Path, target: Path, *, padding: float = 0.0, forget: bool = False) -> Path:
    """The checkpoint again, its rows of padding all of this value; ``forget`` how many there are."""
    checkpoint = open_checkpoint(source)
    args = {name: value for name, value in checkpoint.args.items() if not (forget and name == "vocab_size")}
    with CheckpointWriter(target, args=args, dtype=torch.float32) as writer:
        for weight in weights(checkpoint.shape):
            tensor = checkpoint.read(weight.name)
            if weight.name in ROWS:
                tensor[VOCABULARY:] = padding
            writer.add(weight.name, tensor.shape, [tensor])
    return target


def evaluate(job, checkpoint: Path, corpus: Path, output: Path, *more: object, nproc: int = 1):
    argv = ["evaluate", "--load", checkpoint, "--data-path", corpus, "--labels", "text",
            "--seq-length", S, "--windows", WINDOWS, "--output", output, *more]  # fmt: skip
    return job(argv, nproc=nproc)


def window_losses(output: Path) -> list[float]:
    return json.loads(output.read_text())["corpora"]["text"]["window_losses"]


def test_evaluate_gives_the_loss_of_transformers_however_the_vocabulary_is_padded(tiny_hf, tiny_corpus, tmp_path, job):
    """Padding of one row, and of more rows than tokens, so that the last of two ranks has no tokens."""
    output = tmp_path / "scores.json"
    for name in ("llama-gqa", "mistral-mha-tied"):
        source = tiny_hf(name, layers=2)
        expected = reference.window_losses(model_in_float64(source), tiny_corpus, S, WINDOWS)
        for divisor, tp, pp in ((4, 1, 1), (128, 2, 1), (1024, 1, 2), (1024, 2, 1)):
            checkpoint = tmp_path / f"{name}-{divisor}"
            if not checkpoint.exists():
                import_hf(source, checkpoint, make_vocab_size_divisible_by=divisor)
            assert open_checkpoint(checkpoint).shape.padded_vocab_size == -(-VOCABULARY // divisor) * divisor
            evaluate(job, checkpoint, tiny_corpus, output, *layout(tp, pp), nproc=tp * pp).ok()
            message = f"{name}, {divisor}, TP={tp}, PP={pp}"
            np.testing.assert_allclose(window_losses(output), expected, rtol=2e-5, err_msg=message)


def test_a_checkpoint_that_does_not_know_its_vocabulary_says_so(tiny_hf, tiny_corpus, tmp_path, job):
    source, output = tiny_hf("llama-gqa", layers=2), tmp_path / "scores.json"
    model = model_in_float64(source)
    import_hf(source, tmp_path / "imported", make_vocab_size_divisible_by=1024)
    checkpoint = rewrite(tmp_path / "imported", tmp_path / "forgot", forget=True)
    said = evaluate(job, checkpoint, tiny_corpus, output).ok().output
    assert f"{checkpoint} does not say how many of its 1024 embeddings are words" in said
    # Megatron's own loss: zero rows have logits of zero, and count.
    tokens = np.fromfile(f"{tiny_corpus}.bin", dtype=np.uint16).astype(np.int64)[: S + 1]
    with torch.no_grad():
        logits = torch.nn.functional.pad(model(torch.from_numpy(tokens[None, :-1])).logits[0], (0, 1024 - VOCABULARY))
    padded = torch.nn.functional.cross_entropy(logits, torch.from_numpy(tokens[1:])).item()
    assert window_losses(output)[0] == pytest.approx(padded, rel=2e-5)

    said = evaluate(job, checkpoint, tiny_corpus, output, "--vocab-size", VOCABULARY).ok().output
    assert "does not say" not in said
    expected = reference.window_losses(model, tiny_corpus, S, WINDOWS)
    np.testing.assert_allclose(window_losses(output), expected, rtol=2e-5)
    # A vocabulary that is too small, or larger than the embedding, is refused.
    refused = evaluate(job, checkpoint, tiny_corpus, tmp_path / "none", "--vocab-size", 1025)
    assert refused.returncode == 2 and "--vocab-size: expected" in refused.output and "got 1025" in refused.output
    refused = evaluate(job, checkpoint, tiny_corpus, tmp_path / "none", "--vocab-size", int(tokens.max()))
    assert refused.returncode == 2 and f"vocabulary of {tokens.max()} tokens, got {VOCABULARY}" in refused.output
    assert not (tmp_path / "none").exists()


def losses(save: Path) -> list[float]:
    with open(save / "losses.csv") as table:
        return [float(row["loss"]) for row in csv.DictReader(table)]


def test_training_does_not_depend_on_padding(tiny_hf, tiny_corpus, tmp_path, job):
    """The loss depends neither on the amount of padding nor on its rows; the first is that of transformers."""
    from megatron_prune.data.streams import Stream

    source = tiny_hf("llama-gqa", layers=2)
    few, many = tmp_path / "few", tmp_path / "many"
    import_hf(source, few, make_vocab_size_divisible_by=2)
    import_hf(source, many, make_vocab_size_divisible_by=1024)
    others = rewrite(many, tmp_path / "others", padding=3.0)

    def train(name: str, start: Path, nproc: int = 1) -> list[float]:
        save = tmp_path / f"run-{name}"
        argv = ["pretrain", "--pretrained-checkpoint", start, 
                *recipe(tiny_corpus, f"0:{3 * GLOBAL_BATCH}", save), *layout(nproc)]  # fmt: skip
        job(argv, nproc=nproc).ok()
        return losses(save)

    found = train("many", many)
    assert train("others", others) == found
    np.testing.assert_allclose(train("few", few), found, rtol=1e-6)
    np.testing.assert_allclose(train("tp2", many, 2), found, rtol=2e-5)
    trained = open_checkpoint(tmp_path / "run-many").read("output_layer.weight")
    assert not trained[VOCABULARY:].any() and trained[:VOCABULARY].any()

    stream = Stream.build([str(tiny_corpus)], SEQ_LENGTH, 3)
    samples = [stream[number] for number in range(GLOBAL_BATCH)]
    with torch.no_grad():
        logits = model_in_float64(source)(torch.stack([torch.as_tensor(sample["tokens"]) for sample in samples])).logits
    labels = torch.stack([torch.as_tensor(sample["labels"]) for sample in samples])
    assert found[0] == pytest.approx(torch.nn.functional.cross_entropy(logits.mT, labels).item(), rel=2e-5)


def test_a_run_from_scratch_takes_its_parents_vocabulary(tiny_hf, tiny_corpus, tmp_path, job):
    """Padding starts as zeros and stays zero, as after pruning of an imported parent."""
    import_hf(tiny_hf("mistral-mha-tied", layers=2), tmp_path / "parent", make_vocab_size_divisible_by=128)
    scratch = tmp_path / "scratch"
    job(["pretrain", "--shape-from", tmp_path / "parent", *recipe(tiny_corpus, f"0:{2 * GLOBAL_BATCH}", scratch)]).ok()
    checkpoint = open_checkpoint(scratch)
    rows = checkpoint.read("embedding.word_embeddings.weight")
    assert checkpoint.args["vocab_size"] == VOCABULARY and len(rows) == 384
    assert not rows[VOCABULARY:].any() and rows[:VOCABULARY].any(dim=1).all()


def test_a_tokenizer_says_how_many_words_there_are(tiny_tokenizer, tiny_corpus, tmp_path, job):
    """Without a flag, Megatron pads by the tokenizer, and the checkpoint says what is padding."""
    at = MODEL.index("--padded-vocab-size")
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tiny_tokenizer]
    run = recipe(tiny_corpus, f"0:{GLOBAL_BATCH}", tmp_path / "run")
    job(["pretrain", *MODEL[:at], *MODEL[at + 2 :], *tokenizer, *run]).ok()
    checkpoint = open_checkpoint(tmp_path / "run")
    assert checkpoint.args["vocab_size"] == VOCABULARY and checkpoint.shape.padded_vocab_size == 384
    assert not checkpoint.read("output_layer.weight")[VOCABULARY:].any()

    small = recipe(tiny_corpus, f"0:{GLOBAL_BATCH}", tmp_path / "small")
    refused = job(["pretrain", *MODEL, "--padded-vocab-size", 256, *tokenizer, *small])
    assert (
        refused.returncode == 2
        and "--tokenizer-model: expected" in refused.output
        and f"got {VOCABULARY}" in refused.output
    )
    refused = job(["pretrain", *MODEL, "--vocab-size", 100, *small])
    assert refused.returncode == 2 and f"vocabulary of 100 tokens, got {VOCABULARY}" in refused.output
    assert not (tmp_path / "small").exists()
