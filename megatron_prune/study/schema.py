"""study.yaml as frozen dataclasses, read strictly, with early errors.

Unknown keys are refused by name; every number is checked when it is read. ``load`` gives a ``StudyConfig`` (sections:
``sections``; value types: ``values``) with defaults filled in; ``resolved`` gives it as JSON for the run's folder.
Paths are relative to the working directory, as for Megatron.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from megatron_prune.errors import UsageError
from megatron_prune.study.objectives import Distill, ObjectiveName, Objectives
from megatron_prune.study.sample_ranges import Batch
from megatron_prune.study.sections import CalibrationSection, Data, EvaluationSection, MethodSection, Parent, Recipe
from megatron_prune.study.study_file import Location, Written, WrongStudy, problems_of, read
from megatron_prune.study.values import (
    RESERVED,
    STRICT,
    Flags,
    Fraction,
    Granularity,
    Positive,
    Retention,
    Scratch,
    Scratches,
    Setting,
    Settings,
    Tokens,
    finds,
    steps_in_tokens,
)

# Sections of study.yaml about where runs execute and report.


# Options of sbatch that a job's script sets itself, or that would change what the job is.
OF_THE_SCRIPT = (
    "job-name", "nodes", "ntasks", "ntasks-per-node", "output", "chdir", "open-mode", "dependency",
    "kill-on-invalid-dep", "array", "parsable", "wrap", "wait", "test-only",
)  # fmt: skip
TIMES = ("time", "time-min", "begin", "deadline")


@dataclass(frozen=True, config=STRICT)
class Slurm:
    """Settings of the launcher ``slurm``.

    ``options`` are written as ``#SBATCH --key=value`` (partition, account, time, gres, …), ``setup`` as lines of
    shell before the first command (modules, the environment). ``ranks_per_node``: processes (GPUs) of one node.
    """

    ranks_per_node: Positive | None = None  # None: all of launch.nproc on one node
    options: Flags = dataclasses.field(default_factory=dict)
    setup: list[str] = dataclasses.field(default_factory=list)
    poll_seconds: Annotated[float, Field(gt=0)] = 30.0  # between polls of the queue
    most_jobs: Positive | None = None  # in the queue at once; None: no limit

    @finds
    def __post_init__(self) -> None:
        for name, value in self.options.items():
            _check_option(name, value)


def _check_option(name: str, value: Any) -> None:
    """UsageError for an option of sbatch that the script sets itself, or that YAML or Slurm would misread."""
    allowed = why = remedy = ""
    if name in OF_THE_SCRIPT:
        allowed = "options that a job's script does not set itself"
    elif name.startswith("container-"):
        allowed = "no container here"
        why = "sbatch would run the job's script in it, which calls srun and scontrol"
        remedy = "name one in each command of your own, or install the environment in launch.slurm.setup"
    elif name in TIMES and not isinstance(value, str):
        allowed, why = 'a time in quotes, such as "24:00:00"', "YAML reads 24:00:00 as 86400, and Slurm that as minutes"
    elif value is None or value is False:
        allowed, remedy = "a value, or true for a flag without one", "leave out an option that is not wanted"
    elif name == "signal" and not re.fullmatch(r"B:USR1@\d+", str(value)):
        allowed, why = "B:USR1@SECONDS", "the script tells its training to save that long before the time limit"
    elif isinstance(value, list):
        allowed = 'text as sbatch takes it, such as "a,b"'
    elif isinstance(value, str) and not (value and value.isprintable() and not set("'\"\\") & set(value)):
        allowed = "text on one line, without quotes and backslashes"
    if allowed:
        raise UsageError(f"launch.slurm.options.{name}", got=repr(value), expected=allowed, why=why, do=remedy)


@dataclass(frozen=True, config=STRICT)
class Launch:
    """Processes per run, concurrent runs, and the launcher: this machine or a cluster's queue.

    ``retries``: how often a failed stage is run again, from its last save, before its cell is marked as failed;
    attempts that made progress do not count.
    ``parallel_cells`` bounds the runs on this machine; under Slurm the queue decides.
    """

    launcher: Literal["local", "slurm"] = "local"
    nproc: Positive = 1
    tensor_parallel: Positive = 1
    pipeline_parallel: Positive = 1
    parallel_cells: Positive = 1
    threads: Positive | None = None  # CPU threads of a process; None: the cores, shared evenly
    retries: Annotated[int, Field(ge=0)] = 1
    slurm: Slurm | None = None

    @finds
    def __post_init__(self) -> None:
        if self.nproc % (self.tensor_parallel * self.pipeline_parallel):
            raise UsageError(
                "launch.nproc",
                got=self.nproc,
                expected=f"a multiple of tensor_parallel x pipeline_parallel = "
                f"{self.tensor_parallel * self.pipeline_parallel}",
            )
        if self.slurm is not None and self.launcher != "slurm":
            raise UsageError("launch.slurm", got="it alone", expected="launcher: slurm with it")
        if self.launcher == "slurm" and self.parallel_cells > 1:
            raise UsageError(
                "launch.parallel_cells", got=self.parallel_cells, expected="no such key with launcher: slurm"
            )
        if self.nproc % self.ranks_per_node:
            raise UsageError(
                "launch.nproc",
                got=self.nproc,
                expected=f"a multiple of launch.slurm.ranks_per_node {self.ranks_per_node}",
            )

    @property
    def data_parallel(self) -> int:
        return self.nproc // (self.tensor_parallel * self.pipeline_parallel)

    @property
    def ranks_per_node(self) -> int:
        per_node = self.slurm.ranks_per_node if self.slurm else None
        return min(per_node or self.nproc, self.nproc)

    def threads_per_process(self, cells: int) -> int:
        """Threads per process if up to ``cells`` runs share the machine."""
        return self.threads or max(1, len(os.sched_getaffinity(0)) // (cells * self.nproc))


@dataclass(frozen=True, config=STRICT)
class Tracking:
    """Trackers of running trainings, through Megatron's own writers; runs are grouped by study.

    W&B groups by ``WANDB_RUN_GROUP``, the study's name; a run has the name of its cell.
    """

    tensorboard: bool = False  # under the study's folder, tensorboard/<cell>
    wandb_project: str | None = None
    wandb_entity: str | None = None

    @finds
    def __post_init__(self) -> None:
        if self.wandb_entity and not self.wandb_project:
            raise UsageError(
                "tracking.wandb_entity", got=f"{self.wandb_entity} alone", expected="tracking.wandb_project with it"
            )


# ``family`` of study.yaml: the study's planned comparisons, over which Holm's correction is made.


@dataclass(frozen=True, config=STRICT)
class Family:
    """Criteria for belonging to the family; None: any. By default all comparisons of a study belong."""

    methods: list[str] | None = None  # as in rows: the label, or else the name
    patterns: list[str] | None = None
    ratios: list[Fraction] | None = None
    settings: list[Setting] | None = None
    budgets: list[Tokens] | None = None
    objectives: list[ObjectiveName] | None = None

    def holds(self, comparison: Mapping[str, Any]) -> bool:
        """Whether a comparison (``method``, ``pattern``, ``ratio``, ``setting``, ``budget``, ``objective``) belongs."""
        return all(
            allowed is None or comparison[key] in allowed
            for key, allowed in (
                ("method", self.methods),
                ("pattern", self.patterns),
                ("ratio", self.ratios),
                ("setting", self.settings),
                ("budget", self.budgets),
                ("objective", self.objectives),
            )
        )

    def check(self, where: str = "family", **known: Iterable[Any]) -> None:
        """UsageError for a value that the study does not have."""
        for key, there in known.items():
            values = list(dict.fromkeys(there))
            for value in getattr(self, key) or ():
                if value not in values:
                    raise UsageError(
                        f"{where}.{key}", got=value, expected=f"one that the study has: {', '.join(map(str, values))}"
                    )


@dataclass(frozen=True, config=STRICT)
class Omission(Family):
    """Comparisons that are not made, by any of these keys, and so the runs that no other comparison needs."""

    seeds: list[PositiveInt] | None = None
    against: Scratch | None = None  # the kind of scratch run

    def holds(self, comparison: Mapping[str, Any]) -> bool:
        """The same for a comparison that also has its ``seed`` and ``against``."""
        return (
            super().holds(comparison)
            and (self.seeds is None or comparison["seed"] in self.seeds)
            and self.against in (None, comparison["against"])
        )


@dataclass(frozen=True, config=STRICT)
class GapSelection(Family):
    """Comparisons of a pruned arm with its scratch arm, by any of these keys. Without ``budgets`` they are those at the
    largest budget (in a trend in tokens, those at every budget). ``against``: the kind of scratch run that sparse
    methods are compared with.
    """

    granularities: list[Granularity] | None = None
    against: Scratch | None = None

    def words(self) -> str:
        """``depth at 50%``; ``sparsegpt 2:4``"""
        parts = [" and ".join(self.methods or self.granularities or [])]
        parts += [" and ".join(self.patterns)] if self.patterns else []
        parts += ["at " + " and ".join(f"{100 * ratio:g}%" for ratio in self.ratios)] if self.ratios else []
        parts += ["with " + " and ".join(self.objectives)] if self.objectives else []
        parts += ["after " + " and ".join(f"{tokens:,} tokens" for tokens in self.budgets)] if self.budgets else []
        return " ".join(filter(None, parts)) or "all comparisons"


@dataclass(frozen=True, config=STRICT)
class Contrast:
    """A question between comparisons. A gap is the advantage of pruning over its scratch run.

    ``larger``: is the gap of ``of`` larger than that of ``than``? A difference of differences, seed by seed. With
    ``arm: scratch``: do the scratch runs of ``of`` end lower than those of ``than``?
    ``vanishes``: is the gap of ``of`` within ``margin`` (nats, or a share for accuracies)? Two one-sided tests.
    ``trend``: does the gap of ``of`` change ``along`` the ratio removed, or along the tokens of retraining? A slope per
    10% of the linears, or per doubling of the tokens, the mean over the methods.

    Several comparisons are averaged. ``measure``: ``test`` for the test loss, the label of another corpus, a suite or a
    task. The question is asked in every setting in which its comparisons are.
    """

    kind: Literal["larger", "vanishes", "trend"]
    of: GapSelection
    than: GapSelection | None = None
    along: Literal["ratio", "tokens"] | None = None
    margin: Annotated[float, Field(gt=0)] | None = None
    measure: str = "test"
    label: str | None = None  # its name in the report
    arm: Literal["gap", "scratch"] = "gap"

    @finds
    def __post_init__(self) -> None:
        if self.arm == "scratch" and self.kind != "larger":
            raise UsageError("compare.arm", got=f"scratch with kind {self.kind}", expected="it with kind larger")
        needed = {"larger": "than", "vanishes": "margin", "trend": "along"}
        for kind, key in needed.items():
            if (getattr(self, key) is not None) != (kind == self.kind):
                raise UsageError(
                    f"compare.{key}", got="nothing" if kind == self.kind else f"it with kind {self.kind}",
                    expected=f"it with kind {kind}, and with no other",
                )  # fmt: skip


@dataclass(frozen=True, config=STRICT)
class StudyConfig:
    """The whole of a study.yaml."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    data: Data
    parent: Parent
    recipe: Recipe
    methods: Annotated[list[MethodSection], Field(min_length=1)]
    budgets: Annotated[list[Tokens], Field(min_length=1)]
    ratios: list[Fraction] = dataclasses.field(default_factory=list)
    ratio_of: Literal["linears", "all"] = "linears"
    settings: Settings = dataclasses.field(default_factory=lambda: ["equal-training", "equal-total"])
    scratch: Scratches = dataclasses.field(
        default_factory=lambda: ["masked"]
    )  # scratch runs that sparse methods are compared with
    objectives: Objectives = dataclasses.field(default_factory=lambda: ["lm"])  # what the compared runs learn from
    distill: Distill | None = None  # settings of the objective ``distill``
    seeds: Annotated[list[PositiveInt], Field(min_length=1)] = dataclasses.field(default_factory=lambda: [1])
    launch: Launch = dataclasses.field(default_factory=Launch)
    calibration: CalibrationSection = dataclasses.field(default_factory=CalibrationSection)
    evaluation: EvaluationSection = dataclasses.field(default_factory=EvaluationSection)
    tracking: Tracking = dataclasses.field(default_factory=Tracking)
    retention: Retention = "all"  # of checkpoints of the compared runs
    leave_out: list[Omission] = dataclasses.field(default_factory=list)  # comparisons of the grid that are not made
    family: Family = dataclasses.field(default_factory=Family)  # the comparisons under Holm's correction
    compare: list[Contrast] = dataclasses.field(default_factory=list)  # questions between comparisons
    parent_per_seed: bool = False  # train one parent per seed, so that intervals are not conditional on one

    @finds
    def __post_init__(self) -> None:
        batch = self.recipe.micro_batch_size * self.launch.data_parallel
        if self.recipe.global_batch_size % batch:
            raise UsageError(
                "recipe.global_batch_size",
                got=self.recipe.global_batch_size,
                expected=f"a multiple of micro_batch_size x data parallel size = {batch}",
            )
        if self.recipe.dynamic_batch is not None:
            self.recipe.dynamic_batch.check(self.data, len(self.recipe.rates))
        for where, flags in (
            ("recipe.arguments", self.recipe.arguments),
            ("parent.pretrain.arguments", self.parent.pretrain.arguments if self.parent.pretrain else {}),
            ("parent.shape", self.parent.shape if isinstance(self.parent.shape, dict) else {}),
        ):
            for flag in flags:
                if flag in RESERVED:
                    raise UsageError(
                        f"{where}.{flag}",
                        got="it",
                        expected="Megatron flags that the study does not set itself",
                        why="it would differ between arms",
                    )
        if self.parent.pretrain and self.parent.pretrain.lr is None and len(self.recipe.rates) > 1:
            raise UsageError("parent.pretrain.lr", got="nothing", expected="one learning rate",
                             why="recipe.lr lists several for the runs that are compared")  # fmt: skip
        if self.evaluation.efficiency and self.launch.launcher == "slurm":
            raise UsageError("evaluation.efficiency", got="true with launcher: slurm", expected="false",
                             why="nothing measures on the machine that submits the jobs",
                             do="run `megatron-prune benchmark` on a node and write efficiency.json")  # fmt: skip
        if self.parent_per_seed and self.parent.pretrain is None:
            raise UsageError("parent_per_seed", got="true with another parent", expected="parent.pretrain with it",
                             why="a parent from elsewhere cannot be trained again")  # fmt: skip
        for what in ("budgets", "ratios", "seeds"):
            values = getattr(self, what)
            if len(set(values)) != len(values):
                raise UsageError(what, got=values, expected="different values")
        self._refuse_budgets_of_one_run()
        self._check_objectives()
        tags = [method.tag for method in self.methods]
        for tag in tags:
            if tags.count(tag) > 1:
                raise UsageError("methods", got=f"{tag} twice", expected="a label for each of them")
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", tag):
                raise UsageError("methods", got=tag, expected="labels made of letters, digits, dots and dashes")
        names = [(method.title, method.last_pattern) for method in self.methods]
        if len(set(names)) < len(names):
            raise UsageError("methods", got="two with the same name and pattern", expected="a label for each of them")
        known: dict[str, list[Any]] = {
            "methods": [method.title for method in self.methods],
            "patterns": [method.last_pattern for method in self.methods],
            "ratios": [*self.ratios, *(method.own_ratio for method in self.methods)],
            "settings": [setting for method in self.methods for setting, _ in self.compared(method)],
            "budgets": self.budgets,
            "objectives": self.objectives,
        }
        self.family.check("family", **known)
        for number, left in enumerate(self.leave_out):
            left.check(f"leave_out.{number}", **known, seeds=self.seeds)
        measures = ["test", *self.evaluation.corpora, *self.evaluation.tasks, *self.evaluation.lm_eval_tasks]
        for number, contrast in enumerate(self.compare):
            contrast.of.check(f"compare.{number}.of", **known)
            if contrast.than is not None:
                contrast.than.check(f"compare.{number}.than", **known)
            allowed = measures if contrast.arm == "gap" else ["test", *self.evaluation.corpora]
            if contrast.measure not in allowed:
                raise UsageError(
                    f"compare.{number}.measure", got=contrast.measure, expected=" or ".join(dict.fromkeys(allowed))
                )
        if not self.ratios and not all(method.target or method.own_ratio or method.chain for method in self.methods):
            raise UsageError(
                "ratios", got="none", expected="at least one ratio, or for every method a target or an N:M pattern"
            )
        if self.ratio_of != "linears" and any(method.sparse for method in self.methods):
            raise UsageError(
                "ratio_of", got=self.ratio_of, expected="linears in a study with sparse methods",
                why="they remove their ratio of every linear",
            )  # fmt: skip

    def _refuse_budgets_of_one_run(self) -> None:
        """Budgets are trained as whole batches: two with the same number of steps would be one run, counted twice."""
        batch = Batch(self.recipe.global_batch_size, self.data.seq_length)
        known: dict[int, int] = {}
        for budget in self.budgets:
            steps = batch.steps(budget, "budgets")
            if steps in known:
                raise UsageError(
                    "budgets", got=f"{known[steps]} and {budget}",
                    expected="budgets that differ in their number of steps",
                    why=f"both are {steps} step{'s' * (steps != 1)} of {batch.tokens:,} tokens: one run",
                )  # fmt: skip
            known[steps] = budget

    def _check_objectives(self) -> None:
        if "distill" not in self.objectives:
            if self.distill is not None:
                raise UsageError("distill", got="it", expected="distill among objectives with it")
            return
        for budget in self.distillation.budgets:
            if budget not in self.budgets:
                raise UsageError(
                    "distill.budgets", got=budget, expected=f"those of budgets: {', '.join(map(str, self.budgets))}"
                )
        if self.distillation.budgets and "lm" not in self.objectives:
            raise UsageError("distill.budgets", got=self.distillation.budgets, expected="no such key without lm",
                             why="the other budgets would have no run")  # fmt: skip
        if self.distillation.hidden_states and self.launch.pipeline_parallel > 1:
            raise UsageError("distill.hidden_states", got="it", why="both blocks must be where the loss is",
                             expected="no such key with launch.pipeline_parallel above 1")  # fmt: skip
        if self.distillation.cached and self.recipe.dynamic_batch is not None:
            raise UsageError("distill.teacher", got="cache with recipe.dynamic_batch", expected="online",
                             why="which samples a run will read is not known before it has")  # fmt: skip

    @property
    def distillation(self) -> Distill:
        """The settings of ``distill``, or their defaults."""
        return self.distill or Distill()

    def learned_from(self, budget: int) -> list[ObjectiveName]:
        """The objectives of the runs of a budget."""
        return [one for one in self.objectives if one == "lm" or self.distillation.at(budget)]

    @property
    def trainings(self) -> list[tuple[int, ObjectiveName]]:
        """Every budget with each objective of its runs."""
        return [(budget, objective) for budget in self.budgets for objective in self.learned_from(budget)]

    def compared(self, method: MethodSection) -> list[tuple[Setting, Scratch]]:
        """The comparisons of a pruned model of ``method``."""
        asked = method.compare or dict.fromkeys(self.settings)
        default: list[Scratch] = self.scratch if method.sparse else ["dense"]
        return [(setting, kind) for setting, kinds in asked.items() for kind in kinds or default]

    def asked_of(
        self, method: MethodSection, ratio: float | None, budget: int, objective: ObjectiveName, seed: int
    ) -> list[tuple[Setting, Scratch]]:
        """Of ``compared``, those at one ratio, budget, objective and seed that ``leave_out`` does not have."""
        about: dict[str, Any] = {"method": method.title, "pattern": method.last_pattern, "ratio": ratio}
        about |= {"budget": budget, "objective": objective, "seed": seed}
        return [
            (setting, kind)
            for setting, kind in self.compared(method)
            if not any(left.holds(about | {"setting": setting, "against": kind}) for left in self.leave_out)
        ]

    def parent_run(self, replicate: int) -> tuple[int, float]:
        """Seed and learning rate of a parent's training; ``replicate`` is its number in ``parent_cells``."""
        assert self.parent.pretrain is not None
        return self.parent.pretrain.seed + replicate, self.parent.pretrain.lr or self.recipe.rates[0]

    def location(self, method: MethodSection) -> Location:
        """The location in study.yaml of a method, or of a link of a chain."""
        for number, entry in enumerate(self.methods):
            if entry == method:
                return "methods", number
            for place, link in enumerate(entry.chain):
                if link.method() == method:
                    return "methods", number, "chain", place
        return ()

    @property
    def evaluation_seq_length(self) -> int:
        return self.evaluation.seq_length or self.data.seq_length

    @property
    def calibration_seq_length(self) -> int:
        return self.calibration.seq_length or self.data.seq_length


