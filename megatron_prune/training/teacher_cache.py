"""A teacher's most probable next tokens on a range of a stream, in files: written once, read by every run on it.

``teach`` writes a folder, ``pretrain --teacher-cache`` reads it:

* ``manifest.json``: teacher, stream, range, vocabulary, k, types, and the size and SHA-256 of every shard;
* ``shard-00000.safetensors``, …: consecutive samples of the stream, S positions each. For every position ``ids``
  [samples, S, k], the most probable first (of equals the lowest id); ``log_probabilities`` [samples, S, k]; and
  ``rest`` [samples, S], float32: the logarithm of the probability of all other ids.

Samples are found by their number in the stream. So runs with other permutations, batch sizes, layouts and shapes of the
student share one cache.

Megatron's own form (``megatron/training/distillation``) is not used. Its tar files hold pickles, compressed by step:
the student must have the teacher's seed, micro-batch size and context-parallel ranks, and reading one sample means
decoding a step. It holds no probability of the rest, no identity of teacher or range, and at most 131,072 ids.
"""

from __future__ import annotations

import contextlib
import stat
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

import safetensors
import safetensors.torch
import torch

from megatron_prune import storage
from megatron_prune.artifacts import read_json, sha256_json, write_bytes, write_json
from megatron_prune.data import indexed
from megatron_prune.errors import DataError, UsageError
from megatron_prune.untrusted import check, reason, show

FLAG = "--teacher-cache"
MANIFEST, VERSION = "manifest.json", 1
IDS, LOG_PROBABILITIES, REST = NAMES = "ids", "log_probabilities", "rest"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# By how much the probabilities of a position may exceed 1: rounding is relative to the logarithm, whose mean under the
# distribution is an entropy of at most 12.5 nats (a vocabulary of 2**18).
_EXCESS = {"float16": 12.5 * 2**-11, "bfloat16": 12.5 * 2**-8, "float32": 1e-4}
_SHARD_BYTES = 64 << 20
_OPEN_SHARDS = 64
_AGAIN = "remove it and run the same teach again, which writes what is missing"


