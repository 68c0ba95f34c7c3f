"""The catalogue of bad inputs: what they damage in the folder of ``good.make``, and the verbs that meet them.

``INPUTS`` has one entry per input; ``VERBS`` the command lines of every verb, by what they read.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import pickle
import struct
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import yaml
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_prune.data.indexed import HEADER, MAGIC
from tests.checkpoint import small
from tests.checkpoint.test_safe import Touches, replace_metadata, replace_record, saved

Attack = Callable[[Path], Any]  # damages what is in a folder
WEIGHT = "decoder.final_layernorm.weight"
RECIPE = (
    "--seq-length 16 --max-position-embeddings 64 --micro-batch-size 1 --global-batch-size 2 --train-iters 1 --lr 1e-3"
)
TOKENIZE = "--tokenizer-type HuggingFaceTokenizer --tokenizer-model {tokenizer} --output-prefix {out}/made"
CALIBRATION = "--calibration-data-path {corpus} --calibration-seq-length 16 --calibration-sequences 2"

# What a verb reads, and its command line. {ckpt} and the others are good unless the input damages them.
_OF_A_CHECKPOINT = {
    "inspect": "inspect {ckpt} --verify-integrity --sparsity",
    "convert export": "convert export --load {ckpt} --hf {out}/made",
    "convert rewrite": "convert rewrite --load {ckpt} --save {out}/made",
    "plan": "plan --load {ckpt} --method random --target-ffn-hidden-size 24 --divisible-by 8 --output {out}/made.json",
    "apply": "apply --load {ckpt} --plan {plan} --save {out}/made",
    "sparsify": "sparsify --load {ckpt} --method magnitude --ratio 0.5 --save {out}/made",
    "calibrate": f"calibrate --load {{ckpt}} {CALIBRATION} --output {{out}}/made.safetensors",
    "prune": f"prune --load {{ckpt}} --method shortgpt --ratio 0.5 --save {{out}}/made {CALIBRATION}",
    "evaluate": "evaluate --load {ckpt} --data-path {corpus} --seq-length 16 --output {out}/made.json",
    "teach": "teach --load {ckpt} --train-data-path {corpus} --seq-length 16 --stream-range 0:2 --top-k 4 "
    "--output {out}/made",
    "pretrain": f"pretrain --use-checkpoint-args --pretrained-checkpoint {{ckpt}} {RECIPE} --mock-data",
}
_OF_MASKS = {
    "inspect": "inspect {masked} --sparsity",
    "convert export": "convert export --load {masked} --hf {out}/made",
    "convert rewrite": "convert rewrite --load {masked} --save {out}/made",
    "evaluate": "evaluate --load {masked} --data-path {corpus} --seq-length 16 --output {out}/made.json",
}
_OF_A_CORPUS = {
    "calibrate": _OF_A_CHECKPOINT["calibrate"],
    "evaluate": _OF_A_CHECKPOINT["evaluate"],
    "teach": _OF_A_CHECKPOINT["teach"],
    "pretrain": f"pretrain --use-checkpoint-args --pretrained-checkpoint {{ckpt}} {RECIPE} "
    "--train-data-path {corpus} --stream-range 0:2",
}
_OF_AN_INDEX = _OF_A_CORPUS | {
    "check-contamination": "check-contamination --train {corpus} --test {other}",
    "build-index": "build-index --data-path {corpus} --seq-length 16",
}
VERBS: dict[str, dict[str, str]] = {
    "checkpoint": _OF_A_CHECKPOINT,
    "weights": {verb: _OF_A_CHECKPOINT[verb] for verb in ("convert export", "convert rewrite", "apply", "sparsify")},
    "integrity": {"inspect": _OF_A_CHECKPOINT["inspect"]},
    "provenance": {
        verb: _OF_A_CHECKPOINT[verb] for verb in ("inspect", "apply", "convert rewrite", "sparsify", "prune")
    },
    "carried": {verb: _OF_A_CHECKPOINT[verb] for verb in ("apply", "convert rewrite", "sparsify", "prune")},
    "legacy": {
        verb: line.replace("{ckpt}", "{legacy}").replace(" --verify-integrity", "")
        for verb, line in _OF_A_CHECKPOINT.items()
        if verb in ("inspect", "convert rewrite", "convert export", "plan", "evaluate")
    },
    "masks": _OF_MASKS,
    "hf": {"convert import": "convert import --hf {hf} --save {out}/made"},
    "plan": {"apply": _OF_A_CHECKPOINT["apply"]},
    "statistics": {
        "plan": "plan --load {ckpt} --method shortgpt --ratio 0.5 --statistics {statistics} --output {out}/made.json"
    },
    "learned": {
        "plan": "plan --load {ckpt} --method sheared-llama --target-num-layers 2 --statistics {learned} "
        "--output {out}/made.json"
    },
    "ledger": {"advise": "advise --ledger {ledger} --ratio 0.5 --tokens 20480"},
    "study": {"study plan": "study plan {study}"},
    "index": _OF_AN_INDEX,
    "tokens": _OF_A_CORPUS,
    "text": {
        "preprocess": f"preprocess --input {{text}} {TOKENIZE}",
        "train-tokenizer": "train-tokenizer --input {text} --output {out}/made.model --vocab-size 300",
    },
    "tokenizer": {"preprocess": f"preprocess --input {{text}} {TOKENIZE}"},
    "output": {verb: line for verb, line in _OF_A_CHECKPOINT.items() if verb not in ("inspect", "pretrain")}
    | {
        "pretrain": _OF_A_CHECKPOINT["pretrain"] + " --save {out}/made",
        "learn-masks": _OF_A_CHECKPOINT["pretrain"].replace("pretrain ", "learn-masks ", 1)
        + " --ratio 0.5 --divisible-by 8 --save {out}/made",
        "convert import": "convert import --hf {hf} --save {out}/made",
        "preprocess": f"preprocess --input {{text}} {TOKENIZE}",
        "train-tokenizer": "train-tokenizer --input {text} --output {out}/made.model --vocab-size 300",
        "benchmark": "benchmark {ckpt} --static --output {out}/made.json",
        "advise": "advise --ledger {ledger} --ratio 0.5 --tokens 20480 --json {out}/made.json",
        "check-contamination": "check-contamination --train {corpus} --test {other} --json {out}/made.json",
        "study run": "study run {study} --runs-dir {out}/made",
        "preflight": "preflight --output {out}/made.json --gpus 1 " + _OF_A_CHECKPOINT["pretrain"],
    },
}


@dataclass(frozen=True)
class Input:
    """One bad input: what it damages (a key of ``VERBS``), a name, how, and places that differ from the usual ones."""

    of: str
    name: str
    attack: Attack
    places: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"{self.of}: {self.name}"


# -- JSON -----------------------------------------------------------------------------------------

JSON: dict[str, bytes | Attack] = {
    "nothing": b"",
    "half of it": b'{"a": [1, 2',
    "a number": b"7",
    "null": b"null",
    "words": b"These are words.",
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "nested 100,000 deep": b"[" * 100_000 + b"]" * 100_000,
    "nested 500 deep": b'{"a":' * 500 + b"1" + b"}" * 500,
    "NaN": b'{"version": NaN}',
    "1e999": b'{"version": 1e999}',
    "5,000 digits": b'{"version": ' + b"9" * 5000 + b"}",
    "10 million lists": b"[" + b"[]," * 10_000_000 + b"[]]",
    "half a surrogate pair": b'{"version": "\\ud800"}',
    "3 GB of nothing": lambda path: _sparse(path, 3 << 30),
    "a pipe": lambda path: _pipe(path),
    "a device": lambda path: _link(path, "/dev/zero"),
    "a link in a circle": lambda path: _link(path, path.name),
}


def _sparse(path: Path, size: int) -> None:
    with open(path, "wb") as handle:
        handle.truncate(size)


def _pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _link(path: Path, target: str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


JSON_FILES = {
    "ckpt/release/metadata.json": "checkpoint",
    "ckpt/release/integrity.json": "integrity",
    "ckpt/release/pruning.json": "provenance",
    "masked/masks/masks.json": "masks",
    "hf/config.json": "hf",
    "plan.json": "plan",
    "statistics.json": "statistics",
    "learned.json": "learned",
    "ledger/report/results.json": "ledger",
    "corpus.json": "tokens",
    "tokenizer/tokenizer.json": "tokenizer",
}
# An absent or irregular file that is not needed is not a bad input.
_NOT_BAD = {
    *((file, kind) for file in ("ckpt/release/integrity.json", "ckpt/release/pruning.json", "corpus.json")
      for kind in ("a pipe", "a device", "a link in a circle")),
    ("ckpt/release/pruning.json", "1e999"), ("ckpt/release/pruning.json", "NaN"),
}  # fmt: skip


def _json_inputs() -> Iterator[Input]:
    for file, of in JSON_FILES.items():
        for name, content in JSON.items():
            if (file, name) in _NOT_BAD and name not in ("NaN", "1e999"):
                continue
            yield Input(of, f"{name} for {file}", _writes(file, content))


def _weight_index(content: bytes) -> Attack:
    """An index in place of the single file: beside it no index is read."""

    def attack(folder: Path) -> None:
        (folder / "hf/model.safetensors").unlink()
        (folder / "hf/model.safetensors.index.json").write_bytes(content)

    return attack


def _writes(file: str, content: bytes | Attack) -> Attack:
    def attack(folder: Path) -> None:
        if isinstance(content, bytes):
            (folder / file).write_bytes(content)
        else:
            content(folder / file)

    return attack


def edits(file: str, change: Callable[[Any], Any]) -> Attack:
    """Change the value of a JSON file in place, or replace it by what ``change`` returns."""

    def attack(folder: Path) -> None:
        found = json.loads((folder / file).read_text())
        changed = change(found)
        (folder / file).write_text(json.dumps(found if changed is None else changed))

    return attack


def _sets(file: str, *way: Any, value: Any) -> Attack:
    def change(found: Any) -> None:
        for part in way[:-1]:
            found = found[part]
        found[way[-1]] = value

    return edits(file, change)


# -- pickles --------------------------------------------------------------------------------------


def doubled(times: int, kind: type = tuple) -> Any:
    """A tuple (or list) of two of two of two …"""
    value: Any = kind()
    for _ in range(times):
        value = kind((value, value))
    return value


def _cycle() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


_MEMO = b"\x80\x04Nr" + struct.pack("<I", 1 << 31) + b"."
PICKLES: dict[str, bytes | Callable[[Path], bytes]] = {
    "no bytes": b"",
    "no pickle": b"These are words.",
    "a memo index of 2^31": _MEMO,
    "bytes of 2^50": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 50) + b"x.",
    "a frame of 2^60": b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"N.",
    "300,000 lists in lists": b"\x80\x04" + b"]" * 300_000 + b"a" * 299_999 + b".",
    "a tuple doubled 60 times": pickle.dumps(doubled(60)),
    "a list doubled 60 times": pickle.dumps(doubled(60, list)),
    "a tuple doubled 60 times as a key": pickle.dumps(doubled(60))[:-1] + b"Ns\x2e",
    "a list that holds itself": pickle.dumps(_cycle()),
    "3 million steps": b"\x80\x04" + b"N0" * 3_000_000 + b"N.",
    "a number of a million bits": pickle.dumps(1 << 1_000_000),
    "another class": pickle.dumps(dcp.StorageMeta()),
    "code": lambda folder: pickle.dumps(Touches(folder / "executed")),
}


def _archive(pickled: bytes) -> bytes:
    """What ``torch.save`` would write, with another pickle."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", b"3\n")
    return stream.getvalue()


