"""A corpus of English text from this machine, for the examples: four JSONL files and a manifest.

``gather`` finds text; packages that are named (``text_packages``) add theirs. It is cleaned (each paragraph is kept
once in the whole corpus, so that splits do not overlap), filtered (long enough, English) and split by document: in the
order of their hashes, the first 94% of the bytes are train, then calibration, validation and test. Two runs on a
machine give the same bytes. The licenses of the packages apply to their text, so do not put it in a repository.
"""

from __future__ import annotations

import ast
import email
import gzip
import hashlib
import heapq
import html
import json
import multiprocessing
import os
import re
import sysconfig
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import Any

from megatron_prune import artifacts, screen
from megatron_prune.errors import DataError, UsageError

SPLITS = ("train", "calibration", "validation", "test")
SHARES = (94, 2, 2, 2)
SHORTEST = 200  # characters in a document
SHORT_PARAGRAPH = 40  # letters and digits; shorter paragraphs ("Parameters", "Examples:") may repeat
LEAST_ASCII = 0.97
LEAST_STOPWORDS = 0.05  # fraction of words; about 0.4 in English prose, almost 0 in tables and code
STOPWORDS = frozenset("the of to and a in is it for be as on this that with are by or an if not from".split())
CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ufeff]")


def build_corpus(
    output: str | Path,
    *,
    max_bytes: int | None = 16_000_000,
    shares: Sequence[float] = SHARES,
    longest_held_out: int | None = None,
    workers: int = 1,
    places: TextPlaces | None = None,
    more: Sequence[Iterable[FoundText]] = (),
    packages: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Write ``output``/{train,calibration,validation,test}.jsonl and manifest.json; returns the manifest.

    Gathering ends at ``max_bytes`` of text (UTF-8). ``shares`` are the splits' shares of the bytes, met up to the
    document on each border. Documents of calibration, validation and test are cut to ``longest_held_out`` characters;
    the rest is in no split. For resampling, many short documents are better than few long ones. An existing ``output``
    is replaced. ``more`` are further kinds of text, and ``packages`` says where they are from (``packages.json``).
    Raises UsageError, and DataError if a split would be empty.
    """
    if len(shares) != len(SPLITS) or min(shares) <= 0:
        given = ",".join(map(str, shares))
        raise UsageError("--split", got=given, expected="four positive shares, such as 94,2,2,2")
    if max_bytes is not None and max_bytes < 1:
        raise UsageError("--max-bytes", got=max_bytes, expected="a positive number of bytes")
    if longest_held_out is not None and longest_held_out < SHORTEST:
        raise UsageError("--longest-held-out", got=longest_held_out, expected=f"at least {SHORTEST} characters")
    begun = monotonic()
    rejected: Counter[str] = Counter()
    kinds: dict[str, Counter[str]] = {}
    documents: list[tuple[bytes, FoundText]] = []
    total = 0
    with screen.Bar(max_bytes, "gathering text", "B") as bar:
        for document in clean(gather(places or TextPlaces(), workers, more), rejected):
            payload = document.text.encode()
            size = len(payload)
            documents.append((hashlib.sha256(payload).digest(), document))
            kinds.setdefault(document.kind, Counter()).update(documents=1, bytes=size)
            total += size
            bar.reach(total)
            if max_bytes is not None and total >= max_bytes:
                break
    splits = _split(documents, total, shares, longest_held_out)
    if empty := [name for name, found in splits.items() if not found]:
        raise DataError(
            f"only {total} bytes of text were found and {', '.join(empty)} got none: "
            "install packages with documentation, or raise --max-bytes"
        )
    manifest: dict[str, Any] = {"version": 1, "max_bytes": max_bytes, "shares": list(shares),
                                "longest_held_out": longest_held_out, "bytes": total,
                                "splits": {}, "kinds": kinds, "rejected": dict(rejected)}  # fmt: skip
    with artifacts.atomic_directory(output, replace=True) as scratch:
        for name, chosen in splits.items():
            with open(scratch / f"{name}.jsonl", "w", encoding="utf-8") as handle:
                for found in chosen:
                    line = {"text": found.text, "source": f"{found.kind}/{found.name}"}
                    handle.write(json.dumps(line, ensure_ascii=False) + "\n")
            manifest["splits"][name] = {
                "documents": len(chosen),
                "bytes": sum(len(found.text.encode()) for found in chosen),
                "sha256": artifacts.sha256_file(scratch / f"{name}.jsonl"),
            }
        artifacts.write_json(scratch / "manifest.json", manifest)
        if packages:
            artifacts.write_json(scratch / "packages.json", list(packages))
    return manifest | {"seconds": monotonic() - begun}


def _split(
    documents: Sequence[tuple[bytes, FoundText]], total: int, shares: Sequence[float], longest: int | None
) -> dict[str, list[FoundText]]:
    """Split the documents, in the order of their hashes, by shares of the bytes, with test at the end.

    Each split keeps this order, so that its first windows are a mixture of kinds. A held-out document whose beginning
    is that of another is left out: it would be in two splits.
    """
    begun: set[str] = set()
    rest = [found for _, found in sorted(documents, key=lambda document: document[0])]
    splits: dict[str, list[FoundText]] = {}
    seen, border = 0, 0.0
    for name, share in reversed(list(zip(SPLITS, shares, strict=True))[1:]):
        border += total * share / sum(shares)
        chosen: list[FoundText] = []
        while rest:
            held = replace(rest[-1], text=beginning(rest[-1].text, longest))
            size = len(held.text.encode())
            if seen + size / 2 >= border:
                break
            rest.pop()
            if held.text not in begun:
                begun.add(held.text)
                chosen.append(held)
                seen += size
        splits[name] = chosen[::-1]
    return {SPLITS[0]: rest} | {name: splits[name] for name in SPLITS[1:]}


def beginning(text: str, longest: int | None) -> str:
    """A text's first paragraphs, at most ``longest`` characters; or the first words if that paragraph is longer."""
    if longest is None or len(text) <= longest:
        return text
    ends = (text.rfind(mark, SHORTEST, longest + 1) for mark in ("\n\n", " "))
    return text[: next((end for end in ends if end > 0), longest)]


def clean(found: Iterable[FoundText], rejected: Counter[str]) -> Iterator[FoundText]:
    """The documents to keep, without repeated paragraphs; ``rejected`` counts the others by reason."""
    seen: set[bytes] = set()
    for document in found:
        text = deduplicate(document.text, seen)
        reason = why_not(text)
        if reason:
            rejected[reason] += 1
        else:
            yield FoundText(document.kind, document.name, text)


def deduplicate(text: str, seen: set[bytes]) -> str:
    """The paragraphs of a text that are not in ``seen``, compared by letters and digits; adds them to ``seen``."""
    kept = []
    text = CONTROLS.sub("", text.replace("\r\n", "\n").expandtabs(4))
    for paragraph in re.split(r"\n\s*\n", text):
        letters = re.sub(r"[\W_]+", "", paragraph.lower())
        if len(letters) >= SHORT_PARAGRAPH:
            key = hashlib.blake2b(letters.encode(), digest_size=12).digest()
            if key in seen:
                continue
            seen.add(key)
        if paragraph := "\n".join(line.rstrip() for line in paragraph.strip("\n").split("\n")):
            kept.append(paragraph)
    return "\n\n".join(kept)


def why_not(text: str) -> str | None:
    """The reason to reject a text, or None."""
    if len(text) < SHORTEST:
        return "short"
    if len(text.encode("ascii", "ignore")) < LEAST_ASCII * len(text):
        return "not ASCII"
    words = re.findall(r"[a-z]+", text.lower())
    if sum(word in STOPWORDS for word in words) < LEAST_STOPWORDS * max(len(words), SHORTEST // 8):
        return "not English"
    return None


# Sources of English text on this machine. Nothing is imported or run.
#
# The kinds are Python's manual (``pydoc_data``), Debian's documentation and manual pages if installed, the
# descriptions and documents of installed distributions, and the docstrings of the standard library and of
# installed packages (by far the most). They are taken evenly, by length, until each is exhausted. Each kind has
# a fixed order (the larger ones by hash of the name), so that any part of the text is a reproducible sample.


def _paths(*names: str) -> tuple[Path, ...]:
    found = {Path(sysconfig.get_paths()[name]) for name in names}
    return tuple(sorted(path for path in found if path.is_dir()))


@dataclass(frozen=True)
class TextPlaces:
    """The directories to look in."""

    stdlib: tuple[Path, ...] = field(default_factory=lambda: _paths("stdlib"))
    packages: tuple[Path, ...] = field(default_factory=lambda: _paths("purelib", "platlib"))
    documentation: tuple[Path, ...] = (Path("/usr/share/doc"),)
    manuals: tuple[Path, ...] = (Path("/usr/share/man"),)


@dataclass(frozen=True)
class FoundText:
    """A text with its kind and its relative path (machine-independent)."""

    kind: str
    name: str
    text: str


def gather(places: TextPlaces, workers: int = 1, more: Sequence[Iterable[FoundText]] = ()) -> Iterator[FoundText]:
    """Every text of every kind, and of those in ``more``; ``workers`` processes parse Python files. The order does not
    depend on ``workers``."""
    kinds = [topics(places), documentation(places), manuals(places), descriptions(places), *map(iter, more)]
    # Parsing comes last, so that no processes start for a reader that stops early.
    waiting = [(0, number, kind) for number, kind in enumerate([*kinds, docstrings(places, workers)])]
    while waiting:
        taken, number, kind = heapq.heappop(waiting)
        if (found := next(kind, None)) is not None:
            yield found
            heapq.heappush(waiting, (taken + len(found.text), number, kind))


def topics(places: TextPlaces) -> Iterator[FoundText]:
    """The language reference that ``help()`` uses: the dictionary in ``pydoc_data/topics.py``."""
    for folder in places.stdlib:
        source = _read(folder / "pydoc_data" / "topics.py")
        for statement in ast.parse(source).body:
            if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
                for name, text in ast.literal_eval(statement.value).items():
                    yield FoundText("topics", name, text)


NOT_TEXT = re.compile(
    r"(?i)changelog|copyright|licen[cs]e|copying|notice|authors|thanks|contributors|sources\.txt|"
    r"top_level|entry_points|requirements|record|cmakelists|installer|api_tests|vendor\.txt"
)
TEXT_SUFFIXES = (".txt", ".rst", ".md", ".html", ".htm")


def is_document(path: str) -> bool:
    """Whether a file is documentation by its name, and no notice, changelog or list."""
    name = path.rpartition("/")[2].removesuffix(".gz").lower()
    return (name.endswith(TEXT_SUFFIXES) or name.startswith("readme")) and not NOT_TEXT.search(name)


def documentation(places: TextPlaces) -> Iterator[FoundText]:
    """Debian's ``/usr/share/doc`` without changelogs and copyright notices."""
    for folder in places.documentation:
        for name in filter(is_document, _files(folder)):
            text = _read(folder / name)
            if name.removesuffix(".gz").endswith((".html", ".htm")):
                text = strip_html(text)
            yield FoundText("documentation", name, text)


def manuals(places: TextPlaces) -> Iterator[FoundText]:
    """English manual pages."""
    for folder in places.manuals:
        for name in sorted(_files(folder), key=shuffled):
            if re.match("man[1-9]/", name) and not (folder / name).is_symlink():  # a link is an alias
                yield FoundText("manuals", name, strip_roff(_read(folder / name)))


def descriptions(places: TextPlaces) -> Iterator[FoundText]:
    """Long descriptions of installed distributions (the body of METADATA), and documents next to code.

    This package's own description is left out, so that the corpus does not change with the README.
    """
    for folder in places.packages:
        for path in sorted(folder.glob("*.dist-info/METADATA")):
            if path.parent.name.startswith("megatron_prune-"):
                continue
            message = email.message_from_string(_read(path))
            text = message.get_payload() if not message.is_multipart() else ""
            yield FoundText("descriptions", str(path.relative_to(folder)), str(text))
        for name in filter(is_document, _files(folder)):
            if not {"tests", "licenses"} & set(name.split("/")):
                yield FoundText("descriptions", name, _read(folder / name))


def docstrings(places: TextPlaces, workers: int = 1) -> Iterator[FoundText]:
    """One text per Python file: its docstrings in order. Files with little documentation are skipped."""
    found: dict[str, Path] = {}
    for folder in (*places.stdlib, *places.packages):
        unwanted = {"test", "tests", "testing"}
        if folder in places.stdlib:
            unwanted |= {"site-packages", "dist-packages"}
        for name in _files(folder):
            if name.endswith(".py") and not unwanted & set(name.split("/")):
                found.setdefault(name, folder / name)
    names = sorted(found, key=shuffled)
    paths = [found[name] for name in names]
    workers = artifacts.bound_workers("--workers", workers)
    if workers == 1:
        yield from (FoundText("docstrings", *pair) for pair in zip(names, map(docstrings_of, paths), strict=True))
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), artifacts.end_with_parent, (os.getpid(),))
    try:
        texts = pool.map(docstrings_of, paths, chunksize=32)
        yield from (FoundText("docstrings", *pair) for pair in zip(names, texts, strict=True))
    finally:
        pool.shutdown(cancel_futures=True)