@dataclass(frozen=True)
class Taught:
    """What a cache holds, and of what. ``stream`` as in an account, ``range`` in samples, ``vocabulary`` unpadded.

    ``teacher``: path and fingerprint of the checkpoint, its masks' hash, the precision that it ran in. ``tokenizers``:
    fingerprints of the tokenizers of the text, where the corpora say them. ``flops``: the teacher's, for all samples.
    """

    teacher: dict[str, Any]
    stream: dict[str, Any]
    range: tuple[int, int]
    vocabulary: int
    tokenizers: tuple[str, ...]
    k: int
    dtype: str
    shard_samples: int
    flops: int

    @property
    def seq_length(self) -> int:
        return int(self.stream["seq_length"])

    @property
    def id_dtype(self) -> torch.dtype:
        return torch.uint16 if self.vocabulary <= 1 << 16 else torch.uint32

    @property
    def tokens(self) -> int:
        return (self.range[1] - self.range[0]) * self.seq_length

    @property
    def bytes_per_token(self) -> int:
        return bytes_per_token(self.k, self.dtype, self.vocabulary)

    @property
    def shards(self) -> int:
        return -(-(self.range[1] - self.range[0]) // self.shard_samples)

    def shard_range(self, shard: int) -> tuple[int, int]:
        """The samples [start, end) of a shard."""
        start = self.range[0] + shard * self.shard_samples
        return start, min(start + self.shard_samples, self.range[1])

    def tensors(self, shard: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape of every tensor of a shard."""
        start, end = self.shard_range(shard)
        shape = end - start, self.seq_length
        return {
            IDS: (self.id_dtype, (*shape, self.k)),
            LOG_PROBABILITIES: (DTYPES[self.dtype], (*shape, self.k)),
            REST: (torch.float32, shape),
        }

    def to_json(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def identity(self) -> dict[str, Any]:
        """What two attempts at one cache have in common: paths may differ."""
        teacher = {key: value for key, value in self.teacher.items() if key != "path"}
        return self.to_json() | {"teacher": teacher, "stream": self.stream["id"]}

    def described(self) -> dict[str, Any]:
        """The cache in an account's objective (``objective.py``); ``flops`` are shared by all runs that read it."""
        return {
            "hash": sha256_json(self.identity()), "range": list(self.range), "dtype": self.dtype,
            "bytes_per_token": self.bytes_per_token, "bytes": self.tokens * self.bytes_per_token, "flops": self.flops,
        }  # fmt: skip

    def __str__(self) -> str:
        ids = str(self.id_dtype).removeprefix("torch.")
        return (
            f"the top {self.k} of {self.vocabulary} words per token, {ids} and {self.dtype}: {self.bytes_per_token} "
            f"bytes per token, {self.tokens * self.bytes_per_token / 1e6:,.1f} MB for {self.tokens:,} tokens, in "
            f"{self.shards} shard(s) of {self.shard_samples} samples"
        )


def bytes_per_token(k: int, dtype: str, vocabulary: int) -> int:
    """Bytes of a cache per token, without the headers of its shards."""
    return k * ((2 if vocabulary <= 1 << 16 else 4) + DTYPES[dtype].itemsize) + torch.float32.itemsize


def default_shard_samples(k: int, dtype: str, vocabulary: int, seq_length: int) -> int:
    """Samples of a shard of about 64 MiB."""
    return max(1, _SHARD_BYTES // (seq_length * bytes_per_token(k, dtype, vocabulary)))


def tokenizers_of(prefixes: Sequence[str]) -> tuple[str, ...]:
    """Fingerprints of the tokenizers that the corpora were made with, of those that say it."""
    said = [found["tokenizer"] for prefix in prefixes if (found := indexed.sidecar(prefix))]
    return tuple(sorted({one["fingerprint"] for one in said if "fingerprint" in one}))


# -- files ------------------------------------------------------------------------------------------


class _Stream(TypedDict):
    id: str
    seed: int
    seq_length: int
    epochs: int
    blend: list[list[Any]]
    corpora: list[str]


class _Teacher(TypedDict):
    path: str
    fingerprint: str


class ShardFile(TypedDict):
    bytes: int
    sha256: str


class _Manifest(TypedDict):
    version: int
    teacher: _Teacher
    stream: _Stream
    range: list[int]
    vocabulary: int
    tokenizers: list[str]
    k: int
    dtype: str
    shard_samples: int
    flops: int
    shards: list[ShardFile] | None


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def write_manifest(folder: Path, taught: Taught, hashes: Sequence[str] | None = None) -> None:
    """Write the manifest: without ``hashes`` (SHA-256 by shard) that of a cache whose shards are still to come."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = None if hashes is None else [
        {"bytes": shard_path(folder, shard).stat().st_size, "sha256": found} for shard, found in enumerate(hashes)
    ]  # fmt: skip
    sizes = {"bytes_per_token": taught.bytes_per_token, "bytes": taught.tokens * taught.bytes_per_token}
    write_json(folder / MANIFEST, {"version": VERSION, **taught.to_json(), **sizes, "shards": shards})


def read_manifest(folder: Path, flag: str) -> tuple[Taught, list[ShardFile] | None] | None:
    """What a folder's manifest says, and its shards if they are complete; None without a manifest. DataError if it is
    damaged, UsageError for another version."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    held = check(_Manifest, read_json(path), str(path), DataError)
    if held["version"] != VERSION:
        raise UsageError(flag, got=f"{path} of version {show(held['version'])}", expected=f"version {VERSION}")
    fields = {name: held[name] for name in Taught.__dataclass_fields__}  # type: ignore[literal-required]
    taught = Taught(**fields | {name: tuple(fields[name]) for name in ("range", "tokenizers")})
    sound = (
        len(taught.range) == 2
        and 0 <= taught.range[0] < taught.range[1]
        and taught.dtype in DTYPES
        and 1 <= taught.k <= taught.vocabulary < 1 << 31
        and taught.shard_samples >= 1
        and taught.seq_length >= 1
        and all(len(pair) == 2 for pair in taught.stream["blend"])
        and (held["shards"] is None or len(held["shards"]) == taught.shards)
    )
    if not sound:
        raise DataError(f"{path} is damaged: its sizes contradict each other; make the cache in another folder")
    return taught, held["shards"]


def write_shard(folder: Path, taught: Taught, shard: int, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a shard atomically, from tensors by name. Log-probabilities below what float16 holds become its least."""
    least = torch.finfo(DTYPES[taught.dtype]).min
    fit = {**tensors, LOG_PROBABILITIES: tensors[LOG_PROBABILITIES].clamp(min=least)}
    payload = {name: fit[name].to(dtype).cpu().view(shape) for name, (dtype, shape) in taught.tensors(shard).items()}
    write_bytes(shard_path(folder, shard), safetensors.torch.save(payload))


def open_shard(folder: Path, taught: Taught, shard: int) -> dict[str, Any]:
    """The slices of a shard by name, mapped into memory; DataError if the file is damaged or not of this cache."""
    path = shard_path(folder, shard)
    try:
        handle: Any = safetensors.safe_open(path, framework="pt")
        slices = {name: handle.get_slice(name) for name in NAMES}
    except (safetensors.SafetensorError, OSError) as error:
        raise DataError(f"{path} is missing, truncated or damaged: {reason(error)}; {_AGAIN}") from error
    for name, (dtype, shape) in taught.tensors(shard).items():
        found = slices[name][:0].dtype, tuple(slices[name].get_shape())
        if found != (dtype, shape):
            got = f"{found[0]} {list(found[1])}"
            raise DataError(f"{path} is damaged: expected {name} of {dtype} {list(shape)}, got {got}; {_AGAIN}")
    return slices


def is_written(folder: Path, taught: Taught, shard: int) -> bool:
    """True if the shard is there; one that is damaged is not."""
    path = shard_path(folder, shard)
    if path.is_file():
        with contextlib.suppress(DataError):
            open_shard(folder, taught, shard)
            return True
    return False


# -- reading ----------------------------------------------------------------------------------------


class TeacherCache:
    """An open cache, made by ``open_cache``. Shards are mapped into memory when they are first read.

    May be used in the workers of a data loader.
    """

    def __init__(self, folder: Path, taught: Taught):
        self.folder, self.taught = folder, taught
        self._open: OrderedDict[int, dict[str, Any]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": OrderedDict()}

    def read(self, sample: int) -> dict[str, torch.Tensor]:
        """The targets of the stream's ``sample``: ``ids`` int32 [S, k], ``log_probabilities`` [S, k] in the cache's
        type, ``rest`` float32 [S]. DataError for numbers that no teacher has, IndexError outside the range."""
        taught = self.taught
        if not taught.range[0] <= sample < taught.range[1]:
            raise IndexError(f"sample {sample} of a cache of {taught.range[0]}:{taught.range[1]}")
        shard, place = divmod(sample - taught.range[0], taught.shard_samples)
        slices = self._slices(shard)
        found: dict[str, torch.Tensor] = {name: slices[name][place] for name in NAMES}
        found[IDS] = found[IDS].to(torch.int32)  # of an id above 2**31, which no teacher writes, a negative number
        wrong = self._wrong(*(found[name] for name in NAMES))
        if wrong:
            raise DataError(f"{shard_path(self.folder, shard)} is damaged: sample {sample}: {wrong}; {_AGAIN}")
        return found

    def _wrong(self, ids: torch.Tensor, logs: torch.Tensor, rest: torch.Tensor) -> str:
        """What no teacher would say, of one sample, or nothing."""
        taught, logs = self.taught, logs.float()
        least, most = int(ids.min()), int(ids.max())
        if least < 0 or most >= taught.vocabulary:
            return f"expected ids from 0 to {taught.vocabulary - 1}, got {least if least < 0 else most}"
        if (odd := logs[~(logs.isfinite() & (logs <= 0))]).numel():
            return f"expected finite log-probabilities of at most 0, got {float(odd[0])}"
        if (most_mass := float(logs.exp().sum(-1).max())) > 1 + _EXCESS[taught.dtype]:
            return f"expected probabilities whose sum is at most 1, got {most_mass:.6g}"
        none = taught.k == taught.vocabulary
        if (odd := rest[~(rest.isneginf() if none else rest.isfinite() & (rest <= 0))]).numel():
            expected = "-inf, without other words" if none else "a finite number of at most 0"
            return f"expected as logarithm of the rest {expected}, got {float(odd[0])}"
        return ""

    def _slices(self, shard: int) -> dict[str, Any]:
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            self._open[shard] = open_shard(self.folder, self.taught, shard)
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        return self._open[shard]

    def refuse_other_use(
        self, stream: Mapping[str, Any], samples: tuple[int, int], vocabulary: int, prefixes: Sequence[str],
        teacher: str | None = None,
    ) -> None:  # fmt: skip
        """UsageError unless the cache is of this ``stream`` (its entry in an account), holds all its ``samples``, and
        is of the same vocabulary and the tokenizer of the corpora ``prefixes``; and of the ``teacher`` with this
        fingerprint, if it is given."""
        taught, known = self.taught, tokenizers_of(prefixes)
        held = other = ""
        if taught.stream["id"] != stream["id"]:
            held, other = _difference(taught.stream, stream)
        elif samples[0] < taught.range[0] or samples[1] > taught.range[1]:
            held, other = (f"samples {start}:{end}" for start, end in (taught.range, samples))
        elif vocabulary != taught.vocabulary:
            held, other = (f"a vocabulary of {words} words" for words in (taught.vocabulary, vocabulary))
        elif known and taught.tokenizers and known != taught.tokenizers:
            held, other = (f"text by the tokenizer {_short(prints)}" for prints in (taught.tokenizers, known))
        elif teacher is not None and teacher != taught.teacher["fingerprint"]:
            held = f"the teacher {taught.teacher['path']} with the weights {_short([taught.teacher['fingerprint']])}"
            other = f"a teacher with the weights {_short([teacher])}"
        if held:
            raise UsageError(
                FLAG, got=f"{self.folder}, a cache of {held}", expected=f"one of {other}",
                do="make it with megatron-prune teach",
            )  # fmt: skip


def _difference(held: Mapping[str, Any], asked: Mapping[str, Any]) -> tuple[str, str]:
    """What differs between two streams."""
    for flag, key in (("--seq-length", "seq_length"), ("--stream-seed", "seed"), ("--stream-epochs", "epochs")):
        if held[key] != asked[key]:
            return f"{flag} {held[key]}", f"{flag} {asked[key]}"
    theirs, ours = (" ".join(prefix for _, prefix in one["blend"]) for one in (held, asked))
    if held["corpora"] != asked["corpora"]:
        return f"the corpora {theirs}" + " with another content" * (theirs == ours), f"the corpora {ours}"
    theirs, ours = (" ".join(str(weight) for weight, _ in one["blend"]) for one in (held, asked))
    return f"corpora with the weights {theirs}", f"these corpora with the weights {ours}"


def _short(hashes: Sequence[str]) -> str:
    return ", ".join(one[:12] for one in hashes)


def open_cache(path: str | Path, flag: str = FLAG, *, check_shards: bool = True) -> TeacherCache:
    """Open a complete cache. UsageError for a folder that is none, or not complete; DataError for a damaged one, and
    (``check_shards``) for shards that are missing or truncated. Reads no shard."""
    storage.refuse_stored(flag, path, "its shards are mapped into memory")
    folder = Path(path).absolute()
    found = read_manifest(folder, flag)
    if found is None:
        raise UsageError(flag, got=path, expected=f"a folder that teach has written, with a {MANIFEST}")
    taught, shards = found
    if shards is None:
        made = sum(shard_path(folder, shard).is_file() for shard in range(taught.shards))
        raise UsageError(
            flag, got=f"{path}, of which {made} of {taught.shards} shards exist", expected="a complete cache",
            do="run the same teach again, and it continues",
        )  # fmt: skip
    for shard, entry in enumerate(shards if check_shards else ()):
        file = shard_path(folder, shard)
        try:
            status = file.stat()
        except OSError as error:
            raise DataError(f"{file} is missing: {reason(error)}; run the same teach again") from error
        if not stat.S_ISREG(status.st_mode) or status.st_size != entry["bytes"]:
            raise DataError(
                f"{file} is damaged: expected a file of {entry['bytes']:,} bytes, got {status.st_size:,}; {_AGAIN}"
            )
    return TeacherCache(folder, taught)
