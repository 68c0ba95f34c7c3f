"""What is known of a study before anything runs.

``look`` reads the parent's shape if it exists, every method's flags (``needs``), and finished results; it returns the
runs' sample ranges on the stream and the resulting shapes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_prune import storage
from megatron_prune.checkpoint.layout import HeterogeneousShape, ModelShape
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.convert.config import args_from_config, find_config
from megatron_prune.data import blend, indexed
from megatron_prune.errors import MegatronPruneError, UsageError
from megatron_prune.structured import plan
from megatron_prune.structured.choice import varied
from megatron_prune.study import records
from megatron_prune.study.grid import Grid, expand
from megatron_prune.study.needs import Needs, needs_of, shapes_of
from megatron_prune.study.prunings import (
    Places,
    Pruning,
    calibration_cell,
    calibration_tokens,
    flops_of,
    links,
    prunings,
)
from megatron_prune.study.sample_ranges import Batch, Lay
from megatron_prune.study.schema import StudyConfig, written
from megatron_prune.study.study_file import placed
from megatron_prune.training import data, lineage
from megatron_prune.training.account import ACCOUNT, read_account
from megatron_prune.training.lineage import Stage


@dataclass(frozen=True)
class Outlook:
    """What is known so far. All mappings are by the name of a pruning.

    ``source`` and ``targets`` are missing while the parent's shape is unknown (before an import); the target of a
    search, until its plan is made. ``needs``: each pruning's inputs; ``spent``: its FLOPs and those of what it starts
    from, once finished; ``retrained``: tokens of its candidates' retraining, once there is a plan. ``assumed``: what
    ``study plan`` assumes about missing files. ``questions``: how many sequences of each length the evaluation's tasks
    make a model read, where ``study plan`` counted them.
    """

    lay: Lay
    source: ModelShape | None
    targets: Mapping[str, ModelShape]
    needs: Mapping[str, Needs]
    spent: Mapping[str, int] = field(default_factory=dict)
    stages: Sequence[Stage] = field(default=(), repr=False)  # of a loaded parent's history
    retrained: Mapping[str, int] = field(default_factory=dict)
    assumed: Sequence[str] = ()
    questions: Mapping[int, int] = field(default_factory=dict)

    def grid(self, study: StudyConfig) -> Grid:
        """All training cells, as far as shapes and FLOPs are known."""
        return expand(study, self.lay, self.shapes, self.consumed(study), self.spent, self.teacher)

    def estimated_grid(self, study: StudyConfig) -> Grid:
        """The same, counting unknown FLOPs of prunings as zero."""
        spent = dict.fromkeys(self.targets, 0) | dict(self.spent)
        return expand(study, self.lay, self.shapes, self.consumed(study), spent, self.teacher)

    @property
    def teacher(self) -> int | None:
        """FLOPs of the parent's forward pass over a sequence; None while its shape is not known."""
        return None if self.source is None else self.source.forward_flops(self.lay.batch.seq_length)

    @property
    def shapes(self) -> dict[str, Mapping[str, Any]]:
        """The targets as plain mappings."""
        return {name: asdict(shape) for name, shape in self.targets.items()}

    def consumed(self, study: StudyConfig) -> dict[str, int]:
        """Tokens read by each pruning and what it starts from: calibration windows, if used, retraining of candidates,
        and learning of masks."""
        tokens = calibration_tokens(study)
        consumed: dict[str, int] = {}
        for pruning in links(study):
            needs = self.needs[pruning.name]
            asked = needs.retraining.candidates * needs.retraining.tokens if needs.retraining else 0
            trained = self.retrained.get(pruning.name, asked)  # a search may have fewer candidates
            before = consumed[pruning.base.name] if pruning.base else 0
            consumed[pruning.name] = before + (tokens if needs.tokens else 0) + trained + needs.learning
        return consumed