def load(path: str | Path) -> StudyConfig:
    """Read a study.yaml; UsageError names file, line, key, the problem and what is allowed."""
    found = load_all(path)
    if len(found) > 1:
        raise UsageError("STUDY.yaml", got=f"{path} with {len(found)}", expected="a study with one parent")
    return found[0]


def load_all(path: str | Path) -> list[StudyConfig]:
    """Read a study.yaml that may have ``parents``, by label, in place of ``parent``: one study for each of them.

    They are called NAME.LABEL, and are separate studies in separate folders.
    """
    written = read(path)
    content = written.content
    if not isinstance(content, dict) or "parents" not in content:
        return [_study(written)]
    parents, where = content["parents"], written.place(("parents",))
    if not isinstance(parents, dict) or not parents or "parent" in content:
        raise UsageError(f"{where}parents", got=parents if "parent" not in content else "both",
                         expected="either parent, or parents by their labels")  # fmt: skip
    if not isinstance(name := content.get("name"), str):
        raise UsageError(f"{written.place(('name',))}name", got="nothing" if name is None else name,
                         expected="a text", why="its studies are called NAME.LABEL")  # fmt: skip
    return [_study(written.of_parent(label)) for label in parents]


def from_mapping(content: Any, where: str = "study") -> StudyConfig:
    """A ``StudyConfig`` from plain data; errors begin with ``where``."""
    return _study(Written(content, where))


