"""Settings that several verbs share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_prune.settings import Settings, count, fraction, setting

GPUS = ("a100-80gb", "h100", "h200", "b200")
FP8_PRESETS = ("hybrid-delayed", "current", "blockwise")
TOKENIZERS = ("SentencePieceTokenizer", "HuggingFaceTokenizer", "TikTokenizer")
FORMATS = ("auto", "jsonl", "parquet", "array_record", "text")
TOKEN_TYPES = ("uint16", "int32", "uint32", "int64")
DOCUMENTS = ("file", "paragraph", "line")
DTYPES = ("float32", "bfloat16", "float16")
MODULES = ("qkv", "proj", "fc1", "fc2")
ALLOCATIONS = ("uniform", "global", "owl", "search")


# Flags of ``--allocation`` that sparse methods and those that cut units declare alike.


def owl_threshold_setting() -> Any:
    return setting(None, metavar="M", help="a weight is an outlier above M times its layer's mean score (default: 5)")


def owl_bound_setting() -> Any:
    return setting(None, metavar="L", help="with owl, the layers' ratios span twice L around --ratio (default: 0.08)")


def search_generations_setting() -> Any:
    return setting(None, metavar="N", help="generations of --allocation search, of 16 trials each (default: 50)")


def least_kept_setting() -> Any:
    words = "unless uniform: fraction of its weights or units that a layer keeps (default: 0)"
    return setting(0.0, kind=fraction, metavar="F", help=words)


def allow_missing_masks_setting() -> Any:
    return setting(False, help="load a checkpoint whose masks are lost; its zeros are then weights like others")


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """Flags that this package adds to Megatron's parser to select the model that Megatron builds."""

    TITLE = "model and layout"

    shape_from: str | None = setting(
        None,
        metavar="CKPT",
        help="take the model's arguments from this checkpoint, but no weights: training from scratch in the same shape",
    )
    parallel_residual: bool = setting(
        False, help="attention and MLP read the same input, as in Pythia (default: as the checkpoint)"
    )
    allow_missing_masks: bool = allow_missing_masks_setting()
    fp32: bool = setting(False, help="compute in fp32 (default: as the checkpoint)")
    fp8_preset: str | None = setting(
        None,
        choices=FP8_PRESETS,
        metavar="NAME",
        help=f"a named FP8 recipe, {', '.join(FP8_PRESETS[:-1])} or {FP8_PRESETS[-1]} (needs Transformer Engine)",
    )


@dataclass(frozen=True, kw_only=True)
class CalibrationTextSettings(Settings):
    """The text that a parent is run on."""

    TITLE = "calibration text"

    calibration_data_path: str | None = setting(None, metavar="PREFIX", help="tokenized corpus, without .bin")
    calibration_sequences: int = setting(128, metavar="N", help="number of windows to read")
    calibration_seq_length: int = setting(2048, metavar="S", help="tokens per window")
    calibration_sampling: str = setting(
        "sequential",
        choices=("sequential", "random"),
        metavar="HOW",
        help="sequential: the first N windows (default); random: N drawn with --seed",
    )


