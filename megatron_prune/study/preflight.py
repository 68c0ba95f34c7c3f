"""What a study refuses before anything runs, and what it can know beforehand.

``look`` reads the parent's shape where there is one to read, every method's flags (``choices``), and what is
finished; it returns where the runs lie and which shapes will come out. ``check`` also reads the corpora's sizes. It
refuses streams that are too short, corpora that are one another, windows that are not there, unknown methods, targets
and patterns that cannot be met, and recipes under which zeros would not stay zero.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_prune import artifacts, plan
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.data import blend, heldout, identity, indexed, overlap, windows
from megatron_prune.errors import DataError, UsageError
from megatron_prune.study import budgets, choices, commands
from megatron_prune.study.choices import Needs
from megatron_prune.study.config import Study
from megatron_prune.study.grid import Grid, expand
from megatron_prune.study.ledger import Ledger
from megatron_prune.study.places import Places
from megatron_prune.study.prunings import calibration_tokens, flops_of, links, prunings


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
    account: Mapping[str, Any] | None = field(default=None, repr=False)  # of a loaded parent
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

    def to_json(self, study: Study) -> dict[str, Any]:
        """What a report needs to know of it, without Megatron."""
        return {
            "lay": asdict(self.lay),
            "shapes": self.shapes,
            "consumed": self.consumed(study),
            "spent": dict(self.spent),
        }

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
        raise UsageError("tracking.wandb_project", given=study.tracking.wandb_project,
                         allowed="a project only where wandb is installed: pip install wandb")  # fmt: skip
    outlook = look(study, places)
    _check_masked(study, places, outlook)
    _check_data(study, places, outlook)
    return outlook


def look(study: Study, places: Places) -> Outlook:
    """What can be known now; UsageError where a method or a target cannot be meant."""
    needs = {pruning.name: choices.needs(study, pruning.method, pruning.ratio) for pruning in links(study)}
    source, account = _parent(study, places)
    return Outlook(
        _lay(study, source, account), source, _targets(study, places, source, needs), needs,
        _spent(study, places, needs), account, _retrained(study, places, needs),
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
        competing = choices.shapes(study, pruning.method, pruning.ratio, before)
        made = places.plan(pruning)
        if len(competing) == 1 and not needs[pruning.name].retraining:
            found[pruning.name] = competing[0]
        elif made.is_file():
            found[pruning.name] = plan.read(made).target
    return found


def _spent(study: Study, places: Places, needs: Mapping[str, Needs]) -> dict[str, int]:
    """FLOPs behind every pruning that is finished, from the ledger."""
    records = Ledger(places.ledger).read()
    spent: dict[str, int] = {}
    for pruning in prunings(study):
        found = [flops_of(records, study, link, statistics=needs[link.name].statistics) for link in pruning.links]
        known = [flops for flops in found if flops is not None]
        if len(known) == len(found):
            spent[pruning.name] = sum(known)
    return spent


def _check_masked(study: Study, places: Places, outlook: Outlook) -> None:
    """Zeros can be held, and what starts from scratch under masks begins with other weights than their parent."""
    masked = [cell for cell in outlook.grid(study).cells if cell.masked]
    if not masked:
        return
    choices.refuse_recipe_without_zeros(commands.training(study, places, masked[0], masked[0].source))
    trained = study.parent.pretrain
    for cell in masked:
        own = cell.seed if study.parent_per_seed else 0
        seed = trained.seed + own if trained is not None else (outlook.account or {}).get("seed")
        if cell.kind == "scratch" and cell.seed == seed:
            raise UsageError(
                "seeds", given=seed, allowed="another than the parent's, for scratch under masks",
                why="masks made of the parent fit the weights that it began with, and one seed gives the same to both",
            )  # fmt: skip


def _parent(study: Study, places: Places) -> tuple[ModelShape | None, Mapping[str, Any] | None]:
    """The parent's shape if it can be known, and its account if it was trained by us elsewhere."""
    parent = study.parent
    if parent.pretrain is not None:
        return shape_from_flags(study), None
    if parent.load is not None:
        checkpoint = open_checkpoint(parent.load)
        checkpoint.verify()
        path = places.beside_parent(study) / "account.json"
        account = artifacts.read_json(path) if path.is_file() else None
        if account is not None and not checkpoint.release and account["steps"] != checkpoint.iteration:
            raise UsageError("parent.load", given=f"iteration {checkpoint.iteration} of {places.beside_parent(study)}",
                             allowed=f"iteration {account['steps']}, of which its account is")  # fmt: skip
        return checkpoint.shape, account
    imported = places.checkpoint("parent")
    return (open_checkpoint(imported).shape if imported.is_dir() else None), None


