"""Masks as an artifact: the folder ``masks/`` beside a checkpoint, which says what sparse pruning removed.

A mask is a bool tensor in the shape of its weight [out, in]; True is kept. Zero weights alone are no mask: a kept
weight may be zero. Only the blocks' linears have masks, under the weights' logical names, and only those that were
pruned. On disk they are a `torch_dist` folder, sharded like the weights of whoever wrote it:

    masks/masks.json      version, shape of the model, pattern and count of every mask, a hash that no layout changes
    masks/.metadata, …    one uint8 tensor a mask: eight inputs a byte [out, ceil(in / 8)], the first in the lowest
                          bit; one input a byte [out, in] where a shard's width was no multiple of 8

* ``pattern.py``    ``unstructured`` and ``N:M``
* ``reader.py``     ``open_masks``: any rectangle of a mask, whatever layout wrote it; no Megatron
* ``writer.py``     ``write_single``: one process
* ``megatron.py``   ``save`` and ``local``: ranks, each with its own shards; imports Megatron
* ``verify.py``     masks against weights
* ``cut.py``        masks of a checkpoint that loses layers or channels
* ``huggingface.py``  ``masks.safetensors``, beside a Hugging Face model
"""

from megatron_prune.masks.mask_reader import MASKS, MASKS_FILE, Entry, Masks, find_masks, open_masks
from megatron_prune.masks.mask_writer import write_single
from megatron_prune.masks.pattern import Pattern
from megatron_prune.masks.verify import verify

__all__ = ["MASKS", "MASKS_FILE", "Entry", "Masks", "Pattern", "find_masks", "open_masks", "verify", "write_single"]
