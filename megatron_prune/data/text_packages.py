"""English text of Debian and PyPI packages that are named, not installed: ``build-corpus --debian … --pypi …``.

``fetch`` downloads them with the registries' own clients (``apt-get download``, ``pip download``) into a folder; a
package that is there is not fetched again. ``texts_of`` reads documents from an archive without unpacking it. Nothing
is installed, and no code of a Debian package or a wheel is run (pip asks an sdist for its metadata). Every package is a
kind of its own, so that ``local_text.gather`` takes them evenly. A corpus's ``packages.json`` lists name, version, file
and licences.
"""

from __future__ import annotations

import email
import gzip
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from megatron_prune import artifacts
from megatron_prune.data import local_text
from megatron_prune.data.local_text import FoundText
from megatron_prune.errors import DataError, UsageError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9+._-]*")
LONGEST = 1_000_000  # characters; a longer text (a dictionary in one file) is cut, so that several splits can have it
PART = 50_000
FURNITURE = 10, 0.05  # texts of a package, and their share, that have a paragraph: then it is none of their own
# Translations, and second copies of the same text (sources of Sphinx and of rustdoc).
UNWANTED = re.compile(
    r"/(?:translations|locale|_sources|_modules|_static|_downloads|src|tests?|licen[cs]es)/"
    r"|[./_-](?:de|fr|es|it|ja|ko|ru|nl|pt|pt[-_]br|zh|zh[-_](?:cn|tw|hk)|tr|cs|ca|hu|pl|da|sv|el|id|uk|vi)(?:\.[a-z0-9-]+)?"
    r"(?:\.html?|/)",
    re.IGNORECASE,
)
POD_CODE = re.compile(r"[A-Z]<([^<>]*)>|[A-Z]<<+ (.*?) >>+")

Convert = Callable[[str], str]
Read = Callable[[], bytes]


@dataclass(frozen=True)
class TextPackage:
    """A downloaded archive: its registry, name, version and licences as it declares them."""

    registry: Literal["debian", "pypi"]
    name: str
    version: str
    file: Path
    licences: tuple[str, ...]

    @property
    def kind(self) -> str:
        return f"{self.registry}/{self.name}"

    def to_json(self) -> dict[str, Any]:
        return {"registry": self.registry, "name": self.name, "version": self.version, "file": self.file.name,
                "sha256": artifacts.sha256_file(self.file), "licences": list(self.licences)}  # fmt: skip


def fetch(folder: Path, debian: Sequence[str] = (), pypi: Sequence[str] = ()) -> list[TextPackage]:
    """The named packages, in this order, downloaded into ``folder`` unless they are there.

    Raises UsageError for a name that is none, and DataError where a registry's client fails.
    """
    for flag, names in (("--debian", debian), ("--pypi", pypi)):
        for name in names:
            if not NAME.fullmatch(name) or list(names).count(name) > 1:
                raise UsageError(flag, got=repr(name), expected="names of packages, each once")
    folder.mkdir(parents=True, exist_ok=True)
    if missing := [name for name in debian if _debian_file(folder, name) is None]:
        if shutil.which("apt-get") is None:
            raise UsageError("--debian", got=", ".join(missing), expected="a machine with apt-get")
        _client(["apt-get", "download", "-q", *missing], folder, "apt-get update")
    for name in pypi:
        if _pypi_file(folder, name) is None:
            argv = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            _client([*argv, "--dest", ".", name], folder, "pip index versions " + name)
    return [_debian_package(folder, name) for name in debian] + [_pypi_package(folder, name) for name in pypi]


