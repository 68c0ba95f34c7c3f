"""The verbs. This file dispatches and nothing else: ``torchrun … -m megatron_prune <verb> …``."""

from __future__ import annotations

import importlib
import os
import sys
import time

from megatron_prune.errors import EXIT_REFUSED, MegatronPruneError

# verb: (module with `main(argv) -> exit status`, whether it runs Megatron's model, what it does)
VERBS = {
    "calibrate": ("megatron_prune.cli.calibrate", True, "gather statistics of a parent's activations"),
    "plan": ("megatron_prune.cli.plan", False, "choose what stays, from statistics"),
    "rescore": (
        "megatron_prune.structured.retrain_candidates",
        False,
        "retrain the best candidates of a search, and score them again",
    ),
    "apply": ("megatron_prune.structured.apply", False, "cut a checkpoint as a plan says"),
    "sparsify": ("megatron_prune.cli.sparsify", True, "zero weights in the model, block after block, and leave masks"),
    "prune": ("megatron_prune.cli.prune", True, "calibrate, plan and apply, or sparsify, in one command"),
    "pretrain": ("megatron_prune.training.pretrain", True, "Megatron's training loop, with an account"),
    "index": ("megatron_prune.cli.build_index", False, "build a token stream's caches beforehand"),
    "evaluate": ("megatron_prune.evaluation.evaluate", True, "loss and perplexity on fixed windows"),
    "preflight": ("megatron_prune.cli.preflight", True, "will a command line run on a cluster of any size"),
    "study": ("megatron_prune.cli.study", False, "run|plan|status|report a token-matched comparison"),
    "advise": ("megatron_prune.cli.advise", False, "prune or scratch, as far as a ledger can say"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb; its exit status. What the user can mend is said without a traceback."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        print("usage: python -m megatron_prune VERB … (VERB --help says more)\n")
        for verb, (_, _, text) in VERBS.items():
            print(f"  {verb:<10} {text}")
        return 0
    verb, *rest = words
    if verb not in VERBS:
        print(f"megatron_prune: there is no verb '{verb}': one of {', '.join(VERBS)}", file=sys.stderr)
        return EXIT_REFUSED
    module, runs_model, _ = VERBS[verb]
    try:
        if runs_model:  # torch must know the machine before anything imports Megatron
            importlib.import_module("megatron_prune.engine.cpu").prepare()
        code: int = importlib.import_module(module).main(rest)
        return code
    except MegatronPruneError as error:
        if os.environ.get("RANK", "0") != "0":
            # Rank 0 says the same; a launcher ends all ranks with the first that leaves, so let it speak.
            time.sleep(3)
        print(f"megatron_prune {verb}: {error}", file=sys.stderr, flush=True)
        return EXIT_REFUSED


if __name__ == "__main__":
    sys.exit(main())
