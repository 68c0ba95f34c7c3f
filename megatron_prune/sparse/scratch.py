"""The scratch folder of ``sparsify``, next to SAVE: finished blocks, from which a killed run resumes.

    .SAVE.sparsify/question.json          the parent, request and calibration of this work
    .SAVE.sparsify/block-0003/            a folder per rank with weights (``checkpoint/parallel.py``), and packed masks
    .SAVE.sparsify/block-0003/done.json   written last, when the block is complete: its rows of the table
    .SAVE.sparsify/counts-0003.json       the outliers of a layer, or its scores by size, where they decide its ratio
    .SAVE.sparsify/levels.json            how far a search for the layers' ratios has come
    .SAVE.sparsify/stage-0-pruning.left   the first stage has its activations ready for the second

Ranks also wait for each other through these files: a later stage may wait for hours, longer than the timeout of a
collective.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from megatron_prune import screen
from megatron_prune.artifacts import explain_full_disk, read_json, write_bytes, write_json
from megatron_prune.checkpoint.parallel import Part, copy_overlap, read_part, write_part
from megatron_prune.errors import CheckpointError, UsageError
from megatron_prune.masks.pattern import pack, unpack
from megatron_prune.methods.evolution import Found
from megatron_prune.methods.level_search import Levels

POLL_SECONDS = 0.1
_PATIENT_SECONDS = 1.0
SEEN_SECONDS = 120.0  # a network file system may cache a missing file for a minute

# Parts of a weight: (logical name, offsets, tensor [rows, columns]).
Shards = Iterable[tuple[str, tuple[int, ...], torch.Tensor]]
# Parts of a pruned weight and its mask: (logical name, offsets, weight, kept).
Pruned = Iterable[tuple[str, tuple[int, ...], torch.Tensor, torch.Tensor]]


class Scratch:
    """The folder that belongs to the output ``save``."""

    def __init__(self, save: Path):
        save = save.absolute()
        self.folder = save.with_name(f".{save.name}.sparsify")
        self.masks = self.folder / "masks"

    # -- the question -------------------------------------------------------------------------------

    def refuse_another(self, question: Mapping[str, Any]) -> None:
        """UsageError if the folder holds unfinished work on another question."""
        path = self.folder / "question.json"
        if not path.exists():
            return
        held = read_json(path)
        differs = [key for key in question if held.get(key) != question[key]]
        if differs:
            raise UsageError(
                "--save", got=f"a directory whose unfinished pruning has another {differs[0]}",
                expected="another directory, or the same command as before",
                do=f"delete {self.folder} to start from the beginning",
            )  # fmt: skip

    def open(self, question: Mapping[str, Any]) -> None:
        """Start or resume the work on ``question``; discard the ranks' signals. Called by one process."""
        if not (self.folder / "question.json").exists():
            shutil.rmtree(self.folder, ignore_errors=True)  # of unknown origin
            write_json(self.folder / "question.json", question)
        for left in self.folder.glob("stage-*.left"):
            left.unlink()
        shutil.rmtree(self.masks, ignore_errors=True)

    def refuse_unseen(self) -> None:
        """UsageError if this machine does not see the first rank's folder: ranks would wait for each other's blocks
        forever."""
        deadline = time.monotonic() + SEEN_SECONDS
        while not (self.folder / "question.json").exists():
            if time.monotonic() >= deadline:
                raise UsageError(
                    "--save", got=f"a directory that {os.uname().nodename} does not see as the first rank does",
                    expected="a directory on a file system that all nodes share",
                )  # fmt: skip
            time.sleep(_PATIENT_SECONDS)

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    # -- blocks -------------------------------------------------------------------------------------

    def write(self, layer: int, rank: int, pruned: Pruned) -> None:
        """Store a tensor-parallel rank's shards of a pruned block, with only one and the packed masks in memory."""
        folder = self._block(layer)
        packed, places = {}, []

        def weights() -> Shards:
            for number, (name, offsets, weight, kept) in enumerate(pruned):
                packed[str(number)] = pack(kept)
                places.append([name, list(offsets), list(kept.shape)])
                yield name, offsets, weight

        with explain_full_disk(folder, "the blocks before it are kept"):
            folder.mkdir(parents=True, exist_ok=True)
            write_part(folder / f"weights-{rank}", weights())
            described = safetensors.torch.save(packed, {"places": json.dumps(places)})
            write_bytes(folder / f"masks-{rank}.safetensors", described)

    def finish(self, layer: int, ranks: int, row: Mapping[str, Any]) -> None:
        """Record that all ``ranks`` tensor-parallel ranks have written their shards of a block."""
        write_json(self._block(layer) / "done.json", {"ranks": ranks, **row})

    def done(self, layers: Iterable[int]) -> list[dict[str, Any]]:
        """The rows given to ``finish``, of those of ``layers`` that are finished."""
        paths = (self._block(layer) / "done.json" for layer in layers)
        return [read_json(path) for path in paths if path.exists()]

    def parts(self, layer: int) -> list[Part]:
        """The weights of a finished block."""
        ranks = read_json(self._block(layer) / "done.json")["ranks"]
        return [read_part(self._block(layer) / f"weights-{rank}") for rank in range(ranks)]

    def read_weights(self, layer: int, targets: Shards) -> None:
        """Fill tensors with their parts of a finished block's weights."""
        parts = self.parts(layer)
        for name, offsets, target in targets:
            self._check(layer, name, target, sum(part.fill(name, offsets, target) for part in parts))

    def read_masks(self, layer: int, targets: Shards) -> None:
        """Fill bool tensors with their parts of a finished block's masks."""
        wanted = list(targets)
        filled = [0] * len(wanted)
        ranks = read_json(self._block(layer) / "done.json")["ranks"]
        for rank in range(ranks):
            path = self._block(layer) / f"masks-{rank}.safetensors"
            with safetensors.safe_open(path, framework="pt") as file:
                for number, (name, offsets, sizes) in enumerate(_places(file)):
                    kept = unpack(file.get_tensor(str(number)), 0, sizes[1])
                    for i, (asked, asked_offsets, target) in enumerate(wanted):
                        if asked == name:
                            filled[i] += copy_overlap(kept, offsets, target, asked_offsets)
        for (name, _, target), count in zip(wanted, filled, strict=True):
            self._check(layer, name, target, count)

    def mask_rows(self, layer: int, name: str) -> Iterator[torch.Tensor]:
        """A weight's mask as its block stores it: consecutive rows, written by a single rank."""
        with safetensors.safe_open(self._block(layer) / "masks-0.safetensors", framework="pt") as file:
            for number, (given, _, sizes) in enumerate(_places(file)):
                if given == name:
                    yield unpack(file.get_tensor(str(number)), 0, sizes[1])

    def _check(self, layer: int, name: str, target: torch.Tensor, filled: int) -> None:
        if filled != target.numel():
            raise CheckpointError(
                f"{self._block(layer)} holds {filled} of {target.numel()} entries of {name}, expected all of them: "
                "delete this folder and run the same command again"
            )

    def _block(self, layer: int) -> Path:
        return self.folder / f"block-{layer:04d}"

    # -- counts -----------------------------------------------------------------------------------------

    def keep_counts(self, layer: int, counted: Mapping[str, Any]) -> dict[str, Any]:
        """Store what was counted in a layer: its ``outliers`` among so many ``weights``, or the filled bins of its
        ``scores``. Returns its row."""
        row = {"layer": layer, **counted}
        write_json(self._counts(layer), row)
        return row

    def wait_for_counts(self, layers: Iterable[int], seen: Callable[[dict[str, Any]], None]) -> None:
        """Wait until those of all ``layers`` are counted, in order; ``seen`` gets the row of each."""
        _wait_for(map(self._counts, layers), seen)

    def counts(self, layers: Iterable[int]) -> list[dict[str, Any]] | None:
        """The rows of ``layers``; None if one is not known."""
        paths = [self._counts(layer) for layer in layers]
        return [read_json(path) for path in paths] if all(path.exists() for path in paths) else None

    def forget_counts(self) -> None:
        """Discard those of an attempt that did not finish: all layers' must come from one pass."""
        for path in self.folder.glob("counts-*.json"):
            path.unlink()

    def _counts(self, layer: int) -> Path:
        return self.folder / f"counts-{layer:04d}.json"

    # -- levels -------------------------------------------------------------------------------------

    def keep_levels(self, found: Found[Levels]) -> None:
        """Store how far a search has come."""
        write_json(self.folder / "levels.json", found.to_json())

    def levels(self) -> Found[Levels] | None:
        """What a search has found so far."""
        path = self.folder / "levels.json"
        if not path.exists():
            return None
        content = read_json(path)
        return Found(**{**content, "allocation": tuple(content["allocation"])})

    # -- waiting ------------------------------------------------------------------------------------

    def leave(self, stage: int, purpose: str) -> None:
        """Signal that a stage is ready to send, in the pass for ``purpose``."""
        write_bytes(self._left(stage, purpose), b"")

    def wait_for_stage(self, stage: int, purpose: str) -> None:
        """Wait until a stage is ready to send."""
        wait(self._left(stage, purpose).exists)

    def _left(self, stage: int, purpose: str) -> Path:
        return self.folder / f"stage-{stage}-{purpose}.left"

    def wait_for_blocks(self, layers: Iterable[int], seen: Callable[[dict[str, Any]], None]) -> None:
        """Wait until all ``layers`` are finished, in order; ``seen`` gets the row of each."""
        _wait_for((self._block(layer) / "done.json" for layer in layers), seen)


