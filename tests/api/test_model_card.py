"""The model card of an export says what the account says, and the Hub can read it."""

from __future__ import annotations

import megatron_prune as mp
from megatron_prune.api import model_card
from megatron_prune.checkpoint.reader import open_checkpoint

TRAINED = {
    "kind": "trained", "start": None, "tokens": 4096, "flops": 3 * 10**9, "steps": 8, "global_batch_size": 4,
    "seq_length": 128, "seed": 7, "masks": None,
}  # fmt: skip


def test_a_card_has_the_shape_and_the_history(tiny_parent, tmp_path) -> None:
    from huggingface_hub import ModelCard

    plan = mp.plan(tiny_parent, "random", axis="depth", ratio=0.5, output=tmp_path / "plan.json")
    cut = mp.apply(tiny_parent, plan, tmp_path / "cut")
    mp.export_hf(cut.path, tmp_path / "hf")
    read = ModelCard.load(tmp_path / "hf" / "README.md")
    assert read.data.library_name == "transformers" and read.data.tags == ["megatron_prune", "pruned"]
    assert f"{cut.parameters:,} parameters in float32: 2 layers, hidden size\n96, FFN 192, 12 heads" in read.text
    assert "1. pruned by random; read 0 tokens" in read.text and "the weights were made elsewhere" in read.text
    assert open_checkpoint(cut.path).fingerprint() in read.text and "Removed weights" not in read.text
    mp.export_hf(tiny_parent, tmp_path / "parent")
    assert "is not known: the checkpoint was made elsewhere." in (tmp_path / "parent" / "README.md").read_text()


def test_stages_are_words() -> None:
    assert model_card.words(TRAINED) == (
        "trained from random weights: 4,096 tokens (8 steps of 4 x 128), seed 7, 3.000e+09 FLOPs"
    )
    later = model_card.words({**TRAINED, "start": "f", "masks": "hash"})
    assert later.startswith("trained on: 4,096 tokens") and "its zeros held" in later


def test_a_history_from_random_weights_on_is_summed(tiny_parent, monkeypatch) -> None:
    pruned = {"kind": "pruned", "start": "a", "method": "shortgpt", "tokens": 4, "flops": 10**9}
    monkeypatch.setattr(model_card.lineage, "of", lambda _: [TRAINED, pruned])
    text = model_card.card(open_checkpoint(tiny_parent)).decode()
    assert "In all 4,100 tokens and 4.000e+09 FLOPs, from random weights on." in text
    assert "2. pruned by shortgpt; read 4 tokens, 1.000e+09 FLOPs" in text


def test_a_missing_account_is_said_and_does_not_stop_an_export(tiny_parent, monkeypatch) -> None:
    from megatron_prune.errors import AccountError

    def missing(_):
        raise AccountError("the account is missing")

    monkeypatch.setattr(model_card.lineage, "of", missing)
    text = model_card.card(open_checkpoint(tiny_parent)).decode()
    assert "What was done to these weights is not known: the account is missing." in text
