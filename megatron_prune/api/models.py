"""Functions that run the model: calibrate, sparsify, evaluate, and the chain from a checkpoint to a pruned one.

Each takes its verb's flags by name, with underscores. ``megatron`` are flags of Megatron's own in the same form
(``{"bf16": True, "tensor_model_parallel_size": 2}``); the model itself comes from the checkpoint. ``nproc`` and
``devices`` say where the job runs; ``log`` gets its output (see ``launching.py``).
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_prune import verbs
from megatron_prune.api import launching
from megatron_prune.api.made import Calibration, Evaluation, Model
from megatron_prune.methods import options
from megatron_prune.settings import Settings

Words = str | Path


def calibrate(
    load: Words,
    output: Words,
    calibration_data_path: Words,
    *,
    calibration_sequences: int = 128,
    calibration_seq_length: int = 2048,
    calibration_sampling: str = "sequential",
    gradients: bool = False,
    megatron: Mapping[str, Any] | None = None,
    nproc: int = 1,
    devices: Sequence[int] | None = None,
    log: Words | None = None,
) -> Calibration:
    """Run the checkpoint ``load`` on calibration text and write statistics of its activations to ``output``
    (a ``.safetensors`` file), for every structured method and every ratio.

    ``calibration_data_path`` is the prefix of a tokenized corpus, of which ``calibration_sequences`` windows of
    ``calibration_seq_length`` tokens are read. ``gradients``: run a backward pass too, for
    llm-pruner. Raises UsageError, DataError, CheckpointError and RunError.
    """
    asked = verbs.CalibrateSettings.read(
        {
            "output": output,
            "calibration_data_path": calibration_data_path,
            "calibration_sequences": calibration_sequences,
            "calibration_seq_length": calibration_seq_length,
            "calibration_sampling": calibration_sampling,
            "gradients": gradients,
        }
    )
    words = _megatron({"load": load}, megatron)
    _run("calibrate", [asked], words, nproc, devices, log)
    return Calibration.read(output)


def sparsify(
    load: Words,
    save: Words,
    method: str,
    *,
    pattern: str = "unstructured",
    ratio: float | None = None,
    calibration_data_path: Words | None = None,
    calibration_sequences: int | None = None,
    calibration_seq_length: int | None = None,
    seed: int | None = None,
    megatron: Mapping[str, Any] | None = None,
    nproc: int = 1,
    devices: Sequence[int] | None = None,
    log: Words | None = None,
    **settings: Any,
) -> Model:
    """Zero weights of the checkpoint ``load`` and write ``save``, of the same shape, with its masks.

    ``pattern`` is ``unstructured`` (then ``ratio`` is needed) or N:M; ``settings`` are the verb's other flags
    (``layers``, ``modules``, ``module_ratio``). Methods that read text need ``calibration_data_path``.
    Raises UsageError, DataError, CheckpointError and RunError.
    """
    asked = verbs.SparsifySettings.read(
        {
            "method": method,
            "pattern": pattern,
            "ratio": ratio,
            "calibration_data_path": calibration_data_path,
            "calibration_sequences": calibration_sequences,
            "calibration_seq_length": calibration_seq_length,
            **settings,
        }
    )
    words = _megatron({"load": load, "save": save, "seed": seed}, megatron)
    _run("sparsify", [asked], words, nproc, devices, log)
    return Model.of_checkpoint(save)


def prune_checkpoint(
    load: Words,
    save: Words,
    method: str,
    *,
    calibration_data_path: Words | None = None,
    calibration_sequences: int | None = None,
    calibration_seq_length: int | None = None,
    seed: int | None = None,
    megatron: Mapping[str, Any] | None = None,
    nproc: int = 1,
    devices: Sequence[int] | None = None,
    log: Words | None = None,
    **settings: Any,
) -> Model:
    """Prune the checkpoint ``load`` and write ``save``: calibrate, plan and apply with the model loaded once,
    or sparsify, depending on ``method``.

    ``settings`` are its target (``ratio``, ``target_num_layers``, ``pattern``, …) and its own flags, by name. A method
    that learns masks trains on ``mask_tokens`` of the corpora ``megatron={"train_data_path": …, "seq_length": …}``, and
    is refused inside a distributed launch, since Megatron trains once per process. Raises UsageError, DataError,
    CheckpointError and RunError.
    """
    given = {
        "method": method,
        "calibration_data_path": calibration_data_path,
        "calibration_sequences": calibration_sequences,
        "calibration_seq_length": calibration_seq_length,
    }
    asked, own = options.read(verbs.PruneSettings, method, given | settings, known=options.PRUNED)
    if isinstance(own, verbs.LearningSettings):
        launching.refuse_if_launched("method")
    words = _megatron({"load": load, "save": save, "seed": seed}, megatron)
    _run("prune", [asked, own], words, nproc, devices, log)
    return Model.of_checkpoint(save)


def evaluate(
    load: Words,
    data_path: Words | Sequence[Words] = (),
    *,
    output: Words | None = None,
    labels: Sequence[str] = (),
    seq_length: int | None = None,
    windows: int | None = None,
    tasks: Sequence[str] = (),
    megatron: Mapping[str, Any] | None = None,
    nproc: int = 1,
    devices: Sequence[int] | None = None,
    log: Words | None = None,
    **settings: Any,
) -> Evaluation:
    """Mean loss per token and perplexity of the checkpoint ``load`` on fixed windows of corpora; lm-eval tasks.

    ``data_path`` lists prefixes of tokenized corpora; the first ``windows`` windows of ``seq_length`` tokens of each
    are scored (default: all). ``output`` keeps the scores as JSON. ``settings`` are the verb's other flags. Raises
    UsageError, DataError, CheckpointError and RunError.
    """
    prefixes = [data_path] if isinstance(data_path, str | Path) else list(data_path)
    words = _megatron({"load": load, "data_path": prefixes, "seq_length": seq_length}, megatron)
    with tempfile.TemporaryDirectory(prefix="megatron-prune-") as folder:
        path = Path(output or Path(folder) / "scores.json")
        asked = verbs.EvaluateSettings.read(
            {
                "output": path,
                "labels": labels or None,
                "windows": windows,
                "tasks": ",".join(tasks) or None,
                **settings,
            }
        )
        if not launching.is_launched():
            _launch("evaluate", [asked], words, nproc, devices, log)
            return Evaluation.read(path, kept=output is not None)
        from megatron_prune.evaluation import evaluate as room

        found: list[dict[str, Any]] = []
        launching.in_place(lambda: found.append(room.evaluate(asked, words)))
        return Evaluation.of(found[0], None if output is None else path)


def _megatron(own: Mapping[str, Any], more: Mapping[str, Any] | None) -> list[str]:
    """The command-line words for Megatron's parser."""
    return [*launching.flags(own), *launching.flags(more or {})]


def _run(
    verb: str,
    asked: Sequence[Settings],
    words: Sequence[str],
    nproc: int,
    devices: Sequence[int] | None,
    log: Words | None,
) -> None:
    """Run a verb of the room ``pruning``: here in a rank of a launch, otherwise as a job."""
    if launching.is_launched():
        room = importlib.import_module(f"megatron_prune.pruning.{verb}")
        launching.in_place(lambda: getattr(room, verb)(*asked, words))
    else:
        _launch(verb, asked, words, nproc, devices, log)


def _launch(
    verb: str,
    asked: Sequence[Settings],
    words: Sequence[str],
    nproc: int,
    devices: Sequence[int] | None,
    log: Words | None,
) -> None:
    own = [word for settings in asked for word in settings.words()]
    launching.run([verb, *own, *words], nproc=nproc, devices=devices, log=log)