def _places(file: Any) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """(logical name, offsets, sizes) of the masks in a file, in the order of their keys."""
    return [(name, tuple(offsets), tuple(sizes)) for name, offsets, sizes in json.loads(file.metadata()["places"])]


def wait(ready: Callable[[], bool]) -> None:
    """Return when ``ready()``. If the process it waits for dies, the job ends, and this process with it."""
    began = time.monotonic()
    while not ready():
        time.sleep(POLL_SECONDS if time.monotonic() - began < 60 else _PATIENT_SECONDS)


def _wait_for(paths: Iterable[Path], seen: Callable[[dict[str, Any]], None]) -> None:
    for path in paths:
        wait(path.exists)
        seen(read_json(path))


class Progress(screen.Bar):
    """Progress of a pass over blocks: counts each once, and prints one line per block without a terminal."""

    def __init__(self, name: str, total: int) -> None:
        super().__init__(total, name, "block")
        self._seen: set[int] = set()

    def block(self, row: Mapping[str, Any], *, resumed: bool = False) -> None:
        """Count a finished block; ``row`` is its row in the scratch folder."""
        self._once(row["layer"], "kept from before" if resumed else _says(row))

    def counted(self, row: Mapping[str, Any]) -> None:
        """Count a block whose outliers or scores are counted; ``row`` is what the scratch folder has of it."""
        if "scores" in row:
            self._once(row["layer"], f"{sum(count for _, count in row['scores']):,} scores")
        else:
            self._once(row["layer"], f"{row['outliers']:,} outliers in {row['weights']:,} weights")

    def _once(self, layer: int, note: str) -> None:
        if layer not in self._seen:
            self._seen.add(layer)
            self.advance(note=f"layer {layer}: {note}")


def _says(row: Mapping[str, Any]) -> str:
    errors = [f"{found['matrix']} {found['error']:.4f}" for found in row["matrices"] if found["error"] is not None]
    return f"{row['seconds']:.1f} s, relative error " + ", ".join(errors)
