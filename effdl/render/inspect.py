"""The result of ``effdl inspect``."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from effdl.render.console import out
from effdl.render.numbers import change, count, size
from effdl.report import InspectReport, ModelStats, Opportunity


def print_inspect(reports: Sequence[InspectReport]) -> None:
    """Print the facts of the models side by side, then ops, then what could be done."""
    console = out()
    _print_facts(console, [r.stats for r in reports])
    _print_ops(console, [r.stats for r in reports])
    for report in reports:
        if report.nodes:
            _print_nodes(console, report)
        if report.channels:
            _print_channels(console, report)
        _print_could(console, report, len(reports) > 1)


def _print_facts(console: Console, stats: Sequence[ModelStats]) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for s in stats:
        table.add_column(s.path, overflow="fold")
    rows = {
        "opset": [", ".join(f"{d or 'ai.onnx'} {v}" for d, v in s.opsets.items()) for s in stats],
        "IR version": [str(s.ir_version) for s in stats],
        "inputs": ["\n".join(f"{k} {v}" for k, v in s.inputs.items()) for s in stats],
        "outputs": ["\n".join(f"{k} {v}" for k, v in s.outputs.items()) for s in stats],
        "dynamic dims": [", ".join(s.dynamic) or "none" for s in stats],
        "nodes": [str(s.nodes) for s in stats],
        "params": [count(s.params) for s in stats],
        "MACs": [_macs(s) for s in stats],
        "weights": [
            ", ".join(f"{k} {size(v)}" for k, v in s.weight_bytes.items()) or "none" for s in stats
        ],
        "file": [size(s.file_bytes) for s in stats],
        "file, zstd": [size(s.zstd_bytes) for s in stats],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    console.print(table)
    if len(stats) > 1:
        first = stats[0]
        for s in stats[1:]:
            console.print(
                f"{s.path}: nodes {change(first.nodes, s.nodes)}, params {change(first.params, s.params)}, "
                f"MACs {change(first.macs, s.macs)}, file {change(first.file_bytes, s.file_bytes)}",
                overflow="fold",
            )


def _macs(stats: ModelStats) -> str:
    at = ", ".join(f"{k}={v}" for k, v in stats.dims.items())
    unknown = f", not counted: {', '.join(stats.macs_unknown)}" if stats.macs_unknown else ""
    return count(stats.macs) + (f" at {at}" if at else "") + unknown


def _print_ops(console: Console, stats: Sequence[ModelStats]) -> None:
    if len(stats) == 1:
        ops = sorted(stats[0].ops.items(), key=lambda item: (-item[1], item[0]))
        console.print("ops: " + ", ".join(f"{name} {n}" for name, n in ops), overflow="fold")
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("op", no_wrap=True)
    for s in stats:
        table.add_column(s.path, justify="right", overflow="fold")
    for name in sorted({n for s in stats for n in s.ops}):
        table.add_row(name, *(str(s.ops.get(name, 0)) for s in stats))
    console.print(table)


def _print_nodes(console: Console, report: InspectReport) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("node", overflow="fold")
    table.add_column("op", no_wrap=True)
    for name in ("MACs", "params", "weights"):
        table.add_column(name, justify="right", no_wrap=True)
    for node in report.nodes:
        table.add_row(
            node.name, node.op_type, count(node.macs), count(node.params), size(node.weight_bytes)
        )
    console.print(table)


def _print_channels(console: Console, report: InspectReport) -> None:
    free = [g for g in report.channels if not g.reason]
    console.print(
        f"groups of channels: {len(report.channels)}, of which {len(free)} can lose some",
        overflow="fold",
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("made by", overflow="fold")
    table.add_column("channels", justify="right", no_wrap=True)
    table.add_column("read by, or why all stay", overflow="fold")
    for group in report.channels:
        number = f"{group.channels} x {group.width}" if group.width > 1 else str(group.channels)
        table.add_row(
            _few(group.makers),
            number,
            f"stays: {group.reason}" if group.reason else _few(group.readers),
        )
    console.print(table)


def _few(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "") or "nobody"


def _print_could(console: Console, report: InspectReport, several: bool) -> None:
    if not report.could:
        return
    console.print(
        f"what effdl could do{f' with {report.stats.path}' if several else ''}:", overflow="fold"
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("pass", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold")
    for o in report.could:
        kind = "lossy" if o.lossy else "lossless"
        table.add_row(o.name, f"{kind}, data" if o.needs_data else kind, _could(o))
    console.print(table)


def _could(o: Opportunity) -> str:
    return f"{o.count} places" if o.count else o.reason
