"""English text that is on this machine: where it lies, and how to get at it. Nothing is imported or run.

Kinds: Python's own manual (``pydoc_data``), Debian's documentation and manual pages where there are
any, the long descriptions and documents of installed distributions, and the docstrings of the
standard library and of installed packages, which are by far the most. They are taken evenly, by
bytes, until each is used up. Every kind has a fixed order, the larger ones by a hash of their names:
a machine gives the same text every time, and a part of it is a sample of the whole.
"""

from __future__ import annotations

import ast
import email
import gzip
import hashlib
import heapq
import html
import multiprocessing
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path


def _paths(*names: str) -> tuple[Path, ...]:
    found = {Path(sysconfig.get_paths()[name]) for name in names}
    return tuple(sorted(path for path in found if path.is_dir()))


@dataclass(frozen=True)
class Places:
    """The directories to look in."""

    stdlib: tuple[Path, ...] = field(default_factory=lambda: _paths("stdlib"))
    packages: tuple[Path, ...] = field(default_factory=lambda: _paths("purelib", "platlib"))
    documentation: tuple[Path, ...] = (Path("/usr/share/doc"),)
    manuals: tuple[Path, ...] = (Path("/usr/share/man"),)


@dataclass(frozen=True)
class Found:
    """A text with its kind and its place (relative, so that it does not say where the machine keeps it)."""

    kind: str
    name: str
    text: str


def gather(places: Places, workers: int = 1) -> Iterator[Found]:
    """Every text of every kind; ``workers`` processes parse Python. The order does not depend on them."""
    kinds = [topics(places), documentation(places), manuals(places), descriptions(places)]
    # Parsing comes last, so that processes are not started for a reader that stops at once.
    waiting = [(0, number, kind) for number, kind in enumerate([*kinds, docstrings(places, workers)])]
    while waiting:
        taken, number, kind = heapq.heappop(waiting)
        if (found := next(kind, None)) is not None:
            yield found
            heapq.heappush(waiting, (taken + len(found.text), number, kind))


def topics(places: Places) -> Iterator[Found]:
    """The language reference as ``help()`` has it: the dictionary in ``pydoc_data/topics.py``."""
    for folder in places.stdlib:
        source = _read(folder / "pydoc_data" / "topics.py")
        for statement in ast.parse(source).body:
            if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
                for name, text in ast.literal_eval(statement.value).items():
                    yield Found("topics", name, text)


NOT_TEXT = re.compile(
    r"(?i)changelog|copyright|licen[cs]e|copying|notice|authors|thanks|contributors|sources\.txt|"
    r"top_level|entry_points|requirements|record|cmakelists|installer|api_tests|vendor\.txt"
)
TEXT_SUFFIXES = (".txt", ".rst", ".md", ".html", ".htm")


def _is_document(path: str) -> bool:
    name = path.rpartition("/")[2].removesuffix(".gz").lower()
    return (name.endswith(TEXT_SUFFIXES) or name.startswith("readme")) and not NOT_TEXT.search(name)


def documentation(places: Places) -> Iterator[Found]:
    """Debian's ``/usr/share/doc`` without changelogs and copyright notices."""
    for folder in places.documentation:
        for name in filter(_is_document, _files(folder)):
            text = _read(folder / name)
            if name.removesuffix(".gz").endswith((".html", ".htm")):
                text = strip_html(text)
            yield Found("documentation", name, text)


def manuals(places: Places) -> Iterator[Found]:
    """English manual pages."""
    for folder in places.manuals:
        for name in sorted(_files(folder), key=_shuffled):
            if re.match("man[1-9]/", name) and not (folder / name).is_symlink():  # a link is an alias
                yield Found("manuals", name, strip_roff(_read(folder / name)))


def descriptions(places: Places) -> Iterator[Found]:
    """Long descriptions of installed distributions (the body of METADATA), and documents beside code.

    This package's own is left out: a corpus shall not change with our README.
    """
    for folder in places.packages:
        for path in sorted(folder.glob("*.dist-info/METADATA")):
            if path.parent.name.startswith("megatron_prune-"):
                continue
            message = email.message_from_string(_read(path))
            text = message.get_payload() if not message.is_multipart() else ""
            yield Found("descriptions", str(path.relative_to(folder)), str(text))
        for name in filter(_is_document, _files(folder)):
            if not {"tests", "licenses"} & set(name.split("/")):
                yield Found("descriptions", name, _read(folder / name))


def docstrings(places: Places, workers: int = 1) -> Iterator[Found]:
    """One text a Python file: its docstrings in order. Files with little documentation are passed over."""
    found: dict[str, Path] = {}
    for folder in (*places.stdlib, *places.packages):
        unwanted = {"test", "tests", "testing"}
        if folder in places.stdlib:
            unwanted |= {"site-packages", "dist-packages"}
        for name in _files(folder):
            if name.endswith(".py") and not unwanted & set(name.split("/")):
                found.setdefault(name, folder / name)
    names = sorted(found, key=_shuffled)
    paths = [found[name] for name in names]
    if workers == 1:
        yield from (Found("docstrings", *pair) for pair in zip(names, map(docstrings_of, paths), strict=True))
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"))
    try:
        texts = pool.map(docstrings_of, paths, chunksize=32)
        yield from (Found("docstrings", *pair) for pair in zip(names, texts, strict=True))
    finally:
        pool.shutdown(cancel_futures=True)


TRIPLE = re.compile(rb'"""(.*?)"""', re.DOTALL)
LEAST_BYTES, LEAST_SHARE = 1500, 0.15  # parsing is what costs: leave files where it brings little


def docstrings_of(path: Path) -> str:
    """All docstrings of a Python file, joined by blank lines; "" when not worth it or not parsable."""
    try:
        source = path.read_bytes()
    except OSError:
        return ""
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
    """Text of an HTML page: block elements become paragraphs, preformatted indentation is lost."""
    text = re.sub(r"(?is)<(script|style|head)\b.*?</\1>|<!--.*?-->", "", text)
    blocks = "p|div|h[1-6]|li|tr|table|ul|ol|d[ltd]|pre|blockquote|[bh]r"
    text = re.sub(rf"(?i)</?({blocks})\b[^>]*>", "\n\n", text)
    return html.unescape(re.sub(r"<[^>]+>", "", text))


ROFF_ESCAPES = {
    r"\-": "-", r"\(em": "--", r"\(aq": "'", r"\(dq": '"', r"\(lq": '"', r"\(rq": '"', r"\(bu": "*",
    r"\(co": "(c)", r"\ ": " ", r"\~": " ", r"\e": "\\",
}  # fmt: skip


def strip_roff(text: str) -> str:
    """Text of a manual page: requests go (their words stay where they are prose), escapes are resolved."""
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
    """Names below a folder, relative to it, in a fixed order; strings, since there are a hundred thousand."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(set(folders) - {"__pycache__"})
        below = os.path.relpath(place, folder)
        yield from sorted(names) if below == "." else (f"{below}/{name}" for name in sorted(names))


def _shuffled(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _read(path: Path) -> str:
    """A file's text, unzipped; "" when it is absent, no plain file, unreadable or not UTF-8."""
    try:
        payload = path.read_bytes() if path.is_file() else b""
        return (gzip.decompress(payload) if payload[:2] == b"\x1f\x8b" else payload).decode()
    except (OSError, EOFError, UnicodeDecodeError):
        return ""
