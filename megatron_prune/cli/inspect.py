"""``megatron-prune inspect CKPT``: what a Megatron checkpoint holds."""

from __future__ import annotations

import json
import signal

from megatron_prune import verbs
from megatron_prune.cli.parser import Parser


def parser() -> Parser:
    return Parser(
        "inspect",
        "Shows what a Megatron checkpoint holds: shape, weights, masks and origin. Reads only the index, "
        "unless zeros or hashes are requested.",
        verbs.InspectSettings,
        example="megatron-prune inspect checkpoints/parent",
    )


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    asked = verbs.InspectSettings.of(parser().read(argv)[0])
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    from megatron_prune.checkpoint.reader import open_checkpoint
    from megatron_prune.convert import inspect

    checkpoint = open_checkpoint(asked.checkpoint)
    if asked.verify_integrity:
        checkpoint.verify(hashes=True)
    found = inspect.describe(checkpoint, sparsity=asked.sparsity, full_hash=asked.full_hash)
    if asked.json:
        print(json.dumps(found, indent=2))
    else:
        inspect.show(found, inspect.warnings(checkpoint))
    return 0
