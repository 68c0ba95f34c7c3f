"""Megatron flags that would do nothing here, or start a run that cannot resume: refused when given.

Megatron's flags work as in Megatron, except those that only its entry scripts read: this package replaces these
scripts, so such a flag would be accepted without effect. ``unreached.json`` lists the flags that no code which runs
here reads. ``tests/engine/unreached.py`` derives it from Megatron's source, and a test derives it again. The lists
below are flags that Megatron's library does read, for programs that are not here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from megatron_prune.errors import UsageError

# Groups of the parser that belong to other programs. Flags of CUDA graphs are in the group of inference.
_OTHER_PROGRAMS = ("rl", "biencoder", "vision", "inference")
_OF_TRAINING = ("cuda_graph_modules", "cuda_graph_scope_deprecated")
# Deprecated names of what is now Megatron's default: they still work.
_ASK_FOR_THE_DEFAULT = (
    "deprecated_use_mcore_models",
    "use_dist_ckpt_deprecated",
    "ckpt_fully_parallel_save_deprecated",
)

_UNREAD = "nothing that runs here reads it, so it would have no effect"
_CANNOT_RESUME = "its checkpoints are in a format that is not read here, so the run could not resume"
# destination: the reason, for flags whose values other than the default would be accepted without effect
_ELSEWHERE = {
    "logits_load_dir": "the loss on these logits is in pretrain_gpt.py, so the run would train without it; here, teach "
    "writes a cache and pretrain --objective distill --teacher-cache reads it",
    "sft": "its data set is made by pretrain_gpt.py, so the run would train on plain text",
    "hybrid_context_parallel": "its batches are cut by pretrain_gpt.py's forward step",
    "inprocess_restart": "pretrain_gpt.py does it; here the launcher starts a failed run again",
    "use_megatron_fsdp": _CANNOT_RESUME,
}
# (destination, value): the reason
_VALUES = {
    ("ckpt_format", "torch_dcp"): _CANNOT_RESUME,
    ("ckpt_format", "fsdp_dtensor"): _CANNOT_RESUME,
    ("non_persistent_ckpt_type", "local"): "it stores pickles, whose code would be executed when the run resumes",
}


def refuse_yaml(argv: Sequence[str]) -> None:
    """Refuse (UsageError) Megatron's ``--yaml-cfg``, which its parser would read at once."""
    for position, word in enumerate(argv):
        flag, _, value = word.partition("=")
        if flag == "--yaml-cfg":
            raise UsageError(
                flag, got=value or " ".join(argv[position + 1 : position + 2]), expected="no such flag here",
                why="its file would replace the whole command line, with the flags of this program",
            )  # fmt: skip


def refuse_without_effect(parser: argparse.ArgumentParser, args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Refuse (UsageError) a flag with a value other than its default that would have no effect."""
    for action, why in _refused(parser):
        value = getattr(args, action.dest, action.default)
        if value != action.default:
            raise UsageError(_option(action, argv), got=_given(action, value), expected="no such flag here", why=why)
    actions = {action.dest: action for action in parser._actions}
    for (name, value), why in _VALUES.items():
        if getattr(args, name, None) == value and actions[name].default != value:
            raise UsageError(_option(actions[name], argv), got=value, expected="another value", why=why)


def refuse_names(arguments: Mapping[str, Any], where: str) -> None:
    """Refuse (UsageError) flags of the list above by their names alone, before there is a command line.

    ``arguments`` are values by flag, without dashes; ``where`` they are written is named in the error.
    """
    for flag, value in arguments.items():
        name = flag.replace("-", "_")
        why = _ELSEWHERE.get(name) or _VALUES.get((name, str(value)))
        if why is None and name in unreached() - set(_ASK_FOR_THE_DEFAULT):
            why = _UNREAD
        if why is not None and value not in (None, False):
            raise UsageError(f"{where}.{flag}", got=value, expected="no such flag here", why=why)


def _refused(parser: argparse.ArgumentParser) -> Iterator[tuple[argparse.Action, str]]:
    others = {
        action.dest: f"it belongs to other programs ({group.title})"
        for group in parser._action_groups
        if group.title in _OTHER_PROGRAMS
        for action in group._group_actions
        if action.dest not in _OF_TRAINING
    }
    for action in parser._actions:
        name = action.dest
        if name in _ELSEWHERE:
            yield action, _ELSEWHERE[name]
        elif name in others:
            yield action, others[name]
        elif name in unreached() and name not in _ASK_FOR_THE_DEFAULT:
            yield action, _UNREAD


@cache
def unreached() -> frozenset[str]:
    """Destinations of Megatron's flags that no code which runs here reads."""
    return frozenset(json.loads(Path(__file__).with_name("unreached.json").read_text()))


def _option(action: argparse.Action, argv: Sequence[str]) -> str:
    """The flag as written on the command line."""
    words = {word.split("=", 1)[0] for word in argv}
    return next((option for option in action.option_strings if option in words), action.option_strings[0])


def _given(action: argparse.Action, value: Any) -> Any:
    return "on" if action.nargs == 0 else value
