"""The result of ``effdl bench``."""

from __future__ import annotations

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from effdl.render.console import out, print_warning
from effdl.render.numbers import milliseconds, size
from effdl.report import BenchReport

_WIDE = 100


def print_bench(report: BenchReport) -> None:
    """Print where and how it was measured, a row per model, and the verdicts."""
    console = out()
    threads = (
        f"{report.threads} thread{'s' if report.threads != 1 else ''}"
        if report.threads
        else "all threads"
    )
    console.print(
        f"ONNX Runtime {report.onnxruntime}, {report.provider}, {threads}, ORT_ENABLE_ALL, {report.cpu}",
        overflow="fold",
    )
    feeds = ", ".join(f"{k} {v}" for k, v in report.feeds.items())
    console.print(f"inputs ({report.source}): {feeds}", overflow="fold")
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", overflow="fold")
    columns = ["median", "p90", "p99", "±", "ratio", "load", "memory", "file", "zstd"]
    if console.width < _WIDE:  # the names of the models need the room
        columns = ["median", "p90", "±", "ratio", "memory", "file"]
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for index, m in enumerate(report.models):
        t = m.latency
        cells = {
            "median": milliseconds(t.median),
            "p90": f"{t.p90:.3g}",
            "p99": f"{t.p99:.3g}",
            "±": f"{t.spread:.0%}",
            "ratio": f"{m.ratio:.2f}x",
            "load": f"{m.load_ms:.0f} ms",
            "memory": size(m.peak_bytes),
            "file": size(m.file_bytes),
            "zstd": size(m.zstd_bytes),
        }
        table.add_row(label(report, index), *(cells[name] for name in columns))
    console.print(table)
    for index in range(1, len(report.models)):
        console.print(verdict_line(report, index))
    for warning in report.warnings:
        print_warning(warning)


def verdict_line(report: BenchReport, index: int) -> Text:
    """Return the sentence on model ``index`` against the first, coloured by what it says."""
    text = report.verdict[index - 1]
    style = (
        "bold green"
        if text.startswith("faster")
        else "bold red"
        if text.startswith("slower")
        else ""
    )
    return Text(f"{label(report, index)}: {text}", style=style)


def label(report: BenchReport, index: int) -> str:
    """Return the file name of model ``index``, or its path when another model has that name too."""
    path = report.models[index].path
    names = [Path(m.path).name for m in report.models if m.path != path]
    return path if Path(path).name in names else Path(path).name
