"""What checkpoints cost to run: FLOPs, memory, latency and throughput."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_prune import artifacts, verbs
from megatron_prune.errors import UsageError


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
        }
    )
    return run(asked)


def run(asked: verbs.BenchmarkSettings) -> dict[str, Any]:
    """The same from the verb's settings."""
    for name, least in (("batch", 1), ("prompt", 1), ("new", 1), ("repeats", 1), ("warmup", 0)):
        if getattr(asked, name) < least:
            raise UsageError(f"--{name}", got=getattr(asked, name), expected=f"at least {least}")
    if not asked.checkpoints:
        raise UsageError("CKPT", got="nothing", expected="one or more checkpoints")
    from megatron_prune.checkpoint.reader import open_checkpoint
    from megatron_prune.errors import CheckpointError
    from megatron_prune.evaluation import efficiency, speed

    opened = [open_checkpoint(path) for path in asked.checkpoints]  # all, before anything takes long
    work = speed.Workload(asked.batch, asked.prompt, asked.new, asked.repeats, asked.warmup)
    models = []
    for checkpoint in opened:
        model = {
            "path": str(checkpoint.root),
            "fingerprint": checkpoint.fingerprint(),
            **efficiency.of_checkpoint(checkpoint),
        }
        if not asked.static:
            try:
                model["measured"] = speed.measure(checkpoint.directory, model["pattern"], work)
            except CheckpointError as error:  # Hugging Face's Llama family cannot express it
                model["measured"] = {speed.DENSE: {"why": f"not measured: {error}"}}
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
        artifacts.write_json(asked.output, found)
    return found
