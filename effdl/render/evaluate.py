"""The result of ``effdl evaluate``."""

from __future__ import annotations

import math
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from effdl.render.console import out, print_warning
from effdl.report import EvaluateReport

_WIDE = 100
_STYLE = {"better": "bold green", "worse": "bold red"}


def print_evaluate(report: EvaluateReport) -> None:
    """Print what was scored, a row per model, and what the differences mean."""
    console = out()
    better = "" if report.higher_is_better else " (lower is better)"
    what = f"{report.metric}{better} of output '{report.output}' on {report.samples} samples"
    console.print(f"{what} from {report.source}, {report.target}", overflow="fold")
    if report.reference:
        console.print(f"the outputs of {Path(report.reference).name} stand in for labels")
    for note in report.notes:
        console.print(note, overflow="fold")
    compared = any(m.difference is not None for m in report.models)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", overflow="fold")
    table.add_column(report.metric, justify="right", overflow="fold")
    bounded = not compared or console.width >= _WIDE
    if bounded:
        table.add_column("95 % interval", justify="right", no_wrap=True)
    if compared:
        table.add_column("points" if report.share else "difference", justify="right", no_wrap=True)
        table.add_column("95 % interval", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for index, m in enumerate(report.models):
        cells = [label(report, index), score(m.score, report)]
        if bounded:
            cells.append(bounds(m.ci, report))
        if compared:
            gap = m.difference_ci
            cells.append("" if m.difference is None else change(m.difference, report))
            cells.append("" if gap is None else changes(gap, report))
        table.add_row(*cells, Text(m.verdict, style=_STYLE.get(m.verdict, "")))
    console.print(table)
    for index, sentence in enumerate(report.verdict, 1):
        style = _STYLE.get(report.models[index].verdict, "")
        console.print(Text(f"{label(report, index)}: {sentence}", style=style), overflow="fold")
    for sentence in report.failed:
        print_warning(sentence)


def score(value: float, report: EvaluateReport) -> str:
    """``84.54 %`` of a share, else four significant digits."""
    if math.isnan(value):
        return "none"
    return f"{value:.2%}".replace("%", " %") if report.share else f"{value:.4g}"


def bounds(pair: tuple[float, float], report: EvaluateReport) -> str:
    """``[83.82, 85.24]``, or what can be said of it."""
    if not all(map(math.isfinite, pair)):
        return "unknown"
    low, high = pair
    return f"[{100 * low:.2f}, {100 * high:.2f}]" if report.share else f"[{low:.4g}, {high:.4g}]"


def change(value: float, report: EvaluateReport) -> str:
    """``-0.31``: points of a share, else three significant digits."""
    if math.isnan(value):
        return "none"
    return f"{100 * value:+.2f}" if report.share else f"{value:+.3g}"


def changes(pair: tuple[float, float], report: EvaluateReport) -> str:
    """``[-0.50, -0.12]``."""
    if not all(map(math.isfinite, pair)):
        return "unknown"
    return f"[{change(pair[0], report)}, {change(pair[1], report)}]"


def label(report: EvaluateReport, index: int) -> str:
    """Return the file name of a model, or its path when another model has that name too."""
    path = report.models[index].path
    others = [Path(m.path).name for m in report.models if m.path != path]
    return path if Path(path).name in others else Path(path).name
