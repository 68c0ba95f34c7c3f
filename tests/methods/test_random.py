"""random: its allowed cuts, whole units, the same for a seed, and all units equally likely."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.errors import UsageError
from megatron_prune.methods.base import DEPTH, WIDTH, PruningRequest, Selection
from megatron_prune.methods.options import RandomOptions
from megatron_prune.methods.random import METHOD

SOURCE = ModelShape(5, 24, 6, 3, 4, 20, 100, tied=False)
CUTS = {
    "num_layers": {"num_layers": 3},
    "hidden_size": {"hidden_size": 17},
    "ffn_hidden_size": {"ffn_hidden_size": 7},
    "heads": {"num_attention_heads": 3},
}


def select(seed: int, **sizes: int) -> Selection:
    return METHOD.select(PruningRequest(SOURCE, replace(SOURCE, **sizes), RandomOptions(), seed=seed))


def test_the_axis_says_what_is_free():
    assert METHOD.free_dimensions(RandomOptions(axis="depth")) == DEPTH
    assert METHOD.free_dimensions(RandomOptions(axis="width")) == WIDTH
    with pytest.raises(UsageError, match="--axis"):
        METHOD.free_dimensions(RandomOptions())


@pytest.mark.parametrize("cut", CUTS)
def test_what_is_cut_has_the_size_asked_for_and_the_rest_is_whole(cut):
    target = replace(SOURCE, **CUTS[cut])
    found = select(0, **CUTS[cut])
    whole = Selection(tuple(range(5)))
    assert {name for name in ("layers", "hidden", "heads", "ffn") if getattr(found, name) != getattr(whole, name)} == {
        {"num_layers": "layers", "hidden_size": "hidden", "ffn_hidden_size": "ffn"}.get(cut, cut)
    }
    assert len(found.layers) == target.num_layers and list(found.layers) == sorted(set(found.layers))
    if found.hidden is not None:
        assert len(found.hidden) == target.hidden_size and list(found.hidden) == sorted(set(found.hidden))
    for units, size in ((found.heads, target.num_attention_heads), (found.ffn, target.ffn_hidden_size)):
        if units is not None:
            assert len(units) == 5 and all(len(of) == size and list(of) == sorted(set(of)) for of in units)
            assert len(set(units)) > 1, "layers draw apart"
    assert found == select(0, **CUTS[cut]) != select(1, **CUTS[cut])


def test_every_channel_and_layer_is_kept_as_often():
    kept = np.zeros(5), np.zeros(20)
    for seed in range(400):
        found = select(seed, num_layers=2, ffn_hidden_size=5)
        np.add.at(kept[0], list(found.layers), 1)
        assert found.ffn is not None
        np.add.at(kept[1], list(found.ffn[0]), 1)
    for counts, share in zip(kept, (2 / 5, 5 / 20), strict=True):
        deviations = (counts - 400 * share) / np.sqrt(400 * share * (1 - share))
        assert np.abs(deviations).max() < 4  # of 25 numbers, seeds fixed
