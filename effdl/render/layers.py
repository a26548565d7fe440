"""The result of ``effdl explain quantize``."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from effdl.render.console import out
from effdl.render.numbers import change, error, milliseconds
from effdl.render.words import plural
from effdl.report import LayerRow, LayersReport

_MOST = 40
"""Rows that a terminal is given, those that cost most; --all and --json have them all."""
_WIDE = 110


def print_layers(report: LayersReport, *, whole: bool = False) -> None:
    """Print the table of layers, and what it comes to.

    Args:
        report: what was found.
        whole: every layer, however many.
    """
    console = out()
    console.print(
        Text(f"8-bit integers in {report.path or 'the model'}, {report.form} form", style="bold")
    )
    console.print(
        f"{report.cpu}: {report.reason}" if report.reason else report.cpu, overflow="fold"
    )
    console.print(f"inputs: {report.source}", overflow="fold")
    rows = list(report.rows)
    if not whole and len(rows) > _MOST:
        costly = sorted(rows, key=_weight, reverse=True)[:_MOST]
        rows = [r for r in rows if r in costly]
    wide = console.width >= _WIDE
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", overflow="fold")
    if wide:
        table.add_column("types", no_wrap=True)
    for name in ("range", "error", "float", "8-bit"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("decision", overflow="fold")
    for row in rows:
        style = "" if row.decision == "8-bit" else "dim"
        cells = [_name(row), *([row.kind] if wide else []), _range(row), error(row.effect)]
        table.add_row(*cells, _ms(row.before_ms), _ms(row.after_ms), row.decision, style=style)
    console.print(table)
    if len(rows) < len(report.rows):
        rest = len(report.rows) - len(rows)
        console.print(Text(f"and {plural(rest, 'layer')} that cost less (--all)", style="dim"))
    _print_sum(report)


def _print_sum(report: LayersReport) -> None:
    console = out()
    moved = change(report.before_ms, report.after_ms) or "same"
    console.print(
        f"all of them in 8 bits: {milliseconds(report.before_ms)} -> "
        f"{milliseconds(report.after_ms)} ({moved}), output error {error(report.error)}, "
        f"allowed {report.limit:g}",
        overflow="fold",
    )
    slow, bad = report.left
    if slow or bad:
        parts = []
        if slow:
            parts.append(f"{plural(slow, 'node')} for the time")
        if bad:
            parts.append(f"{plural(bad, 'node')} for the error")
        console.print(f"better left in float, borders counted: {', '.join(parts)}", overflow="fold")
    if not report.real:
        console.print(
            "random inputs: the errors say little; with --data FILE.npz they are those of real ones",
            overflow="fold",
        )
    console.print("effdl optimize MODEL -c int8 does what pays, and measures it", overflow="fold")


def _weight(row: LayerRow) -> float:
    return max(row.before_ms or 0.0, row.after_ms or 0.0)


def _name(row: LayerRow) -> str:
    more = f" + {len(row.names) - 1}" if len(row.names) > 1 else ""
    return f"{row.op_type} {row.names[0]}{more}"


def _range(row: LayerRow) -> str:
    if row.low is None or row.high is None:
        return "each run" if row.kind else "-"
    return f"{row.low:.3g}..{row.high:.3g}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
