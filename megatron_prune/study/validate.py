"""Checks of a study before anything runs.

``check`` collects what can be known (``outlook``), and then refuses: flags without effect, recipes that would not keep
zeros, identical corpora or corpora that share documents, missing windows, a parent that has seen the study's text, and
streams that are too short for a run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_prune import artifacts, storage
from megatron_prune.checkpoint.layout import ModelShape, vocabulary
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.data import contamination, indexed, windows
from megatron_prune.engine import refusals
from megatron_prune.errors import DataError, MegatronPruneError, UsageError
from megatron_prune.study import commands, needs, questions
from megatron_prune.study.grid import selects
from megatron_prune.study.outlook import Outlook, absent_corpora, look, stream_of
from megatron_prune.study.prunings import Places, Pruning, learning_samples, links, parent_cell
from megatron_prune.study.sample_ranges import Lay, SampleRange
from megatron_prune.study.schema import StudyConfig, written
from megatron_prune.study.study_file import placed
from megatron_prune.training import batch_flags, data, lineage
from megatron_prune.training.lineage import Stage

Seen = list[dict[str, Any]]


def check(study: StudyConfig, places: Places, *, planned: bool = False, corpus_tokens: int | None = None) -> Outlook:
    """Refuse what cannot work; UsageError, DataError or CheckpointError say what to change.

    ``planned``: nothing is about to run; a parent that does not exist yet is assumed to be as study.yaml describes it.
    ``corpus_tokens``: tokens in data.train while corpora do not exist; their content is then not checked.
    """
    try:
        return _check(study, places, planned, corpus_tokens)
    except MegatronPruneError as error:
        raise placed(error, written(study)) from error


def _check(study: StudyConfig, places: Places, planned: bool, corpus_tokens: int | None) -> Outlook:
    if study.tracking.wandb_project and importlib.util.find_spec("wandb") is None:
        raise UsageError("tracking.wandb_project", got=study.tracking.wandb_project,
                         expected="no such key where wandb is not installed", do="pip install wandb")  # fmt: skip
    refusals.refuse_names(study.recipe.arguments, "recipe.arguments")
    if study.parent.pretrain is not None:
        refusals.refuse_names(study.parent.pretrain.arguments, "parent.pretrain.arguments")
    outlook = look(study, places, planned=planned)
    _check_dynamic(study, outlook)
    _check_masked(study, places, outlook)
    _check_questions(study, outlook)
    _check_matched_blocks(study, outlook)
    absent = absent_corpora(study)
    if planned and absent and corpus_tokens is None:
        raise DataError(
            f"{absent[0]}.bin does not exist, nor do {len(absent) - 1} more of the study's corpora: `study plan "
            "--corpus-tokens N` plans a study that has N tokens to train on before they are there"
        )
    if not planned or not absent:
        _check_data(study, places, outlook)
        if not planned and study.evaluation.tasks:
            questions.check(study, places)
        return outlook
    assert corpus_tokens is not None
    data = study.data
    samples = (corpus_tokens - 1) // data.seq_length * data.epochs
    stream = {"id": "", "samples": samples, "epochs": data.epochs, "seq_length": data.seq_length}
    check_ranges(study, outlook, stream)
    assumed = f"{len(absent)} corpora are not there: {corpus_tokens:,} tokens are taken to be in data.train"
    return replace(outlook, assumed=[*outlook.assumed, assumed])


def _check_masked(study: StudyConfig, places: Places, outlook: Outlook) -> None:
    """Zeros can be held, and scratch runs under masks start from other weights than the masks' parent."""
    masked = [cell for cell in outlook.grid(study).cells if cell.masked]
    if not masked:
        return
    needs.refuse_recipe_without_zeros(commands.training(study, places, masked[0], masked[0].source))
    trained = study.parent.pretrain
    for cell in masked:
        own = cell.seed if study.parent_per_seed else 0
        seed = trained.seed + own if trained is not None else _first_seed(outlook.stages)
        if cell.kind == "scratch" and cell.seed == seed:
            raise UsageError(
                "seeds",
                got=seed,
                expected="a seed other than the parent's for scratch runs under masks",
                why="with the parent's seed they would begin with the weights that the masks were made from",
            )


