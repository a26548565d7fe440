"""The result of ``effdl bench``."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from effdl.measure.baseline import setting
from effdl.render.bench_rows import (
    Grid,
    against_baseline,
    cells,
    control,
    costs,
    inputs,
    label,
    order,
    speed,
    warnings,
    where,
    work,
)
from effdl.render.console import out, print_warning
from effdl.render.roof import sources
from effdl.report import BenchReport, BenchScan

_WIDE = 100
_STYLES = {"faster": "bold green", "slower": "bold red"}


def print_report(report: BenchReport | BenchScan) -> None:
    """Print a bench, or one at several settings."""
    if isinstance(report, BenchScan):
        print_scan(report)
    else:
        print_bench(report)


def print_bench(report: BenchReport) -> None:
    """Print where and how it was measured, the tables, and the verdicts."""
    console = out()
    console.print(where(report), overflow="fold")
    console.print(inputs(report), overflow="fold")
    wide = console.width >= _WIDE
    _print_grid(console, speed(report, wide))
    _print_grid(console, costs(report, wide))
    rates = work(report)
    if wide and rates is not None:
        _print_grid(console, rates)
        for line in sources(report):
            console.print(Text(line, style="dim"))
    if len(report.models) > 1:
        console.print(Text(control(report), style="dim"))
    for index in order(report):
        if index:
            console.print(verdict_line(report, index))
    _print_baseline(console, report)
    for warning in warnings(report):
        print_warning(warning)


def print_scan(report: BenchScan) -> None:
    """Print a table per model with a row per setting."""
    console = out()
    console.print(where(report), overflow="fold")
    console.print(inputs(report), overflow="fold")
    for title, grid in cells(report, console.width >= _WIDE):
        console.print(Text(title, style="bold"))
        _print_grid(console, grid)
    for cell in report.cells:
        _print_baseline(console, cell, f"{setting(cell)}: ")
    for warning in warnings(report):
        print_warning(warning)


def verdict_line(report: BenchReport, index: int) -> Text:
    """Return the sentence on model ``index`` against the first, coloured by what it says."""
    sentence = report.verdict[index - 1]
    return Text(
        f"{label(report, index)}: {sentence}", style=_STYLES.get(sentence.split(" ")[0], "")
    )


def _print_baseline(console: Console, report: BenchReport, place: str = "") -> None:
    for line in against_baseline(report, place):
        word = line.strip().partition(": ")[2].split(" ")[0]
        console.print(Text(line, style=_STYLES.get(word, "")), overflow="fold")
    for note in report.baseline.notes if report.baseline else ():
        print_warning(f"{place}baseline: {note}")


def _print_grid(console: Console, grid: Grid) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for k, name in enumerate(grid.head):
        if k < grid.texts and name != "#":
            table.add_column(name, overflow="fold", min_width=12)
        else:
            table.add_column(name, justify="right", no_wrap=True)
    for row in grid.rows:
        table.add_row(*row)
    console.print(table)