@dataclass(frozen=True, kw_only=True)
class AmountSettings(Settings):
    TITLE = "how much to remove"

    ratio: float | None = setting(None, metavar="R", help="fraction to remove, between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class SizeSettings(AmountSettings):
    """The shape after structured pruning: one of ``ratio``, ``target_params`` and sizes (``structured/target.py``)."""

    TITLE = "how much to remove"

    ratio_of: str | None = setting(
        None,
        choices=("linears", "all"),
        help="of the blocks' linear weights (the default), or of all parameters",
    )
    target_params: int | None = setting(
        None, kind=count, metavar="P", help="total number of parameters to keep, such as 6B"
    )
    target_num_layers: int | None = setting(None, metavar="N", help="size to keep, like the next four")
    target_hidden_size: int | None = setting(None, metavar="N", help="channels of the residual stream")
    target_num_attention_heads: int | None = setting(None, metavar="N", help="query heads")
    target_num_query_groups: int | None = setting(None, metavar="N", help="key-value heads")
    target_ffn_hidden_size: int | None = setting(None, metavar="N", help="channels of the MLP")


@dataclass(frozen=True, kw_only=True)
class TargetSettings(SizeSettings):
    """How a shape is chosen that meets an amount, too."""

    TITLE = "how much to remove"

    divisible_by: int = setting(64, metavar="N", help="every width that changes is a multiple of N")
    tolerance: float | None = setting(
        None,
        metavar="T",
        help="relative error of the target that a chosen width may have (default: 0.02)",
    )
    ffn_exponent: float = setting(
        2.0, metavar="K", help="FFN keeps the fraction that hidden keeps, to the power K (default: 2; 1: the same)"
    )
    keep_heads: bool = setting(False, help="heads and query groups stay, only other sizes shrink")
    at_most: tuple[str, ...] = setting(
        (), metavar="LIMIT", help="memory=BYTES@TOKENS, cache=BYTES of a token, latency=TIME of one, prefill=TIME"
    )
    latency_table: str | None = setting(None, metavar="FILE", help="with latency= or prefill=: made by latency-table")


@dataclass(frozen=True, kw_only=True)
class SparsitySettings(AmountSettings):
    """Which weights a sparse method may remove (``sparse/request.py``)."""

    TITLE = "sparse methods"

    pattern: str = setting(
        "unstructured", metavar="P", help="unstructured, or N:M: N of every M consecutive inputs stay"
    )
    layers: str | None = setting(
        None, metavar="0-3,7", help="layers to prune, counted from 0 (default: all); the others stay dense"
    )
    modules: str | None = setting(
        None, metavar="M,…", help=f"linears to prune, of {','.join(MODULES)} (default: all); the others stay dense"
    )
    module_ratio: tuple[str, ...] = setting(
        (), metavar="M=R", help="another ratio for some linears, such as fc2=0.3; unstructured only"
    )
    allocation: str = setting(
        "uniform",
        choices=ALLOCATIONS,
        metavar="HOW",
        help="ratios by layer: uniform (default), global (one ranking of all weights), owl (less where outliers are "
        "many) or search (by calibration loss)",
    )
    least_kept: float = setting(
        0.0,
        kind=fraction,
        metavar="F",
        help="with --allocation global: the fraction of its weights that every layer keeps (default: 0)",
    )
    owl_threshold: float | None = owl_threshold_setting()
    owl_bound: float | None = owl_bound_setting()
    search_generations: int | None = search_generations_setting()


@dataclass(frozen=True, kw_only=True)
class AnySparsitySettings(SparsitySettings):
    """Of a verb that takes structured methods too."""

    TITLE = "how much to remove"

    allocation: str = setting(
        "uniform",
        choices=ALLOCATIONS,
        metavar="HOW",
        help="uniform (default), or ratios by layer: owl, global (one ranking of all) or search",
    )
    owl_threshold: float | None = owl_threshold_setting()
    owl_bound: float | None = owl_bound_setting()
    least_kept: float = least_kept_setting()
    search_generations: int | None = search_generations_setting()


@dataclass(frozen=True, kw_only=True)
class WorkersSettings(Settings):
    TITLE = "work"

    workers: int = setting(1, metavar="N", help="processes that share the work")


@dataclass(frozen=True, kw_only=True)
class NonFiniteSettings(Settings):
    TITLE = "work"

    allow_non_finite: bool = setting(False, help="let NaN and infinities among the weights pass")


@dataclass(frozen=True, kw_only=True)
class NonFiniteModelSettings(NonFiniteSettings):
    """Of a verb that does everything, whose help has no room for a group of its own."""

    TITLE = "model and layout"

    allow_non_finite: bool = setting(False, help="let NaN and infinities among the weights pass")


@dataclass(frozen=True, kw_only=True)
class MissingMasksSettings(Settings):
    TITLE = "work"

    allow_missing_masks: bool = allow_missing_masks_setting()


@dataclass(frozen=True, kw_only=True)
class IntegritySettings(Settings):
    TITLE = "work"

    verify_integrity: bool = setting(False, help="check the files of --load against integrity.json first")


@dataclass(frozen=True, kw_only=True)
class LearningSettings(Settings):
    """How ``sheared-llama`` learns masks: of ``learn-masks``, and of ``prune``, which learns and cuts."""

    TITLE = "learned masks (sheared-llama)"

    mask_tokens: int | None = setting(
        None,
        metavar="N",
        help="tokens of the stream, not seen before, that weights and masks are trained on",
    )
    mask_lr: float = setting(1.0, metavar="RATE", help="highest learning rate of masks, on the schedule of --lr")
    multiplier_lr: float | None = setting(
        None, metavar="RATE", help="the same for the Lagrange multipliers (default: that of masks)"
    )
    mask_ramp: float = setting(
        0.2, metavar="F", help="the fraction of the steps after which the target is asked for in full"
    )
