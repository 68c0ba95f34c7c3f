"""The files of learned masks: the state at each save of the run that learns them, and the final one for ``plan``.

A state is a directory in Megatron's `torch_dist` format, which every rank writes its shards of, so that a run resumes
at any layout. The final file is safetensors. Both have the same tensors, fp32 (L layers, G groups, H heads, F FFN
channels, h hidden channels):

    log_alpha.{kind}             layer [L], group [L, G], head [L, G, H/G], ffn [L, F], hidden [h]: those that are cut
    multipliers.{kind}           [2], λ₁ and λ₂
    moments.{group}.{kind}.…     AdamW's moments and step [1], of the groups ``masks`` and ``multipliers``
    history                      fp64 [steps, kinds, 4]: expected and target sparsity, λ₁, λ₂, before every step

(in a state the heads of a layer are one axis) and say the source and target shapes and the settings. The final file has
a JSON file next to it, with the fingerprint of the weights that were trained under the masks, and the tokens and FLOPs
that learning took.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

import safetensors
import safetensors.torch
import torch

from megatron_prune import artifacts, storage
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.checkpoint.torch_dist import TorchDistSource
from megatron_prune.errors import CheckpointError
from megatron_prune.methods import sheared_llama
from megatron_prune.untrusted import check, parse_json, read_bytes

FILE = "learned_masks.safetensors"
FOLDER = "learned_masks"
VERSION = 2
_MOST_BYTES = 256 << 20  # of 80 layers with 28,672 channels: 28 MB


@dataclass(frozen=True)
class LearnerState:
    """Masks at a step, with all that going on from there needs."""

    source: ModelShape
    target: ModelShape
    settings: Mapping[str, Any]
    log_alpha: Mapping[str, torch.Tensor]
    multipliers: Mapping[str, torch.Tensor]
    moments: Mapping[str, torch.Tensor]
    history: torch.Tensor

    def __post_init__(self) -> None:
        wanted = {kind.name: kind.shape for kind in sheared_llama.kinds(self.source, self.target)}
        found = {name: tuple(values.shape) for name, values in self.log_alpha.items()}
        if found != wanted or set(self.multipliers) != set(wanted):
            raise CheckpointError(f"learned masks: expected {wanted} for their target, got {found}")
        if not all(bool(values.isfinite().all()) for values in self.log_alpha.values()):
            raise CheckpointError("learned masks: expected finite numbers, got others: the run that made them diverged")

    def payload(self) -> bytes:
        """The final file's bytes."""
        tensors = {f"log_alpha.{name}": values for name, values in self.log_alpha.items()}
        tensors |= {f"multipliers.{name}": values for name, values in self.multipliers.items()}
        tensors |= {f"moments.{name}": values for name, values in self.moments.items()}
        tensors["history"] = self.history
        header = {"about": about(self.source, self.target, self.settings)}  # one entry: their order is not said
        return bytes(safetensors.torch.save({name: t.contiguous() for name, t in sorted(tensors.items())}, header))


def about(source: ModelShape, target: ModelShape, settings: Mapping[str, Any]) -> str:
    """What both files say besides tensors: JSON."""
    said = {"version": VERSION, "source": asdict(source), "target": asdict(target), "settings": dict(settings)}
    return json.dumps(said, sort_keys=True)


def at_step(save: Path, step: int) -> Path:
    """The directory of the state at a save."""
    return save / FOLDER / f"iter_{step:07d}"


def read_state(path: Path) -> LearnerState:
    """CheckpointError where there is no such directory, or it is damaged."""
    folder = storage.path(path)
    if not (folder / ".metadata").is_file():
        raise CheckpointError(f"{path} is missing: the masks that were learned up to this save; restore it")
    found = TorchDistSource(folder)
    try:
        return _state(found.common["about"], {key: found.whole(key) for key in found.stored})
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error


def _read_final(path: Path) -> LearnerState:
    try:
        payload = read_bytes(path, _MOST_BYTES)
        length = int.from_bytes(payload[:8], "little")
        header = parse_json(payload[8 : 8 + length], str(path))["__metadata__"]
        return _state(header["about"], safetensors.torch.load(payload))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: learn-masks writes it at its end") from error
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error