TRIPLE = re.compile(rb'"""(.*?)"""', re.DOTALL)
LEAST_BYTES, LEAST_SHARE = 1500, 0.15  # least documentation that is worth the cost of parsing


def docstrings_of(path: Path) -> str:
    """All docstrings of a Python file, joined by blank lines; "" if there are few or the file cannot be parsed."""
    try:
        source = path.read_bytes()
    except OSError:
        return ""
    return docstrings_in(source)


def docstrings_in(source: bytes | str) -> str:
    """The same of a file's content."""
    source = source.encode() if isinstance(source, str) else source
    documented = sum(map(len, TRIPLE.findall(source)))
    if documented < max(LEAST_BYTES, LEAST_SHARE * len(source)):
        return ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    return "\n\n".join(_docstrings(tree))


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    if text := ast.get_docstring(node):
        yield text
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _docstrings(child)


def strip_html(text: str) -> str:
    """Text of an HTML page: block elements become paragraphs; indentation of preformatted text is lost."""
    text = re.sub(r"(?is)<(script|style|head)\b.*?</\1>|<!--.*?-->", "", text)
    blocks = "p|div|h[1-6]|li|tr|table|ul|ol|d[ltd]|pre|blockquote|[bh]r"
    text = re.sub(rf"(?i)</?({blocks})\b[^>]*>", "\n\n", text)
    return html.unescape(re.sub(r"<[^>]+>", "", text))


