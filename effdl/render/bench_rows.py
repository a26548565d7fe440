"""The tables of a bench as rows of text: the same on the console and in Markdown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from effdl.measure.baseline import setting, threads_of
from effdl.render import roof
from effdl.render.numbers import count, milliseconds, size
from effdl.report import BenchReport, BenchResult, BenchScan

Cell = Callable[[BenchResult], str]
RANKED_FROM = 3
"""So many models are put in order of speed; two stay as they were given."""


@dataclass(frozen=True)
class Grid:
    """A table.

    Args:
        head: names of the columns, the first ``texts`` of them to the left.
        rows: as many cells each.
        texts: columns with names.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    texts: int = 1


def order(report: BenchReport) -> list[int]:
    """Return the models' numbers as they are listed: fastest first where there are three or more."""
    numbers = list(range(len(report.models)))
    if len(numbers) < RANKED_FROM:
        return numbers
    return sorted(numbers, key=lambda k: -report.models[k].ratio)


def label(report: BenchReport, index: int) -> str:
    """Return the file name of model ``index``, or its path when another model has that name too."""
    path = report.models[index].path
    names = [Path(m.path).name for m in report.models if m.path != path]
    return path if Path(path).name in names else Path(path).name


def speed(report: BenchReport, wide: bool) -> Grid:
    """Return latency and ratio of each model; with ``wide`` more of the distribution."""
    several = len(report.models) > 1
    columns: list[tuple[str, Cell]] = [
        ("median", lambda m: milliseconds(m.latency.median)),
        ("p90", lambda m: f"{m.latency.p90:.3g}"),
        *([("p99", lambda m: f"{m.latency.p99:.3g}")] if wide else []),
        ("±", lambda m: f"{m.latency.spread:.0%}"),
    ]
    if any(m.throughput is not None for m in report.models):
        columns.append(("per s", lambda m: _rate(m.throughput)))
    if wide:
        columns.append(("runs", lambda m: str(m.latency.runs)))
    if several:
        columns += [("ratio", _ratio), ("95% interval", _interval)]
    return _grid(report, columns)


def costs(report: BenchReport, wide: bool) -> Grid:
    """Return what each model takes: time to start, memory, bytes, work; with ``wide`` its weights."""
    columns: list[tuple[str, Cell]] = [
        ("load", lambda m: milliseconds(m.load_ms)),
        ("first run", lambda m: milliseconds(m.first_ms)),
        ("memory", lambda m: size(m.peak_bytes)),
        ("file", lambda m: size(m.file_bytes)),
        ("zstd", lambda m: size(m.zstd_bytes)),
        *([("params", _params)] if wide else []),
        ("MACs", lambda m: count(m.macs)),
    ]
    return _grid(report, columns, places=False)


def work(report: BenchReport) -> Grid | None:
    """Return how near to the machine's peaks each model runs, its energy and memory on a device."""
    models = report.models
    columns: list[tuple[str, Cell]] = []
    if report.peaks is not None and any(m.gflops is not None for m in models):
        columns += [
            ("GFLOP/s", roof.rate),
            ("of peak", roof.share),
            ("limit", lambda m: m.bound or "-"),
        ]
    if any(m.energy_mj is not None for m in models):
        columns.append(("energy", roof.energy))
    if any(m.device_bytes is not None for m in models):
        columns.append(("device memory", lambda m: size(m.device_bytes)))
    return _grid(report, columns, places=False) if columns else None


def cells(report: BenchScan, wide: bool) -> list[tuple[str, Grid]]:
    """Return a table per model: its speed at each combination, with the gain over the first one."""
    axes = list(report.axes)
    tables = []
    for k in range(len(report.cells[0].models)):
        columns = _cell_columns(report, k, wide)
        rows = [
            (
                *(str(value_of(cell, axis)) for axis in axes),
                *(show(cell.models[k]) for _, show in columns),
            )
            for cell in report.cells
        ]
        title = label(report.cells[0], k) + ("" if k else " (base)")
        head = (*axes, *(name for name, _ in columns))
        tables.append((title, Grid(head, tuple(rows), 0)))
    return tables