def _pickle_inputs() -> Iterator[Input]:
    for name, content in PICKLES.items():

        def made(folder: Path, content: Any = content) -> bytes:
            return content if isinstance(content, bytes) else content(folder)

        def index(folder: Path, made: Any = made) -> None:
            (folder / "ckpt/release/.metadata").write_bytes(made(folder))

        def common(folder: Path, made: Any = made) -> None:
            replace_record(folder / "ckpt/release", "common_state/shard_0_1", _archive(made(folder)))

        def tensor(folder: Path, made: Any = made) -> None:
            replace_record(folder / "ckpt/release", WEIGHT, _archive(made(folder)))

        def mask(folder: Path, made: Any = made) -> None:
            (folder / "masked/masks/.metadata").write_bytes(made(folder))

        def legacy(folder: Path, made: Any = made) -> None:
            path = folder / "legacy/iter_0000003/mp_rank_00/model_optim_rng.pt"
            path.write_bytes(_archive(made(folder)))

        yield Input("checkpoint", f"{name} for the index", index)
        yield Input("checkpoint", f"{name} for the arguments", common)
        yield Input("weights", f"{name} for a tensor", tensor)
        yield Input("masks", f"{name} for the index of masks", mask)
        yield Input("legacy", f"{name} for a legacy file", legacy)


