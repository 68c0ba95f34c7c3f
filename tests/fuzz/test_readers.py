"""Good files, damaged at random by Hypothesis, to every reader: read, or refused with a message, in limited time and
memory.

    python -m pytest tests/fuzz/test_readers.py --fuzz-minutes 60        an hour per reader

Every reader runs in a process of its own (``limits.Reader``): a hang, a crash and a bomb are failures with an example.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from megatron_prune.artifacts import read_json
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.checkpoint.tracker import find_iteration
from megatron_prune.convert import inspect
from megatron_prune.convert.config import args_from_config
from megatron_prune.convert.huggingface import import_hf
from megatron_prune.data import indexed, multiple_choice, readers
from megatron_prune.data.tokenizers import load_tokenizer
from megatron_prune.masks import open_masks, verify
from megatron_prune.structured import plan, statistics
from megatron_prune.study import schema
from megatron_prune.study.advise import ledgers
from megatron_prune.training import learned_file
from tests.fuzz import good
from tests.fuzz.limits import Reader

TRACKER = "ckpt/latest_checkpointed_iteration.txt"  # what it says is found out without it
EXAMPLES = 25  # of each reader in the default tier


def _checkpoint(folder: Path) -> None:
    found = open_checkpoint(folder / "ckpt")
    found.verify(hashes=False)
    json.dumps(inspect.describe(found, sparsity=True))


def _legacy(folder: Path) -> None:
    json.dumps(inspect.describe(open_checkpoint(folder / "legacy"), sparsity=True))


def _masks(folder: Path) -> None:
    verify(open_masks(folder / "masked/masks"), open_checkpoint(folder / "masked"))


def _import(folder: Path) -> None:
    shutil.rmtree(folder / "made", ignore_errors=True)
    import_hf(folder / "hf", folder / "made")


def _corpus(folder: Path) -> None:
    indexed.check_fits_model(folder / "corpus", 125)
    corpus = indexed.open_indexed(folder / "corpus")
    for number in range(len(corpus)):
        corpus[number]
    indexed.document_tokens(folder / "corpus.idx")
    indexed.fingerprint(folder / "corpus")


def _text(name: str) -> Callable[[Path], None]:
    return lambda folder: [readers.text_of(one) for one in readers.records([folder / name])] and None


def _examples(folder: Path) -> None:
    multiple_choice.read(folder / "task.jsonl")


# The file that is damaged, and the reader that meets it.
READERS: dict[str, Callable[[Path], Any]] = {
    "ckpt/release/.metadata": _checkpoint,
    "ckpt/release/__0_0.distcp": _checkpoint,
    "ckpt/release/metadata.json": _checkpoint,
    "ckpt/release/pruning.json": _checkpoint,
    "ckpt/release/integrity.json": lambda folder: open_checkpoint(folder / "ckpt").verify(hashes=True),
    TRACKER: lambda folder: find_iteration(folder / "ckpt"),
    "legacy/iter_0000003/mp_rank_00/model_optim_rng.pt": _legacy,
    "masked/masks/masks.json": _masks,
    "masked/masks/.metadata": _masks,
    "masked/masks/__0_0.distcp": _masks,
    "hf/config.json": lambda folder: args_from_config(read_json(folder / "hf/config.json")),
    "hf/model.safetensors": _import,
    "hf/masks.safetensors": _import,
    "plan.json": lambda folder: plan.read(folder / "plan.json"),
    "statistics.json": lambda folder: statistics.read(folder / "statistics.safetensors"),
    "statistics.safetensors": lambda folder: statistics.read(folder / "statistics.safetensors"),
    "learned.safetensors": lambda folder: learned_file.read(folder / "learned.safetensors"),
    "learned.json": lambda folder: learned_file.read(folder / "learned.safetensors"),
    "ledger/report/results.json": lambda folder: ledgers.read(folder / "ledger"),
    "study.yaml": lambda folder: schema.load(folder / "study.yaml"),
    "corpus.idx": _corpus,
    "corpus.bin": _corpus,
    "corpus.json": _corpus,
    "text.jsonl": _text("text.jsonl"),
    "text.jsonl.gz": _text("text.jsonl.gz"),
    "text.jsonl.zst": _text("text.jsonl.zst"),
    "text.parquet": _text("text.parquet"),
    "task.jsonl": _examples,
    "tokenizer/tokenizer.json": lambda folder: load_tokenizer("HuggingFaceTokenizer", folder / "tokenizer"),
    "tokenizer/tokenizer_config.json": lambda folder: load_tokenizer("HuggingFaceTokenizer", folder / "tokenizer"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    folder = good.make(tmp_path_factory.mktemp("whole"), tiny_tokenizer)
    (folder / "text.jsonl.zst").write_bytes(readers.zstd.compress((folder / "text.jsonl").read_bytes()))
    texts = [json.loads(line)["text"] for line in (folder / "text.jsonl").read_text().splitlines()]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "text.parquet")
    example = {"query": "What do bees make?", "choices": ["wax", "silk"], "gold": 0}
    (folder / "task.jsonl").write_text(f"{json.dumps(example)}\n" * 3)
    return folder


@pytest.fixture(params=READERS)
def reader(request: pytest.FixtureRequest, whole: Path, tmp_path: Path) -> Iterator[tuple[bytes, Reader]]:
    """The content of a file, and a reader of what replaces it."""
    file: str = request.param
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)

    def read(payload: bytes) -> None:
        (folder / file).write_bytes(payload)
        READERS[file](folder)

    made = Reader(read, file)
    yield (whole / file).read_bytes(), made
    made.close()


NUMBERS = [b"0", b"-1", b"1e999", b"NaN", b"9" * 40, b"null", b"true", b'"x"', b"[]", b"{}", b"\x00" * 8, b"\xff" * 8]


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """``content`` with pieces that are replaced, cut out, doubled, swapped, or cut off."""
    place = st.integers(0, max(0, len(content) - 1))

    @st.composite
    def one(draw: st.DrawFn) -> Callable[[bytearray], None]:
        at, length, kind = draw(place), draw(st.integers(1, 64)), draw(st.integers(0, 5))
        other, piece = draw(place), draw(st.one_of(st.binary(min_size=1, max_size=16), st.sampled_from(NUMBERS)))

        def change(found: bytearray) -> None:
            if kind == 0:
                found[at : at + len(piece)] = piece
            elif kind == 1:
                del found[at : at + length]
            elif kind == 2:
                found[at:at] = found[other : other + length]
            elif kind == 3:
                found[at:at] = piece
            elif kind == 4:
                del found[max(at, 1) :]
            else:
                found[at : at + length] = found[other : other + length]

        return change

    def apply(changes: list[Callable[[bytearray], None]]) -> bytes:
        found = bytearray(content)
        for change in changes:
            change(found)
        return bytes(found)

    return st.lists(one(), min_size=1, max_size=4).map(apply)


def test_no_damage_is_more_than_a_refusal(reader: tuple[bytes, Reader], request: pytest.FixtureRequest) -> None:
    content, made = reader
    assert made.read(content), "the file itself must be accepted"
    minutes = request.config.getoption("--fuzz-minutes")
    ends, refused = time.monotonic() + 60 * minutes, []

    @settings(
        max_examples=EXAMPLES if not minutes else 1000, derandomize=not minutes, deadline=None, database=None,
        phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(payload=damaged(content))
    def meet(payload: bytes) -> None:
        refused.append(not made.read(payload))

    meet()
    while time.monotonic() < ends:
        meet()
    assert any(refused) or made.file == TRACKER, "damage that nobody notices tests nothing"


def test_the_harness_finds_what_it_is_for() -> None:
    """A hang, a bomb, a crash and another exception are failures."""
    import os
    import signal

    def bomb(payload: bytes) -> None:
        bytearray(16 << 30)

    def hang(payload: bytes) -> None:
        while True:
            pass

    def crash(payload: bytes) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    for function, says in ((bomb, "MemoryError"), (crash, "ended by -11"), (hang, "ended by -26"), (len, "")):
        with contextlib.closing(Reader(function)) as made:
            if function is len:
                assert made.read(b"x")
                continue
            with pytest.raises(AssertionError, match=says):
                made.read(b"x")