def of_hf(study: StudyConfig, hf: str) -> StudyConfig:
    """The same study of another parent: the Hugging Face model ``hf``, of which ``config.json`` is enough to plan.

    Its name is NAME.MODEL, so that a folder of the study itself is not taken for its own.
    """
    place = Path(hf).parent if Path(hf).name == "config.json" else Path(hf)
    label = re.sub(r"[^A-Za-z0-9._-]+", "-", place.resolve().name if place.exists() else place.name)
    made = dataclasses.replace(study, name=f"{study.name}.{label}", parent=Parent(import_hf=hf, shape=hf))
    object.__setattr__(made, "_written", written(study))
    return made


def resolved(study: StudyConfig) -> dict[str, Any]:
    """The study with every default filled in, as JSON values."""
    values: dict[str, Any] = TypeAdapter(StudyConfig).dump_python(study, mode="json")
    return values


def written(study: StudyConfig) -> Written:
    """The source of a study, for errors that are found after reading."""
    found: Written = getattr(study, "_written", Written(None))
    return found


def _study(source: Written) -> StudyConfig:
    """The study from a file's content; WrongStudy, or a single UsageError, lists all errors."""
    if not isinstance(source.content, dict):
        kind = "nothing" if source.content is None else f"a {type(source.content).__name__}"
        raise UsageError(source.file, got=kind, expected="a mapping of keys to values")
    try:
        made = TypeAdapter(StudyConfig).validate_python(steps_in_tokens(source.content))
    except ValidationError as error:
        problems = list(problems_of(error, source, StudyConfig))
        raise problems[0] if len(problems) == 1 else WrongStudy(problems) from error
    object.__setattr__(made, "_written", source)  # not a field: studies of equal content are equal
    return made
