"""``statistics.safetensors`` and its ``.json``: the result of one calibration, for every method and ratio.

Tensors are float64 of global sizes, whatever layout computed them (L layers, h hidden channels,
H·d attention channels, F FFN channels):

    block_influence                [L]       Σ over tokens of 1 − cos(block in, block out)
    {site}.sum_abs_mean_sq         below     Σ over sequences of (mean over tokens of |x|)²
    {site}.sum_sq, {site}.sum      below     Σ over tokens of x², of x

with the sites ``input_layernorm`` and ``pre_mlp_layernorm`` [L, h] (outputs of a block's norms),
``attention`` [L, H·d] (input of linear_proj), ``mlp`` [L, F] (input of linear_fc2) and
``final_layernorm`` [h]. If layers differ, rows are as long as the longest, with zeros after a layer's own channels and
in place of a part that it lacks. These are plain sums, so two calibrations merge by addition. Of the weights that read
the channels of ``attention`` and ``mlp``, the columns of linear_proj and linear_fc2, there are

    {site}.weight_sum_sq, {site}.weight_sum_abs           Σ over rows of w², of |w|

Of every block's linears, in one row, there are the number of their weights, and of those that are outliers in OWL's
sense at each of ``allocation.THRESHOLDS``:

    outliers                       [L, 5]    weights, and those above M times the mean score

They need the sums of all windows, so merged statistics lack them.

With gradients (``calibrate --gradients``) there are also the saliencies of ``calibration/gradients.py``, which are no
sums over windows, and are not merged:

    {module}.vector, .first, .second, .mixed    of the channels of ``qkv`` [L, its rows], ``proj`` [L, H·d],
                                                ``fc1`` [L, 2F] (not gated: [L, F]) and ``fc2`` [L, F]

The JSON records the source: parent, shape, sequences, tokens, loss, windows, and the hash of the tensor file, which
ties the two files together. It also holds the scores of candidates: the mean loss, on the same windows, of the parent
without what a candidate removes; its accuracy on tasks; and the loss, again on these windows, of a candidate that was
cut and retrained. A loss that is not finite is null in the JSON and infinite in memory, so that it always ranks last.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict, cast

import safetensors
import safetensors.torch
import torch
from pydantic import Field, NonNegativeInt, PositiveInt

from megatron_prune import artifacts
from megatron_prune.checkpoint.layout import Axis, ModelShape
from megatron_prune.errors import CheckpointError, MegatronPruneError
from megatron_prune.methods.accumulators import COLUMN_SUMS, QUANTITIES, SALIENCIES
from megatron_prune.methods.allocation import OUTLIERS, THRESHOLDS
from megatron_prune.methods.ranking import Accuracy
from megatron_prune.untrusted import check, read_bytes

VERSION = 1
_MOST_HEADER_BYTES = 1 << 20  # of the tensor file


class StatisticsError(MegatronPruneError):
    """A statistics file that is missing, damaged, or used where it does not belong."""


def site_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Size of every site's sums, in the order of the forward pass."""
    layers, hidden = shape.num_layers, shape.hidden_size
    return {
        "input_layernorm": (layers, hidden),
        "attention": (layers, max(shape.extents("heads"))),
        "pre_mlp_layernorm": (layers, hidden),
        "mlp": (layers, max(shape.extents("ffn"))),
        "final_layernorm": (hidden,),
    }


def tensor_shapes(shape: ModelShape, *, gradients: bool = False, outliers: bool = False) -> dict[str, tuple[int, ...]]:
    """The size of every tensor in a statistics file, by name."""
    sites = {f"{site}.{q}": size for site, size in site_shapes(shape).items() for q in QUANTITIES}
    own = saliency_shapes(shape) if gradients else {}
    if outliers:
        own = {**own, OUTLIERS: (shape.num_layers, 1 + len(THRESHOLDS))}
    return {"block_influence": (shape.num_layers,), **sites, **column_shapes(shape), **own}