def look(study: StudyConfig, places: Places, *, planned: bool = False) -> Outlook:
    """What can be known now; UsageError for an invalid method or target.

    ``planned``: a parent that does not exist yet is assumed to be as study.yaml describes it.
    """
    try:
        return _look(study, places, planned)
    except MegatronPruneError as error:
        raise placed(error, written(study)) from error


def _look(study: StudyConfig, places: Places, planned: bool) -> Outlook:
    needs = {pruning.name: _needs(study, pruning) for pruning in links(study)}
    source, stages, assumed = _parent(study, places, planned)
    lay = _planned_lay(study, source) if planned and _is_to_come(study) else _lay(study, source, stages, planned)
    return Outlook(
        lay, source, _targets(study, places, source, needs), needs,
        _spent(study, places, needs), stages, _retrained(study, places, needs), assumed,
    )  # fmt: skip


def _needs(study: StudyConfig, pruning: Pruning) -> Needs:
    try:
        return needs_of(study, pruning.method, pruning.ratio)
    except UsageError as error:
        raise placed(error, written(study), study.location(pruning.method)) from error


def _retrained(study: StudyConfig, places: Places, needs: Mapping[str, Needs]) -> dict[str, int]:
    """Tokens that candidates were trained on, from the plans chosen that way."""
    made = {link.name: places.plan(link) for link in links(study) if needs[link.name].retraining}
    return {
        name: (plan.read(path).calibration or {})["retraining"]["tokens"]
        for name, path in made.items()
        if path.is_file()
    }


def _targets(
    study: StudyConfig, places: Places, source: ModelShape | None, needs: Mapping[str, Needs]
) -> dict[str, ModelShape]:
    """The known shapes. One chosen by retraining counts as known only once that retraining has been counted; layers
    that differ, and what is cut from them, are known once they are planned."""
    found: dict[str, ModelShape] = {}
    differ: set[str] = set()  # whose layers may differ
    for pruning in links(study):
        before, base = source, pruning.base
        if base is not None:
            before = found.get(base.name)
            if base.name in differ and before is None and source is not None:
                _refuse_what_layers_that_differ_cannot_have(study, pruning, source)
        asked, sparse = needs[pruning.name], pruning.method.pattern is not None
        if asked.heterogeneous or isinstance(before, HeterogeneousShape) or (base is not None and base.name in differ):
            differ.add(pruning.name)
        if before is None:
            continue
        competing = shapes_of(study, pruning.method, pruning.ratio, before)
        made = places.plan(pruning)
        planned = not asked.heterogeneous and (sparse or not isinstance(before, HeterogeneousShape))
        if len(competing) == 1 and not asked.retraining and planned:
            found[pruning.name] = competing[0]
        elif made.is_file():
            found[pruning.name] = plan.read(made).target
    return found


def _refuse_what_layers_that_differ_cannot_have(study: StudyConfig, pruning: Pruning, source: ModelShape) -> None:
    """UsageError for a link that cannot follow one whose layers may differ, before that one has run."""
    if pruning.method.pattern in (None, "unstructured"):  # whether an M divides their inputs is not known yet
        shapes_of(study, pruning.method, pruning.ratio, varied(source))


def _spent(study: StudyConfig, places: Places, needs: Mapping[str, Needs]) -> dict[str, int]:
    """FLOPs behind every finished pruning, from its artifacts."""
    costs = _costs(study, places, needs)
    spent: dict[str, int] = {}
    for pruning in prunings(study):
        found = [flops_of(costs, study, link, statistics=needs[link.name].statistics) for link in pruning.links]
        known = [flops for flops in found if flops is not None]
        if len(known) == len(found):
            spent[pruning.name] = sum(known)
    return spent