def _cell_columns(report: BenchScan, k: int, wide: bool) -> list[tuple[str, Cell]]:
    first = _pace(report.cells[0].models[k])
    columns: list[tuple[str, Cell]] = [("median", lambda m: milliseconds(m.latency.median))]
    if wide:
        columns.append(("±", lambda m: f"{m.latency.spread:.0%}"))
    if any(c.models[k].throughput is not None for c in report.cells):
        if wide:
            columns.append(
                ("per sample", lambda m: milliseconds(m.latency.median / (m.batch or 1)))
            )
        columns.append(("per s", lambda m: _rate(m.throughput)))
    columns.append(("scaling", lambda m: f"{_pace(m) / first:.2f}x"))
    if k:
        columns.append(("ratio", _ratio))
        if wide:
            columns.append(("95% interval", _interval))
        columns.append(("verdict", lambda m: m.verdict))
    return columns


def value_of(cell: BenchReport, axis: str) -> int:
    """Return where a cell of a scan lies on an axis."""
    return cell.threads if axis == "threads" else cell.dims[axis]


def _grid(report: BenchReport, columns: list[tuple[str, Cell]], places: bool = True) -> Grid:
    ranked = len(report.models) >= RANKED_FROM
    places = places and ranked
    rows = []
    for place, k in enumerate(order(report), 1):
        name = label(report, k) + (" (base)" if ranked and k == 0 else "")
        values = (cell(report.models[k]) for _, cell in columns)
        rows.append((*([str(place)] if places else []), name, *values))
    head = (*(["#"] if places else []), "model", *(name for name, _ in columns))
    return Grid(head, tuple(rows), 2 if places else 1)


def _params(m: BenchResult) -> str:
    return count(m.params)


def _ratio(m: BenchResult) -> str:
    return "base" if m.verdict == "reference" else f"{m.ratio:.2f}x"


def _interval(m: BenchResult) -> str:
    return "" if m.verdict == "reference" else f"[{m.ci[0]:.2f}, {m.ci[1]:.2f}]"


def _pace(m: BenchResult) -> float:
    return m.throughput if m.throughput is not None else 1e3 / m.latency.median


def _rate(value: float | None) -> str:
    return "-" if value is None else count(round(value)) if value >= 100 else f"{value:.3g}"


def where(report: BenchReport | BenchScan) -> str:
    """Return how and where it was measured, in one line."""
    first = report.cells[0] if isinstance(report, BenchScan) else report
    scanned = isinstance(report, BenchScan) and "threads" in report.axes
    threads = [] if scanned else [threads_of(first)]
    parts = [f"ONNX Runtime {first.onnxruntime}", first.provider, *threads, first.cpu]
    return ", ".join([*parts, "ORT_ENABLE_ALL"])


def inputs(report: BenchReport | BenchScan) -> str:
    """Return the inputs and where they come from."""
    scan = isinstance(report, BenchScan)
    first = report.cells[0] if isinstance(report, BenchScan) else report
    feeds = ", ".join(f"{name} {kind}" for name, kind in first.feeds.items())
    return f"inputs ({first.source}{', first row' if scan else ''}): {feeds}"


def warnings(report: BenchReport | BenchScan) -> list[str]:
    """Return all warnings; those of a scan with the setting they belong to."""
    if isinstance(report, BenchReport):
        return list(report.warnings)
    return [f"{setting(c)}: {w}" for c in report.cells for w in c.warnings]


def control(report: BenchReport) -> str:
    """Return what the second process of the base showed, empty without one."""
    times = f"{report.generations} time{'s' if report.generations != 1 else ''}"
    if report.control is None:
        return "" if len(report.models) < 2 else f"each process was started {times}; no control"
    value, low, high = report.control
    return (
        f"control: the base against itself {value:.2f}x [{low:.2f}, {high:.2f}]; "
        f"each process was started {times}"
    )


def against_baseline(report: BenchReport, place: str = "") -> list[str]:
    """Return the sentences on a baseline: a heading, then one per model."""
    found = report.baseline
    if found is None:
        return []
    by = (
        "ratios to the base"
        if found.by == "ratio"
        else "latency, corrected for the machine's speed by the yardstick"
    )
    return [
        f"{place}against {found.path} ({by}):",
        *(f"  {Path(c.path).name}: {c.sentence}" for c in found.changes),
    ]
