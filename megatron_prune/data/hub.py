"""Datasets from the Hugging Face Hub (or a local folder) as input, streamed shard by shard.

Needs the optional package ``datasets``: ``pip install 'megatron-prune[datasets]'``. Code that comes with a
dataset is never run, also with releases of ``datasets`` that could run it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_prune.data.readers import RawDocument
from megatron_prune.errors import DataError, UsageError


@dataclass(frozen=True)
class RemoteShard:
    """One shard of a split: the unit in which a run is resumed. ``data`` is the streamed split."""

    name: str
    split: str
    column: str
    version: str  # the builder's hash of the files, so that a new revision is a different input
    number: int
    of: int
    data: Any = field(repr=False, compare=False)

    def records(self) -> Iterator[RawDocument]:
        place = f"{self.name} ({self.split}, shard {self.number + 1} of {self.of})"
        try:
            for row, found in enumerate(self.data.shard(self.of, self.number), start=1):
                text = found[self.column]
                text = "" if text is None else text
                if not isinstance(text, str):
                    raise DataError(f"{place}:{row}: expected text under '{self.column}', got none; see --json-keys")
                yield RawDocument(text.encode("utf-8", "replace"), f"{place}:{row}", None)
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read {place} to its end: {error}") from error

    def describe(self) -> dict[str, Any]:
        return {"dataset": self.name, "split": self.split, "version": self.version, "shard": [self.number, self.of]}

    def identity(self) -> dict[str, Any]:
        return self.describe() | {"column": self.column}


def shards(dataset: str, split: str = "train", column: str = "text") -> list[RemoteShard]:
    """The shards of ``NAME[:CONFIG]``: a name on the Hub, or a local folder of Parquet or JSON lines.

    Reads only the description. Raises UsageError and DataError; DataError says what to install if the
    package ``datasets`` is missing.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise DataError("--dataset needs the package 'datasets': pip install 'megatron-prune[datasets]'") from error
    name, config = dataset, None
    if not Path(dataset).is_dir() and ":" in dataset:
        name, _, config = dataset.rpartition(":")
    if Path(name).is_dir():
        name = str(Path(name).absolute())
    try:
        builder = datasets.load_dataset_builder(name, config)
        data = builder.as_streaming_dataset(split=split)
    except (OSError, ValueError) as error:
        raise UsageError(
            "--dataset, --dataset-split",
            got=f"{dataset}, {split}",
            expected="NAME[:CONFIG] on the Hugging Face Hub, or a directory, and one of its splits",
            why=" ".join(str(error).split()),
        ) from error
    names = data.column_names or list(next(iter(data), {}))
    if column not in names:
        raise DataError(f"{dataset}: expected the column '{column}' of --json-keys, got {', '.join(names)}")
    data = data.select_columns([column])
    version = str(builder.hash or builder.config_id)
    return [RemoteShard(dataset, split, column, version, i, data.num_shards, data) for i in range(data.num_shards)]