def _costs(study: StudyConfig, places: Places, needs: Mapping[str, Needs]) -> dict[str, dict[str, Any]]:
    """The own cost of every finished pruning and calibration, by cell."""
    found: dict[str, dict[str, Any]] = {}
    for link in links(study):
        cell, statistics = calibration_cell(study, link), places.statistics(calibration_cell(study, link))
        if needs[link.name].statistics and statistics.is_file():
            found.setdefault(cell, {"flops": records.calibration_flops(statistics)})
        if (flops := records.pruning_flops(places, link)) is not None:
            found[link.cell] = {"flops": flops}
    return found


def _parent(study: StudyConfig, places: Places, planned: bool) -> tuple[ModelShape | None, list[Stage], list[str]]:
    """The parent's shape if known, the stages of one that another study trained, and what is assumed."""
    parent = study.parent
    if parent.pretrain is not None:
        return shape_from_flags(study), [], []
    if parent.load is not None and not (planned and _is_to_come(study)):
        checkpoint = open_checkpoint(parent.load)
        checkpoint.verify()
        path = checkpoint.root / ACCOUNT
        steps = read_account(path)["steps"] if path.is_file() else None
        if steps is not None and not checkpoint.release and steps != checkpoint.iteration:
            raise UsageError("parent.load", got=f"iteration {checkpoint.iteration} of {checkpoint.root}",
                             expected=f"iteration {steps}, which its account describes")  # fmt: skip
        _refuse_another_shape(study, checkpoint.shape)
        return checkpoint.shape, lineage.of(checkpoint), []
    imported = places.checkpoint("parent")
    if parent.load is None and imported.is_dir():
        found = open_checkpoint(imported).shape
        _refuse_another_shape(study, found)
        return found, [], []
    shape, said = _shape_to_come(study) if planned else (None, "")
    if shape is None and parent.load is not None:
        raise UsageError("parent.shape", got="nothing", expected="the parent's shape",
                         why=f"{parent.load} is not there to say it")  # fmt: skip
    return shape, [], [f"the parent is not there yet: {said}"] if shape else []


def _refuse_another_shape(study: StudyConfig, found: ModelShape) -> None:
    """UsageError if an existing parent has another shape than study.yaml says."""
    said = _shape_to_come(study)[0] if study.parent.shape is not None else None
    if said is not None and said != found:
        differing = [name for name, value in vars(found).items() if value != getattr(said, name)]
        got, expected = (", ".join(f"{name} {getattr(one, name)}" for name in differing) for one in (said, found))
        raise UsageError("parent.shape", got=got, expected=f"{expected}, as the parent has")


def _is_to_come(study: StudyConfig) -> bool:
    """True for a parent to load that does not exist yet."""
    return study.parent.load is not None and not storage.path(study.parent.load).exists()


def _shape_to_come(study: StudyConfig) -> tuple[ModelShape | None, str]:
    """The shape of a missing parent from study.yaml or a Hugging Face config, and a text with its source."""
    parent = study.parent
    if isinstance(parent.shape, dict):
        return shape_from_flags(study), "its shape is what parent.shape says"
    source = parent.shape or parent.import_hf or ""
    config = find_config(source)
    if config is None:
        if parent.shape is not None:
            raise UsageError("parent.shape", got=parent.shape, expected="Megatron flags, or a Hugging Face config: a "
                             "config.json, its directory, or a model whose config is in the local cache")  # fmt: skip
        return None, ""
    return ModelShape.from_args(args_from_config(config)), f"its shape is what the config of {source} says"


def _planned_lay(study: StudyConfig, source: ModelShape | None) -> Lay:
    """The layout for a parent that another study will train on ``parent.planned_tokens`` of the same stream."""
    batch, parent = Batch(study.recipe.global_batch_size, study.data.seq_length), study.parent
    if parent.planned_tokens is None:
        return _lay(study, source, [], planned=True)
    samples = batch.steps(parent.planned_tokens, "parent.planned_tokens") * batch.samples
    flops = source.training_flops(batch.seq_length) * samples if source else None
    return Lay(batch, samples, samples * batch.seq_length, flops)