def _index(change: Callable[[Any], None]) -> Attack:
    return lambda folder: replace_metadata(folder / "ckpt/release", change)


def _entry(key: str, **values: Any) -> Attack:
    def change(metadata: Any) -> None:
        for name, value in values.items():
            setattr(metadata.state_dict_metadata[key], name, value)

    return _index(change)


def _stored(**values: Any) -> Attack:
    def change(metadata: Any) -> None:
        place = next(index for index in metadata.storage_data if index.fqn == WEIGHT)
        held = metadata.storage_data[place]
        metadata.storage_data[place] = _StorageInfo(
            values.get("name", held.relative_path), values.get("offset", held.offset), values.get("length", held.length)
        )

    return _index(change)


def _many_chunks(metadata: Any) -> None:
    entry = metadata.state_dict_metadata["decoder.layers.mlp.linear_fc1.weight"]
    entry.chunks = entry.chunks * 20_000


def _thin_chunks(metadata: Any) -> None:
    """Every column of a million columns is its own shard of all layers."""
    key = "decoder.layers.mlp.linear_fc1.weight"
    entry = metadata.state_dict_metadata[key]
    layers, rows, _ = entry.size
    wide = 20_000
    entry.size = torch.Size((layers, rows, wide))
    entry.chunks = [
        dcp.ChunkStorageMetadata(torch.Size((0, 0, at)), torch.Size((layers, rows, 1))) for at in range(wide)
    ]
    info = next(info for index, info in metadata.storage_data.items() if index.fqn == key)
    metadata.storage_data = {index: one for index, one in metadata.storage_data.items() if index.fqn != key}
    for chunk in entry.chunks:
        metadata.storage_data[dcp.MetadataIndex(key, chunk.offsets)] = info


def arguments(**changes: Any) -> Attack:
    """Other stored arguments."""

    def attack(folder: Path) -> None:
        state = {"args": Namespace(**small.ARGS | changes), "iteration": 0}
        replace_record(folder / "ckpt/release", "common_state/shard_0_1", saved([state]))

    return attack


def _again_and_again(folder: Path) -> None:
    """A record that shows one number as a whole tensor."""
    size = torch.Size((32,))
    replace_record(folder / "ckpt/release", WEIGHT, saved(torch.zeros(1).expand(size)))


