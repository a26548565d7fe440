"""The result of ``effdl compare MODEL --target``: here against there."""

from __future__ import annotations

import math
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from effdl.render.console import out
from effdl.render.numbers import error
from effdl.report import CompareReport, OutputError, Place, ThereReport


def print_there(report: ThereReport) -> None:
    """Print a row per machine with its worst output, in a table per model, then what that says."""
    console = out()
    pairs = dict.fromkeys((r.reference, r.candidate) for r in report.results)
    for pair in pairs:
        if len(pairs) > 1:
            console.print(_title(*pair), overflow="fold")
        console.print(_table([r for r in report.results if (r.reference, r.candidate) == pair]))
    for line in dict.fromkeys(_remarks(report)):
        console.print(line, overflow="fold")
    console.print(_verdict(report), overflow="fold")


def _table(results: list[CompareReport]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("on", no_wrap=True)
    table.add_column("worst output", overflow="fold")
    for name in ("max abs", "rel L2", "top-1"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for result in results:
        worst = _worst(result)
        words = ("right", "DIFFERS") if _decides(result) else ("equal", "differs")
        style = ("green" if result.equal else "red") if _decides(result) else ""
        table.add_row(
            _core(result.place),
            worst.name,
            error(worst.max_abs),
            error(worst.rel_l2),
            "" if worst.top1 is None else f"{worst.top1:.1%}",
            Text(words[not result.equal], style=style),
        )
    return table


def _title(reference: str, candidate: str) -> str:
    if reference == candidate:
        return f"{Path(candidate).name}: there against here"
    return f"{Path(candidate).name} against {Path(reference).name}, both there"


def _decides(result: CompareReport) -> bool:
    """Whether it compares one model here and there: two models may differ and both be right."""
    return result.reference == result.candidate


def _worst(result: CompareReport) -> OutputError:
    wrong = [o for o in result.outputs if not o.equal] or result.outputs
    return max(wrong, key=lambda o: o.rel_l2 if math.isfinite(o.rel_l2) else 1e300)


def _core(place: Place | None) -> str:
    return "" if place is None else place.cpu


def _remarks(report: ThereReport) -> list[str]:
    said = []
    for result in (r for r in report.results if _decides(r)):
        name = Path(result.candidate).name
        said += [f"{name}: {note}" for note in result.notes]
        for o in result.outputs:
            where = f"{name} on {_core(result.place)}, output {o.name}"
            if o.reason:
                said.append(f"{where}: {o.reason}")
            elif not o.equal:
                said.append(f"{where}: beyond the tolerance of {o.tolerance:g}")
    return said


def _verdict(report: ThereReport) -> Text:
    first = report.results[0]
    kind = (
        f"from {first.source}" if first.real else "random: weak evidence, --data FILE.npz is better"
    )
    wrong = dict.fromkeys(_core(r.place) for r in report.results if _decides(r) and not r.equal)
    where = ", ".join(dict.fromkeys(_core(r.place) for r in report.results))
    text = f"NOT right on {', '.join(wrong)}" if wrong else f"right on {where}"
    ending = f"{first.feeds} feed{'s' if first.feeds != 1 else ''} ({kind}), against {report.here}"
    if first.place is not None and first.place.emulator:
        ending += "; latency not measured: emulated"
    return Text(f"{text}: {ending}", style="bold red" if wrong else "bold green")
