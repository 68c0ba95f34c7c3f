"""The corpus builder: enough text on a bare installation, no text twice, the same bytes every time."""

from __future__ import annotations

import gzip
import json
from collections import Counter

import pytest

from megatron_prune.data import local_text
from megatron_prune.data.local_text import FoundText, TextPlaces
from megatron_prune.errors import DataError, UsageError

PROSE = "It is the purpose of this text to be long enough, and to read as if a person had written it for others. "


@pytest.fixture
def machine(tmp_path):
    """A small machine: a manual, a package with docstrings and METADATA, Debian documents, a manual page."""
    root = tmp_path / "machine"

    def write(name, text, zipped=False):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(gzip.compress(text.encode()) if zipped else text.encode())

    paragraph = lambda word: "\n\n".join(f"{word} number {i}: {PROSE * 3}" for i in range(6))  # noqa: E731
    write("lib/pydoc_data/topics.py", f"topics = {{'a': {paragraph('Topic')!r}}}\n")
    write("lib/module.py", f'''"""{paragraph("Module")}"""
import a_bomb_that_must_not_run
class A:
    """{paragraph("Class")}"""
    def f(self):
        """{paragraph("Method")}"""
        x = """{paragraph("String")}"""
''')  # fmt: skip
    write("lib/test/test_module.py", f'"""{paragraph("Never")}"""\n')
    write("site/thing-1.0.dist-info/METADATA", f"Name: thing\nLicense: MIT\n\n{paragraph('Description')}")
    write("site/megatron_prune-1.0.dist-info/METADATA", f"Name: us\n\n{paragraph('Never')}")
    write("site/thing/README.rst", paragraph("Readme"))
    write("site/thing/LICENSE.txt", paragraph("Never"))
    write("doc/tool/README.gz", paragraph("Debian"), zipped=True)
    html = "</p><p>".join(paragraph("Html").split("\n\n"))
    write("doc/tool/page.html", f"<html><head>Never</head><p>{html}</p>")
    write("doc/tool/changelog.Debian.gz", paragraph("Never"), zipped=True)
    write("doc/tool/copyright", paragraph("Never"))
    page = f".TH Never 1\n.SH NAME\ntool \\- a \\fBbold\\fR tool\n.PP\nManual {PROSE * 3}\n"
    write("man/man1/tool.1.gz", page, zipped=True)
    (root / "man/man1/alias.1.gz").symlink_to("tool.1.gz")
    return TextPlaces((root / "lib",), (root / "site",), (root / "doc",), (root / "man",))


def test_every_kind_is_found_and_nothing_that_should_not_be(machine):
    found = list(local_text.gather(machine))
    assert {f.kind for f in found} == {"topics", "documentation", "manuals", "descriptions", "docstrings"}
    text = "\n".join(f.text for f in found)
    for word in ("Topic", "Module", "Class", "Method", "Description", "Readme", "Debian", "Html"):
        assert text.count(f"{word} number 5") == 1
    assert text.count(f"Manual {PROSE * 3}".strip()) == 1  # of the two names of one page
    assert "Never" not in text and "String number" not in text
    assert "tool - a bold tool" in text and text.count("a bold tool") == 1


def test_documents_are_split_without_a_shared_paragraph(machine, tmp_path, monkeypatch):
    monkeypatch.setattr(local_text, "LEAST_BYTES", 0)
    shares = (40, 20, 20, 20)
    copies = [
        FoundText("k", str(i), f"Document {i}. {PROSE * 3}\n\nshared: {PROSE * 2}\n\nExamples") for i in range(60)
    ]
    monkeypatch.setattr(local_text, "gather", lambda places, workers, more: iter(copies + copies))
    manifest = local_text.build_corpus(tmp_path / "c", shares=shares, places=machine)
    lines = {name: (tmp_path / "c" / f"{name}.jsonl").read_text().splitlines() for name in local_text.SPLITS}
    texts = {name: [json.loads(line)["text"] for line in found] for name, found in lines.items()}
    assert sum(map(len, texts.values())) == 60 and all(texts.values())
    joined = "\n\n".join(text for found in texts.values() for text in found).split("\n\n")
    counts = Counter(joined)
    assert counts[f"shared: {PROSE * 2}".rstrip()] == 1 and counts["Examples"] == 60
    assert manifest["splits"]["test"]["documents"] == len(texts["test"])
    assert manifest["rejected"] == {"short": 60}


