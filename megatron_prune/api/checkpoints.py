"""Functions that read checkpoints without starting Megatron: import, export, plan, apply and benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_prune import artifacts, verbs
from megatron_prune.api.made import Model, Plan
from megatron_prune.errors import PlanError, UsageError

Place = str | Path


def import_hf(
    hf: Place,
    save: Place,
    *,
    dtype: str | None = None,
    make_vocab_size_divisible_by: int = 128,
    tensor_model_parallel_size: int = 1,
    max_position_embeddings: int | None = None,
    workers: int = 1,
    allow_non_finite: bool = False,
) -> Model:
    """Write the Hugging Face model ``hf`` (a directory, or a name on the Hub) as the Megatron checkpoint ``save``.

    ``dtype`` (float32, bfloat16 or float16) casts every weight; by default each keeps its dtype. The vocabulary is
    padded to a multiple of ``make_vocab_size_divisible_by`` × ``tensor_model_parallel_size``. Weights are streamed:
    memory does not grow with the model. Raises CheckpointError for a model that cannot be represented, and for NaN and
    infinities among the weights, unless ``allow_non_finite``.
    """
    import torch

    from megatron_prune.checkpoint.parallel import keep_freed_memory
    from megatron_prune.checkpoint.tracker import refuse_remote
    from megatron_prune.convert import huggingface

    keep_freed_memory()
    refuse_remote("--hf", str(hf))
    if dtype is not None and dtype not in verbs.DTYPES:
        raise UsageError("--dtype", got=dtype, expected=f"one of {', '.join(verbs.DTYPES)}")
    made = huggingface.import_hf(
        hf,
        save,
        dtype=getattr(torch, dtype) if dtype else None,
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
        tensor_model_parallel_size=tensor_model_parallel_size,
        max_position_embeddings=max_position_embeddings,
        workers=workers,
        allow_non_finite=allow_non_finite,
    )
    return Model.of_checkpoint(made.root)


def export_hf(
    load: Place,
    hf: Place,
    *,
    workers: int = 1,
    allow_non_finite: bool = False,
    allow_missing_masks: bool = False,
    gguf: bool = False,
) -> Model:
    """Write the Megatron checkpoint ``load`` as the Hugging Face directory ``hf``, which must not exist or be empty.

    Masks become ``masks.safetensors``; the imported tokenizer is copied too, and README.md is a model card. ``gguf``
    writes ``model.gguf`` too, for plain models of the families in ``convert/gguf_file.py``; else UsageError. Raises
    CheckpointError for a model that no supported family can represent, and for NaN and infinities among the weights,
    unless ``allow_non_finite``; MasksError for a model that lost its masks, unless ``allow_missing_masks``.
    """
    from megatron_prune.api import model_card
    from megatron_prune.checkpoint.parallel import keep_freed_memory
    from megatron_prune.checkpoint.reader import open_checkpoint
    from megatron_prune.checkpoint.tracker import refuse_remote
    from megatron_prune.convert import huggingface

    keep_freed_memory()
    refuse_remote("--hf", str(hf))
    checkpoint = open_checkpoint(load)
    card = {model_card.NAME: model_card.card(checkpoint, allow_missing_masks=allow_missing_masks)}
    made = huggingface.export_hf(
        load,
        hf,
        workers=workers,
        files=card,
        allow_non_finite=allow_non_finite,
        allow_missing_masks=allow_missing_masks,
        gguf=gguf,
    )
    return Model(made, "Hugging Face directory", checkpoint.shape, tuple(checkpoint.pruning))


def plan(
    load: Place,
    method: str,
    *,
    output: Place,
    statistics: Place | Sequence[Place] = (),
    ratio: float | None = None,
    seed: int | None = None,
    **settings: Any,
) -> Plan:
    """Choose which parts of the checkpoint ``load`` to keep, from the ``statistics`` that ``calibrate`` wrote for it.

    Writes the plan to ``output`` (``plan.json``). ``ratio`` is the fraction to remove; other targets
    (``target_num_layers``, ``target_params``, …) and the method's own flags are ``settings``, by name. Raises
    UsageError; PlanError if candidates must be scored first (they are written next to ``output``; ``prune`` scores
    them itself).
    """
    from megatron_prune.methods import options
    from megatron_prune.pruning.make_plan import Unscored, make_plan

    paths = [statistics] if isinstance(statistics, str | Path) else list(statistics)
    given = {"load": load, "method": method, "output": output, "statistics": paths, "ratio": ratio, "seed": seed}
    made = make_plan(*options.read(verbs.PlanSettings, method, given | settings))
    if isinstance(made, Unscored):
        raise PlanError(
            f"expected scores for all candidates, got none for {len(made.missing)} (in {made.file}): use prune, or "
            "calibrate --score and plan again"
        )
    return Plan(Path(output), made)


def apply(
    load: Place,
    plan: Plan | Place,
    save: Place,
    *,
    workers: int = 1,
    allow_non_finite: bool = False,
    allow_missing_masks: bool = False,
) -> Model:
    """Cut the checkpoint ``load`` according to ``plan`` (an object or a file) and write ``save``.

    Masks next to the parent are cut too. Raises PlanError if the plan is for another parent, CheckpointError for NaN
    and infinities among the weights, unless ``allow_non_finite``, MasksError for a parent that lost its masks, unless
    ``allow_missing_masks``.
    """
    from megatron_prune.structured import plan as plans
    from megatron_prune.structured.apply import apply_plan

    made = plan.content if isinstance(plan, Plan) else plans.read(plan)
    apply_plan(
        load,
        made,
        save,
        workers=workers,
        allow_non_finite=allow_non_finite,
        allow_missing_masks=allow_missing_masks,
    )
    return Model.of_checkpoint(save)


def benchmark(
    checkpoints: str | Path | Sequence[str | Path],
    *,
    output: str | Path | None = None,
    batch: int = 1,
    prompt: int = 512,
    new: int = 64,
    repeats: int = 5,
    warmup: int = 1,
    static: bool = False,
    allow_missing_masks: bool = False,
) -> dict[str, Any]:
    """Parameters, FLOPs and memory of every checkpoint; unless ``static``, also the measured times of ``batch`` prompts
    of ``prompt`` tokens and of ``new`` tokens after each, on this machine. ``output`` keeps it as JSON.

    Checkpoints are measured one after the other; nothing else should run. Raises UsageError, and CheckpointError for
    one that cannot be read, or whose layers differ in shape.
    """
    several = [checkpoints] if isinstance(checkpoints, str | Path) else list(checkpoints)
    asked = verbs.BenchmarkSettings.read(
        {
            "checkpoints": [str(one) for one in several],
            "output": output,
            "batch": batch,
            "prompt": prompt,
            "new": new,
            "repeats": repeats,
            "warmup": warmup,
            "static": static,
            "allow_missing_masks": allow_missing_masks,
        }
    )
    return run_benchmark(asked)


def latency_table(checkpoint: Place, *, output: Place, **settings: Any) -> Any:
    """Measure how long the parts of models of this architecture take on this machine, at a few sizes, and write the
    table ``output``, by which ``latency_table=`` and ``at_most=["latency=12ms"]`` limit a search of shapes.

    ``settings`` are the flags of ``latency-table`` by name. Nothing else should run. Raises UsageError.
    """
    from megatron_prune.evaluation.latency_measurement import measure_table

    values = {"checkpoint": str(checkpoint), "output": str(output), **settings}
    return measure_table(verbs.LatencyTableSettings.read(values))


def run_benchmark(asked: verbs.BenchmarkSettings) -> dict[str, Any]:
    """The same from the verb's settings."""
    from megatron_prune.evaluation import efficiency

    work = efficiency.workload(asked)
    if not asked.checkpoints:
        raise UsageError("CKPT", got="nothing", expected="one or more checkpoints")
    if asked.output is not None:
        artifacts.refuse_unwritable("--output", asked.output)
    from megatron_prune.checkpoint.reader import open_checkpoint
    from megatron_prune.errors import CheckpointError

    opened = [open_checkpoint(path) for path in asked.checkpoints]  # all, before anything takes long
    models = []
    for checkpoint in opened:
        model = {
            "path": str(checkpoint.root),
            "fingerprint": checkpoint.fingerprint(),
            **efficiency.of_checkpoint(checkpoint, allow_missing_masks=asked.allow_missing_masks),
        }
        if not asked.static:
            try:
                model["measured"] = efficiency.measure(checkpoint.directory, model["pattern"], work)
            except CheckpointError as error:  # Hugging Face's Llama family cannot express it
                model["measured"] = {efficiency.DENSE: {"why": f"not measured: {error}"}}
        models.append(model)
    found = {
        "version": 1,
        "sequence": efficiency.SEQUENCE,
        "workload": None if asked.static else {name: getattr(work, name) for name in vars(work)},
        "models": models,
        "versions": artifacts.versions(),
        "device": artifacts.device(),
    }
    if asked.output is not None:
        artifacts.write_results(asked.output, artifacts.json_bytes(found))
    return found