def column_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """The size of every tensor about weights alone, by name."""
    sites = site_shapes(shape)
    return {f"{site}.{name}": sites[site] for site in ("attention", "mlp") for name in COLUMN_SUMS}


def saliency_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """The size of every tensor that needs gradients, by name."""
    axes: dict[str, Axis] = {"qkv": "qkv", "proj": "heads", "fc1": "fc1", "fc2": "ffn"}
    sizes = {module: max(shape.extents(axis)) for module, axis in axes.items()}
    return {f"{module}.{name}": (shape.num_layers, size) for module, size in sizes.items() for name in SALIENCIES}


@dataclass(frozen=True)
class TaskScore:
    """Accuracies on one task, by metric, and the FLOPs that scoring took."""

    accuracies: Mapping[str, Accuracy]
    flops: int


def loss_of(value: float | None) -> float:
    """``value``, or infinity if it is None or not finite."""
    return value if value is not None and math.isfinite(value) else math.inf


@dataclass(frozen=True)
class Retrained:
    """A candidate after it was cut and trained, and the cost of that."""

    loss: float  # on the calibration windows; infinite if it was not finite
    tokens: int
    flops: int
    recipe: str  # must be equal for compared candidates (structured/retrain_candidates.py)


@dataclass(frozen=True)
class Score:
    """The parent's loss and accuracies without what one candidate removes."""

    candidate: str  # in words
    loss: float  # mean per token, in nats, on the calibration windows; infinite if it was not finite
    tasks: Mapping[str, TaskScore] = field(default_factory=dict)  # by a task's fingerprint
    retrained: Retrained | None = None
    windows: int | None = None  # ``loss`` is on the first of them alone; None: on all
    rounds: Mapping[int, float] = field(default_factory=dict)  # losses on fewer windows than all, by their number

    def to_json(self) -> dict[str, Any]:
        content = asdict(self)
        if not self.rounds:
            del content["windows"], content["rounds"]
        return cast(dict[str, Any], artifacts.with_nulls(content))

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> Score:
        tasks = {
            task: TaskScore({name: Accuracy(**found) for name, found in one["accuracies"].items()}, one["flops"])
            for task, one in content.get("tasks", {}).items()
        }
        retrained = content.get("retrained")
        if retrained:
            retrained = Retrained(**{**retrained, "loss": loss_of(retrained["loss"])})
        rounds = {int(windows): loss_of(loss) for windows, loss in content.get("rounds", {}).items()}
        return Score(content["candidate"], loss_of(content["loss"]), tasks, retrained, content.get("windows"), rounds)