def test_held_out_documents_can_be_beginnings_of_many(machine, tmp_path, monkeypatch):
    """With 400 documents the held-out splits have many short ones, and no split has the ends that were cut."""
    parts = [[f"Part {k} of {i}: {PROSE}".rstrip() for k in range(30)] for i in range(400)]
    made = [FoundText("k", str(i), "\n\n".join(own)) for i, own in enumerate(parts)]
    monkeypatch.setattr(local_text, "gather", lambda places, workers, more: iter(made))
    whole = local_text.build_corpus(tmp_path / "w", places=machine)["splits"]
    short = local_text.build_corpus(tmp_path / "s", places=machine, longest_held_out=600)["splits"]
    assert (tmp_path / "s" / "train.jsonl").read_text() in (tmp_path / "w" / "train.jsonl").read_text()
    names = []
    for split in local_text.SPLITS:
        lines = [json.loads(line) for line in (tmp_path / "s" / f"{split}.jsonl").read_text().splitlines()]
        names += [line["source"] for line in lines]
        for line in lines:
            text = next(found.text for found in made if f"k/{found.name}" == line["source"])
            assert text == line["text"] if split == "train" else text.startswith(line["text"] + "\n\n")
            assert split == "train" or 600 - len(PROSE) - 30 < len(line["text"]) <= 600
        if split != "train":
            assert short[split]["bytes"] == pytest.approx(whole[split]["bytes"], rel=0.2)
            assert short[split]["documents"] > 3 * whole[split]["documents"]
    assert len(names) == len(set(names)) == 400
    assert local_text.beginning("word " * 100, 403) == ("word " * 80).rstrip()
    assert local_text.beginning("w" * 500, 403) == "w" * 403 and local_text.beginning("w" * 403, 403) == "w" * 403
    with pytest.raises(UsageError, match="--longest-held-out: expected .*, got 10"):
        local_text.build_corpus(tmp_path / "x", places=machine, longest_held_out=10)


def test_beginnings_are_held_out_once(machine, tmp_path, monkeypatch):
    """Documents that differ only after what is held out of them would be in two splits."""
    made = [FoundText("k", str(i), f"{f'{i % 2 and i}: {PROSE}' * 8}\n\nPart {i}. {PROSE}") for i in range(200)]
    monkeypatch.setattr(local_text, "clean", lambda found, rejected: iter(made))
    local_text.build_corpus(tmp_path / "c", shares=(70, 10, 10, 10), places=machine, longest_held_out=900)
    held = [json.loads(line)["text"] for split in local_text.SPLITS[1:]
            for line in (tmp_path / "c" / f"{split}.jsonl").read_text().splitlines()]  # fmt: skip
    assert sum(text.startswith("0: ") for text in held) == 1 and len(held) == len(set(held)) > 40


def test_this_machine_gives_the_same_bytes_for_any_number_of_workers(tmp_path):
    places = TextPlaces(documentation=(), manuals=())
    made = [local_text.build_corpus(tmp_path / name, max_bytes=1_800_000, workers=workers, places=places)
            for name, workers in (("a", 1), ("b", 2))]  # fmt: skip
    for name in (*(f"{split}.jsonl" for split in local_text.SPLITS), "manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    sizes = {name: split["bytes"] for name, split in made[0]["splits"].items()}
    assert 1_800_000 <= sum(sizes.values()) < 2_100_000
    for name, share in zip(local_text.SPLITS, local_text.SHARES, strict=True):
        assert sizes[name] == pytest.approx(share / 100 * sum(sizes.values()), abs=50_000) and sizes[name] > 5_000
    assert made[0]["kinds"]["docstrings"]["documents"] > 20


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (PROSE * 3, None),
        (PROSE, "short"),
        ("α β γ δ " * 60, "not ASCII"),
        ("0x1f 0x2e 77 int foo = bar_baz; " * 20, "not English"),
        ("1234 5678\n" * 60, "not English"),
    ],
)
def test_what_is_left_out(text, reason):
    assert local_text.why_not(text) == reason


def test_shares_and_empty_splits_are_refused(machine, tmp_path):
    with pytest.raises(UsageError, match="--split: expected .*, got 1,2,3"):
        local_text.build_corpus(tmp_path / "c", shares=(1, 2, 3))
    with pytest.raises(DataError, match="got none"):
        local_text.build_corpus(tmp_path / "c", places=machine, shares=(1, 1e-9, 1e-9, 1e-9))
    assert not (tmp_path / "c").exists()
