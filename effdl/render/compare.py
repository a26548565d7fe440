"""The result of ``effdl compare``."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from effdl.render.console import out
from effdl.render.numbers import error
from effdl.report import CompareReport


def print_compare(report: CompareReport) -> None:
    """Print a row per output and the verdict."""
    console = out()
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("output", overflow="fold")
    for name in ("max abs", "rel L2", "cosine", "SQNR", "top-1"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for o in report.outputs:
        table.add_row(
            o.name,
            error(o.max_abs),
            error(o.rel_l2),
            f"{o.cosine:.6f}",
            f"{o.sqnr_db:.1f} dB",
            "" if o.top1 is None else f"{o.top1:.1%}",
            Text("equal" if o.equal else "differs", style="green" if o.equal else "red"),
        )
    console.print(table)
    for o in report.outputs:
        if not o.equal and not o.reason:
            console.print(f"{o.name}: beyond the tolerance of {o.tolerance:g}", overflow="fold")
        if o.reason:
            console.print(f"{o.name}: {o.reason}", overflow="fold")
    for note in report.notes:
        console.print(note, overflow="fold")
    kind = (
        f"from {report.source}"
        if report.real
        else "random: weak evidence, --data FILE.npz is better"
    )
    verdict = "equal within tolerance" if report.equal else "NOT equal"
    style = "bold green" if report.equal else "bold red"
    console.print(Text(f"{verdict} on {report.feeds} feeds ({kind})", style=style))