@dataclass(frozen=True)
class Statistics:
    """Sums over ``sequences`` calibration sequences of ``seq_length`` tokens of one parent."""

    tensors: dict[str, torch.Tensor]
    shape: ModelShape
    parent: str  # fingerprint
    seq_length: int
    sequences: int
    loss_sum: float  # over all predictions, in nats
    calibrations: tuple[dict[str, Any], ...]  # prefix, corpus, sampling, seed, windows of every run
    scores: Mapping[str, Score] = field(default_factory=dict)  # by a selection's key

    def __post_init__(self) -> None:
        expected = tensor_shapes(self.shape, gradients=self.gradients, outliers=OUTLIERS in self.tensors)
        if set(self.tensors) != set(expected):
            odd = sorted(set(self.tensors) ^ set(expected))
            raise StatisticsError(
                f"statistics: expected exactly the tensors of their shape, got too many or too few of {odd}"
            )
        for name, size in expected.items():
            found = self.tensors[name]
            if found.dtype != torch.float64 or tuple(found.shape) != size:
                raise StatisticsError(
                    f"statistics tensor {name}: expected float64 {list(size)}, got {found.dtype} {list(found.shape)}"
                )
            if not torch.isfinite(found).all():
                raise StatisticsError(
                    f"statistics tensor {name}: expected finite numbers, got others: the parent overflows on the "
                    "calibration text; use bf16 or fp32 in place of fp16"
                )
        if not math.isfinite(self.loss_sum):
            raise StatisticsError(
                "the parent's loss on the calibration text is not finite: use bf16 or fp32 in place of fp16"
            )
        if self.sequences < 1 or self.seq_length < 1:
            raise StatisticsError("statistics: expected at least one sequence of one token, got none")

    @property
    def gradients(self) -> bool:
        """True if saliencies from gradients are among them."""
        return not self.tensors.keys().isdisjoint(saliency_shapes(self.shape))

    @property
    def tokens(self) -> int:
        return self.sequences * self.seq_length

    @property
    def loss(self) -> float:
        """Mean loss per token of the parent on the calibration windows."""
        return self.loss_sum / self.tokens

    def loss_on(self, key: str, windows: int) -> float | None:
        """The loss of the candidate with this key on the first ``windows`` windows; None if it was not run on those."""
        score = self.scores.get(key)
        if score is None or (windows == self.sequences and score.windows is not None):
            return None
        return score.loss if windows == self.sequences else score.rounds.get(windows)

    @property
    def hash(self) -> str:
        """Hex SHA-256 of the tensor file."""
        return hashlib.sha256(self._payload()).hexdigest()

    def _payload(self) -> bytes:
        return bytes(safetensors.torch.save({name: t.contiguous() for name, t in sorted(self.tensors.items())}))

    def files(self) -> tuple[bytes, bytes]:
        """Content of the tensor file and of its JSON."""
        payload = self._payload()
        meta = {
            "version": VERSION,
            "sha256": hashlib.sha256(payload).hexdigest(),
            "parent": self.parent,
            "shape": asdict(self.shape),
            "loss_sum": self.loss_sum,
            **self.provenance(),
            "scores": {key: score.to_json() for key, score in self.scores.items()},
            "versions": artifacts.versions(),
        }
        return payload, artifacts.json_bytes(meta)

    def write(self, path: str | Path) -> None:
        """Write ``path`` and, after it, ``path`` with the suffix ``.json``; each atomically."""
        payload, meta = self.files()
        artifacts.write_results(path, payload)
        artifacts.write_results(json_path(path), meta)

    def provenance(self) -> dict[str, Any]:
        """The source of the numbers, for plans and pruned checkpoints."""
        one = self.shape.training_flops if self.gradients else self.shape.forward_flops
        return {
            "sequences": self.sequences,
            "seq_length": self.seq_length,
            "tokens": self.tokens,
            "flops": self.sequences * one(self.seq_length),
            "loss": self.loss,
            "calibrations": list(self.calibrations),
        }


def json_path(path: str | Path) -> Path:
    """The JSON next to a statistics file."""
    return Path(path).with_suffix(".json")


class _Calibration(TypedDict):
    prefix: str
    corpus: str
    windows: list[int]


class _AccuracyRow(TypedDict):
    examples: PositiveInt
    correct: NonNegativeInt
    low: NonNegativeInt
    high: NonNegativeInt


class _TaskRow(TypedDict):
    accuracies: dict[str, _AccuracyRow]
    flops: int


class _RetrainedRow(TypedDict):
    loss: float | None
    tokens: int
    flops: int
    recipe: str


class _ScoreRow(TypedDict):
    candidate: str
    loss: float | None
    tasks: NotRequired[dict[str, _TaskRow]]
    retrained: NotRequired[_RetrainedRow | None]
    windows: NotRequired[PositiveInt | None]
    rounds: NotRequired[dict[Annotated[str, Field(pattern="^[1-9][0-9]{0,9}$")], float | None]]


class _StatisticsFile(TypedDict):
    sha256: str
    parent: str
    shape: dict[str, Any]
    loss_sum: float
    sequences: PositiveInt
    seq_length: PositiveInt
    calibrations: Annotated[list[_Calibration], Field(min_length=1)]
    scores: dict[str, _ScoreRow]


