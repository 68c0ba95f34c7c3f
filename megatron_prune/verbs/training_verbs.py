"""Settings of pretrain and evaluate."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_prune.settings import Settings, setting
from megatron_prune.verbs.shared import DTYPES, LearningSettings, TargetSettings


@dataclass(frozen=True, kw_only=True)
class MasksSettings(Settings):
    TITLE = "masks"

    masks: str | None = setting(
        None,
        metavar="DIR",
        help="train with the zeros of these masks held; a resumed run uses the masks in its save directory",
    )
    random_masks: int | None = setting(
        None,
        metavar="SEED",
        help="train a new model under random masks with the pattern and the counts of --masks (per row; per group "
        "for N:M)",
    )
    let_zeros_fill: bool = setting(False, help="train a sparse checkpoint as a dense one: its zeros may become nonzero")


@dataclass(frozen=True, kw_only=True)
class StreamSettings(Settings):
    TITLE = "token stream"

    stream_range: str | None = setting(
        None,
        metavar="START:END",
        help="train on exactly these samples of the stream over --train-data-path or --data-path; END - START is the "
        "global batch size times the number of steps",
    )
    stream_seed: int = setting(1234, metavar="SEED", help="order of the stream; the same for a whole study")
    stream_epochs: int = setting(
        1, metavar="N", help="number of differently shuffled passes over the corpora in the stream"
    )
    stream_allow_seen: bool = setting(
        False, help="allow samples that the pretrained checkpoint has seen; such a run is never compared"
    )
    stream_permutation_seed: int | None = setting(
        None, metavar="SEED", help="permute the samples within the range (a replicate of the same training)"
    )


@dataclass(frozen=True, kw_only=True)
class BatchScheduleSettings(Settings):
    """``training/batch_flags.py``"""

    TITLE = "dynamic batch loading (Sheared-LLaMA), over the corpora of --data-path"

    dynamic_batch_every: int | None = setting(
        None,
        metavar="STEPS",
        help="every STEPS steps, change what each corpus gives to a batch by its loss over its reference",
    )
    domain_validation: tuple[str, ...] = setting(
        (), metavar="PREFIX", help="with it: text to measure the losses on, a corpus for each of --data-path, in order"
    )
    reference_losses: tuple[str, ...] = setting(
        (), metavar="LOSS", help="with it: the loss to reach on each, or a FILE: scores.json, or {PREFIX: loss}"
    )
    domain_samples: int | None = setting(None, metavar="N", help="samples to measure each loss on (default: 500)")
    batch_schedule: str | None = setting(
        None, metavar="FILE", help="follow the batch_schedule.json of another run: the same samples at the same steps"
    )


@dataclass(frozen=True, kw_only=True)
class DistillationSettings(Settings):
    """``training/distillation.py``"""

    TITLE = "objective"

    objective: str = setting(
        "lm", choices=("lm", "distill"), help="learn from the text alone, or from a teacher's probabilities as well"
    )
    teacher: str | None = setting(
        None, metavar="CKPT", help="with distill: the teacher, run in the same job; usually the unpruned parent"
    )
    teacher_cache: str | None = setting(
        None,
        metavar="DIR",
        help="with distill: what teach wrote of a teacher on these samples; --teacher is then compared, not run",
    )
    distill_alpha: str = setting(
        "1", metavar="A[:B]", help="share of T² · KL in the loss, of which cross entropy has the rest; or from A to B"
    )
    distill_temperature: str = setting(
        "1", metavar="T[:U]", help="temperature T of both distributions; or from T to U over the run"
    )
    distill_kl: str = setting(
        "forward", choices=("forward", "reverse"), help="KL(teacher ‖ student), or KL(student ‖ teacher)"
    )
    distill_hidden_states: tuple[str, ...] = setting(
        (), metavar="S:T", help="also match the output of the student's block S with that of the teacher's block T"
    )
    distill_hidden_weight: float = setting(1.0, metavar="W", help="weight of their squared distance in the loss")


@dataclass(frozen=True, kw_only=True)
class RunSettings(BatchScheduleSettings, MasksSettings, StreamSettings):
    """Of every training run."""

    TITLE = "token stream"

    start_over: str | None = setting(
        None, metavar="DIR", help="move the run in --save to DIR, a new path, and begin again; where DIR is that run, "
        "it has been moved, and the new one continues"
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(DistillationSettings, RunSettings):
    """``pretrain``; everything else is Megatron's."""