def _check_dynamic(study: StudyConfig, outlook: Outlook) -> None:
    """UsageError for a run that would end before its proportions change for the first time."""
    dynamic = study.recipe.dynamic_batch
    if dynamic is None:
        return
    for cell in outlook.estimated_grid(study).cells:
        if cell.kind != "retrained" and cell.follows is None and cell.samples.steps <= dynamic.every:
            raise UsageError(
                "recipe.dynamic_batch.every", got=dynamic.every, why="its proportions would never change",
                expected=f"less than the {cell.samples.steps} steps of {cell.id}",
            )  # fmt: skip


def _check_matched_blocks(study: StudyConfig, outlook: Outlook) -> None:
    """UsageError for a block that a student or the teacher does not have, as far as their shapes are known."""
    if not outlook.targets or outlook.source is None:
        return
    name, least = min(outlook.targets.items(), key=lambda target: target[1].num_layers)
    for student, teacher in study.distillation.blocks():
        if student > least.num_layers or teacher > outlook.source.num_layers:
            raise UsageError(
                "distill.hidden_states", got=f"{student}:{teacher}",
                expected=f"blocks up to {least.num_layers}:{outlook.source.num_layers}, which {name} and its teacher "
                "have",
            )  # fmt: skip


def _check_questions(study: StudyConfig, outlook: Outlook) -> None:
    """UsageError for a side of a question that has no comparison."""
    comparisons = outlook.grid(study).comparisons
    for number, asked in enumerate(study.compare):
        for side, selection in (("of", asked.of), ("than", asked.than)):
            every = asked.along == "tokens"
            if selection and not any(selects(study, selection, made, every_budget=every) for made in comparisons):
                raise UsageError(
                    f"compare.{number}.{side}", got=selection.words(), expected="comparisons that the study has"
                )


def _first_seed(stages: Sequence[Stage]) -> int | None:
    """The seed of a parent's initial weights, if known."""
    return int(stages[0]["seed"]) if lineage.begins_at_random(stages) else None


def _words(study: StudyConfig, places: Places, source: ModelShape) -> int:
    """The parent's vocabulary size without padding, if its checkpoint or flags have it."""
    checkpoint = study.parent.load or places.checkpoint("parent")
    if study.parent.pretrain is None and storage.path(checkpoint).exists():
        return vocabulary(open_checkpoint(checkpoint).args)
    size = (dict(study.recipe.arguments) | study.parent.flags).get("vocab-size")
    return vocabulary({"vocab_size": size, "padded_vocab_size": source.padded_vocab_size})


def _check_data(study: StudyConfig, places: Places, outlook: Outlook) -> None:
    data = study.data
    prints = {f"data.train ({prefix})": prefix for _, prefix in data.train}
    prints |= {f"data.{name}": getattr(data, name) for name in ("calibration", "validation", "test")}
    seen: dict[str, str] = {}
    for name, prefix in prints.items():
        indexed.open_indexed(prefix)
        if earlier := seen.get(print_ := indexed.fingerprint(prefix)):
            raise DataError(
                f"{name} and {earlier}: expected different text, got the same tokens: no stage may train on what "
                "another is evaluated on"
            )
        seen[print_] = name
        if outlook.source is not None:
            indexed.check_fits_model(prefix, _words(study, places, outlook.source))
    for label, prefix in study.evaluation.corpora.items():  # nothing is trained on them: they may be each other's
        indexed.open_indexed(prefix)
        if (earlier := seen.get(indexed.fingerprint(prefix))) and earlier != "data.test":
            raise DataError(
                f"evaluation.corpora.{label} and {earlier} hold the same tokens: expected text that no run is trained, "
                "pruned or chosen on"
            )
        if outlook.source is not None:
            indexed.check_fits_model(prefix, _words(study, places, outlook.source))
    windows.windows(
        data.calibration,
        study.calibration_seq_length,
        study.calibration.sequences,
        flag="calibration.sequences",
    )
    scored = commands.scored_corpora(study)
    for prefix in scored.values():
        windows.windows(
            prefix,
            study.evaluation_seq_length,
            study.evaluation.windows,
            flag="evaluation.windows",
        )
    more = list(study.evaluation.corpora.values())
    held_out = [data.calibration, data.validation, data.test, *_domain_validation(study)]
    contamination.refuse_shared_documents([prefix for _, prefix in data.train], [*held_out, *more])
    for number, earlier in enumerate(held_out):  # no held-out text may be seen in an earlier stage
        later = [*held_out[number + 1 :], *(more if earlier != data.test else [])]
        contamination.refuse_shared_documents([earlier], later)
    if data.max_near_duplicates is not None:
        _check_near_duplicates(study, data.max_near_duplicates, places)
    check_unseen(study, outlook.stages)
    check_ranges(study, outlook, stream_of(study))


