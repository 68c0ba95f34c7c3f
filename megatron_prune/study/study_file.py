"""Reads the YAML of a study.yaml, and refuses a key that is there twice: of YAML the last one wins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megatron_prune.errors import UsageError


class _Loader(yaml.SafeLoader):
    """Looks at mappings as they are written: keys that ``<<`` merges in may be set again."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise yaml.YAMLError(f"{key.value} is there twice, on lines {lines[key.value]} and {line}")
                lines[key.value] = line
        return node


def read(path: str | Path) -> Any:
    """The content of a YAML file; UsageError where there is none, or it is not valid."""
    path = Path(path)
    if not path.is_file():
        raise UsageError("STUDY.yaml", given=path, allowed="an existing file")
    try:
        return yaml.load(path.read_text(), _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise UsageError("STUDY.yaml", given=path, allowed="valid YAML", why=str(error)) from error
