"""``prune``: from Hugging Face to Hugging Face, or from checkpoint to checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, overload

from megatron_prune.api import launching
from megatron_prune.api.made import Model, Pruned
from megatron_prune.api.models import Words, prune_checkpoint
from megatron_prune.errors import UsageError


@overload
def prune(
    *,
    hf: Words,
    out: Words,
    method: str,
    text: Words | Sequence[Words] = (),
    dataset: str | None = None,
    json_keys: str = "text",
    text_documents: str = "file",
    seq_length: int | None = None,
    calibration_sequences: int = 128,
    windows: int | None = None,
    retrain_tokens: int | None = None,
    retrain_lr: float = 1e-4,
    retrain_batch_size: int = 8,
    dtype: str | None = None,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    nproc: int = 1,
    devices: Sequence[int] = (),
    workers: int = 1,
    keep: bool = False,
    tell: Callable[[str], None] = print,
    during: Callable[[str], AbstractContextManager[object]] = nullcontext,
    **settings: Any,
) -> Pruned: ...


@overload
def prune(
    *,
    load: Words,
    save: Words,
    method: str,
    calibration_data_path: Words | None = None,
    calibration_sequences: int | None = None,
    calibration_seq_length: int | None = None,
    megatron: Mapping[str, Any] | None = None,
    nproc: int = 1,
    devices: Sequence[int] | None = None,
    log: Words | None = None,
    **settings: Any,
) -> Model: ...


def prune(*, method: str, **given: Any) -> Pruned | Model:
    """Make a pruned model: the directory ``out`` from the Hugging Face model ``hf``, or the checkpoint ``save`` from
    the checkpoint ``load``.

    The amount (``ratio``, ``pattern``, ``target_num_layers``, …) and the method's own flags are keywords, named as on
    the command line, with underscores.

    With ``hf`` (a directory, or a name on the Hub) the model is imported, calibrated on ``text`` (files of JSON lines,
    Parquet or plain text; or ``dataset``, a name on the Hub; by default text of this machine), pruned, trained on
    ``retrain_tokens`` tokens if given, and exported. Its perplexity on held-out documents of the same text is measured
    before and after. ``tell`` gets one line per stage; each stage runs inside ``during(its name)``. A killed call
    resumes where it was.

    Raises MegatronPruneError: UsageError, DataError, CheckpointError and RunError.
    """
    if ("hf" in given) == ("load" in given):
        raise UsageError("hf, load", got="both or neither", expected="one of them")
    return _prune_hf(method=method, **given) if "hf" in given else prune_checkpoint(method=method, **given)


def _prune_hf(
    *,
    text: Words | Sequence[Words] = (),
    tell: Callable[[str], None] = print,
    during: Callable[[str], AbstractContextManager[object]] = nullcontext,
    **given: Any,
) -> Pruned:
    from megatron_prune.api.asked import Asked

    files = [text] if isinstance(text, Words) else list(text)
    asked = Asked.read({**given, "text": tuple(files)})
    with launching.quiet():
        from megatron_prune.api import one_line

        return one_line.run(asked, tell, during)