def _client(argv: Sequence[str], folder: Path, remedy: str) -> None:
    ended = subprocess.run(argv, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if ended.returncode:
        raise DataError(f"{' '.join(argv)} exited with code {ended.returncode}:\n{ended.stderr.strip()[-2000:]}\n"
                        f"If the names are right, try `{remedy}`, or leave these packages out")  # fmt: skip


def _debian_file(folder: Path, name: str) -> Path | None:
    return max(folder.glob(f"{name}_*.deb"), default=None)


def _pypi_file(folder: Path, name: str) -> Path | None:
    def same(path: Path) -> bool:
        return _normal(re.split(r"-\d", path.name)[0]) == _normal(name)

    return max((path for ending in ("*.whl", "*.tar.gz") for path in folder.glob(ending) if same(path)), default=None)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _debian_package(folder: Path, name: str) -> TextPackage:
    path = _debian_file(folder, name)
    if path is None:
        raise DataError(f"{folder}: expected {name}_VERSION_….deb, got none")
    found: list[str] = []
    for member, read in _members(path):
        if member == f"usr/share/doc/{name}/copyright":
            text = _decoded(read())
            # Older copyright files are prose that points to the text of the licence.
            found = re.findall(r"(?m)^License: *(\S.*?) *$", text)
            found = found or re.findall(r"/usr/share/common-licenses/([A-Za-z0-9.-]*[A-Za-z0-9])", text)
            break
    version = path.name.split("_")[1].replace("%3a", ":")
    return TextPackage("debian", name, version, path, tuple(dict.fromkeys(found)) or ("see its copyright file",))


def _pypi_package(folder: Path, name: str) -> TextPackage:
    path = _pypi_file(folder, name)
    if path is None:
        raise DataError(f"{folder}: expected a wheel or an sdist of {name}, got none")
    about = next((_decoded(read()) for member, read in _members(path)
                  if re.fullmatch(r"[^/]*\.dist-info/METADATA|[^/]*/PKG-INFO", member)), "")  # fmt: skip
    message = email.message_from_string(about)
    said = [message.get("License-Expression"), *(c.split(" :: ")[-1] for c in message.get_all("Classifier", [])
                                                 if c.startswith("License ::"))]  # fmt: skip
    said.append((message.get("License") or "").split("\n")[0][:80] if not any(said) else None)
    licences = tuple(dict.fromkeys(one for one in said if one))
    return TextPackage("pypi", name, message.get("Version", ""), path, licences or ("see its METADATA",))


def texts_of(package: TextPackage) -> list[FoundText]:
    """The documents of a package, in the order of the hashes of their names, so that any part is a sample.

    Manuals come in several formats of equal text: only the format with the most text is taken.
    """
    formats: dict[str, dict[str, str]] = {}
    for name, read in _members(package.file):
        if (found := _format(name)) is not None:
            form, convert = found
            if text := convert(_decoded(read())):
                formats.setdefault(form, {})[name] = text
    if not formats:
        raise DataError(f"{package.file}: expected documents, got none: leave {package.name} out")
    texts = without_furniture(max(formats.values(), key=lambda found: sum(map(len, found.values()))))
    return [
        FoundText(package.kind, name if not number else f"{name}#{number}", part)
        for name in sorted(texts, key=local_text.shuffled)
        for number, part in enumerate(parts(texts[name]))
    ]


def without_furniture(texts: Mapping[str, str]) -> dict[str, str]:
    """The texts without the lines that many pages of a manual share: menus, links to the next page, "Light mode".

    A paragraph goes if a twentieth of the texts, and ten at least, have it. Texts of which nothing is left go too.
    """
    paragraphs = {name: re.split(r"\n\s*\n", text) for name, text in texts.items()}
    keys = {name: [" ".join(one.split()) for one in found] for name, found in paragraphs.items()}
    pages = Counter(key for found in keys.values() for key in set(found))
    most = max(FURNITURE[0], FURNITURE[1] * len(texts))
    kept = {
        name: "\n\n".join(one for one, key in zip(found, keys[name], strict=True) if pages[key] < most)
        for name, found in paragraphs.items()
    }
    return {name: text for name, text in kept.items() if text.strip()}


def parts(text: str) -> Iterator[str]:
    """A text; one longer than ``LONGEST`` in parts of about ``PART`` characters, cut where a paragraph ends."""
    if len(text) <= LONGEST:
        yield text
        return
    while len(text) > 2 * PART:
        ends = (text.rfind(mark, PART // 2, PART) for mark in ("\n\n", "\n", " "))
        end = next((end for end in ends if end > 0), PART)
        yield text[:end]
        text = text[end:]
    yield text


def _format(name: str) -> tuple[str, Convert] | None:
    """The format of a member of an archive and how it becomes plain text; None for what is no document."""
    if UNWANTED.search(name):
        return None
    bare = name.removesuffix(".gz")
    if bare.endswith(".py"):
        return "docstrings", local_text.docstrings_in
    if bare.endswith(".pod"):
        return "pod", strip_pod
    if re.search(r"/man/man[1-9]/[^/]+$", name):
        return "manual", local_text.strip_roff
    if re.search(r"/dictd/[^/]+\.dict\.dz$|/games/fortunes/[^./]+$", name):
        return "plain", str
    if not local_text.is_document(name):
        return None
    return ("html", local_text.strip_html) if bare.endswith((".html", ".htm")) else ("plain", str)


def strip_pod(text: str) -> str:
    """Text of Perl's documentation format: commands go, their words stay, and so do the words in codes (``C<...>``)."""
    text = re.sub(r"(?m)^=(?:pod|cut|over|back|begin|end|for|encoding)\b.*$", "", text)
    text = re.sub(r"(?m)^=[a-z]+\d? *", "", text)
    for _ in range(3):  # codes within codes
        text = POD_CODE.sub(lambda found: (found[1] or found[2] or "").split("|")[0], text)
    return text


def _decoded(payload: bytes) -> str:
    try:
        payload = gzip.decompress(payload) if payload[:2] == b"\x1f\x8b" else payload
        return payload.decode()
    except UnicodeDecodeError:
        return payload.decode("latin-1")
    except (OSError, EOFError, zlib.error):
        return ""


def _members(path: Path) -> Iterator[tuple[str, Read]]:
    """Names of an archive's files, each with a function that reads it before the next is asked for."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            for name in wheel.namelist():
                yield name, partial(wheel.read, name)
    elif path.suffix == ".deb":
        argv = ["dpkg-deb", "--fsys-tarfile", str(path)]
        # Whoever stops reading early breaks its pipe, which it would report.
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            try:
                yield from _members_of_tar(tarfile.open(fileobj=process.stdout, mode="r|"))
            except tarfile.TarError as error:
                raise DataError(f"{path}: expected a Debian package: remove it, so that it is fetched again") from error
    else:
        yield from _members_of_tar(tarfile.open(path, mode="r|gz"))


def _members_of_tar(archive: tarfile.TarFile) -> Iterator[tuple[str, Read]]:
    with archive:
        for member in archive:
            if member.isfile():  # a link is an alias
                yield member.name.removeprefix("./"), partial(_read_member, archive, member)


def _read_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    return file.read() if file is not None else b""
