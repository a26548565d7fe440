"""A bench as GitHub-flavoured Markdown."""

from __future__ import annotations

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
from effdl.render.roof import sources
from effdl.report import BenchReport, BenchScan


def bench_markdown(report: BenchReport | BenchScan) -> str:
    """Return the tables and verdicts of a bench."""
    parts = _scan(report) if isinstance(report, BenchScan) else _bench(report)
    return "\n\n".join(p for p in parts if p) + "\n"


def _bench(report: BenchReport) -> list[str]:
    rates = work(report)
    said = [
        f"- **{_plain(label(report, k))}**: {report.verdict[k - 1]}" for k in order(report) if k
    ]
    return [
        _table(speed(report, wide=True)),
        "\n".join(said),
        _baseline(report),
        _table(costs(report, wide=True)),
        _table(rates) if rates is not None else "",
        "\n".join(_plain(line) for line in sources(report)),
        _plain(control(report)),
        *_end(report),
    ]


def _scan(report: BenchScan) -> list[str]:
    parts = []
    for title, grid in cells(report, wide=True):
        parts += [f"**{_plain(title)}**", _table(grid)]
    changes = (_baseline(cell, f"{setting(cell)}: ") for cell in report.cells)
    return [*parts, *changes, *_end(report)]


def _end(report: BenchReport | BenchScan) -> list[str]:
    return [
        f"{_plain(where(report))}; {_plain(inputs(report))}",
        "\n".join(f"> - {_plain(w)}" for w in warnings(report)),
    ]


def _baseline(report: BenchReport, place: str = "") -> str:
    lines = against_baseline(report, place)
    if not lines:
        return ""
    notes = report.baseline.notes if report.baseline else ()
    said = [f"- {_plain(line.strip())}" for line in (*lines[1:], *notes)]
    return "\n".join([_plain(lines[0]), "", *said])


def _table(grid: Grid) -> str:
    marks = [":---" if k < grid.texts and n != "#" else "---:" for k, n in enumerate(grid.head)]
    rows = [grid.head, tuple(marks), *grid.rows]
    return "\n".join(
        "| " + " | ".join(c if r == 1 else _plain(c) for c in row) + " |"
        for r, row in enumerate(rows)
    )


def _plain(text: str) -> str:
    """Take the meaning from what Markdown would read as a mark."""
    for mark in "\\`*_|<>[]":
        text = text.replace(mark, "\\" + mark)
    return text.replace("\n", " ")