def read(path: str | Path) -> Statistics:
    """Read a statistics file with its JSON; StatisticsError if they are damaged or do not match."""
    meta = artifacts.read_json(json_path(path))
    if not isinstance(meta, dict) or meta.get("version") != VERSION:
        raise StatisticsError(
            f"{json_path(path)}: expected the JSON of a statistics file of version {VERSION}, got another: run "
            "calibrate again"
        )
    check(_StatisticsFile, meta, str(json_path(path)), StatisticsError)
    try:
        shape = ModelShape.read(meta["shape"])
        numbers = sum(math.prod(size) for size in tensor_shapes(shape, gradients=True, outliers=True).values())
        payload = read_bytes(path, 8 * numbers + _MOST_HEADER_BYTES)
    except (OSError, TypeError, CheckpointError) as error:
        raise StatisticsError(
            f"{path}: expected statistics from calibrate, got a file that cannot be read: {error}"
        ) from error
    if hashlib.sha256(payload).hexdigest() != meta.get("sha256"):
        raise StatisticsError(
            f"{path} and {json_path(path)}: expected two files of one run, got those of two: run calibrate again"
        )
    try:
        return Statistics(
            tensors=safetensors.torch.load(payload),
            shape=shape,
            parent=meta["parent"],
            seq_length=meta["seq_length"],
            sequences=meta["sequences"],
            loss_sum=meta["loss_sum"],
            calibrations=tuple(meta["calibrations"]),
            scores={key: Score.from_json(score) for key, score in meta["scores"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError, safetensors.SafetensorError) as error:
        raise StatisticsError(f"{path} or its JSON is damaged ({error!r}): run calibrate again") from error


def merge(parts: Sequence[Statistics]) -> Statistics:
    """Add up calibrations of one parent at one sequence length, over windows that do not overlap.

    Candidates scored on all windows of all of them keep their mean loss, and their accuracies, which do not depend on
    windows. A retrained candidate's loss is dropped, because its training may differ.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if any(part.gradients for part in parts):
        raise StatisticsError(
            "cannot merge statistics with gradients, whose saliencies are no sums over windows: calibrate on all "
            "windows at once"
        )
    seen: set[tuple[Any, int]] = set()
    for part in parts:
        for name in ("parent", "shape", "seq_length"):
            if getattr(part, name) != getattr(first, name):
                raise StatisticsError(
                    f"cannot merge statistics: {name} is {getattr(first, name)} in one and "
                    f"{getattr(part, name)} in another"
                )
        for calibration in part.calibrations:
            for name in ("params_dtype", "fp8"):
                if (own := calibration.get(name)) != (other := first.calibrations[0].get(name)):
                    raise StatisticsError(f"cannot merge statistics: {name} is {other} in one and {own} in another")
            windows = {(calibration["corpus"], window) for window in calibration["windows"]}
            if windows & seen:
                raise StatisticsError(
                    f"cannot merge statistics: {len(windows & seen)} windows of {calibration['prefix']} are "
                    "in more than one of them; calibrate on others (--calibration-sampling random, another --seed)"
                )
            seen |= windows
    sequences = sum(part.sequences for part in parts)
    of_weights = column_shapes(first.shape)  # the same in all
    scored = [key for key in first.scores if all(part.loss_on(key, part.sequences) is not None for part in parts)]
    return Statistics(
        tensors={
            name: tensor if name in of_weights else torch.stack([part.tensors[name] for part in parts]).sum(0)
            for name, tensor in first.tensors.items()
            if name != OUTLIERS
        },
        shape=first.shape,
        parent=first.parent,
        seq_length=first.seq_length,
        sequences=sequences,
        loss_sum=sum(part.loss_sum for part in parts),
        calibrations=tuple(c for part in parts for c in part.calibrations),
        scores={
            key: Score(
                first.scores[key].candidate,
                sum(part.sequences * part.scores[key].loss for part in parts) / sequences,
                {task: score for part in parts for task, score in part.scores[key].tasks.items()},
            )
            for key in scored
        },
    )
