"""Tables as CSV and LaTeX, read back: the numbers of results.json; and short names of runs, which are names."""

from __future__ import annotations

import csv
import json
import math
import re
from typing import Any

import pytest

from megatron_prune.study.analysis import results
from megatron_prune.study.grid import label
from megatron_prune.study.prunings import Places
from megatron_prune.study.report import appendix, tables
from megatron_prune.study.report.tabular import Column, Table, perplexity, words


@pytest.fixture(scope="module", params=["quickstart_like", "simulated_study"])
def places(request: pytest.FixtureRequest) -> Places:
    found: Places = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def data(places: Places) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((places.root / "report" / "results.json").read_text())
    return read


SETTINGS = {"equal-training": "equal training tokens", "equal-total": "equal total tokens"}


def read_csv(places: Places, name: str) -> list[dict[str, str]]:
    with open(places.root / "report" / "tables" / f"{name}.csv", newline="") as handle:
        return list(csv.DictReader(handle))


def read_latex(places: Places, name: str) -> list[list[str]]:
    """The cells of every row below the heads, as they are set."""
    text = (places.root / "report" / "tables" / f"{name}.tex").read_text()
    body = text[text.index("\\midrule") + len("\\midrule") : text.index("\\bottomrule")]
    lines = [line.removesuffix(r" \\").split(" & ") for line in body.strip("\n").splitlines()]
    columns = re.search(r"\\begin\{tabular\}\{([lr]+)\}", text)
    assert columns is not None and {len(line) for line in lines} == {len(columns[1])}
    return lines


def number(text: str) -> float | None:
    return None if text == "" else float(text)


def test_verdicts(places: Places, data: dict[str, Any]) -> None:
    rows = read_csv(places, "verdicts")
    assert len(rows) == len(data["verdicts"]) > 0
    by_name = {(row["comparison"], int(row["tokens"])): row for row in rows}
    named = [(f"{label(v['method'], v['pattern'], v['ratio'])}: {SETTINGS[v['setting']]}" + ", dense scratch"
              * (v["sparse"] and v["against"] == "dense"), v["tokens"]) for v in data["verdicts"]]  # fmt: skip
    assert len(by_name) == len(rows) and set(named) == set(by_name)
    for name, verdict in zip(named, data["verdicts"], strict=True):
        row = by_name[name]
        test, documents = verdict["test"], verdict["documents"] or {}
        expected = {
            "tokens": verdict["tokens"], "pruned": verdict["pruned"]["test"], "scratch": verdict["scratch"]["test"],
            "gap": test["mean"], "low": test["low"], "high": test["high"], "p": test["p"],
            "corrected_p": verdict["corrected"], "effect": test["effect"], "detectable": verdict["detectable"],
            "documents_low": documents.get("low"), "pruned_perplexity": math.exp(verdict["pruned"]["test"]),
        }  # fmt: skip
        assert {key: number(row[key]) for key in expected if key in row} == {
            key: value for key, value in expected.items() if key in row
        }
        assert row["winner"] == verdict["winner"] and verdict["method"] in row["comparison"]
        assert ("low" in row) == (test["low"] is not None)
    verdicts = dict(zip(named, data["verdicts"], strict=True))
    for cells, row in zip(read_latex(places, "verdicts"), rows, strict=True):
        verdict = verdicts[row["comparison"], int(row["tokens"])]
        assert cells[1:3] == [f"{verdict['tokens']:,}", f"{verdict['pruned']['test']:.4f}"]
        assert cells[4] == f"{verdict['scratch']['test']:.4f}"
        assert float(cells[6].replace("$-$", "-")) == pytest.approx(verdict["test"]["mean"], abs=5.1e-5)


def test_rows_and_accounts(places: Places, data: dict[str, Any]) -> None:
    rows = read_csv(places, "rows")
    for row, expected in zip(rows, data["rows"], strict=True):
        assert row["cell"] == (expected["cell"] or "") and row["arm"] == expected["arm"]
        assert number(row["test_loss"]) == expected["test_loss"] and number(row["params"]) == expected["params"]
        assert number(row["validation_loss"]) == expected["validation_loss"]
    latex = read_latex(places, "rows")
    losses = [cells[-3] for cells in latex]
    assert losses == [f"{row['test_loss']:.4f}" for row in data["rows"]]
    by_cell = {row["cell"]: row for row in data["rows"]}
    accounts = read_csv(places, "account")
    assert {row["cell"] for row in accounts} == set(by_cell)
    for row in accounts:
        expected = by_cell[row["cell"]]
        assert [number(row[key]) for key in ("tokens_train", "tokens_total", "flops_total")] == [
            expected[key] for key in ("tokens_train", "tokens_total", "flops_total")
        ]


def test_every_table_of_the_page_is_a_file(places: Places) -> None:
    text = (places.root / "report" / "index.html").read_text()
    shown = set(re.findall(r'<table id="([\w-]+)"', text))
    files = {path.name for path in (places.root / "report" / "tables").iterdir()}
    assert files == {f"{name}.{kind}" for name in shown for kind in ("csv", "tex")} and len(shown) >= 7


def test_short_names_are_names(places: Places) -> None:
    found = results.collect(places)
    short = appendix.short_names(found)
    trained = [short[cell] for cell in {row["cell"] for row in found.rows}]
    assert len(set(trained)) == len(trained)
    assert max(map(len, trained)) <= 60
    for cell, name in short.items():
        if cell.startswith(("pruned-", "scratch-")):
            assert name != cell, cell


def test_odd_words_are_latex() -> None:
    odd = r"a_b & 50% of $x$ {y} #1 \end{tabular} ~^ −1 – ok"
    table = Table("odd", "", [words("head_", "key")], [{"key": odd}])
    line = table.latex().splitlines()[4]
    assert line == (
        r"a\_b \& 50\% of \$x\$ \{y\} \#1 \textbackslash{}end\{tabular\} "
        r"\textasciitilde{}\textasciicircum{} $-$1 -- ok \\"
    )
    assert table.csv() == f"key\n{odd}\n"


def test_unknown_values_are_empty_in_the_file_and_a_dash_on_the_page() -> None:
    column = Column("loss", lambda row: "–" if row["loss"] is None else f"{row['loss']:.1f}", {"loss": "loss"})
    table = Table("t", "", [column], [{"loss": None}, {"loss": 1.23456}])
    assert table.csv() == 'loss\n""\n1.23456\n' and [row["cells"][0].text for row in table.body] == ["–", "1.2"]


def test_perplexities() -> None:
    assert (perplexity(math.exp(4.0)), perplexity(1234.5)) == ("54.60", "1,234")
    assert tables.exp(1.0) == pytest.approx(math.e) and tables.exp(1e6) == math.inf
