"""What a study refuses before anything runs, and what it can know beforehand.

``check`` reads the corpora's sizes, the parent's shape where there is one to read, and every method's
flags (``choices``). It refuses streams that are too short, corpora that are one another, windows that are
not there, unknown methods, targets and patterns that cannot be met, and recipes under which zeros would not
stay zero; it returns where the runs lie and which shapes will come out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_prune import artifacts, plan
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.data import blend, heldout, indexed, overlap, windows
from megatron_prune.errors import DataError, UsageError
from megatron_prune.study import budgets, choices, commands, grid
from megatron_prune.study.choices import Needs
from megatron_prune.study.config import Study


@dataclass(frozen=True)
class Outlook:
    """What is known before the first run.

    ``source`` and ``targets`` (by the name of a pruning) are missing while the parent's shape is unknown,
    that is, before an import; the target of a search, until its plan is made. ``needs`` says by tag what
    each method asks for.
    """

    lay: budgets.Lay
    source: ModelShape | None
    targets: Mapping[str, ModelShape]
    needs: Mapping[str, Needs]
    account: Mapping[str, Any] | None = field(default=None, repr=False)  # of a loaded parent

    def grid(self, study: Study) -> grid.Grid:
        """All training cells, as far as shapes are known."""
        return grid.expand(study, self.lay, self.shapes, self.consumed(study))

    @property
    def shapes(self) -> dict[str, Mapping[str, Any]]:
        """The targets as plain mappings."""
        return {name: asdict(shape) for name, shape in self.targets.items()}

    def to_json(self, study: Study) -> dict[str, Any]:
        """What a report needs to know of it, without Megatron."""
        return {"lay": asdict(self.lay), "shapes": self.shapes, "consumed": self.consumed(study)}

    def consumed(self, study: Study) -> dict[str, int]:
        """Tokens that each pruning reads: the calibration's, for methods that look at it, and its candidates'."""
        tokens, consumed = grid.calibration_tokens(study), {}
        for pruning in grid.prunings(study):
            needs = self.needs[pruning.method.tag]
            trained = needs.retraining.candidates * needs.retraining.tokens if needs.retraining else 0
            consumed[pruning.name] = (tokens if needs.tokens else 0) + trained
        return consumed


def check(study: Study, places: commands.Places) -> Outlook:
    """Refuse what cannot work; UsageError, DataError or CheckpointError say what to change."""
    needs = {method.tag: choices.needs(study, method) for method in study.methods}
    source, account = _parent(study, places)
    lay = _lay(study, account)
    shapes = {}
    if source is not None:
        for pruning in grid.prunings(study):
            competing = choices.shapes(study, pruning.method, pruning.ratio, source)
            made = places.plan(pruning)
            if len(competing) == 1:
                shapes[pruning.name] = competing[0]
            elif made.is_file():
                shapes[pruning.name] = plan.read(made).target
    outlook = Outlook(lay, source, shapes, needs, account)
    _check_masked(study, places, outlook)
    _check_data(study, outlook, account)
    return outlook


def _check_masked(study: Study, places: commands.Places, outlook: Outlook) -> None:
    """Zeros can be held, and what starts from scratch under masks begins with other weights than their parent."""
    masked = [cell for cell in outlook.grid(study).cells if cell.masked]
    if not masked:
        return
    choices.refuse_recipe_without_zeros(commands.training(study, places, masked[0]))
    trained = study.parent.pretrain
    seed = trained.seed if trained is not None else (outlook.account or {}).get("seed")
    if any(cell.kind == "scratch" and cell.seed == seed for cell in masked):
        raise UsageError(
            "seeds", given=seed, allowed="another than the parent's, for scratch under masks",
            why="masks made of the parent fit the weights that it began with, and one seed gives the same to both",
        )  # fmt: skip


def _parent(study: Study, places: commands.Places) -> tuple[ModelShape | None, Mapping[str, Any] | None]:
    """The parent's shape if it can be known, and its account if it was trained by us elsewhere."""
    parent = study.parent
    if parent.pretrain is not None:
        return shape_from_flags(study), None
    if parent.load is not None:
        checkpoint = open_checkpoint(parent.load)
        checkpoint.verify()
        path = Path(parent.load) / "account.json"
        return checkpoint.shape, artifacts.read_json(path) if path.is_file() else None
    imported = places.checkpoint("parent")
    return (open_checkpoint(imported).shape if imported.is_dir() else None), None


def _lay(study: Study, account: Mapping[str, Any] | None) -> budgets.Lay:
    batch = budgets.Batch(study.recipe.global_batch_size, study.data.seq_length)
    parent = study.parent
    if parent.pretrain is not None:
        steps = batch.steps(parent.pretrain.tokens, "parent.pretrain.tokens")
        return budgets.Lay(batch, steps * batch.samples, steps * batch.tokens)
    if account is None:
        return budgets.Lay(batch, 0, parent.declared_tokens)
    if account.get("complete") is not True or account.get("stream") is None:
        raise UsageError("parent.load", given=parent.load, allowed="a run whose account is complete and on a stream")
    if parent.declared_tokens not in (None, account["tokens"]):
        raise UsageError(
            "parent.declared_tokens",
            given=parent.declared_tokens,
            allowed=f"{account['tokens']}, as its account says",
        )
    return budgets.Lay(batch, account["range"][1], account["tokens"])


