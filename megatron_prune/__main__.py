"""The verbs: ``megatron-prune VERB …``, ``torchrun … -m megatron_prune VERB …``. This file only dispatches."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from megatron_prune import screen, untrusted
from megatron_prune.errors import EXIT_REFUSED, MegatronPruneError
from megatron_prune.settings import nearest

# Grouped by purpose, like the files of cli/.
VERBS = {
    "pruning": {
        "prune": "calibrate, plan and apply, or sparsify, in one command",
        "calibrate": "gather statistics of a checkpoint on text",
        "plan": "choose what to keep, from statistics",
        "apply": "cut a checkpoint according to a plan",
        "sparsify": "zero weights block by block and write masks",
        "retrain-candidates": "retrain the best candidates of a search and score them again",
    },
    "training and evaluation": {
        "pretrain": "Megatron's training loop, with an account",
        "teach": "write what a teacher says on a range of a stream, for runs that distil",
        "learn-masks": "pretrain that learns which layers, heads and channels can go (sheared-llama)",
        "evaluate": "loss and perplexity on fixed windows; lm-eval's tasks",
        "benchmark": "parameters, FLOPs, memory, latency and throughput of checkpoints",
        "latency-table": "measure what predicts the latency of shapes, for plan --at-most latency=TIME",
    },
    "studies": {
        "study": "run|plan|status|report a token-matched comparison",
        "advise": "prune or train from scratch: what measurements say",
    },
    "clusters": {
        "preflight": "check whether a command line will run on a cluster of any size",
        "launch-files": "write the files that start runs under Slurm, Kubernetes and Docker",
    },
    "checkpoints": {
        "convert": "import from Hugging Face, export to it, or rewrite a checkpoint",
        "inspect": "show what a checkpoint holds",
        "reshard-optimizer": "let a run continue at another TP or PP",
    },
    "data": {
        "build-corpus": "gather English text from this machine",
        "train-tokenizer": "train a SentencePiece tokenizer on text",
        "preprocess": "tokenize text into Megatron's .bin and .idx",
        "prepare-suite": "fetch and tokenize an evaluation suite's corpora; fetch its tasks",
        "check-contamination": "find documents that corpora share",
        "build-index": "build a token stream's index caches in advance",
    },
}
FILES = {
    "pruning": "pruning_commands",
    "training and evaluation": "training_commands",
    "studies": "study_commands",
    "clusters": "cluster_commands",
    "checkpoints": "checkpoint_commands",
    "data": "data_commands",
}
NAMES = [name for group in VERBS.values() for name in group]


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return its exit code. Errors that the user can fix are printed without a traceback."""
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
        with screen.escaping(), screen.quiet(verb, rest) as rest:
            return _run(verb, rest)
    except MegatronPruneError as error:
        text, code = screen.printable(str(error), lines=error.lines), error.exit_code
    if os.environ.get("RANK", "0") != "0":
        # Rank 0 prints the same error. The launcher kills all ranks once one exits, so wait for rank 0.
        time.sleep(3)
    print(f"megatron-prune {verb}: {text}", file=sys.stderr, flush=True)
    return code


def _run(verb: str, words: list[str]) -> int:
    """The verb's exit code. What a disk or the machine has refused becomes a MegatronPruneError."""
    try:
        code: int = command(verb, "main")(words)
        return code
    except (MegatronPruneError, BrokenPipeError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and untrusted.is_explained(error):
            text = untrusted.explain(error, error.filename or "a file", "read or written")
        else:
            text = untrusted.explain_machine(error) or ""
        if not text:
            raise
        raise MegatronPruneError(text) from error


def command(verb: str, part: str) -> Callable[..., Any]:
    """The function ``VERB_PART`` of a verb: ``main(argv) -> exit code`` or ``parser()``.

    The parser of a verb with subcommands takes the subcommand, and ``group()`` makes that of the verb itself.
    """
    file = next(FILES[title] for title, group in VERBS.items() if verb in group)
    found: Callable[..., Any] = getattr(
        importlib.import_module(f"megatron_prune.cli.{file}"), f"{verb.replace('-', '_')}_{part}"
    )
    return found


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
        "`megatron-prune VERB --help` lists a verb's flags. Several processes: torchrun … -m megatron_prune VERB …",
        "",
        "example:",
        "  megatron-prune convert import --hf HuggingFaceTB/SmolLM2-135M --save checkpoints/parent",
    ]
    return "\n".join(lines)


class Signalled(KeyboardInterrupt):
    """A signal that ends the process, as an exception, so that what is half-written is removed."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _end(number: int, frame: object) -> None:
    for one in SIGNALS:
        signal.signal(one, signal.SIG_IGN)  # the cleaning up takes seconds at most
    raise Signalled(number)


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def console() -> int:
    """``main`` for a shell, where ``| head`` may close the output, and signals end the process."""
    if "RANK" not in os.environ:  # a launcher ends its ranks, quickly
        for one in SIGNALS:
            if signal.getsignal(one) != signal.SIG_IGN:  # nohup
                signal.signal(one, _end)
    sys.excepthook = screen.print_traceback
    _open_closed_streams()
    try:
        code = main()
        if code:  # what a refused write left unfinished complains at the exit
            sys.unraisablehook = lambda _: None
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 1
    except KeyboardInterrupt as error:
        number = signal.Signals(getattr(error, "number", signal.SIGINT))
        words = " ".join(sys.argv[1:2])
        print(f"megatron-prune {words}: ended by {number.name}; what was half-written is removed", file=sys.stderr)
        return 128 + number


def _open_closed_streams() -> None:
    """Where the caller has closed standard output (``>&-``), a file that is opened would get its number."""
    is_silent = sys.stdout is None
    for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            with contextlib.suppress(OSError):
                if os.open(os.devnull, os.O_RDWR) == number:
                    setattr(sys, name, open(number, "w" if number else "r", closefd=False))
    if is_silent:
        print("megatron-prune: standard output is closed: what is printed there is lost", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(console())
