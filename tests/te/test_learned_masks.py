"""Masks on Transformer Engine's layers, whose norms are fused into linears, are those on Megatron's local ones."""

from __future__ import annotations

from tests.training.small import layout
from tests.training.test_learned_masks import differences, losses, words


def test_sequence_parallel_te_layers_learn_the_same_masks(tiny_parent, tiny_corpus, tmp_path, job) -> None:
    one, two = tmp_path / "local", tmp_path / "te"
    job(["learn-masks", *words(tiny_parent, tiny_corpus, one, "--transformer-impl", "local")]).ok()
    job(["learn-masks", *words(tiny_parent, tiny_corpus, two, *layout(2), "--sequence-parallel")], nproc=2).ok()
    assert max(differences(one, two).values()) < 1e-3
    assert max(abs(a / b - 1) for a, b in zip(losses(one), losses(two), strict=True)) < 2e-5