def _lay(study: Study, source: ModelShape | None, account: Mapping[str, Any] | None) -> budgets.Lay:
    batch = budgets.Batch(study.recipe.global_batch_size, study.data.seq_length)
    parent = study.parent
    if parent.pretrain is not None:
        steps = batch.steps(parent.pretrain.tokens, "parent.pretrain.tokens")
        samples = steps * batch.samples
        flops = source.training_flops(batch.seq_length) * samples if source else None
        return budgets.Lay(batch, samples, steps * batch.tokens, flops)
    if account is None:
        declared = parent.declared_tokens
        one = source.training_flops(batch.seq_length) if source else None
        flops = one * declared // batch.seq_length if one and declared else None
        return budgets.Lay(batch, 0, declared, flops)
    if account.get("complete") is not True or account.get("stream") is None:
        raise UsageError("parent.load", given=parent.load, allowed="a run whose account is complete and on a stream")
    if parent.declared_tokens not in (None, account["tokens"]):
        raise UsageError(
            "parent.declared_tokens",
            given=parent.declared_tokens,
            allowed=f"{account['tokens']}, as its account says",
        )
    return budgets.Lay(batch, account["range"][1], account["tokens"], account["flops_executed"])


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


def _check_data(study: Study, places: Places, outlook: Outlook) -> None:
    data = study.data
    prints = {f"data.train ({prefix})": prefix for _, prefix in data.train}
    prints |= {f"data.{name}": getattr(data, name) for name in ("calibration", "validation", "test")}
    seen: dict[str, str] = {}
    for name, prefix in prints.items():
        indexed.open_indexed(prefix)
        if earlier := seen.get(print_ := identity.fingerprint(prefix)):
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
    held_out = [data.calibration, data.validation, data.test]
    heldout.refuse_shared_documents([prefix for _, prefix in data.train], held_out)
    for number, earlier in enumerate(held_out):  # what is judged finally was not looked at before, either
        heldout.refuse_shared_documents([earlier], held_out[number + 1 :])
    if data.max_near_duplicates is not None:
        _check_near_duplicates(study, data.max_near_duplicates, places)
    ends = {"parent": outlook.lay.parent_end}
    ends |= {cell.id: cell.samples.end for cell in outlook.estimated_grid(study).cells}
    for pruning in links(study):
        needs = outlook.needs[pruning.name]
        if needs.retraining:
            ends[f"methods.{pruning.method.tag}'s candidates"] = outlook.lay.retrain(needs.retraining.tokens).end
    longest = max(ends, key=lambda cell: ends[cell])
    corpora = blend.members(blend.parse_blend(data.blend))
    held = blend.samples_per_epoch(corpora, data.seq_length) * data.epochs
    if ends[longest] > held:
        raise DataError(
            f"data.train is too short for {longest}, which ends at sample {ends[longest]}: it has {held} samples of "
            f"{data.seq_length} tokens in {data.epochs} epoch(s); give more text, smaller budgets or more data.epochs"
        )
    _check_parent_stream(study, outlook.account)


def _check_near_duplicates(study: Study, limit: float, places: Places) -> None:
    """Refuse corpora that share too much; the report is kept, since making it reads every training token."""
    data = study.data
    stages = {name: [getattr(data, name)] for name in ("calibration", "validation", "test")}
    stages["train"] = [prefix for _, prefix in data.train]
    earlier = artifacts.read_json(places.overlap) if places.overlap.is_file() else None
    report = overlap.compare_stages(stages, max_near_duplicates=limit, earlier=earlier)
    if report != earlier and places.root.is_dir():  # a plan of a study that has not begun leaves nothing
        artifacts.write_json(places.overlap, report)
    overlap.refuse(report)


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