def _domain_validation(study: StudyConfig) -> list[str]:
    """The corpora that steer dynamic batch loading, each once; UsageError if one is too short."""
    found: dict[str, None] = {}
    asked = [("recipe.dynamic_batch", study.recipe.dynamic_batch.flags)] if study.recipe.dynamic_batch else []
    asked += [(f"methods.{method.tag}.settings", method.settings) for method in study.methods]
    for where, flags in asked:
        prefixes: Any = flags.get("domain-validation", [])
        count: Any = flags.get("domain-samples", batch_flags.DEFAULT_SAMPLES)
        for prefix in prefixes:
            windows.windows(prefix, study.data.seq_length, int(count), flag=f"{where}: the samples of each corpus")
            found[prefix] = None
    return list(found)


def _check_near_duplicates(study: StudyConfig, limit: float, places: Places) -> None:
    """Refuse corpora that share too much; the report is kept, since it requires reading every training token."""
    data = study.data
    stages = {name: [getattr(data, name)] for name in ("calibration", "validation", "test")}
    stages["test"] += [prefix for prefix in study.evaluation.corpora.values() if prefix != data.test]
    if steering := _domain_validation(study):
        stages["domain validation"] = steering
    stages["train"] = [prefix for _, prefix in data.train]
    earlier = artifacts.read_json(places.overlap) if places.overlap.is_file() else None
    report = contamination.compare_stages(stages, max_near_duplicates=limit, earlier=earlier)
    if report != earlier and places.root.is_dir():  # planning a study that has not begun writes nothing
        artifacts.write_json(places.overlap, report)
    contamination.refuse(report)


# Has a loaded parent seen the study's text? Its lineage says what it was trained on. On the study's own stream the
# ranges decide. The same corpora in another stream are refused, since sample numbers of two orders are not comparable.
# Other corpora are compared document by document if they can still be read; otherwise ``parent.declared_unseen`` must
# give a reason. A parent without a lineage (from elsewhere) is accepted, and the report says so.


def check_unseen(study: StudyConfig, stages: Sequence[Stage]) -> None:
    """UsageError or DataError if a stage has seen text of the study, or may have and no reason is declared."""
    trainings = lineage.seen(stages)
    if not trainings:
        return
    own = stream_of(study)
    compared: set[str] = set()
    for stage in trainings:
        stream = stage["stream"]
        if stream is None:
            _need_a_word(study, stage, "it was not trained on a token stream, so that nothing says on which samples")
            continue
        if stream["id"] == own["id"]:
            continue
        if set(stream["corpora"]) & set(own["corpora"]):
            data = study.data
            raise UsageError(
                "data",
                got=f"stream seed {data.stream_seed}, length {data.seq_length}, epochs {data.epochs}",
                expected=f"the stream of {stage['run']}: {stream['blend']}, seed {stream['seed']}, length "
                f"{stream['seq_length']}, epochs {stream['epochs']}",
                why="in another order the retraining range would overlap what the parent was trained on",
            )
        for (_, prefix), content in zip(stream["blend"], stream["corpora"], strict=True):
            if content not in compared:
                compared.add(content)
                _compare(study, stage, prefix, content)


def _compare(study: StudyConfig, stage: Stage, prefix: str, content: str) -> None:
    """Compare the documents of one corpus of the parent with all corpora of the study."""
    wrong = ""
    if not all(Path(f"{prefix}{suffix}").is_file() for suffix in (".bin", ".idx")):
        wrong = f"its corpus {prefix} is not there any more"
    elif indexed.fingerprint(prefix) != content:
        wrong = f"{prefix} is another corpus now"
    if wrong:
        _need_a_word(study, stage, f"{wrong}, and what its documents are cannot be compared with data.train")
        return
    for name, corpora in _corpora(study).items():
        for own in corpora:
            if shared := contamination.shared_documents(prefix, own):
                row, twin = shared[0]
                raise DataError(
                    f"{len(shared)} document(s) of {name} {own} are in {prefix}, which {stage['run']}, a training "
                    f"behind the parent, read (document {twin} is its document {row}): take them out of {name}"
                )