def shape_from_flags(study: Study) -> ModelShape:
    """The shape of a parent that is to be trained here, from its flags and its tokenizer's vocabulary."""
    assert study.parent.pretrain is not None
    given = {name.replace("-", "_"): value for name, value in study.parent.pretrain.arguments.items()}
    given |= {name.replace("-", "_"): value for name, value in study.recipe.arguments.items()}
    given["add_bias_linear"] = not given.get("disable_bias_linear", False)
    if not given.get("padded_vocab_size"):
        given["padded_vocab_size"] = _padded_vocabulary(study, given)
    return ModelShape.from_args(given)


def _padded_vocabulary(study: Study, given: Mapping[str, Any]) -> int:
    size = given.get("vocab_size")
    if size is None:
        described = indexed.sidecar(study.data.train[0][1])
        if described is None:
            raise UsageError(
                "parent.pretrain.arguments",
                given="no vocabulary size",
                allowed="padded-vocab-size",
                why=f"{study.data.train[0][1]} has no sidecar that says it",
            )
        size = described["tokenizer"]["vocab_size"]
    multiple = int(given.get("make_vocab_size_divisible_by", 128)) * study.launch.tensor_parallel
    return math.ceil(int(size) / multiple) * multiple


def _check_data(study: Study, outlook: Outlook, account: Mapping[str, Any] | None) -> None:
    data = study.data
    prints = {f"data.train ({prefix})": prefix for _, prefix in data.train}
    prints |= {f"data.{name}": getattr(data, name) for name in ("calibration", "validation", "test")}
    seen: dict[str, str] = {}
    for name, prefix in prints.items():
        indexed.open_indexed(prefix)
        if earlier := seen.get(print_ := indexed.fingerprint(prefix)):
            raise DataError(
                f"{name} and {earlier} hold the same tokens: no stage may train on what another is judged by"
            )
        seen[print_] = name
        if outlook.source is not None:
            indexed.check_fits_model(prefix, outlook.source.padded_vocab_size)
    windows.windows(
        data.calibration,
        study.calibration_seq_length,
        study.calibration.sequences,
        flag="calibration.sequences",
    )
    for name in commands.CORPORA:
        windows.windows(
            getattr(data, name),
            study.evaluation_seq_length,
            study.evaluation.windows,
            flag="evaluation.windows",
        )
    heldout.refuse_shared_documents(
        [prefix for _, prefix in data.train], [data.calibration, data.validation, data.test]
    )
    if data.max_near_duplicates is not None:
        stages = {name: [getattr(data, name)] for name in ("calibration", "validation", "test")}
        stages["train"] = [prefix for _, prefix in data.train]
        overlap.refuse(overlap.compare_stages(stages, max_near_duplicates=data.max_near_duplicates))
    ends = {cell.id: cell.samples.end for cell in outlook.grid(study).cells} | {"parent": outlook.lay.parent_end}
    for tag, needs in outlook.needs.items():
        if needs.retraining:
            ends[f"methods.{tag}'s candidates"] = outlook.lay.retrain(needs.retraining.tokens).end
    longest = max(ends, key=lambda cell: ends[cell])
    corpora = blend.members(blend.parse_blend(data.blend))
    held = blend.samples_per_epoch(corpora, data.seq_length) * data.epochs
    if ends[longest] > held:
        raise DataError(
            f"data.train is too short for {longest}, which ends at sample {ends[longest]}: it has {held} samples of "
            f"{data.seq_length} tokens in {data.epochs} epoch(s); give more text, smaller budgets or more data.epochs"
        )
    _check_parent_stream(study, account)


def _check_parent_stream(study: Study, account: Mapping[str, Any] | None) -> None:
    """A loaded parent with an account was trained on the study's stream, or on other text altogether."""
    if account is None:
        return
    data, stream = study.data, account["stream"]
    ours = {corpus.fingerprint for corpus in blend.members(blend.parse_blend(data.blend))}
    same = (
        set(stream["corpora"]) == ours
        and stream["seed"] == data.stream_seed
        and stream["seq_length"] == data.seq_length
        and stream["epochs"] == data.epochs
    )
    if not same:
        raise UsageError(
            "data",
            given=f"stream seed {data.stream_seed}, length {data.seq_length}, epochs {data.epochs}",
            allowed=f"the stream of parent.load: {stream['blend']}, seed {stream['seed']}, length "
            f"{stream['seq_length']}, epochs {stream['epochs']}",
            why="in another order the retraining range would overlap what the parent was trained on",
        )
