"""Shared by ``plan`` and ``prune``: selects the named method's settings among those of all methods."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from megatron_prune.methods import options
from megatron_prune.settings import Settings

NAMES = ", ".join(options.STRUCTURED)


def own_settings(
    method: str, given: argparse.Namespace, known: Mapping[str, type[Settings]] = options.STRUCTURED
) -> Settings:
    """The settings of ``method`` among the flags ``given``; UsageError for a flag of another method.

    ``known``: the settings that the verb takes, by method.
    """
    options.refuse_others(method, vars(given), known=known)
    return known.get(method, options.NoOptions).of(given)
