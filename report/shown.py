"""A sealed report in a notebook: its table and its figures as objects that show themselves."""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import dataclass, field
from io import StringIO
from typing import TYPE_CHECKING

from ..core.errors import choice
from ..core.kinds import Report
from ..core.proc import require
from .faults import faults_table
from .plots import Figure, figures
from .tables import Numbers, closing_lines, device_lines, print_summary, summary_table
from .words import device_heading

if TYPE_CHECKING:
    import rich.table


@dataclass(frozen=True)
class Table:
    """The main table and what is said below it: as HTML in a notebook, by ``print`` as in a terminal."""

    numbers: Numbers = field(repr=False)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=StringIO(), width=100)
        print_summary(console, self.numbers)
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in text.splitlines())

    def _repr_html_(self) -> str:
        devices = self.numbers["devices"]
        shown = [self._device(device, several=len(devices) > 1) for device in devices]
        return "".join([*shown, _paragraph(closing_lines(self.numbers))])

    def _device(self, device: Numbers, *, several: bool) -> str:
        above = _paragraph([device_heading(device)]) if several else ""
        tables = [summary_table(device, self.numbers["task"])]
        if device.get("faults"):
            tables.append(faults_table(device))
        return above + "".join(map(_html, tables)) + _paragraph(device_lines(device))


def _html(table: rich.table.Table) -> str:
    heads = "".join(f"<th>{html.escape(str(column.header))}</th>" for column in table.columns)
    rows = zip(*(column.cells for column in table.columns), strict=True)
    lines = ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def _paragraph(lines: Iterable[str]) -> str:
    return f"<p>{'<br>'.join(map(html.escape, lines))}</p>"


def table(report: Report) -> Table:
    """The table that the command line prints of ``report``."""
    return Table(report.numbers)


def figure(report: Report, name: str) -> Figure:
    """A figure of ``report``'s page by its name, as ``plots.figures`` calls it.

    Raises:
        UserError: the report has no such figure, or matplotlib is missing.
    """
    require("a figure", ("matplotlib",), "report")
    drawn = figures(report.numbers)
    if name not in drawn:
        raise choice("figure", name, drawn)
    return drawn[name]