ROFF_ESCAPES = {
    r"\-": "-", r"\(em": "--", r"\(aq": "'", r"\(dq": '"', r"\(lq": '"', r"\(rq": '"', r"\(bu": "*",
    r"\(co": "(c)", r"\ ": " ", r"\~": " ", r"\e": "\\",
}  # fmt: skip


def strip_roff(text: str) -> str:
    """Text of a manual page: requests are removed (prose arguments stay), escapes are resolved."""
    lines = []
    for line in text.splitlines():
        if request := re.match(r"[.']\s*([A-Za-z]*)\s*(.*)", line):
            name, words = request.groups()
            if name in ("SH", "SS", "Sh", "Ss"):
                lines += ["", words.strip('"'), ""]
            elif name in ("PP", "P", "LP", "TP", "IP", "sp", "Pp", "It"):
                lines.append("")
            elif name in ("B", "I", "BR", "RB", "IR", "RI", "BI", "IB", "SM", "Nm", "Nd", "Ar", "Fl"):
                lines.append(words.replace('"', ""))
        else:
            lines.append(line)
    joined = re.sub(r"\\f(\[\w*\]|\(\w\w|.)|\\[&/,|^]|\\s[-+]?\d|\\\".*", "", "\n".join(lines))
    for escape, meant in ROFF_ESCAPES.items():
        joined = joined.replace(escape, meant)
    return joined


def _files(folder: Path) -> Iterator[str]:
    """File names below a folder, relative to it, in a fixed order; strings because there are about 100,000."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(set(folders) - {"__pycache__"})
        below = os.path.relpath(place, folder)
        yield from sorted(names) if below == "." else (f"{below}/{name}" for name in sorted(names))


def shuffled(name: str) -> bytes:
    """A key to sort names in an order that has nothing to do with their meaning."""
    return hashlib.sha256(name.encode()).digest()


def _read(path: Path) -> str:
    """A file's text, unzipped; "" if it is missing, not a regular file, unreadable or not UTF-8."""
    try:
        payload = path.read_bytes() if path.is_file() else b""
        return (gzip.decompress(payload) if payload[:2] == b"\x1f\x8b" else payload).decode()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error):
        return ""
