"""The result of ``effdl optimize``."""

from __future__ import annotations

import textwrap

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from effdl.render.bench import verdict_line
from effdl.render.console import err, out, print_warning
from effdl.render.numbers import change, count, error, milliseconds, score, size
from effdl.render.words import (
    at_fault,
    notes,
    op_times,
    plural,
    ratio,
    score_change,
    settled,
    short_ms,
    tally,
    why,
)
from effdl.report import ModelStats, PassReport, RunReport

_FAR = 0.1
"""Relative output error from which a reader is told to score the result."""
_STYLE = {
    "changed": "green",
    "unchanged": "dim",
    "rolled_back": "red",
    "dropped": "yellow",
    "not_run": "yellow",
}
_GAP = 2
"""Blanks between two columns of the table of passes."""
_LEGEND = " speed, error: against the model before the pass; [95% interval]"
_MOST_OPS = 4
_MOST_BLAMED = 3


def print_run(report: RunReport, *, verbose: bool = False, to_stderr: bool = False) -> None:
    """Print the passes, the table of before and after, and the verdict."""
    console = err() if to_stderr else out()
    report = settled(report)
    for warning in report.warnings:
        print_warning(warning)
    if report.dry_run:
        _print_plan(console, report, verbose)
        return
    _print_passes(console, report.passes, verbose)
    if report.won:
        _print_table(console, report)
        _print_end(console, report)
    else:
        _print_lost(console, report)


def _print_passes(console: Console, passes: tuple[PassReport, ...], verbose: bool) -> None:
    """Print a row per pass; what does not fit into its cells folds under it over the full width."""
    measured = any(p.gate is not None and p.gate.ratio is not None for p in passes)
    head = ["pass", "result", *(["speed"] if measured else []), "error", "time"]
    rows = [
        [p.name, _result(p), *([ratio(p.gate)] if measured else []), *_figures(p)] for p in passes
    ]
    widths = _widths([head, *rows])
    room = console.width - 2 - sum(widths) - _GAP * (len(widths) - 1) + widths[1]
    below: list[list[tuple[str, str]]] = []
    for p, row in zip(passes, rows, strict=True):
        more = [(_reason(p), _STYLE[p.status]), (_notes(p), "dim")]
        texts = [t for t, _ in more if t]
        inline = row[1] + (": " if _reason(p) else "; ") + "; ".join(texts)
        if texts and len(inline) <= room:
            row[1], more = inline, []
        below.append(more)
    widths = _widths([head, *rows])
    rule = sum(widths) + _GAP * (len(widths) - 1)
    console.print(Text("\n " + _line(head, widths), style="bold"))
    console.print(" " + "─" * min(rule, console.width - 1))
    indent = 1 + widths[0] + _GAP
    for p, row, more in zip(passes, rows, below, strict=True):
        console.print(Text(" " + _line(row, widths), style=_STYLE[p.status]))
        for text, style in more:
            for line in textwrap.wrap(text, max(console.width - indent - 1, 20)):
                console.print(Text(" " * indent + line, style=style))
    if measured:
        console.print(Text(_LEGEND, style="dim"), overflow="fold")
    console.print()
    for p in passes:
        if verbose and (p.touched or p.skipped):
            _print_nodes(console, p, limit=None)


def _widths(rows: list[list[str]]) -> list[int]:
    return [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]


def _line(cells: list[str], widths: list[int]) -> str:
    """Return cells in columns: the first two to the left, figures to the right."""
    padded = [
        c.ljust(w) if k < 2 else c.rjust(w)
        for k, (c, w) in enumerate(zip(cells, widths, strict=True))
    ]
    return (" " * _GAP).join(padded).rstrip()


def _result(p: PassReport) -> str:
    match p.status:
        case "changed":
            left = f", {len(p.skipped)} left alone" if p.skipped else ""
            return f"changed {p.changes}{left}"
        case "unchanged":
            return "nothing to do"
        case "dropped":
            return "DROPPED"
        case _:
            return p.status.replace("_", " ")


def _figures(p: PassReport) -> list[str]:
    seconds = "" if p.status == "not_run" else f"{p.seconds:.2f} s"
    return [error(p.error), seconds]


def _reason(p: PassReport) -> str:
    reason = why(p)
    blamed = at_fault(p, _MOST_BLAMED)
    if blamed:
        reason = f"{reason}; at fault: {blamed}"
    return "" if reason == "nothing to do" else reason


def _notes(p: PassReport) -> str:
    return notes(p) if p.status == "changed" else ""


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
        texts = [t for t in (_reason(p), _notes(p)) if t]
        said = _result(p) + (": " if _reason(p) else "; ") * bool(texts) + "; ".join(texts)
        console.print(Text(f"{p.name}: {said}", style=_STYLE[p.status]), overflow="fold")
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
    """Print the model before and after."""
    b, a = report.before, report.after
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
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
        before, after = (score(report.accuracy[k]) for k in ("before", "after"))
        table.add_row(
            report.accuracy["metric"],
            before,
            after,
            score_change(report.accuracy),
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
    if report.changes:
        changes = (
            f"{c.kind} {short_ms(c.before_ms)} -> {short_ms(c.after_ms)} ms"
            for c in op_times(report.changes, _MOST_OPS)
        )
        console.print(f"by operator: {'; '.join(changes)}", overflow="fold")
    _print_verified(console, report)
    console.print(f"{report.output}  ({_cost(report)})", overflow="fold")


def _print_lost(console: Console, report: RunReport) -> None:
    """Print the end of a run of which nothing was kept."""
    console.print(
        Text(f"nothing helped: {report.output} is the input, unchanged", style="bold yellow"),
        overflow="fold",
    )
    console.print(
        f"tried {plural(len(report.passes), 'pass', 'passes')}: {tally(report)}  ({_cost(report)})",
        overflow="fold",
    )


def _cost(report: RunReport) -> str:
    """What the run itself took."""
    memory = f", {size(report.peak_bytes)} of memory" if report.peak_bytes else ""
    return f"{report.seconds:.1f} s{memory}"


def _print_verified(console: Console, report: RunReport) -> None:
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