def _corpora(study: StudyConfig) -> dict[str, list[str]]:
    found = {f"data.{name}": [getattr(study.data, name)] for name in ("calibration", "validation", "test")}
    found |= {f"evaluation.corpora.{label}": [prefix] for label, prefix in study.evaluation.corpora.items()}
    found["data.train"] = [prefix for _, prefix in study.data.train]
    return found | {"domain validation": _domain_validation(study)}


def _need_a_word(study: StudyConfig, stage: Stage, why: str) -> None:
    if study.parent.declared_unseen is None:
        raise UsageError(
            "parent.declared_unseen", got="nothing",
            expected="the reason why the parent has seen no text of the study, which the report prints",
            why=f"{stage['run']} trained the parent, and {why}",
        )  # fmt: skip


def check_ranges(study: StudyConfig, outlook: Outlook, stream: Mapping[str, Any]) -> None:
    """Check every run against the stream as `pretrain` does, before the first of them starts.

    A cell's range must lie within the stream and be unseen by everything that the cell starts from: the parent's stages
    and the retrainings between the links of its chain. DataError names a cell that `pretrain` would refuse, the last to
    end if there are several, and why.
    """
    for cell, samples, seen in sorted(_runs(study, outlook, stream), key=lambda run: -run[1].end):
        try:
            data.refuse_unfit(stream, samples.samples, seen, cell)
        except (UsageError, DataError) as error:
            raise DataError(
                f"data.train is not enough for {cell}, samples {samples}: {error}. Give more text, smaller budgets or "
                "other data.epochs"
            ) from error


def _runs(study: StudyConfig, outlook: Outlook, stream: Mapping[str, Any]) -> Iterator[tuple[str, SampleRange, Seen]]:
    """Every training cell, with its samples and the history of its weights."""
    lay, before = outlook.lay, lineage.seen(outlook.stages)
    if not stream["id"]:  # missing corpora: assume that the parent was trained on their stream
        before = [{**stage, "stream": stream} for stage in before if stage["stream"] is not None]
    if study.parent.pretrain is not None:
        samples = lay.batch.range(0, lay.parent_end // lay.batch.samples)
        yield parent_cell(study, study.seeds[0]), samples, []
        before = [{"run": "parent", "stream": stream, "range": list(samples.samples)}]
    for pruning in links(study):
        retraining = outlook.needs[pruning.name].retraining
        if retraining:
            samples = lay.retrain(retraining.tokens, pruning.trained)
            seen = _behind(pruning, outlook, stream, before) + _learned(study, lay, pruning.base, stream)
            yield f"methods.{pruning.method.tag}'s candidates", samples, seen
        if pruning.method.tokens:
            seen = _behind(pruning, outlook, stream, before) + _learned(study, lay, pruning.base, stream)
            yield f"methods.{pruning.method.tag}'s masks", learning_samples(study, lay, pruning), seen
    for cell in outlook.estimated_grid(study).cells:
        samples, seen = cell.samples, _behind(cell.source, outlook, stream, before)
        if study.recipe.dynamic_batch is not None and cell.kind == "pruned":  # it reads what masks have left
            samples = replace(samples, end=samples.end + cell.source.learned // lay.batch.seq_length)
        else:
            seen += _learned(study, lay, cell.source, stream)
        yield cell.id, samples, [] if cell.kind == "scratch" else seen


def _learned(study: StudyConfig, lay: Lay, pruning: Pruning | None, stream: Mapping[str, Any]) -> Seen:
    """The trainings in which the masks of a pruning and of the links before it were learned."""
    return [
        {"run": f"{link.cell}'s masks", "stream": stream, "range": list(learning_samples(study, lay, link).samples)}
        for link in (pruning.links if pruning else ())
        if link.method.tokens
    ]


def _behind(pruning: Pruning, outlook: Outlook, stream: Mapping[str, Any], before: Sequence[dict[str, Any]]) -> Seen:
    """The parent's trainings and the retrainings between the links of a pruning."""
    made = [
        {"run": link.retraining_cell, "stream": stream, "range": list(retrained.samples)}
        for link in pruning.links
        if link.base is not None and link.retrained
        for retrained in [outlook.lay.retrain(link.retrained, link.base.trained)]
    ]
    return [*before, *made]
