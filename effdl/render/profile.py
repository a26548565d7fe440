"""The result of ``effdl bench --profile`` and ``--placement``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from effdl.measure.blame import OVERHEAD
from effdl.measure.placement import advice
from effdl.render.console import out, print_warning
from effdl.render.numbers import change, milliseconds
from effdl.report import NodeTime, Placement, Profile, ProfileReport

_WIDE = 100
_OPS = 12
_PLACES = 8
_NAMES = 2


def print_profile(
    report: ProfileReport, *, times: bool = True, places: bool = False, top: int = 10
) -> None:
    """Print where the time goes, which provider runs what, or both.

    Args:
        report: what was measured.
        times: tables by op type and by node; with two models, where the difference comes from.
        places: execution providers, inserted nodes, fallback.
        top: how many nodes to list.
    """
    console = out()
    count = f"{report.threads} thread{'s' if report.threads != 1 else ''}"
    console.print(
        f"ONNX Runtime {report.onnxruntime}, {report.provider}, "
        f"{count if report.threads else 'all threads'}, ORT_ENABLE_ALL, {report.cpu}",
        overflow="fold",
    )
    feeds = ", ".join(f"{k} {v}" for k, v in report.feeds.items())
    console.print(f"inputs ({report.source}): {feeds}", overflow="fold")
    names = _labels(report)
    for name, profile, placement in zip(names, report.profiles, report.placements, strict=True):
        console.print()
        console.print(Text(_summary(name, profile), style="bold"), overflow="fold")
        if times:
            _print_ops(console, profile)
            _print_nodes(console, profile, top)
        if places:
            _print_placement(console, placement, profile, top)
    if times and len(report.profiles) == 2:
        _print_difference(console, report, names)
    for warning in report.warnings:
        print_warning(warning)


def _labels(report: ProfileReport) -> list[str]:
    """File names, or paths where both are the same."""
    paths = [p.path for p in report.profiles]
    names = [Path(p).name for p in paths]
    return names if len(set(names)) == len(names) else paths


def _summary(name: str, profile: Profile) -> str:
    rest = max(0.0, profile.wall_ms - profile.kernel_ms)
    share = f", {milliseconds(rest)} between kernels" if rest >= 0.005 * profile.wall_ms else ""
    return (
        f"{name}: {milliseconds(profile.wall_ms)} an inference, {len(profile.nodes)} kernels"
        f"{share} ({profile.runs} runs)"
    )


def _table(*columns: str, texts: int = 1) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for k, name in enumerate(columns):
        if k < texts:
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    return table


def _print_ops(console: Console, profile: Profile) -> None:
    table = _table("op type", "nodes", "ms", "share")
    listed = profile.ops if len(profile.ops) <= _OPS + 1 else profile.ops[:_OPS]
    for op in listed:
        table.add_row(op.op_type, str(op.count), _ms(op.ms), _share(op.ms, profile.wall_ms))
    others = profile.ops[len(listed) :]
    if others:
        ms = sum(o.ms for o in others)
        count = sum(o.count for o in others)
        table.add_row(
            f"({len(others)} others)", str(count), _ms(ms), _share(ms, profile.wall_ms), style="dim"
        )
    console.print(table)


def _print_nodes(console: Console, profile: Profile, top: int) -> None:
    wide = console.width >= _WIDE
    columns = ["slowest nodes", "runs as", *(["output"] if wide else []), "ms", "share"]
    table = _table(*columns, texts=len(columns) - 2)
    for node in profile.nodes[:top]:
        cells = [_node(node), node.op_type, *([node.shape] if wide else [])]
        table.add_row(*cells, _ms(node.ms), _share(node.ms, profile.wall_ms))
    console.print(table)


def _node(node: NodeTime) -> str:
    """The model's own names for a node; for one that it does not have, what it is there for."""
    if node.origin:
        return names_of(node.origin)
    return f"(put in for {names_of(node.near)})" if node.near else f"(put in: {node.name})"


def names_of(names: tuple[str, ...]) -> str:
    """``Conv_1 + Relu_2``; of more than two the first and how many there are."""
    if len(names) <= _NAMES:
        return " + ".join(names)
    return f"{names[0]} + {len(names) - 1} more"


def _print_placement(console: Console, found: Placement, profile: Profile, top: int) -> None:
    table = _table("provider", "nodes", "ms", "share")
    for provider, count in found.providers.items():
        ms = found.ms[provider]
        table.add_row(provider, str(count), _ms(ms), _share(ms, profile.wall_ms))
    console.print(table)
    if found.inserted:
        ops = ", ".join(f"{count} {op}" for op, count in found.inserted.items())
        share = _share(found.inserted_ms, profile.wall_ms)
        console.print(
            f"put in by ONNX Runtime: {ops}; {_ms(found.inserted_ms)} ms ({share})", overflow="fold"
        )
    else:
        console.print("ONNX Runtime put no copies, casts or reorders in")
    if found.fallback:
        console.print(
            f"not on {found.wanted}: {len(found.fallback)} nodes, "
            f"{found.fallback_share:.1%} of the kernels' time",
            overflow="fold",
        )
        listed = _table("node", "op type", "provider", texts=3)
        for name, op, provider in found.fallback[:top]:
            listed.add_row(name, op, provider)
        console.print(listed)
        if len(found.fallback) > top:
            console.print(f"and {len(found.fallback) - top} more (--top)")
    else:
        console.print(f"every node runs on {found.wanted}")
    for line in advice(found):
        console.print(f"  hint: {line}", overflow="fold")


def _print_difference(console: Console, report: ProfileReport, names: list[str]) -> None:
    before, after = report.profiles
    console.print()
    console.print(
        Text(f"where the time went, {names[0]} -> {names[1]}", style="bold"), overflow="fold"
    )
    table = _table("kind of operator", "nodes", "->", "ms", "->", "change")
    least = max((abs(c.after_ms - c.before_ms) for c in report.changes), default=0.0) / 100
    for c in report.changes:
        delta = c.after_ms - c.before_ms
        if abs(delta) < least or (c.kind == OVERHEAD and not c.before_ms and not c.after_ms):
            continue
        counts = ("", "") if c.kind == OVERHEAD else (str(c.before), str(c.after))
        kind = f"{c.kind} ({', '.join(c.became)})" if c.became else c.kind
        table.add_row(kind, *counts, _ms(c.before_ms), _ms(c.after_ms), f"{delta:+.3f}")
    total = after.wall_ms - before.wall_ms
    table.add_section()
    table.add_row(
        "inference",
        *(str(len(p.nodes)) for p in report.profiles),
        *(_ms(p.wall_ms) for p in report.profiles),
        f"{total:+.3f}",
    )
    console.print(table)
    _print_slower(console, report.slower)
    if report.reason:
        verdict = change(before.wall_ms, after.wall_ms)
        console.print(Text(f"{names[1]} ({verdict} time): {report.reason}"), overflow="fold")


def _print_slower(console: Console, places: Iterable[tuple[tuple[str, ...], float, float]]) -> None:
    table = _table("what got slower most", "ms", "->", "change")
    for names, before, after in list(places)[:_PLACES]:
        table.add_row(names_of(names), _ms(before), _ms(after), f"{after - before:+.3f}")
    if table.row_count:
        console.print(table)


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 100 else f"{value:.1f}"


def _share(ms: float, whole: float) -> str:
    return f"{ms / whole:.1%}" if whole else "-"