@dataclass(frozen=True, kw_only=True)
class TeachSettings(Settings):
    """``teach``: a teacher's most probable next tokens on a range of a stream."""

    TITLE = "what is written, and on which samples"

    output: str = setting(metavar="DIR", help="folder of the cache; that of a stopped attempt is continued")
    stream_range: str = setting(metavar="START:END", help="samples of the stream; a run needs a range within it")
    top_k: int = setting(metavar="K", help="number of words per token; of all others, the sum of their probabilities")
    dtype: str = setting("float16", choices=DTYPES, help="type of the log-probabilities")
    shard_samples: int | None = setting(None, metavar="N", help="samples per file (default: as many as take 64 MiB)")
    stream_seed: int = setting(1234, metavar="SEED", help="pretrain's")
    stream_epochs: int = setting(1, metavar="N", help="pretrain's")


@dataclass(frozen=True, kw_only=True)
class LearnMasksSettings(RunSettings, TargetSettings, LearningSettings):
    """``learn-masks``; everything else is Megatron's."""


@dataclass(frozen=True, kw_only=True)
class TasksSettings(Settings):
    TITLE = "lm-eval tasks (up to --seq-length tokens per sequence and --micro-batch-size sequences per batch)"

    tasks: str | None = setting(
        None, metavar="NAME,…", help="tasks, groups or tags of lm-eval (pip install 'megatron_prune[eval]')"
    )
    tasks_path: str | None = setting(None, metavar="DIR", help="a folder with YAML files of more tasks")
    num_fewshot: int | None = setting(None, metavar="N", help="examples before each question (default: the task's)")
    limit: int | None = setting(None, metavar="N", help="only the first N questions of each task")
    task_samples: str | None = setting(
        None, metavar="FILE.jsonl", help="write every question and its likelihoods or text to this file"
    )


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(TasksSettings):
    TITLE = "what to score"

    output: str = setting(metavar="FILE", help="scores.json to write")
    windows: int | None = setting(
        None, metavar="N", help="windows of --seq-length tokens to score per corpus (default: all)"
    )
    labels: tuple[str, ...] | None = setting(
        None, metavar="NAME", help="names for the corpora of --data-path, in order"
    )
    extend: bool = setting(
        False, help="keep what FILE already says of these weights, and score only the corpora and tasks that it lacks"
    )


@dataclass(frozen=True, kw_only=True)
class WorkloadSettings(Settings):
    """What a model does while it is timed."""

    TITLE = "what is measured"

    batch: int = setting(1, metavar="B", help="prompts that are read together")
    prompt: int = setting(512, metavar="S", help="tokens of a prompt")
    new: int = setting(64, metavar="N", help="tokens generated after each prompt, one at a time")
    repeats: int = setting(5, metavar="R", help="measurements, of which the median is shown")
    warmup: int = setting(1, metavar="W", help="measurements before those, which do not count")


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings(WorkloadSettings):
    TITLE = "files"

    checkpoints: tuple[str, ...] = setting(positional=True, metavar="CKPT", help="checkpoints to compare")
    output: str | None = setting(None, metavar="FILE", help="write the numbers as JSON too")
    static: bool = setting(False, help="measure nothing: only what follows from shapes and masks")


@dataclass(frozen=True, kw_only=True)
class TimedSizesSettings(WorkloadSettings):
    """The sizes of the models that are timed."""

    TITLE = "models that are timed"

    axes: tuple[str, ...] = setting(
        ("hidden", "ffn", "heads", "groups"),
        choices=("hidden", "ffn", "heads", "groups"),
        metavar="AXIS",
        help="sizes that the shapes to predict may differ in; fewer take less time",
    )
    points: int = setting(3, metavar="N", help="sizes along each, down from the parent's; linear in between")
    smallest: float = setting(
        0.25, metavar="F", help="smallest hidden and FFN size, as a fraction of the parent's; heads and groups reach 1"
    )
    divisible_by: int = setting(64, metavar="N", help="hidden and FFN sizes are multiples of N")
    depth: int = setting(5, metavar="L", help="layers of a model; more layers, less noise")


@dataclass(frozen=True, kw_only=True)
class LatencyTableSettings(TimedSizesSettings):
    TITLE = "files"

    checkpoint: str = setting(positional=True, metavar="CKPT", help="the parent; its weights are not read")
    output: str = setting(metavar="FILE", help="the table to write, JSON")
