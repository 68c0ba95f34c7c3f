"""Shared by ``plan`` and ``prune``: selects the named method's settings among those of all methods."""

from __future__ import annotations

import argparse

from megatron_prune.methods import options
from megatron_prune.settings import Settings

NAMES = ", ".join(options.STRUCTURED)


def own_settings(method: str, given: argparse.Namespace) -> Settings:
    """The settings of ``method`` among the flags ``given``; UsageError for a flag of another method."""
    options.refuse_others(method, vars(given))
    return options.STRUCTURED.get(method, options.NoOptions).of(given)
