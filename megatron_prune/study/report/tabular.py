"""A table of the report: shown on the page, and written as CSV (every digit) and LaTeX (as shown).

A row is a mapping of plain values. A ``Column`` defines how it is shown and the names of its values in the CSV file, so
all three formats agree.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_prune import artifacts

DASH = "–"
MINUS = "\u2212"  # as wide as a plus
Row = Mapping[str, Any]
# LaTeX escapes, per character, so that none is replaced twice.
ESCAPES = str.maketrans({
    **{sign: f"\\{sign}" for sign in "&%$#_{}"}, "\\": r"\textbackslash{}", "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}", MINUS: "$-$", "–": "--", "·": r"\textperiodcentered{}", "₀": "$_0$", "α": r"$\alpha$",
})  # fmt: skip


class TableCell(NamedTuple):
    head: str  # of its column
    text: str
    style: str = ""  # CSS classes
    hover: str = ""


@dataclass(frozen=True)
class Column:
    """``show`` makes the cell's text from a row. ``data`` maps names of CSV columns to keys of the row."""

    head: str
    show: Callable[[Row], str]
    data: Mapping[str, str]
    text: bool = False  # text is left-aligned; numbers are right-aligned
    wrap: bool = False
    style: Callable[[Row], str] = lambda row: ""
    hover: Callable[[Row], str] = lambda row: ""

    def cell(self, row: Row) -> TableCell:
        styles = ["text"] * self.text + ["wrap"] * self.wrap + [self.style(row)]
        return TableCell(self.head, self.show(row), " ".join(filter(None, styles)), self.hover(row))


@dataclass(frozen=True)
class Table:
    """``group``: the key of a heading above the rows that share it, "" for none."""

    name: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    group: str = ""

    @property
    def body(self) -> list[dict[str, Any]]:
        """The page's rows: ``group``, on the first row of a group, and ``cells``."""
        shown, last = [], None
        for row in self.rows:
            group = row[self.group] if self.group else ""
            cells = [column.cell(row) for column in self.columns]
            shown.append({"group": group if group != last else "", "cells": cells, "first": row.get("first", False)})
            last = group
        return shown

    def csv(self) -> str:
        """The unformatted values; unknown ones are empty."""
        names = {name: key for column in self.columns for name, key in column.data.items()}
        names = ({self.group: self.group} if self.group else {}) | names
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([["" if row[key] is None else row[key] for key in names.values()] for row in self.rows])
        return text.getvalue()

    def latex(self) -> str:
        """A ``tabular`` for the package booktabs, in UTF-8."""
        grouped = "l" * bool(self.group)
        columns = grouped + "".join("l" if column.text else "r" for column in self.columns)
        lines = [f"% {line}" for line in self.caption.splitlines()]
        lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
        heads = [""] * bool(self.group) + [column.head for column in self.columns]
        lines += [_line(heads), r"\midrule"]
        for row, shown in zip(self.rows, self.body, strict=True):
            before = [shown["group"]] if self.group else []
            lines.append(_line([*before, *(column.show(row) for column in self.columns)]))
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])

    def write(self, directory: Path) -> None:
        """``NAME.csv`` and ``NAME.tex``"""
        artifacts.write_bytes(directory / f"{self.name}.csv", self.csv().encode())
        artifacts.write_bytes(directory / f"{self.name}.tex", self.latex().encode())


def _line(cells: Sequence[str]) -> str:
    return " & ".join(cell.translate(ESCAPES) for cell in cells) + r" \\"


def words(head: str, key: str, *, wrap: bool = False, hover: str = "", data: Mapping[str, str] | None = None) -> Column:
    """A column of text; ``hover`` is the key of its tooltip."""
    return Column(
        head, lambda row: str(row[key] or ""), {key: key} if data is None else data, text=True, wrap=wrap,
        hover=(lambda row: str(row[hover] or "")) if hover else lambda row: "",
    )  # fmt: skip


def number(head: str, key: str, show: Callable[[Any], str], style: Callable[[Row], str] = lambda row: "") -> Column:
    return Column(head, lambda row: DASH if row[key] is None else show(row[key]), {key: key}, style=style)


def span(head: str, low: str, high: str, digits: int = 3) -> Column:
    """An interval; its ends are two columns of the CSV file."""
    return Column(head, lambda row: interval(row[low], row[high], digits), {low: low, high: high},
                  style=lambda row: "whole")  # fmt: skip


def signed(value: float, digits: int = 3) -> str:
    """``-0.0541`` → ``−0.054``, with a minus that is as wide as the plus."""
    return f"{value:+.{digits}f}".replace("-", MINUS)


def interval(low: float | None, high: float | None, digits: int = 3) -> str:
    return DASH if low is None or high is None else f"[{signed(low, digits)}, {signed(high, digits)}]"


def amount(value: float) -> str:
    """``409600`` → ``410k``; three significant digits."""
    for scale, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{suffix}"
    return f"{value:.3g}"


def loss(value: float) -> str:
    return f"{value:.4f}"


def perplexity(value: float) -> str:
    """``exp`` of a loss in nats: four digits, or whole where it is large."""
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def count(value: int) -> str:
    return f"{value:,}"


def flops(value: float) -> str:
    return f"{value:.3e}"
