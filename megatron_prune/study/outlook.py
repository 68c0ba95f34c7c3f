"""What a study refuses before anything runs, and what it can know beforehand.

``look`` reads the parent's shape where there is one to read, every method's flags (``choices``), and what is
finished; it returns where the runs lie and which shapes will come out. ``check`` also reads the corpora's sizes. It
refuses streams that are too short, corpora that are one another, windows that are not there, unknown methods, targets
and patterns that cannot be met, and recipes under which zeros would not stay zero.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_prune import artifacts
from megatron_prune.checkpoint.layout import ModelShape, vocabulary
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.data import contamination, indexed, windows
from megatron_prune.engine import refusals
from megatron_prune.errors import DataError, UsageError
from megatron_prune.structured import plan
from megatron_prune.study import budgets, commands, ranges, records, validate
from megatron_prune.study.grid import Grid, calibration_cell, calibration_tokens, expand, flops_of, links, prunings
from megatron_prune.study.places import Places
from megatron_prune.study.schema import Study
from megatron_prune.study.validate import Needs
from megatron_prune.training import lineage
from megatron_prune.training.account import ACCOUNT
from megatron_prune.training.lineage import Stage


@dataclass(frozen=True)
class Outlook:
    """What is known before the first run.

    ``source`` and ``targets`` (by the name of a pruning) are missing while the parent's shape is unknown,
    that is, before an import; the target of a search, until its plan is made. ``needs`` says by the name of a
    pruning what it asks for; ``spent`` its FLOPs, and those of what it starts from, once it is finished;
    ``retrained`` the tokens that its candidates were trained on, once there is a plan.
    """

    lay: budgets.Lay
    source: ModelShape | None
    targets: Mapping[str, ModelShape]
    needs: Mapping[str, Needs]
    spent: Mapping[str, int] = field(default_factory=dict)
    stages: Sequence[Stage] = field(default=(), repr=False)  # behind a loaded parent
    retrained: Mapping[str, int] = field(default_factory=dict)

    def grid(self, study: Study) -> Grid:
        """All training cells, as far as shapes and FLOPs are known."""
        return expand(study, self.lay, self.shapes, self.consumed(study), self.spent)

    def estimated_grid(self, study: Study) -> Grid:
        """The same, where prunings that have not said what they spent are taken to have spent nothing."""
        spent = dict.fromkeys(self.targets, 0) | dict(self.spent)
        return expand(study, self.lay, self.shapes, self.consumed(study), spent)

    @property
    def shapes(self) -> dict[str, Mapping[str, Any]]:
        """The targets as plain mappings."""
        return {name: asdict(shape) for name, shape in self.targets.items()}

    def consumed(self, study: Study) -> dict[str, int]:
        """Tokens that each pruning and what it starts from read: calibration windows, where it looks at them, and
        what its candidates were retrained on."""
        tokens = calibration_tokens(study)
        consumed: dict[str, int] = {}
        for pruning in links(study):
            needs = self.needs[pruning.name]
            asked = needs.retraining.candidates * needs.retraining.tokens if needs.retraining else 0
            trained = self.retrained.get(pruning.name, asked)  # a search may have fewer candidates
            before = consumed[pruning.base.name] if pruning.base else 0
            consumed[pruning.name] = before + (tokens if needs.tokens else 0) + trained
        return consumed


def check(study: Study, places: Places) -> Outlook:
    """Refuse what cannot work; UsageError, DataError or CheckpointError say what to change."""
    if study.tracking.wandb_project and importlib.util.find_spec("wandb") is None:
        raise UsageError("tracking.wandb_project", got=study.tracking.wandb_project,
                         expected="no such key where wandb is not installed", do="pip install wandb")  # fmt: skip
    refusals.refuse_names(study.recipe.arguments, "recipe.arguments")
    if study.parent.pretrain is not None:
        refusals.refuse_names(study.parent.pretrain.arguments, "parent.pretrain.arguments")
    outlook = look(study, places)
    _check_masked(study, places, outlook)
    _check_data(study, places, outlook)
    return outlook


def look(study: Study, places: Places) -> Outlook:
    """What can be known now; UsageError where a method or a target cannot be meant."""
    needs = {pruning.name: validate.needs(study, pruning.method, pruning.ratio) for pruning in links(study)}
    source, stages = _parent(study, places)
    return Outlook(
        _lay(study, source, stages), source, _targets(study, places, source, needs), needs,
        _spent(study, places, needs), stages, _retrained(study, places, needs),
    )  # fmt: skip


def _retrained(study: Study, places: Places, needs: Mapping[str, Needs]) -> dict[str, int]:
    """What candidates were trained on, from the plans that were chosen so."""
    made = {link.name: places.plan(link) for link in links(study) if needs[link.name].retraining}
    return {
        name: (plan.read(path).calibration or {})["retraining"]["tokens"]
        for name, path in made.items()
        if path.is_file()
    }


def _targets(
    study: Study, places: Places, source: ModelShape | None, needs: Mapping[str, Needs]
) -> dict[str, ModelShape]:
    """The shapes that are known. One that candidates were retrained for is not before that has been counted too."""
    found: dict[str, ModelShape] = {}
    for pruning in links(study):
        before = source if pruning.base is None else found.get(pruning.base.name)
        if before is None:
            continue
        competing = validate.shapes(study, pruning.method, pruning.ratio, before)
        made = places.plan(pruning)
        if len(competing) == 1 and not needs[pruning.name].retraining:
            found[pruning.name] = competing[0]
        elif made.is_file():
            found[pruning.name] = plan.read(made).target
    return found


def _spent(study: Study, places: Places, needs: Mapping[str, Needs]) -> dict[str, int]:
    """FLOPs behind every pruning that has been made, from what it left."""
    costs = _costs(study, places, needs)
    spent: dict[str, int] = {}
    for pruning in prunings(study):
        found = [flops_of(costs, study, link, statistics=needs[link.name].statistics) for link in pruning.links]
        known = [flops for flops in found if flops is not None]
        if len(known) == len(found):
            spent[pruning.name] = sum(known)
    return spent


def _costs(study: Study, places: Places, needs: Mapping[str, Needs]) -> dict[str, dict[str, Any]]:
    """What every pruning and calibration that has been made cost by itself, by cell."""
    found: dict[str, dict[str, Any]] = {}
    for link in links(study):
        cell, statistics = calibration_cell(study, link), places.statistics(calibration_cell(study, link))
        if needs[link.name].statistics and statistics.is_file():
            found.setdefault(cell, {"flops": records.calibration_flops(statistics)})
        if (flops := records.pruning_flops(places, link)) is not None:
            found[link.cell] = {"flops": flops}
    return found


def _check_masked(study: Study, places: Places, outlook: Outlook) -> None:
    """Zeros can be held, and what starts from scratch under masks begins with other weights than their parent."""
    masked = [cell for cell in outlook.grid(study).cells if cell.masked]
    if not masked:
        return
    validate.refuse_recipe_without_zeros(commands.training(study, places, masked[0], masked[0].source))
    trained = study.parent.pretrain
    for cell in masked:
        own = cell.seed if study.parent_per_seed else 0
        seed = trained.seed + own if trained is not None else _first_seed(outlook.stages)
        if cell.kind == "scratch" and cell.seed == seed:
            raise UsageError(
                "seeds", got=seed, expected="a seed other than the parent's for scratch runs under masks",
                why="with the parent's seed they would begin with the weights that the masks were made from",
            )  # fmt: skip


def _first_seed(stages: Sequence[Stage]) -> int | None:
    """The seed that a parent's first weights were drawn by, where that is known."""
    return int(stages[0]["seed"]) if lineage.begins_at_random(stages) else None