def _compressed(folder: Path) -> None:
    with zipfile.ZipFile(folder / "ckpt/release/common.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"args": {}}, protocol=2))
        archive.writestr("archive/data/0", bytes(1 << 27))


def _many_entries(folder: Path) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for number in range(70_000):
            archive.writestr(f"archive/{number}", b"")
    replace_record(folder / "ckpt/release", WEIGHT, stream.getvalue())


CHECKPOINTS: dict[str, Attack] = {
    "sizes of 2^60 lists": _entry(WEIGHT, size=doubled(60, list)),
    "sizes of 2^60 tuples": _entry(WEIGHT, size=doubled(60)),
    "a negative size": _entry(WEIGHT, size=[-1]),
    "words for a size": _entry(WEIGHT, size=["32"]),
    "a size of 2^61": _entry(WEIGHT, size=torch.Size((1 << 61,))),
    "20 axes": _entry(WEIGHT, size=torch.Size((1,) * 20)),
    "no shards": _entry(WEIGHT, chunks=[]),
    "none for shards": _entry(WEIGHT, chunks=None),
    "words for shards": _entry(WEIGHT, chunks=["x"]),
    "no properties": _entry(WEIGHT, properties=None),
    "a chunk listed 20,000 times": _index(_many_chunks),
    "20,000 shards of all layers": _index(_thin_chunks),
    "a file outside": _stored(name="../secret"),
    "an absolute file": _stored(name="/etc/passwd"),
    "a doubled tuple for a file": _stored(name=doubled(60)),
    "an offset beyond the file": _stored(offset=1 << 50),
    "a negative offset": _stored(offset=-1),
    "a length of 2^61": _stored(length=1 << 61),
    "no tensors": _index(lambda metadata: metadata.state_dict_metadata.clear()),
    "no records": _index(lambda metadata: metadata.storage_data.clear()),
    "an unknown weight": _index(
        lambda metadata: metadata.state_dict_metadata.update(x=metadata.state_dict_metadata[WEIGHT])
    ),
    "a compressed gigabyte of arguments": _compressed,
    "a missing file of weights": lambda folder: (folder / "ckpt/release/__0_0.distcp").unlink(),
    "half a file of weights": lambda folder: os.truncate(folder / "ckpt/release/__0_0.distcp", 5000),
    "a pipe for the weights": lambda folder: _pipe(folder / "ckpt/release/__0_0.distcp"),
    "a device for the weights": lambda folder: _link(folder / "ckpt/release/__0_0.distcp", "/dev/zero"),
    "a pipe for the index": lambda folder: _pipe(folder / "ckpt/release/.metadata"),
    "a device for the index": lambda folder: _link(folder / "ckpt/release/.metadata", "/dev/zero"),
    "3 GB of nothing for the index": lambda folder: _sparse(folder / "ckpt/release/.metadata", 3 << 30),
    "a directory for the index": lambda folder: (
        (folder / "ckpt/release/.metadata").unlink(), (folder / "ckpt/release/.metadata").mkdir()
    ),
    "another format": _writes("ckpt/release/metadata.json", b'{"sharded_backend": "zarr"}'),
    "a tracker that names nothing": _writes("ckpt/latest_checkpointed_iteration.txt", b"5"),
    **{
        f"{value!r:.24} for {name}": arguments(**{name: value})
        for name, values in {
            "num_layers": ("4", -1, 0, 10**12, 1.5, [], True, 10**4000),
            "hidden_size": (1 << 60, None, "x", -32, {}),
            "num_attention_heads": (1 << 24, 0, 4.0),
            "num_query_groups": (1.5, 3, 1 << 24),
            "kv_channels": (1 << 24, "10"),
            "ffn_hidden_size": (-48, 1 << 30),
            "padded_vocab_size": (1 << 40, "128"),
            "untie_embeddings_and_output_weights": ("false", 1, []),
            "swiglu": ("false",),
            "add_bias_linear": ("no",),
            "num_experts": (8,),
        }.items()
        for value in values
    },
    "no arguments": lambda folder: replace_record(
        folder / "ckpt/release", "common_state/shard_0_1", saved([{"iteration": 0}])
    ),
    "a list for the arguments": lambda folder: replace_record(
        folder / "ckpt/release", "common_state/shard_0_1", saved([[1]])
    ),
    "arguments that hold themselves": arguments(x=_cycle()),
    "arguments doubled 60 times": arguments(x=doubled(60, list)),
    "a tensor of one number shown 2^40 times": arguments(x=torch.zeros(1).expand(1 << 40)),
}  # fmt: skip


def _weight(change: Callable[[torch.Tensor], torch.Tensor]) -> Attack:
    def attack(folder: Path) -> None:
        replace_record(folder / "ckpt/release", WEIGHT, saved(change(small.tensors()[WEIGHT])))

    return attack


def _with(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[7] = value
        return tensor

    return change


WEIGHTS: dict[str, Attack] = {
    "NaN in a weight": _weight(_with(math.nan)),
    "infinity in a weight": _weight(_with(math.inf)),
    "minus infinity in a weight": _weight(_with(-math.inf)),
    "integers for a weight": _weight(lambda tensor: tensor.to(torch.int32)),
    "a short weight": _weight(lambda tensor: tensor[:20].clone()),
    "one number shown 32 times": _again_and_again,
    "70,000 entries in a record": _many_entries,
    "a dictionary for a weight": lambda folder: replace_record(folder / "ckpt/release", WEIGHT, saved({"a": 1})),
    "a masks link that leads nowhere": lambda folder: (folder / "ckpt/masks").symlink_to("nowhere"),
    "a file for the masks": lambda folder: (folder / "ckpt/masks").write_text("x"),
}


# -- Hugging Face ---------------------------------------------------------------------------------


def _tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Attack:
    def attack(folder: Path) -> None:
        found = safetensors.torch.load_file(folder / "hf/model.safetensors")
        change(found)
        (folder / "hf/model.safetensors").write_bytes(safetensors.torch.save(found))

    return attack


def _header(**changes: Any) -> Attack:
    def attack(folder: Path) -> None:
        content = (folder / "hf/model.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        header["model.norm.weight"] |= changes
        text = json.dumps(header).encode()
        (folder / "hf/model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return attack


CONFIG: dict[str, tuple[Any, ...]] = {
    "num_hidden_layers": ("4", -1, 0, 1.5, [], True, 1 << 31),
    "hidden_size": ("x", 0, 1 << 40, {}),
    "num_attention_heads": (1 << 24, 0, "4"),
    "num_key_value_heads": (1 << 24, 3, -2),
    "head_dim": (1 << 24, "10"),
    "intermediate_size": (0, 1 << 30),
    "vocab_size": (0, 1 << 40, "125"),
    "max_position_embeddings": (0, "128"),
    "tie_word_embeddings": ("false", 1, []),
    "rope_theta": (0, -1, "10000", True),
    "rms_norm_eps": (-1, "x"),
    "hidden_act": ("gelu",),
    "attention_bias": (True, "false"),
    "model_type": ("gpt2", 7, []),
    "rope_parameters": ([1], {"rope_type": "yarn"}, {"rope_type": "llama3", "factor": 0, "rope_theta": 1e4},
                        {"rope_type": "llama3", "factor": -8}, {"rope_theta": 0}, {"rope_type": {}}),
    "quantization_config": ({"bits": 4},),
    "sliding_window": (0, "x", -1),
}  # fmt: skip
HF: dict[str, Attack] = {
    **{
        f"{value!r:.30} for {key}": edits(
            "hf/config.json",
            lambda found, key=key, value=value: {
                **{k: v for k, v in found.items() if not (key == "rope_theta" and k.startswith("rope_"))},
                key: value,
                **({"rope_scaling": None} if key == "rope_parameters" else {}),
                **({"model_type": "mistral"} if key == "sliding_window" else {}),
            },
        )
        for key, values in CONFIG.items()
        for value in values
    },
    "NaN in a tensor": _tensors(lambda found: found["model.norm.weight"].__setitem__(3, math.nan)),
    "infinity in a tensor": _tensors(lambda found: found["model.norm.weight"].__setitem__(3, math.inf)),
    "a missing tensor": _tensors(lambda found: found.pop("model.norm.weight")),
    "an unknown tensor": _tensors(lambda found: found.update(x=torch.zeros(3))),
    "a short tensor": _tensors(lambda found: found.update({"model.norm.weight": torch.zeros(3)})),
    "integers for a tensor": _tensors(
        lambda found: found.update({"model.norm.weight": torch.zeros(32, dtype=torch.int32)})
    ),
    "offsets beyond the file": _header(data_offsets=[0, 1 << 60]),
    "a shape of 2^40": _header(shape=[1 << 40]),
    "words for a shape": _header(shape="x"),
    "an unknown type": _header(dtype="X"),
    "a header of 2^60 bytes": _writes("hf/model.safetensors", struct.pack("<Q", 1 << 60) + b"{}"),
    "3 GB of nothing for the weights": lambda folder: _sparse(folder / "hf/model.safetensors", 3 << 30),
    "a pipe for the weights": lambda folder: _pipe(folder / "hf/model.safetensors"),
    "an index of a file outside": _weight_index(b'{"weight_map": {"a": "../x.safetensors"}}'),
    "a list for the index": _weight_index(b"[]"),
    "numbers in the index": _weight_index(b'{"weight_map": {"a": 7}}'),
    "a link to a secret for the tokenizer": lambda folder: (
        (folder / "secret").write_text("{}"), (folder / "hf/tokenizer.json").symlink_to("../secret")
    ),
    "words for the masks": _writes("hf/masks.safetensors", b"These are words."),
    "half of the masks": lambda folder: os.truncate(folder / "hf/masks.safetensors", 3000),
}  # fmt: skip

# -- masks, plans, statistics, ledgers, studies -----------------------------------------------------

_MASK = "decoder.layers.1.mlp.linear_fc2.weight"
MASKS: dict[str, Attack] = {
    **{
        f"{value!r:.24} for {name} of a mask": _sets("masked/masks/masks.json", "masks", _MASK, name, value=value)
        for name, values in {
            "shape": ([32], [1 << 40, 48], "x", [32.0, 48.0], [-1, 48]),
            "pattern": ("0:0", "4:2", 7, "2:1000000000000"),
            "removed": (-1, 1 << 60, "x", 1.5),
            "digest": ("0", None),
            "packed": ("yes", 1, None),
        }.items()
        for value in values
    },
    "no masks": _sets("masked/masks/masks.json", "masks", value={}),
    "another version": _sets("masked/masks/masks.json", "version", value=[[]]),
    "an unknown mask": edits("masked/masks/masks.json", lambda found: found["masks"].update(x=found["masks"][_MASK])),
    "2^24 layers": _sets("masked/masks/masks.json", "model", "num_layers", value=1 << 24),
    "a pipe for the masks": lambda folder: _pipe(folder / "masked/masks/__0_0.distcp"),
    "masks of zeros": lambda folder: (folder / "masked/masks/__0_0.distcp").write_bytes(
        bytes((folder / "masked/masks/__0_0.distcp").stat().st_size)
    ),
}
PLANS: dict[str, Attack] = {
    f"{value!r:.24} for {'.'.join(way)}": _sets("plan.json", *way, value=value)
    for way, values in {
        ("kept_layers",): ([0, 0, 1], [-1, 2, 3], [0, 2, 99], ["0", 2, 3], None, [], [[0]], [0.0, 2, 3], [True, 2, 3]),
        ("kept_hidden",): ([0], "x", [1 << 60]),
        ("source",): ({}, None, []),
        ("source", "num_layers"): ("4", 0, 1 << 40, 4.0),
        ("target", "hidden_size"): (1 << 40, "32"),
        ("parent",): (7, "0" * 64),
        ("settings",): (None, []),
        ("near_ties",): ([7], None),
        ("chosen",): (7, "x"),
        ("hash",): ("0" * 64, None),
        ("version",): (2, "1", None),
        ("ratio",): ("x", [0.5]),
    }.items()
    for value in values
}
STATISTICS: dict[str, Attack] = {
    **{
        f"{value!r:.24} for {'.'.join(map(str, way))}": _sets("statistics.json", *way, value=value)
        for way, values in {
            ("sequences",): (0, -1, "2", 1.5),
            ("seq_length",): (0, None),
            ("loss_sum",): ("x", None),
            ("parent",): (7, "0" * 64),
            ("shape", "num_layers"): (1 << 24, "4", 3),
            ("shape",): ({}, []),
            ("calibrations",): ([], [7], None),
            ("scores",): ([], {"a": 7}, {"a": {"candidate": "x", "loss": "y"}}),
            ("sha256",): ("0" * 64, None),
            ("version",): (2, None),
        }.items()
        for value in values
    },
    "half of the tensors": lambda folder: os.truncate(folder / "statistics.safetensors", 3000),
    "3 GB of nothing for the tensors": lambda folder: _sparse(folder / "statistics.safetensors", 3 << 30),
    "a pipe for the tensors": lambda folder: _pipe(folder / "statistics.safetensors"),
    "no tensors": lambda folder: (folder / "statistics.safetensors").unlink(),
}
LEARNED: dict[str, Attack] = {
    "half of the tensors": lambda folder: os.truncate(folder / "learned.safetensors", 300),
    "3 GB of nothing for the tensors": lambda folder: _sparse(folder / "learned.safetensors", 3 << 30),
    "words for the tensors": _writes("learned.safetensors", b"These are words."),
    "a header of 2^60 bytes": _writes("learned.safetensors", struct.pack("<Q", 1 << 60) + b"{}"),
    "a number for the parent": _sets("learned.json", "parent", value=7),
    "another hash": _sets("learned.json", "sha256", value="0"),
}
_RESULTS = "ledger/report/results.json"
LEDGERS: dict[str, Attack] = {
    **{
        f"{value!r:.24} for {name} of every row": edits(
            _RESULTS,
            lambda found, name=name, value=value: [row.update({name: value}) for row in found["rows"]] and None,
        )
        for name, values in {
            "test_loss": ("x", -1, None, [], "inf"),
            "tokens_train": (0, -1, "1000", 1.5, None),
            "flops_train": (0, "x"),
            "params": (0, "x", None),
            "cell": (None, 7, []),
            "status": (None, 7),
            "shape": (7, []),
            "removed_linears": ("x", None),
        }.items()
        for value in values
    },
    **{
        f"{value!r:.24} for {name}": _sets(_RESULTS, name, value=value)
        for name, values in {"rows": (None, [7], {}, []), "comparisons": (None, [7], [{}], {}), "study": (7,)}.items()
        for value in values
    },
    "comparisons of cells that are not there": edits(
        _RESULTS, lambda found: [made.update(pruned="x") for made in found["comparisons"]] and None
    ),
    "words for tokens": edits(
        _RESULTS, lambda found: [made.update(tokens="x") for made in found["comparisons"]] and None
    ),
}  # fmt: skip

_BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)  # fmt: skip


def _study(line: str) -> Attack:
    """The good study with another value of one key."""

    def attack(folder: Path) -> None:
        found = yaml.safe_load((folder / "study.yaml").read_text())
        found.pop(line.partition(":")[0], None)
        (folder / "study.yaml").write_text(f"{yaml.safe_dump(found)}{line}\n")

    return attack


STUDIES: dict[str, Attack] = {
    name: _writes("study.yaml", text if isinstance(text, bytes) else text.encode())
    for name, text in {
        "aliases of 10^9 values": _BOMB,
        "an alias of itself": "name: &a [*a]\n",
        "no YAML": "name: [\n",
        "nothing": "",
        "a list": "- 1\n",
        "a tab": "name:\n\tx\n",
        "a date that is none": "name: 2020-99-99\n",
        "5,000 digits": "name: " + "9" * 5000 + "\n",
        "a number in base 60 of 100,000 digits": "name: 1" + ":59" * 30_000 + "\n",
        "nested 10,000 deep": "name: " + "[" * 10_000 + "]" * 10_000 + "\n",
        "30,000 keys": "".join(f"key{number}: 1\n" for number in range(30_000)),
        "a byte that is no text": b"name: \xff\n",
        "a zero byte": b"name: a\0b\n",
        "an include of itself": "include: study.yaml\n",
        "an include of a pipe": "include: pipe\n",
        "keys that are lists": "? [a, b]\n: 1\n",
    }.items()
} | {
    "a Python object": _study("name: !!python/object/apply:os.system [touch executed]"),
    "an infinite budget": _study("budgets: [.inf]"),
    "a budget of 10^999": _study("budgets: [1e999]"),
    "a binary budget": _study("budgets: [!!binary aGVsbG8=]"),
    "a negative budget": _study("budgets: [-5]"),
    "a name with a line break": _study('name: "a\\nb"'),
    "a name that clears the screen": _study('name: "a\\e[2J"'),
    "a corpus that is not there": _study(
        "data: {train: nothere, calibration: a, validation: b, test: c, seq_length: 16}"
    ),
    "a launcher of words": _study("launch: {launcher: mine}"),
    "a ratio of 2": _study("ratios: [2.0]"),
    "3 GB of nothing": lambda folder: _sparse(folder / "study.yaml", 3 << 30),
    "a pipe": lambda folder: _pipe(folder / "study.yaml"),
    "a device": lambda folder: _link(folder / "study.yaml", "/dev/zero"),
}

# -- corpora and text -------------------------------------------------------------------------------


def _patched(offset: int, form: str, *values: Any) -> Attack:
    def attack(folder: Path) -> None:
        content = bytearray((folder / "corpus.idx").read_bytes())
        struct.pack_into(form, content, offset, *values)
        (folder / "corpus.idx").write_bytes(content)

    return attack


_LENGTHS, _POINTERS, _ENDS = HEADER.size, HEADER.size + 4 * 20, HEADER.size + 12 * 20
INDICES: dict[str, Attack] = {
    "another magic number": _patched(0, "<4s", b"XXXX"),
    "another version": _patched(len(MAGIC), "<Q", 2),
    "an unknown token type": _patched(len(MAGIC) + 8, "<B", 77),
    "tokens of float64": _patched(len(MAGIC) + 8, "<B", 6),
    "tokens of float32": _patched(len(MAGIC) + 8, "<B", 7),
    "2^60 sequences": _patched(len(MAGIC) + 9, "<Q", 1 << 60),
    "no sequences": _patched(len(MAGIC) + 9, "<Q", 0),
    "2^60 documents": _patched(len(MAGIC) + 17, "<Q", 1 << 60),
    "a negative length": _patched(_LENGTHS + 4, "<i", -50),
    "lengths that do not add up": _patched(_LENGTHS + 4, "<ii", 10, 90),
    "a length beyond the file": _patched(_LENGTHS + 4, "<i", (1 << 31) - 1),
    "a place beyond the file": _patched(_POINTERS + 8, "<q", 1 << 50),
    "a negative place": _patched(_POINTERS + 8, "<q", -2),
    "a document end beyond the sequences": _patched(_ENDS + 8, "<q", 99),
    "a negative document end": _patched(_ENDS + 8, "<q", -1),
    "document ends that descend": _patched(_ENDS + 8, "<qq", 5, 2),
    "documents that end early": _patched(_ENDS + 8 * 20, "<q", 7),
    "half of the index": lambda folder: os.truncate(folder / "corpus.idx", 100),
    "nothing for the index": _writes("corpus.idx", b""),
    "a pipe for the index": lambda folder: _pipe(folder / "corpus.idx"),
    "a pipe for the tokens": lambda folder: _pipe(folder / "corpus.bin"),
    "half of the tokens": lambda folder: os.truncate(folder / "corpus.bin", 777),
    "no tokens": lambda folder: (folder / "corpus.bin").unlink(),
    "nothing for the tokens": _writes("corpus.bin", b""),
}
INDICES["documents that end early"] = _patched(_ENDS + 8 * 20, "<q", 19)


def _ids(change: Callable[[np.ndarray], Any], kind: int | None = None) -> Attack:
    def attack(folder: Path) -> None:
        ids = np.fromfile(folder / "corpus.bin", np.uint16)
        change(ids)
        ids.tofile(folder / "corpus.bin")
        if kind is not None:
            _patched(len(MAGIC) + 8, "<B", kind)(folder)

    return attack


TOKENS: dict[str, Attack] = {
    "an id beyond the vocabulary": _ids(lambda ids: ids.__setitem__(3, 125)),
    "an id of 65,535": _ids(lambda ids: ids.__setitem__(3, 65_535)),
    "ids that int16 makes negative": _ids(lambda ids: ids.__setitem__(slice(None), 40_000), 3),
    "a sidecar of a larger vocabulary": _sets("corpus.json", "tokenizer", "vocab_size", value=50_000),
    "words for the vocabulary of the sidecar": _sets("corpus.json", "tokenizer", "vocab_size", value="x"),
    "a list for the tokenizer of the sidecar": _sets("corpus.json", "tokenizer", value=[]),
}


def _text(name: str, content: bytes | Attack) -> tuple[Attack, tuple[tuple[str, str], ...]]:
    return _writes(name, content), (("text", name),)


def _bomb(path: Path) -> None:
    """13 GB of nothing in 13 MB, made of members of 16 MB."""
    path.write_bytes(gzip.compress(bytes(16 << 20)) * 800)


def _line_bomb(path: Path) -> None:
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * (1 << 20)) * 300)


TEXTS: dict[str, tuple[str, bytes | Attack]] = {
    "13 GB of zeros in a .gz": ("bomb.txt.gz", _bomb),
    "4 GB of lines in a .gz": ("bomb.jsonl.gz", _line_bomb),
    "half a .gz": ("half.jsonl.gz", gzip.compress(os.urandom(5000))[:3000]),
    "a damaged .gz": ("damaged.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99)[:-8] + bytes(8)),
    "half a .zst": ("half.jsonl.zst", b"\x28\xb5\x2f\xfd\x04\x00\x01"),
    "no JSON": ("bad.jsonl", b"These are words.\n"),
    "a line without text": ("bad.jsonl", b'{"txt": "a"}\n'),
    "a number for the text": ("bad.jsonl", b'{"text": 7}\n'),
    "a list for a line": ("bad.jsonl", b"[1]\n"),
    "100,000 lists in lists": ("bad.jsonl", b"[" * 100_000 + b"\n"),
    "5,000 digits": ("bad.jsonl", b'{"text": ' + b"9" * 5000 + b"}\n"),
    "not UTF-8": ("bad.txt", b"\xff\xfe\xff"),
    "no Parquet": ("bad.parquet", b"PAR1 and more words, PAR1"),
    "nothing for Parquet": ("bad.parquet", b""),
    "a line of 3 GB": ("bad.jsonl", lambda path: _sparse(path, 3 << 30)),
    "a text of 3 GB": ("bad.txt", lambda path: _sparse(path, 3 << 30)),
    "a pipe": ("bad.jsonl", _pipe),
    "a device": ("bad.txt", lambda path: _link(path, "/dev/zero")),
}
TOKENIZERS: dict[str, Attack] = {
    "code in the configuration": edits(
        "tokenizer/tokenizer_config.json",
        lambda found: found.update(auto_map={"AutoTokenizer": ["x.T", "x.T"]}, tokenizer_class="T"),
    ),
    "a number for the class": _sets("tokenizer/tokenizer_config.json", "tokenizer_class", value=7),
    "a list for the model": _sets("tokenizer/tokenizer.json", "model", value=[]),
    "no vocabulary": _sets("tokenizer/tokenizer.json", "model", "vocab", value=7),
    "a word for an id": edits(
        "tokenizer/tokenizer.json",
        lambda found: found["model"]["vocab"].update({next(iter(found["model"]["vocab"])): "x"}),
    ),
    "3 GB of nothing for the configuration": lambda folder: _sparse(
        folder / "tokenizer/tokenizer_config.json", 3 << 30
    ),
    "a pipe for the configuration": lambda folder: _pipe(folder / "tokenizer/tokenizer_config.json"),
    "no tokenizer.json": lambda folder: (folder / "tokenizer/tokenizer.json").unlink(),
}


def _carries(link: str, target: str) -> Attack:
    def attack(folder: Path) -> None:
        carried = folder / "ckpt" / "huggingface"
        (carried / link).parent.mkdir(parents=True)
        (folder / "secret").write_text("{}")
        (carried / link).symlink_to(target)

    return attack


# What a checkpoint that is made from another takes over as it is.
CARRIED: dict[str, Attack] = {
    "a link to a file outside": _carries("tokenizer.json", "../../secret"),
    "a link to a file of the system": _carries("tokenizer.json", "/etc/passwd"),
}
# Where a verb is told to write. The rest of it is good.
OUTPUTS: dict[str, tuple[str, Attack]] = {
    "a file in place of the folder": ("plan.json", lambda folder: None),
    "a link that leads nowhere in place of the folder": ("gone", lambda folder: _link(folder / "gone", "/gone/gone")),
    "a link in a circle in place of the folder": ("circle", lambda folder: _link(folder / "circle", folder / "circle")),
    "a device in place of the folder": ("null", lambda folder: _link(folder / "null", "/dev/null")),
}


def _all() -> Iterator[Input]:
    yield from _json_inputs()
    yield from _pickle_inputs()
    for of, attacks in (
        ("checkpoint", CHECKPOINTS), ("weights", WEIGHTS), ("hf", HF), ("masks", MASKS), ("plan", PLANS),
        ("statistics", STATISTICS), ("learned", LEARNED), ("ledger", LEDGERS), ("study", STUDIES), ("index", INDICES),
        ("tokens", TOKENS), ("tokenizer", TOKENIZERS), ("carried", CARRIED),
    ):  # fmt: skip
        for name, attack in attacks.items():
            yield Input(of, name, attack)
    for name, (file, content) in TEXTS.items():
        attack, places = _text(file, content)
        yield Input("text", name, attack, places)

    for name, (file, attack) in OUTPUTS.items():
        yield Input("output", name, attack, (("out", file),))


INPUTS = list(_all())