def _lay(study: StudyConfig, source: ModelShape | None, stages: Sequence[Stage], planned: bool) -> Lay:
    batch = Batch(study.recipe.global_batch_size, study.data.seq_length)
    parent = study.parent
    if parent.pretrain is not None:
        steps = batch.steps(parent.pretrain.tokens, "parent.pretrain.tokens")
        samples = steps * batch.samples
        flops = source.training_flops(batch.seq_length) * samples if source else None
        return Lay(batch, samples, steps * batch.tokens, flops)
    tokens, flops, end = lineage.tokens(stages), lineage.flops(stages), end_on_stream(study, stages, planned=planned)
    if not all(stage["complete"] is True for stage in lineage.seen(stages)):
        raise UsageError("parent.load", got=parent.load, expected="a run whose account is complete")
    if lineage.begins_at_random(stages):
        if parent.declared_tokens not in (None, tokens):
            raise UsageError(
                "parent.declared_tokens",
                got=parent.declared_tokens,
                expected=f"{tokens}, the sum in the accounts of its {len(stages)} stage(s)",
            )
        return Lay(batch, end, tokens, flops)
    declared = parent.declared_tokens
    if declared is None:
        return Lay(batch, end, None)
    origin = lineage.first_shape(stages)  # what is declared was read before the first pruning
    first = source if origin is None else ModelShape.read(origin)
    before = first.training_flops(batch.seq_length) * declared // batch.seq_length if first else None
    after = None if before is None else before + flops
    return Lay(batch, end, declared + tokens, after, declared, before)


def shape_from_flags(study: StudyConfig) -> ModelShape:
    """The shape of a parent from its flags and its tokenizer's vocabulary."""
    given = {name.replace("-", "_"): value for name, value in study.parent.flags.items()}
    given |= {name.replace("-", "_"): value for name, value in study.recipe.arguments.items()}
    given["add_bias_linear"] = not given.get("disable_bias_linear", False)
    if not given.get("padded_vocab_size"):
        given["padded_vocab_size"] = _padded_vocabulary(study, given)
    return ModelShape.from_args(given)


def _padded_vocabulary(study: StudyConfig, given: Mapping[str, Any]) -> int:
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


def absent_corpora(study: StudyConfig) -> list[str]:
    """Prefixes of the study's corpora that do not exist."""
    data = study.data
    prefixes = [*(prefix for _, prefix in data.train), data.calibration, data.validation, data.test]
    prefixes += study.evaluation.corpora.values()
    return [one for one in prefixes if not all(Path(f"{one}{suffix}").is_file() for suffix in (".bin", ".idx"))]


def end_on_stream(study: StudyConfig, stages: Sequence[Stage], *, planned: bool = False) -> int:
    """The first sample of the study's stream after all samples that ``stages`` consumed.

    ``planned``: while the corpora do not exist, the stream is assumed to be that of the stages.
    """
    trainings = [stage for stage in lineage.seen(stages) if stage["stream"] is not None]
    if not trainings:
        return 0
    if planned and absent_corpora(study):
        return max(int(stage["range"][1]) for stage in trainings)
    own = stream_of(study)["id"]
    return max((_end_of(study, stage) for stage in trainings if stage["stream"]["id"] == own), default=0)


def _end_of(study: StudyConfig, stage: Stage) -> int:
    """The first sample of the stream after those of a stage; under dynamic batch loading, after those of any corpus."""
    if not stage.get("batching"):
        return int(stage["range"][1])
    corpora = blend.members(blend.parse_blend(study.data.blend))
    return blend.after(corpora, study.data.seq_length, [end for _, end in stage["domains"]])


def stream_of(study: StudyConfig) -> dict[str, Any]:
    """The stream's description in every account of the study."""
    made = study.data
    return data.described(made.blend, made.seq_length, made.stream_seed, made.epochs)