def _parent(study: Study, places: Places) -> tuple[ModelShape | None, list[Stage]]:
    """The parent's shape if it can be known, and what is behind one that was made by us elsewhere."""
    parent = study.parent
    if parent.pretrain is not None:
        return shape_from_flags(study), []
    if parent.load is not None:
        checkpoint = open_checkpoint(parent.load)
        checkpoint.verify()
        path = checkpoint.root / ACCOUNT
        steps = artifacts.read_json(path)["steps"] if path.is_file() else None
        if steps is not None and not checkpoint.release and steps != checkpoint.iteration:
            raise UsageError("parent.load", got=f"iteration {checkpoint.iteration} of {checkpoint.root}",
                             expected=f"iteration {steps}, which its account describes")  # fmt: skip
        return checkpoint.shape, lineage.of(checkpoint)
    imported = places.checkpoint("parent")
    return (open_checkpoint(imported).shape if imported.is_dir() else None), []


def _lay(study: Study, source: ModelShape | None, stages: Sequence[Stage]) -> budgets.Lay:
    batch = budgets.Batch(study.recipe.global_batch_size, study.data.seq_length)
    parent = study.parent
    if parent.pretrain is not None:
        steps = batch.steps(parent.pretrain.tokens, "parent.pretrain.tokens")
        samples = steps * batch.samples
        flops = source.training_flops(batch.seq_length) * samples if source else None
        return budgets.Lay(batch, samples, steps * batch.tokens, flops)
    tokens, flops, end = lineage.tokens(stages), lineage.flops(stages), ranges.end_on_stream(study, stages)
    if not all(stage["complete"] is True for stage in lineage.trainings(stages)):
        raise UsageError("parent.load", got=parent.load, expected="a run whose account is complete")
    if lineage.begins_at_random(stages):
        if parent.declared_tokens not in (None, tokens):
            raise UsageError(
                "parent.declared_tokens",
                got=parent.declared_tokens,
                expected=f"{tokens}, the sum in the accounts of its {len(stages)} stage(s)",
            )
        return budgets.Lay(batch, end, tokens, flops)
    declared = parent.declared_tokens
    if declared is None:
        return budgets.Lay(batch, end, None)
    first = ModelShape(**stages[0]["source"]) if stages and stages[0]["kind"] == "pruned" else source
    before = first.training_flops(batch.seq_length) * declared // batch.seq_length if first else None
    after = None if before is None else before + flops
    return budgets.Lay(batch, end, declared + tokens, after, declared, before)


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
                got="nothing",
                expected="padded-vocab-size among them",
                why=f"{study.data.train[0][1]} has no sidecar that says its vocabulary size",
            )
        size = described["tokenizer"]["vocab_size"]
    multiple = int(given.get("make_vocab_size_divisible_by", 128)) * study.launch.tensor_parallel
    return math.ceil(int(size) / multiple) * multiple


