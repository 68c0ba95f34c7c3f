"""The verbs: ``megatron-prune VERB …``, ``torchrun … -m megatron_prune VERB …``. This file dispatches, no more."""

from __future__ import annotations

import importlib
import os
import sys
import time

from megatron_prune import screen
from megatron_prune.errors import EXIT_REFUSED, MegatronPruneError
from megatron_prune.settings import nearest

# By what they are for; `main(argv) -> exit status` of a verb is in the file of cli/ that has its name.
VERBS = {
    "pruning": {
        "prune": "calibrate, plan and apply, or sparsify, in one command",
        "calibrate": "gather statistics of a checkpoint on text",
        "plan": "choose what stays, from statistics",
        "apply": "cut a checkpoint as a plan says",
        "sparsify": "zero weights, block after block, and write masks",
        "retrain-candidates": "retrain the best candidates of a search, and score them again",
    },
    "training and evaluation": {
        "pretrain": "Megatron's training loop, with an account",
        "learn-masks": "pretrain that learns which layers, heads and channels can go (sheared-llama)",
        "evaluate": "loss and perplexity on fixed windows; lm-eval's tasks",
    },
    "studies": {
        "study": "run|plan|status|report a token-matched comparison",
        "preflight": "will a command line run on a cluster of any size",
        "advise": "prune or train from scratch, as far as measurements say",
        "launch-files": "write what starts runs under Slurm, Kubernetes and Docker",
    },
    "checkpoints": {
        "convert": "import from Hugging Face, export to it, or rewrite a checkpoint",
        "inspect": "what a checkpoint holds",
        "reshard-optimizer": "let a run go on at another TP or PP",
    },
    "data": {
        "build-corpus": "gather English text that is on this machine",
        "train-tokenizer": "train a SentencePiece tokenizer on text",
        "preprocess": "tokenize text into Megatron's .bin and .idx",
        "check-contamination": "look for documents that corpora share",
        "build-index": "build a token stream's caches beforehand",
    },
}
NAMES = [name for group in VERBS.values() for name in group]


def main(argv: list[str] | None = None) -> int:
    """Run one verb; its exit status. What the user can fix is said without a traceback."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0
    verb, *rest = words
    if verb not in NAMES:
        hint = nearest(verb, NAMES)
        end = f"did you mean {hint}?" if hint else "`megatron-prune --help` lists them"
        print(f"megatron-prune: there is no verb '{verb}': {end}", file=sys.stderr)
        return EXIT_REFUSED
    try:
        with screen.quiet(verb, rest) as rest:
            code: int = importlib.import_module(f"megatron_prune.cli.{verb.replace('-', '_')}").main(rest)
        return code
    except MegatronPruneError as error:
        if os.environ.get("RANK", "0") != "0":
            # Rank 0 says the same; a launcher ends all ranks with the first that exits, so let it speak.
            time.sleep(3)
        print(f"megatron-prune {verb}: {error}", file=sys.stderr, flush=True)
        return EXIT_REFUSED


def overview() -> str:
    """The verbs in groups."""
    width = max(map(len, NAMES))
    lines = [
        "usage: megatron-prune VERB …",
        "",
        "Prunes Megatron checkpoints, trains them on, and compares with training from scratch.",
    ]
    for title, group in VERBS.items():
        lines += ["", f"{title}:", *(f"  {verb:<{width}}  {text}" for verb, text in group.items())]
    lines += [
        "",
        "`megatron-prune VERB --help` lists the flags of one. Several processes: torchrun … -m megatron_prune VERB …",
        "",
        "example:",
        "  megatron-prune convert import --hf HuggingFaceTB/SmolLM2-135M --save checkpoints/parent",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
