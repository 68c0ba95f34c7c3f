"""Text of packages that are named: which documents, under which licences; nothing is installed or run."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from megatron_prune.cli.data_commands import build_corpus_main
from megatron_prune.data import local_text, text_packages
from megatron_prune.errors import DataError, UsageError

PROSE = "It is the purpose of this text to be long enough, and to read as if a person had written it for others. "
PARAGRAPHS = {word: "\n\n".join(f"{word} number {i}: {PROSE * 3}" for i in range(6)) for word in
              ("Html", "Source", "German", "Notice", "Pod", "Docstring", "Readme", "Other")}  # fmt: skip
COPYRIGHT = (
    "Format: x\n\nFiles: *\nLicense: GFDL-1.3+\n Text of it.\n\nFiles: b\nLicense: GPL-2+ \n\nLicense: GFDL-1.3+\n"
)


@pytest.fixture
def downloads(tmp_path) -> Path:
    """What the registries' clients would have fetched: a Debian package, a wheel and an sdist."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("there is no dpkg-deb")
    folder, root = tmp_path / "downloads", tmp_path / "root"
    folder.mkdir()
    html = "<html><head>Never</head><p>" + PARAGRAPHS["Html"].replace("\n\n", "</p><p>")
    files: dict[str, str] = {
        "DEBIAN/control": "Package: some-doc\nVersion: 1:2.0-1\nArchitecture: all\nMaintainer: x\nDescription: -\n",
        "usr/share/doc/some-doc/copyright": COPYRIGHT,
        "usr/share/doc/some-doc/changelog.Debian.gz": PARAGRAPHS["Notice"],
        "usr/share/doc/some-doc/html/page.html": html,
        "usr/share/doc/some-doc/html/other.en.html": html.replace("Html number", "Another number"),
        "usr/share/doc/some-doc/html/page.de.html": html.replace("Html number", "German number"),
        "usr/share/doc/some-doc/html/de/page.html": html.replace("Html number", "German number"),
        "usr/share/doc/some-doc/html/_sources/page.rst.txt": PARAGRAPHS["Source"] * 9,
        "usr/share/doc/some-doc/page.txt.gz": PARAGRAPHS["Source"],
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    (root / "usr/share/doc/some-doc/html/link.html").symlink_to("page.html")
    built = folder / "some-doc_1%3a2.0-1_all.deb"
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", root, built], check=True, capture_output=True)
    about = (
        "Metadata-Version: 2.1\nName: Some_Lib\nVersion: 1.2\nClassifier: License :: OSI Approved :: MIT License\n\nx"
    )
    code = f'"""{PARAGRAPHS["Docstring"]}"""\nimport a_bomb_that_must_not_run\n'
    with zipfile.ZipFile(folder / "some_lib-1.2-py3-none-any.whl", "w") as wheel:
        for name, text in {"some_lib/a.py": code, "some_lib-1.2.dist-info/METADATA": about}.items():
            wheel.writestr(name, text)
    archive(folder / "other-3.0.tar.gz", {
        "other-3.0/PKG-INFO": "Name: other\nVersion: 3.0\nLicense: BSD\n\nx",
        "other-3.0/README.rst": PARAGRAPHS["Other"],
        "other-3.0/LICENSE.txt": PARAGRAPHS["Notice"], "other-3.0/tests/data.txt": PARAGRAPHS["Notice"] * 9,
    })  # fmt: skip
    return folder


def archive(path: Path, files: Mapping[str, str]) -> None:
    with tarfile.open(path, "w:gz") as made:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            made.addfile(info, io.BytesIO(text.encode()))


def test_one_format_of_each_package_without_translations_sources_and_notices(downloads) -> None:
    deb, wheel, sdist = text_packages.fetch(downloads, ["some-doc"], ["some-lib", "other"])
    assert (deb.version, deb.licences) == ("1:2.0-1", ("GFDL-1.3+", "GPL-2+"))
    assert (wheel.version, wheel.licences) == ("1.2", ("MIT License",))
    assert (sdist.version, sdist.licences) == ("3.0", ("BSD",))
    texts = {package.name: text_packages.texts_of(package) for package in (deb, wheel, sdist)}
    names = {found.name.rpartition("/")[2] for found in texts["some-doc"]}
    assert names == {"page.html", "other.en.html"} and {found.kind for found in texts["some-doc"]} == {
        "debian/some-doc"
    }
    joined = {name: "\n".join(found.text for found in own) for name, own in texts.items()}
    assert joined["some-doc"].count("Html number 5") == joined["some-doc"].count("Another number 5") == 1
    assert "Docstring number 5" in joined["some-lib"] and "Other number 5" in joined["other"]
    for word in ("German", "Source", "Notice", "Never"):
        assert not any(f"{word}" in text for text in joined.values()), word


def test_a_dictionary_in_one_file_is_cut_between_its_entries(monkeypatch) -> None:
    monkeypatch.setattr(text_packages, "LONGEST", 1000)
    monkeypatch.setattr(text_packages, "PART", 100)
    entries = [f"entry {i}\n  is the number {i} of them" for i in range(60)]
    found = list(text_packages.parts("\n\n".join(entries)))
    assert "".join(found) == "\n\n".join(entries) and all(len(part) <= 200 for part in found) and len(found) > 20
    assert all(part.strip().startswith("entry") for part in found)
    assert list(text_packages.parts("x" * 1000)) == ["x" * 1000]
    assert list(text_packages.parts("x" * 1001)) == ["x" * 100] * 9 + ["x" * 101]


def test_menus_that_many_pages_share_are_no_text_of_theirs() -> None:
    pages = {str(i): f"Home\n\n  The\tKernel \n\nPage {i}\n\n{'rare' if i < 9 else 'own'} {i // 9}" for i in range(40)}
    left = text_packages.without_furniture(pages | {"menu": "Home\n\nThe Kernel"})
    assert left == {str(i): f"Page {i}\n\n{'rare' if i < 9 else 'own'} {i // 9}" for i in range(40)}
    few = {str(i): f"Home\n\nPage {i}" for i in range(9)}
    assert text_packages.without_furniture(few) == few


def test_a_damaged_file_has_no_text(tmp_path) -> None:
    packed = bytearray(gzip.compress(PARAGRAPHS["Pod"].encode()))
    packed[20:40] = bytes(20)
    assert text_packages._decoded(bytes(packed)) == ""
    (tmp_path / "damaged.gz").write_bytes(packed)
    assert local_text._read(tmp_path / "damaged.gz") == ""


def test_pod_keeps_words_and_loses_commands() -> None:
    text = "=pod\n\n=head1 The B<bold I<and italic>> name\n\nSee L<perlfunc|perlfunc> or C<< a->b >>.\n\n=cut\n"
    assert (
        text_packages.strip_pod(text).split()
        == "The bold and italic name See perlfunc or a->b .".replace(" .", ".").split()
    )


def test_the_corpus_of_packages_is_the_same_on_every_machine_and_lists_licences(
    downloads, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(text_packages.subprocess, "run", None)  # nothing is fetched that is there
    for output in ("a", "b"):
        argv = [
            "--output",
            str(tmp_path / output),
            "--downloads",
            str(downloads),
            "--packages-only",
            "--split",
            "1,1,1,1",
        ]
        assert build_corpus_main([*argv, "--debian", "some-doc", "--pypi", "some-lib", "other"]) == 0
    for name in ("train.jsonl", "test.jsonl", "packages.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    listed = json.loads((tmp_path / "a" / "packages.json").read_text())
    assert [(one["registry"], one["name"], one["licences"]) for one in listed] == [
        ("debian", "some-doc", ["GFDL-1.3+", "GPL-2+"]), ("pypi", "some-lib", ["MIT License"]),
        ("pypi", "other", ["BSD"]),
    ]  # fmt: skip
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert set(manifest["kinds"]) == {"debian/some-doc", "pypi/some-lib", "pypi/other"}  # nothing of this machine


def test_what_is_missing_is_fetched_by_the_registries_clients(downloads, tmp_path, monkeypatch) -> None:
    asked: list[list[str]] = []

    def run(argv, cwd, **_):
        asked.append([str(word) for word in argv])
        for path in downloads.iterdir():
            shutil.copy(path, cwd)
        return subprocess.CompletedProcess(argv, 0, "", "")

    monkeypatch.setattr(text_packages.subprocess, "run", run)
    found = text_packages.fetch(tmp_path / "new", ["some-doc"], ["some-lib"])
    assert asked[0][:2] == ["apt-get", "download"] and asked[0][-1] == "some-doc" and len(asked) == 1
    assert [package.name for package in found] == ["some-doc", "some-lib"]


@pytest.mark.parametrize(("debian", "pypi", "message"), [
    (["-o"], [], "--debian: expected names of packages, each once, got '-o'"), ([], ["a", "a"], "--pypi: .*got 'a'"),
])  # fmt: skip
def test_what_is_no_name_is_refused(tmp_path, debian, pypi, message) -> None:
    with pytest.raises(UsageError, match=message):
        text_packages.fetch(tmp_path, debian, pypi)


def test_a_client_that_fails_is_quoted(tmp_path, monkeypatch) -> None:
    failed = subprocess.CompletedProcess([], 100, "", "E: Unable to locate package no-such-doc")
    monkeypatch.setattr(text_packages.subprocess, "run", lambda *_, **__: failed)
    monkeypatch.setattr(text_packages.shutil, "which", lambda _: "/usr/bin/apt-get")
    with pytest.raises(DataError, match=r"(?s)apt-get download -q no-such-doc exited with code 100.*Unable to locate"):
        text_packages.fetch(tmp_path, ["no-such-doc"])
    with pytest.raises(UsageError, match="--packages-only, --downloads: expected --debian or --pypi with them"):
        build_corpus_main(["--output", str(tmp_path / "x"), "--packages-only"])
