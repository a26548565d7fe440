"""The result of ``effdl optimize``."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from effdl.render.bench import verdict_line
from effdl.render.console import err, out, print_warning
from effdl.render.numbers import change, count, error, milliseconds, size
from effdl.report import ModelStats, PassReport, RunReport

_FAR = 0.1
"""Relative output error from which a reader is told to score the result."""
_STYLE = {"changed": "green", "unchanged": "dim", "rolled_back": "red", "not_run": "yellow"}


def print_run(report: RunReport, *, verbose: bool = False, to_stderr: bool = False) -> None:
    """Print the passes, the table of before and after, and the verdict."""
    console = err() if to_stderr else out()
    for warning in report.warnings:
        print_warning(warning)
    if report.dry_run:
        _print_plan(console, report, verbose)
        return
    _print_passes(console, report.passes, verbose)
    _print_table(console, report)
    _print_end(console, report)


def _print_passes(console: Console, passes: tuple[PassReport, ...], verbose: bool) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("pass", no_wrap=True)
    table.add_column("result", overflow="fold")
    table.add_column("error", justify="right", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    for p in passes:
        table.add_row(
            p.name, Text(_result(p), style=_STYLE[p.status]), error(p.error), f"{p.seconds:.2f} s"
        )
    console.print(table)
    for p in passes:
        if verbose and (p.touched or p.skipped):
            _print_nodes(console, p, limit=None)


def _result(p: PassReport) -> str:
    notes = "; ".join(f"{k} {_figure(v)}" for k, v in p.notes.items())
    match p.status:
        case "changed":
            left = f", {len(p.skipped)} left alone" if p.skipped else ""
            text = f"changed {p.changes}{left}"
            return "; ".join(t for t in (text, notes, p.reason) if t)
        case "unchanged":
            return p.reason if p.reason == "nothing to do" else f"nothing to do: {p.reason}"
        case "rolled_back":
            return f"rolled back: {p.reason}"
        case _:
            return f"not run: {p.reason}"


def _figure(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:,.4g}"


def _print_nodes(console: Console, p: PassReport, limit: int | None) -> None:
    console.print(Text(f"{p.name}:", style="bold"))
    rows = [(n, w, "") for n, w in p.touched] + [
        (n, f"left alone: {w}", "dim") for n, w in p.skipped
    ]
    for name, what, style in rows[:limit]:
        console.print(Text(f"  {name}  {what}", style=style), overflow="fold")
    if limit is not None and len(rows) > limit:
        console.print(Text(f"  ... {len(rows) - limit} more (--verbose or --json)", style="dim"))


def _print_plan(console: Console, report: RunReport, verbose: bool) -> None:
    for p in report.passes:
        console.print(Text(f"{p.name}: {_result(p)}", style=_STYLE[p.status]))
        if p.touched or p.skipped:
            _print_nodes(console, p, None if verbose else 12)
    b, a = report.before, report.after
    console.print(
        f"nodes {b.nodes} -> {a.nodes}, params {count(b.params)} -> {count(a.params)}, "
        f"MACs {count(b.macs)} -> {count(a.macs)}, weights {size(sum(b.weight_bytes.values()))} -> "
        f"{size(sum(a.weight_bytes.values()))}"
    )
    console.print("dry run: nothing was checked, measured or written")


def _print_table(console: Console, report: RunReport) -> None:
    b, a = report.before, report.after
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("nodes", str(b.nodes), str(a.nodes), change(b.nodes, a.nodes))
    table.add_row("params", count(b.params), count(a.params), change(b.params, a.params))
    table.add_row("MACs", _macs(b), _macs(a), change(b.macs, a.macs))
    table.add_row(
        "file", size(b.file_bytes), size(a.file_bytes), change(b.file_bytes, a.file_bytes)
    )
    table.add_row(
        "file, zstd", size(b.zstd_bytes), size(a.zstd_bytes), change(b.zstd_bytes, a.zstd_bytes)
    )
    if report.bench is not None:
        old, new = report.bench.models[0], report.bench.models[-1]
        table.add_row(
            "latency",
            f"{milliseconds(old.latency.median)} ±{old.latency.spread:.0%}",
            f"{milliseconds(new.latency.median)} ±{new.latency.spread:.0%}",
            f"{new.ratio:.2f}x",
        )
        table.add_row(
            "peak memory",
            size(old.peak_bytes),
            size(new.peak_bytes),
            change(old.peak_bytes, new.peak_bytes),
        )
    if report.accuracy is not None:
        before, after = float(report.accuracy["before"]), float(report.accuracy["after"])
        table.add_row(
            report.accuracy["metric"], f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}"
        )
    console.print(table)


def _macs(stats: ModelStats) -> str:
    text = count(stats.macs)
    return f"{text} +?" if stats.macs_unknown and stats.macs is not None else text


def _print_end(console: Console, report: RunReport) -> None:
    if report.bench is not None:
        console.print(verdict_line(report.bench, len(report.bench.models) - 1))
    else:
        console.print(f"latency not measured: {report.unmeasured}")
    if report.verified is None:
        console.print(Text(f"NOT VERIFIED: {report.unverified}", style="yellow"))
    else:
        v = report.verified
        worst = max(v.outputs, key=lambda o: o.rel_l2, default=None)
        kind = "real samples" if v.real else "random feeds, weak evidence about accuracy"
        where = f"{v.feeds} feeds from {v.source}" if v.real else f"{v.feeds} {kind}"
        if v.equal:
            console.print(f"verified: outputs equal the original's ({where})")
        elif worst is not None:
            top1 = f", same top-1 on {worst.top1:.1%}" if worst.top1 is not None else ""
            found = f"{error(worst.rel_l2)} relative, {worst.sqnr_db:.1f} dB{top1}"
            console.print(f"verified: output error {found} ({where})", overflow="fold")
            if worst.rel_l2 > _FAR:
                console.print(
                    Text(
                        "That is far from the original: score it on labelled data (data.evaluation), or "
                        "keep the layers that suffer in float (ignore).",
                        style="yellow",
                    )
                )
        for note in v.notes:
            console.print(Text(note, style="dim"))
    console.print(f"{report.output}  ({report.seconds:.1f} s)", overflow="fold")