def _state(said: str, tensors: Mapping[str, torch.Tensor]) -> LearnerState:
    known = parse_json(said.encode(), "what learned masks say about themselves")
    if known["version"] != VERSION:
        raise ValueError(f"version {known['version']}")
    source, target = ModelShape.read(known["source"]), ModelShape.read(known["target"])
    shapes = {kind.name: kind.shape for kind in sheared_llama.kinds(source, target)}

    def of(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    def shaped(name: str, values: torch.Tensor) -> torch.Tensor:
        """A number of every mask in its kind's shape; all else as it is."""
        group, _, rest = name.partition(".")
        if group == "masks" and not name.endswith(".step"):
            return values.view(shapes[rest.partition(".")[0]])
        return values

    return LearnerState(
        source=source,
        target=target,
        settings=known["settings"],
        log_alpha={name: values.view(shapes[name]) for name, values in of("log_alpha.").items()},
        multipliers=of("multipliers."),
        moments={name: shaped(name, values) for name, values in of("moments.").items()},
        history=tensors["history"],
    )  # fmt: skip


@dataclass(frozen=True)
class LearnedMasks:
    """What a finished run has learned about the weights ``parent``; a plan reads it as it does statistics."""

    state: LearnerState
    parent: str  # fingerprint of the checkpoint that was trained under the masks
    spent: Mapping[str, Any]  # tokens, flops, range, steps, and what else says which run it was

    @property
    def shape(self) -> ModelShape:
        return self.state.source

    @property
    def target(self) -> ModelShape:
        return self.state.target

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        return self.state.log_alpha

    @property
    def hash(self) -> str:
        """Hex SHA-256 of the file."""
        return hashlib.sha256(self.state.payload()).hexdigest()

    def provenance(self) -> dict[str, Any]:
        """What stands behind the masks, for plans and pruned checkpoints."""
        return dict(self.spent)

    def unsettled(self) -> list[sheared_llama.Unsettled]:
        """Rows that say something else than their cut."""
        kinds = sheared_llama.kinds(self.state.source, self.state.target)
        return [row for kind in kinds for row in sheared_llama.unsettled(self.state.log_alpha[kind.name], kind)]

    def write(self, path: Path) -> None:
        """Write the file, and after it its JSON."""
        payload = self.state.payload()
        artifacts.write_bytes(path, payload)
        history = self.state.history[-1].tolist() if len(self.state.history) else []
        kinds = sheared_llama.kinds(self.state.source, self.state.target)
        artifacts.write_json(
            path.with_suffix(".json"),
            {
                "version": VERSION,
                "sha256": hashlib.sha256(payload).hexdigest(),
                "parent": self.parent,
                "target": asdict(self.state.target),
                "settings": dict(self.state.settings),
                "last_step": {
                    kind.name: dict(zip(("expected", "target", "lambda_1", "lambda_2"), row, strict=True))
                    for kind, row in zip(kinds, history, strict=False)
                },
                "unsettled": [str(row) for row in self.unsettled()],
                "spent": dict(self.spent),
                "versions": artifacts.versions(),
            },
        )


class _LearnedFile(TypedDict):
    sha256: str
    parent: str
    spent: dict[str, Any]


def read(path: str | Path) -> LearnedMasks:
    """CheckpointError says what does not fit."""
    where = storage.path(path)
    meta = artifacts.read_json(where.with_suffix(".json"))
    if not isinstance(meta, dict) or meta.get("version") != VERSION:
        raise CheckpointError(
            f"{where.with_suffix('.json')}: expected the JSON of learned masks of version {VERSION}, got another file"
        )
    check(_LearnedFile, meta, str(where.with_suffix(".json")), CheckpointError)
    state = _read_final(where)
    if hashlib.sha256(state.payload()).hexdigest() != meta.get("sha256"):
        raise CheckpointError(
            f"{where} and its JSON: expected two files of one run of learn-masks, got those of two; restore both"
        )
    return LearnedMasks(state, meta["parent"], meta["spent"])
