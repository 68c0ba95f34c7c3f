"""The page: its numbers are the rows, it needs nothing from outside, and odd text cannot break it."""

from __future__ import annotations

import html.parser
import itertools
import json
import math
import re
import xml.etree.ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_prune.study.analysis import results
from megatron_prune.study.prunings import Places
from megatron_prune.study.report import drawing, figures, page, tables
from megatron_prune.study.report.tabular import MINUS, amount, signed
from tests.study import made_up
from tests.study.test_sparse import METHODS


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    folder = tmp_path_factory.mktemp("study")
    methods = [
        {"name": "shortgpt", "label": "a.b"},
        {"name": "random", "settings": {"axis": "width", "divisible-by": 8}},
    ]
    study = made_up.study(made_up.corpora(folder), methods=methods, seeds=[1, 2])
    places = made_up.run(study, folder / "runs", made_up.FakeLauncher())
    page.write(results.collect(places), places)
    return places


class Reader(html.parser.HTMLParser):
    """Cells of the tables by id, their titles (shown on hover), all attributes, and unclosed tags."""

    VOID = {"meta", "br", "link", "img", "path", "use", "rect", "line", "circle"}

    def named(self, table: str, column: int) -> dict[str, list[str]]:
        """The rows of a table by the title of their cell in ``column``."""
        return {
            hover[column]: cells
            for cells, hover in zip(self.tables[table], self.hovers[table], strict=True)
            if column in hover
        }

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.hovers: dict[str, list[dict[int, str]]] = {}
        self.table, self.cell = "", False
        self.attributes: list[tuple[str, str, str | None]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.table = dict(attrs).get("id") or ""
            self.tables.setdefault(self.table, [])
            self.hovers.setdefault(self.table, [])
        elif tag == "tr":
            self.tables[self.table].append([])
            self.hovers[self.table].append({})
        elif tag == "td":
            self.tables[self.table][-1].append("")
            if hover := dict(attrs).get("title"):
                self.hovers[self.table][-1][len(self.tables[self.table][-1]) - 1] = hover
            self.cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag
        if tag == "td":
            self.cell = False

    def handle_data(self, data: str) -> None:
        if self.cell:
            self.tables[self.table][-1][-1] += data


@pytest.fixture(scope="module")
def read(places: Places) -> Reader:
    reader = Reader()
    reader.feed((places.root / "report" / "index.html").read_text())
    assert not reader.open
    return reader


def test_every_row_is_on_the_page(places: Places, read: Reader) -> None:
    rows = json.loads((places.root / "report" / "results.json").read_text())["rows"]
    shown = [cells for cells in read.tables["rows"] if cells]
    assert len(shown) == len(rows) == 1 + 2 * 2 * 2 * 2
    for cells, row in zip(shown, rows, strict=True):
        assert cells[2] == row["arm"] and cells[0] == tables.SETTINGS.get(row["setting"], "")
        assert cells[4] == f"{row['params']:,}"
        assert cells[5:8] == [f"{row[key]:.4f}" for key in ("loss_initial", "validation_loss", "test_loss")]
    for pruned, scratch, cells in zip(rows[1::2], rows[2::2], shown[2::2], strict=True):
        assert float(cells[8].replace(",", "")) == pytest.approx(math.exp(scratch["test_loss"]), rel=0.01)
        assert cells[9].replace(MINUS, "-") == f"{scratch['test_loss'] - pruned['test_loss']:+.4f}"


def test_losses_before_retraining_are_on_the_page(places: Places, read: Reader) -> None:
    shown = read.named("prunings", 0)
    assert len(shown) == 2 * 2
    for cell, cells in shown.items():
        losses = json.loads(places.scores(cell).read_text())["corpora"]
        assert cells[5:7] == [f"{losses[name]['loss']:.4f}" for name in ("validation", "test")]


def test_the_account_table_has_every_run_once(places: Places, read: Reader) -> None:
    rows = json.loads((places.root / "report" / "results.json").read_text())["rows"]
    shown = read.named("account", 1)
    assert set(shown) == {row["cell"] for row in rows}
    for row in rows:
        assert shown[row["cell"]][4] == f"{row['tokens_train']:,}"
        assert shown[row["cell"]][5] == f"{row['tokens_total']:,}"
        assert shown[row["cell"]][7] == f"{row['flops_total']:.3e}"


def test_verdicts_and_matches_are_on_the_page(places: Places) -> None:
    found = results.collect(places)
    text = (places.root / "report" / "index.html").read_text()
    assert len(found.verdicts) == 4
    for verdict in found.verdicts:
        assert verdict.subject in text and page.minus(verdict.words) in text
    assert text.count("all other resolved arguments") == 8
    reader = Reader()
    reader.feed(text)
    lines = [line for item in found.compared for line in item.match if line.field == "total tokens"]
    assert len(lines) == 4
    for line in lines:
        words = [line.field, line.pruned, line.scratch, line.verdict]
        assert words in [cells for rows in reader.tables.values() for cells in rows]


def test_odd_text_stays_text(places: Places) -> None:
    """Paths and arguments in study.yaml, and labels, may contain anything."""
    odd = "<script>alert('1')</script> & \"quoted\" </td></pre>"
    found = results.collect(places)
    rows = tuple(row | {"method": row["method"] and odd} for row in found.rows)
    verdicts = tuple(replace(verdict, method=odd) for verdict in found.verdicts)
    recipe = replace(found.study.recipe, arguments=found.study.recipe.arguments | {"wandb-notes": odd})
    changed = replace(found, rows=rows, verdicts=verdicts, study=replace(found.study, recipe=recipe))
    text = page.render(changed, [])
    assert "<script" not in text and text.count("&lt;script&gt;") > 3 * len(verdicts)
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    shown = [cells for cells in reader.tables["rows"] if cells]
    assert {cells[1] for cells in shown[1:]} == {f"{odd}, 50% removed"}


def test_a_chain_whose_masks_are_of_an_earlier_link_is_sparse(tmp_path: Path) -> None:
    links = [{"name": "magnitude", "pattern": "2:4"}, {"name": "shortgpt", "ratio": 0.5}]
    chain = {"chain": links, "label": "both", "compare": {"equal-training": ["dense", "masked"]}}
    methods = [chain, {"name": "shortgpt", "compare": ["equal-training"]}]
    made = made_up.study(made_up.corpora(tmp_path), methods=methods)
    found = results.collect(made_up.run(made, tmp_path / "runs", made_up.FakeLauncher()))
    said = [(v.method, v.against, v.sparse, v.dense, "against dense scratch" in v.subject) for v in found.verdicts]
    assert said == [("both", "dense", True, True, True), ("both", "masked", True, False, False),
                    ("shortgpt", "dense", False, False, False)]  # fmt: skip
    reader = Reader()
    reader.feed(page.render(found, []))
    dense = "Equal training tokens, dense scratch"
    assert [cells[0] for cells in reader.tables["rows"] if cells] == [
        "", dense, dense, *["Equal training tokens"] * 4
    ]  # fmt: skip
    shown = [cells[5] for cells in reader.tables["rows"] if cells]  # weights that are not zero
    assert shown == [f"{row['params_nonzero']:,}" for row in found.rows]


def test_nothing_is_fetched_and_no_id_is_twice(places: Places, read: Reader) -> None:
    for tag, name, value in read.attributes:
        if tag == "a" and name == "href":  # the same as data, next to the page
            assert value is not None and (places.root / "report" / value).is_file()
        elif name in ("src", "href", "xlink:href", "data", "action") and value is not None:
            assert value.startswith("#"), f"<{tag} {name}={value}>"
        assert tag not in ("script", "link", "iframe", "object")
    ids = [value for _, name, value in read.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = {value[1:] for _, name, value in read.attributes if name == "xlink:href" and value}
    assert used <= set(ids)


def test_figures_read_on_light_and_dark(places: Places) -> None:
    text = (places.root / "report" / "index.html").read_text()
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    assert drawing.INK not in text and "currentColor" in text  # the page's own ink
    folder = places.root / "report" / "figures"
    assert sorted(path.name for path in folder.iterdir()) == [
        f"{name}.{kind}" for name in ("cost", "final-loss", "gaps", "loss-curves", "serving") for kind in ("png", "svg")
    ]
    for path in folder.glob("*.svg"):
        root = xml.etree.ElementTree.fromstring(path.read_text())
        words = " ".join(root.itertext())
        assert "nats" in words and drawing.INK in path.read_text()
        # Nothing paints a background, black or white.
        assert not re.search(r"fill: (#ffffff|#000000|white|black)", path.read_text())
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_final_losses_annotates_the_gaps(places: Places) -> None:
    found = results.collect(places)
    svg = (places.root / "report" / "figures" / "final-loss.svg").read_text()
    for verdict in found.verdicts:
        assert signed(verdict.test.mean) in svg
    assert found.parent is not None and f"parent {found.parent['test_loss']:.3f}" in svg


def test_the_same_results_are_the_same_files(places: Places) -> None:
    report = places.root / "report"
    before = {path.name: path.read_bytes() for path in report.rglob("*") if path.is_file()}
    page.write(results.collect(places), places)
    assert {path.name: path.read_bytes() for path in report.rglob("*") if path.is_file()} == before


def test_sparse_methods_are_on_the_page(tmp_path: Path) -> None:
    study = made_up.study(made_up.corpora(tmp_path), methods=METHODS, ratios=[0.25])
    places = made_up.run(study, tmp_path / "runs", made_up.FakeLauncher())
    found = results.collect(places)
    text = page.write(found, places).read_text()
    reader = Reader()
    reader.feed(text)
    shown = [cells for cells in reader.tables["rows"] if cells]
    for cells, row in zip(shown[1:], found.rows[1:], strict=True):
        dense = row["pattern"] and row["against"] == "dense"
        assert cells[0] == tables.SETTINGS[row["setting"]] + ", dense scratch" * bool(dense)
        name = row["method"] if row["pattern"] is None else f"{row['method']} {row['pattern']}"
        assert cells[1] == f"{name}, {100 * row['ratio']:g}% removed"
        assert cells[4:6] == [f"{row['params']:,}", f"{row['params_nonzero']:,}"]
    for row in found.rows[1:]:
        cells = reader.named("account", 1)[row["cell"]]
        assert [cells[6], cells[8]] == [f"{row[key]:.3e}" for key in ("flops_train", "flops_train_theoretical")]
    removed = {cell: cells[2] for cell, cells in reader.named("prunings", 0).items()}
    assert removed["pruning-magnitude-1-4-r75-s1"] == "75.00%" and removed["pruning-floor-r25-s1"] == "25.00%"
    assert "magnitude-1-4 runs once, at 75%: 1:4 says how much is removed, not ratios: [0.25]." in text
    svg = (places.root / "report" / "figures" / "final-loss.svg").read_text()
    for words in ("wanda 2:4", "dense scratch", "pruned, retrained", "scratch, equal total tokens"):
        assert words in svg, words
    svg = (places.root / "report" / "figures" / "gaps.svg").read_text()
    for words in ("wanda 2:4", "Depth", "Sparse", "vs dense scratch", "vs same masks"):
        assert words in svg, words


def test_more_arms_than_colours_have_a_panel_for_each_method(tmp_path: Path) -> None:
    patterns = ["1:2", "1:4", "2:4", "3:4", "1:8", "3:8", "4:8", "5:8"]
    methods = [{"name": "magnitude", "pattern": p} for p in patterns] + [{"name": "random", "pattern": "2:4"}]
    study = made_up.study(made_up.corpora(tmp_path), methods=methods, settings=["equal-training"])
    places = made_up.run(study, tmp_path / "runs", made_up.FakeLauncher())
    found = results.collect(places)
    assert len(set(drawing.colours(found).values())) == 2  # by method, where each is named next to its line
    page.write(found, places)

    def words(name: str) -> list[str]:
        figure = xml.etree.ElementTree.fromstring((places.root / "report" / "figures" / name).read_text())
        return [text.strip() for text in figure.itertext() if text.strip()]

    final, curves = words("final-loss.svg"), words("loss-curves.svg")
    names = [one for one in final if "nats" not in one]  # the others are in titles
    assert [sum(one.startswith(f"{name} 2:4") for one in names) for name in ("magnitude", "random")] == [1, 1]
    assert curves.count("magnitude") == curves.count("random") == 1
    assert curves.count("2:4, 50% removed") == 1 and curves.count("5:8, 37.5% removed") == 1


def test_rates_and_models_of_every_seed_are_on_the_page(tmp_path: Path) -> None:
    parent = {"pretrain": {"tokens": 2560, "arguments": made_up.SHAPE_FLAGS, "lr": 1e-3}}
    recipe = {"lr": [1e-3, 3e-3], "global_batch_size": 8, "micro_batch_size": 4}
    changes = {"parent": parent, "recipe": recipe, "parent_per_seed": True, "seeds": [1, 2]}
    study = made_up.study(made_up.corpora(tmp_path), methods=[{"name": "shortgpt"}], **changes)
    places = made_up.run(study, tmp_path / "runs", made_up.FakeLauncher())
    found = results.collect(places)
    text = page.write(found, places).read_text()
    reader = Reader()
    reader.feed(text)
    shown = [cells for cells in reader.tables["sweeps"] if cells]
    assert len(shown) == len(found.sweeps) == 3
    for cells, one in zip(shown, found.sweeps, strict=True):
        assert cells[4] == f"{one.chosen:g}" and f"{one.chosen:g}: {min(one.validation.values()):.4f}" in cells[3]
    assert "conditional on" not in text
    counted = reader.named("account", 1)
    assert len([cells for cells in counted.values() if cells[0] == "parent"]) == 2
    assert {cells[8] for cells in counted.values()} <= {"0", "–"}  # loss spikes


def test_an_unfinished_study_has_a_page(tmp_path: Path) -> None:
    study = made_up.study(made_up.corpora(tmp_path))
    with pytest.raises(made_up.Killed):
        made_up.run(study, tmp_path / "runs", made_up.FakeLauncher(kill_at=9))
    places = Places(tmp_path / "runs" / "made-up")
    path = page.write(results.collect(places), places)
    text = path.read_text()
    assert text.count(": not finished.") == 4 and "(pending)" in text
    reader = Reader()
    reader.feed(text)
    assert not reader.open


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (999, "999"), (409_600, "410k"), (1_500_000, "1.5M"), (2e12, "2T")]
)
def test_amounts(value: float, text: str) -> None:
    assert amount(value) == text


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_a_group_of_the_gaps_ends_below_its_name(rows: int) -> None:
    """Names of several lines, 0.58 of a row apart, next to few rows: each group begins below the last line."""
    names = ["Depth", "Sparse\nvs dense scratch\nboth distilled", "Width\nboth distilled"]
    lines = [
        figures.PlotLine(name if row == 0 else "", "name", 1.0, None, None, "pruned", False)
        for name in names
        for row in range(rows)
    ]
    *places, end = figures._places(lines, False)
    begins = [*places[::rows], end]
    assert begins[0] == 0 and np.diff(places).min() >= 1 and end >= places[-1] + 1
    for name, (begin, following) in zip(names, itertools.pairwise(begins), strict=True):
        assert following - (begin + 0.58 * name.count("\n")) >= 0.8
    if rows > 2:  # as it is without such names
        assert begins == [0, rows, 2 * rows, 3 * rows]
