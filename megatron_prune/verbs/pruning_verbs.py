"""Settings of the verbs that prune."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_prune.settings import Settings, setting
from megatron_prune.verbs.shared import (
    DOCUMENTS,
    DTYPES,
    AnySparsitySettings,
    CalibrationTextSettings,
    IntegritySettings,
    MissingMasksSettings,
    NonFiniteModelSettings,
    NonFiniteSettings,
    SparsitySettings,
    TargetSettings,
    WorkersSettings,
)


@dataclass(frozen=True, kw_only=True)
class CalibrateSettings(CalibrationTextSettings):
    TITLE = "files"

    output: str | None = setting(None, metavar="FILE.safetensors", help="file for the statistics")
    score: str | None = setting(
        None,
        metavar="CANDIDATES.json",
        help="candidates from plan: add their losses, on the windows of --statistics",
    )
    statistics: str | None = setting(
        None, metavar="FILE", help="with --score: statistics from calibrate; also the default of --output"
    )
    gradients: bool = setting(False, help="run a backward pass too: saliencies from gradients, which llm-pruner reads")
    task_data: str | None = setting(
        None, metavar="FILE.jsonl", help="with --score: current path of the plan's --task-data"
    )


@dataclass(frozen=True, kw_only=True)
class PlanFilesSettings(IntegritySettings):
    TITLE = "files"

    load: str = setting(metavar="CKPT", help="the parent checkpoint")
    output: str = setting(metavar="PLAN.json", help="file for the plan")
    statistics: tuple[str, ...] = setting(
        (), metavar="FILE", help="statistics from calibrate for this parent; several files are merged"
    )


@dataclass(frozen=True, kw_only=True)
class MethodSettings(Settings):
    TITLE = "method"

    method: str = setting(metavar="NAME", help="the pruning method")
    seed: int | None = setting(
        None, metavar="N", help="seed of the method random, whose choice depends only on it (default: 0)"
    )


@dataclass(frozen=True, kw_only=True)
class ExportableSettings(TargetSettings):
    TITLE = "how much to remove"

    exportable: bool = setting(False, help="keep to shapes that can be exported to Hugging Face")


@dataclass(frozen=True, kw_only=True)
class PlanSettings(ExportableSettings, MethodSettings, PlanFilesSettings):
    TITLE = "how much to remove"

    tensor_model_parallel_size: int = setting(
        1, metavar="TP", help="refuse shapes that this tensor-parallel size does not divide"
    )


@dataclass(frozen=True, kw_only=True)
class ApplySettings(MissingMasksSettings, NonFiniteSettings, WorkersSettings, IntegritySettings):
    TITLE = "files"

    load: str = setting(metavar="CKPT", help="the parent that the plan was made for")
    plan: str = setting(metavar="PLAN.json", help="the plan, as written by plan")
    save: str = setting(metavar="CKPT", help="where the pruned checkpoint goes")


@dataclass(frozen=True, kw_only=True)
class PrunedBySettings(Settings):
    TITLE = "method"

    method: str = setting(metavar="NAME", help="the pruning method")


@dataclass(frozen=True, kw_only=True)
class SparsifySettings(NonFiniteSettings, CalibrationTextSettings, SparsitySettings, PrunedBySettings):
    """``sparsify``; --load, --save and --seed are Megatron's."""


@dataclass(frozen=True, kw_only=True)
class PruneSettings(
    NonFiniteModelSettings, CalibrationTextSettings, AnySparsitySettings, ExportableSettings, PrunedBySettings
):
    """``prune`` of a checkpoint; --load, --save and --seed are Megatron's."""


@dataclass(frozen=True, kw_only=True)
class SourceSettings(Settings):
    TITLE = "from Hugging Face to Hugging Face"

    hf: str = setting(metavar="HF", help="model directory, or a name on the Hub")
    out: str = setting(metavar="OUT", help="directory to write; OUT.work holds intermediate results until then")
    dtype: str | None = setting(
        None,
        choices=DTYPES,
        metavar="TYPE",
        help=f"cast every weight to {', '.join(DTYPES)} (default: keep its dtype)",
    )
    keep: bool = setting(False, help="keep OUT.work: checkpoints, corpora, scores and logs")


@dataclass(frozen=True, kw_only=True)
class TextSettings(Settings):
    TITLE = "text (one document in ten is held out)"

    text: tuple[str, ...] = setting(
        (), metavar="FILE", help="JSON lines, Parquet or plain text (default: English text from this machine)"
    )
    dataset: str | None = setting(
        None, metavar="NAME[:CONFIG]", help="instead of --text: a dataset on the Hub, its split train"
    )
    json_keys: str = setting("text", metavar="KEY", help="the key of a JSON line, or the column, with the text")
    text_documents: str = setting(
        "file",
        choices=DOCUMENTS,
        metavar="HOW",
        help=f"what a document in a plain text file is: {', '.join(DOCUMENTS)}",
    )
    seq_length: int | None = setting(
        None, metavar="S", help="tokens per sequence (default: the model's, at most 2048 on GPUs and 512 on CPUs)"
    )
    calibration_sequences: int = setting(128, metavar="N", help="sequences of calibration text")
    windows: int | None = setting(
        None, metavar="N", help="sequences of held-out text to measure on (default: up to 64)"
    )


@dataclass(frozen=True, kw_only=True)
class RetrainSettings(Settings):
    TITLE = "training before the export"

    retrain_tokens: int | None = setting(None, metavar="N", help="train the pruned model on N tokens (default: none)")
    retrain_lr: float = setting(1e-4, metavar="LR", help="peak learning rate: 5% warm-up, then cosine to a tenth")
    retrain_batch_size: int = setting(8, metavar="N", help="sequences per step")


@dataclass(frozen=True, kw_only=True)
class ProcessesSettings(WorkersSettings):
    TITLE = "work"

    nproc: int = setting(1, metavar="N", help="processes that run the model, on this machine")
    devices: tuple[int, ...] = setting((), metavar="GPU", help="GPUs to use (default: the first)")
    tensor_model_parallel_size: int = setting(1, metavar="T", help="as for Megatron")
    pipeline_model_parallel_size: int = setting(1, metavar="P", help="as for Megatron")


@dataclass(frozen=True, kw_only=True)
class PruneHFSettings(
    ProcessesSettings,
    RetrainSettings,
    TextSettings,
    AnySparsitySettings,
    TargetSettings,
    MethodSettings,
    SourceSettings,
):
    """``prune --hf``."""


@dataclass(frozen=True, kw_only=True)
class RetrainCandidatesSettings(Settings):
    TITLE = "files and processes"

    load: str = setting(metavar="CKPT", help="the parent")
    candidates: str = setting(metavar="CANDIDATES.json", help="candidates from plan")
    statistics: str = setting(metavar="FILE", help="statistics from calibrate --score")
    scratch: str = setting(metavar="DIR", help="folder to cut and train candidates in; may be removed afterwards")
    output: str | None = setting(None, metavar="FILE", help="file for the statistics (default: --statistics)")
    nproc: int = setting(1, metavar="N", help="processes per run, on this machine")
    commands: bool = setting(False, help="print the commands; run nothing")