def _words(study: Study, places: Places, source: ModelShape) -> int:
    """The parent's vocabulary without padding, as far as flags or its checkpoint say it."""
    pretrain = study.parent.pretrain
    if pretrain is None:
        return vocabulary(open_checkpoint(study.parent.load or places.checkpoint("parent")).args)
    size = (dict(study.recipe.arguments) | dict(pretrain.arguments)).get("vocab-size")
    return vocabulary({"vocab_size": size, "padded_vocab_size": source.padded_vocab_size})


def _check_data(study: Study, places: Places, outlook: Outlook) -> None:
    data = study.data
    prints = {f"data.train ({prefix})": prefix for _, prefix in data.train}
    prints |= {f"data.{name}": getattr(data, name) for name in ("calibration", "validation", "test")}
    seen: dict[str, str] = {}
    for name, prefix in prints.items():
        indexed.open_indexed(prefix)
        if earlier := seen.get(print_ := indexed.fingerprint(prefix)):
            raise DataError(
                f"{name} and {earlier} hold the same tokens: no stage may train on what another is evaluated on"
            )
        seen[print_] = name
        if outlook.source is not None:
            indexed.check_fits_model(prefix, _words(study, places, outlook.source))
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
    held_out = [data.calibration, data.validation, data.test]
    contamination.refuse_shared_documents([prefix for _, prefix in data.train], held_out)
    for number, earlier in enumerate(held_out):  # what is judged finally was not looked at before, either
        contamination.refuse_shared_documents([earlier], held_out[number + 1 :])
    if data.max_near_duplicates is not None:
        _check_near_duplicates(study, data.max_near_duplicates, places)
    ranges.check_unseen(study, outlook.stages)
    ranges.check(study, outlook)


def _check_near_duplicates(study: Study, limit: float, places: Places) -> None:
    """Refuse corpora that share too much; the report is kept, since making it reads every training token."""
    data = study.data
    stages = {name: [getattr(data, name)] for name in ("calibration", "validation", "test")}
    stages["train"] = [prefix for _, prefix in data.train]
    earlier = artifacts.read_json(places.overlap) if places.overlap.is_file() else None
    report = contamination.compare_stages(stages, max_near_duplicates=limit, earlier=earlier)
    if report != earlier and places.root.is_dir():  # a plan of a study that has not begun leaves nothing
        artifacts.write_json(places.overlap, report)
    contamination.refuse(report)
