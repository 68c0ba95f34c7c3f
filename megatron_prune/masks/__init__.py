"""The masks artifact: the folder ``masks/`` next to a checkpoint, which records what sparse pruning removed.

A mask is a bool tensor in the shape of its weight [out, in]; True means kept. Masks cannot be inferred from zeros,
because a kept weight may be zero. Only pruned linears of the blocks have masks, under the weights' logical names. On
disk they are a `torch_dist` folder, sharded like the weights of the writer:

    masks/masks.json      version, shape of the model, pattern and count of every mask, a layout-independent hash
    masks/.metadata, …    one uint8 tensor per mask: eight inputs per byte [out, ceil(in / 8)], the first in the
                          lowest bit; or one input per byte [out, in] if a shard's width is not a multiple of 8

* ``pattern.py``      ``unstructured`` and ``N:M``; packed bits
* ``mask_reader.py``  ``open_masks``: read any rectangle of a mask; needs no Megatron
* ``mask_writer.py``  ``write_single``: write from one process
* ``megatron.py``     ``save`` and ``local``: write and read the shards of each rank; imports Megatron
* ``required.py``     ``require_masks``: the masks that a checkpoint must have by its account or ``pruning.json``
* ``with_weights.py`` check masks against weights; masks of a checkpoint that loses layers or channels

``convert/masks.py`` reads and writes ``masks.safetensors`` next to a Hugging Face model.
"""

from megatron_prune.masks.mask_reader import MASKS, MASKS_FILE, Entry, Masks, find_masks, open_masks
from megatron_prune.masks.mask_writer import write_single
from megatron_prune.masks.pattern import Pattern
from megatron_prune.masks.required import missing_masks, require_masks
from megatron_prune.masks.with_weights import verify

__all__ = [
    "MASKS", "MASKS_FILE", "Entry", "Masks", "Pattern", "find_masks", "missing_masks", "open_masks", "require_masks",
    "verify", "write_single",
]  # fmt: skip
