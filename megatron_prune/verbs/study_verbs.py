"""Settings of preflight, study and advise."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_prune.settings import Settings, count, setting
from megatron_prune.verbs.shared import GPUS, SizeSettings


@dataclass(frozen=True, kw_only=True)
class PreflightSettings(Settings):
    TITLE = "cluster"

    gpus: int = setting(metavar="N", help="ranks of the job")
    gpu: str = setting("h100", choices=GPUS, help="kind of GPU")
    gpus_per_node: int = setting(8, metavar="N", help="GPUs in a node")
    installed: str = setting(
        "te,apex,flash-attn",
        metavar="WORDS",
        help="packages on every node besides PyTorch: te, apex, flash-attn, nvrx, emerging-optimizers, with commas "
        "between, or none (default: te,apex,flash-attn, as launch/Dockerfile.ngc has; launch/Dockerfile: none)",
    )
    mfu: float = setting(0.4, metavar="F", help="fraction of peak dense bf16 FLOPs, for times; measure yours")
    reserve_gb: float = setting(
        6.0, metavar="GB", help="memory of every GPU set aside for the CUDA context, NCCL, workspaces and fragmentation"
    )
    host_memory_gb: float | None = setting(
        None, metavar="GB", help="memory of a node; if not given, host memory is reported but not checked"
    )
    model: str | None = setting(
        None,
        metavar="FILE",
        help="file with the model's flags, while the checkpoint is not here (# begins a comment)",
    )
    hf: str | None = setting(
        None,
        metavar="HF",
        help="the model of a Hugging Face config.json, while the checkpoint is not here: the file, its directory, or "
        "the name of a model whose config is in the local cache",
    )
    corpus_tokens: int | None = setting(
        None, kind=count, metavar="N", help="tokens in the corpora, such as 750B, while they are not here"
    )
    output: str | None = setting(None, metavar="FILE.json", help="write the answer as JSON too")


@dataclass(frozen=True, kw_only=True)
class StudySettings(Settings):
    TITLE = "study"

    study: str = setting(
        positional=True, metavar="STUDY.yaml", help="the study's file, or the folder of a study that has begun"
    )
    runs_dir: str = setting("runs", metavar="DIR", help="directory of all studies")
    parent: str | None = setting(
        None, metavar="LABEL", help="only this parent's study, if STUDY.yaml has several parents"
    )


@dataclass(frozen=True, kw_only=True)
class StudyReportSettings(StudySettings):
    TITLE = "what is read"

    verify: bool = setting(
        False, help="hash all weights, masks and corpora again; exits with code 1 if one is not what the results are of"
    )


@dataclass(frozen=True, kw_only=True)
class StudyPlanSettings(StudySettings):
    TITLE = "what is shown"

    hf: str | None = setting(
        None,
        metavar="HF",
        help="plan with this Hugging Face model as the parent: config.json, its directory, or a cached model's name",
    )
    commands: bool = setting(False, help="print the command line of every stage too")
    scripts: bool = setting(False, help="write the Slurm script of every known cell")
    corpus_tokens: int | None = setting(
        None, kind=count, metavar="N", help="tokens in data.train, such as 750B, while the corpora do not exist"
    )
    throughput: str | None = setting(
        None,
        metavar="T",
        help="speed of one GPU: tokens per second on the parent's shape, an MFU such as 40%, or `measured`: time a few "
        "steps of every shape here",
    )
    gpus: int | None = setting(None, metavar="N", help="number of GPUs (default: launch.nproc x launch.parallel_cells)")
    peak_tflops: float | None = setting(
        None, metavar="TFLOPS", help="peak that an MFU refers to (default: 989, an H100 in bf16)"
    )


@dataclass(frozen=True, kw_only=True)
class StudyStatusSettings(StudySettings):
    TITLE = "what is shown"

    watch: float | None = setting(
        None, metavar="SECONDS", alone=2.0, help="refresh while a runner is at work (every 2 s)"
    )


@dataclass(frozen=True, kw_only=True)
class StudyStageSettings(Settings):
    TITLE = "stage"

    cell: str = setting(positional=True, metavar="CELL", help="a cell's directory, with its cell.json")
    stage: str = setting(positional=True, metavar="STAGE", help="the stage's name in cell.json")


@dataclass(frozen=True, kw_only=True)
class AdvisedBySettings(Settings):
    TITLE = "where the answer comes from"

    ledger: str | None = setting(
        None,
        metavar="STUDY",
        help="a study's folder with a report, or its results.json (default: the shipped ledger of the miniature)",
    )
    json: str | None = setting(None, metavar="FILE", help="write the advice as JSON too")


@dataclass(frozen=True, kw_only=True)
class AdvisedParentSettings(Settings):
    TITLE = "parent (default: the ledger's)"

    parent: str | None = setting(None, metavar="CKPT", help="its checkpoint")
    hf: str | None = setting(
        None, metavar="HF", help="its Hugging Face config.json: the file, its directory, or a name in the local cache"
    )
    parent_params: int | None = setting(None, kind=count, metavar="N", help="number of parameters, such as 8B")
    parent_tokens: int | None = setting(None, kind=count, metavar="N", help="tokens it was trained on, such as 15T")


@dataclass(frozen=True, kw_only=True)
class AdvisedAmountSettings(SizeSettings):
    TITLE = "how much to remove"

    pattern: str | None = setting(None, metavar="unstructured|N:M", help="a sparse model; N:M implies its ratio")
    method: str | None = setting(None, metavar="M", help="only this method (default: all measured ones)")


@dataclass(frozen=True, kw_only=True)
class AdvisedBudgetSettings(Settings):
    TITLE = "budget: tokens of retraining (masks that are learned included), or GPU-hours"

    tokens: int | None = setting(None, kind=count, metavar="N", help="such as 10B")
    gpu_hours: float | None = setting(None, metavar="H", help="instead of --tokens")
    gpu_flops: float | None = setting(None, metavar="F", help="FLOP/s that a GPU reaches: its peak times the MFU")
    served_tokens: int | None = setting(
        None, kind=count, metavar="N", help="tokens to serve: count their FLOPs too, and show where a faster shape pays"
    )
    setting: str = setting(
        "equal-training",
        choices=("equal-training", "equal-total", "equal-flops"),
        help="equal-training (the default): the parent exists and its tokens do not count; equal-total, equal-flops: "
        "the scratch run also gets what the parent has cost",
    )


@dataclass(frozen=True, kw_only=True)
class AdviseSettings(AdvisedBudgetSettings, AdvisedAmountSettings, AdvisedParentSettings, AdvisedBySettings):
    """``advise``."""
