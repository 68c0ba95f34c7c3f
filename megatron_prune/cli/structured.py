"""Shared by ``plan`` and ``prune``: selects the named method's settings among those of all methods."""

from __future__ import annotations

import argparse

from megatron_prune.errors import UsageError
from megatron_prune.methods import options
from megatron_prune.settings import Settings

NAMES = ", ".join(options.STRUCTURED)


def own_settings(method: str, given: argparse.Namespace) -> Settings:
    """The settings of ``method`` among the flags ``given``; UsageError for a flag of another method."""
    own = options.STRUCTURED.get(method, options.NoOptions)
    mine = {flag.name for flag in own.flags()}
    for other, theirs in options.STRUCTURED.items():
        for flag in theirs.flags():
            if flag.name not in mine and hasattr(given, flag.name):
                raise UsageError(flag.option, got=f"--method {method}", expected=f"--method {other} with it")
    return own.of(given)
