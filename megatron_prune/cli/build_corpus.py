"""``megatron-prune build-corpus``: gather English text from this machine into JSON lines."""

from __future__ import annotations

import os

from megatron_prune import verbs
from megatron_prune.cli.parser import Parser
from megatron_prune.errors import UsageError


def parser() -> Parser:
    return Parser(
        "build-corpus",
        "Gathers English text from this machine (documentation, licences, manuals) into JSON lines, split into "
        "training, calibration, validation and test, with no document in two splits. Meant for trying things out.",
        verbs.BuildCorpusSettings,
        example="megatron-prune build-corpus --output data/text --max-bytes 10000000",
    )


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    asked = verbs.BuildCorpusSettings.of(parser().read(argv)[0])
    from megatron_prune.data import local_text

    manifest = local_text.build_corpus(
        asked.output,
        max_bytes=asked.max_bytes or None,
        shares=_shares(asked.split),
        longest_held_out=asked.longest_held_out or None,
        workers=asked.workers or min(8, os.cpu_count() or 1),
    )
    sizes = ", ".join(
        f"{name} {s['bytes'] / 1e6:.2f} MB of {s['documents']} documents" for name, s in manifest["splits"].items()
    )
    print(f"{asked.output}: {sizes} in {manifest['seconds']:.1f} s")
    return 0


def _shares(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError as error:
        raise UsageError("--split", got=text, expected="four positive shares, such as 94,2,2,2") from error
