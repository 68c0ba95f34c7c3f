"""The arguments of Megatron's model and transformer configuration, with their defaults, from its own parser.

python -m tests.checkpoint.megatron_arguments > megatron_prune/checkpoint/megatron_arguments.json
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

from tests.engine.unreached import parser

_GROUPS = (
    "transformer configuration",
    "network size",
    "moe",
    "mla",
    "experimental_attention_variant",
    "heterogeneous architecture",
    "experimental",
    "Transformer-Engine",
)


def arguments() -> dict[str, Any]:
    """Default by name (as text if it is not a plain value), for the model groups and all transformer configurations."""
    from megatron.core.transformer import MLATransformerConfig

    megatrons = parser()
    defaults = vars(megatrons.parse_args([]))
    names = {action.dest for group in megatrons._action_groups for action in group._group_actions
             if group.title in _GROUPS}  # fmt: skip
    names |= {field.name for field in dataclasses.fields(MLATransformerConfig)} & set(defaults)
    plain = (type(None), bool, int, float, str, list)
    return {name: value if isinstance(value := defaults[name], plain) else str(value) for name in sorted(names)}


if __name__ == "__main__":
    json.dump(arguments(), sys.stdout, indent=1)
    print()
