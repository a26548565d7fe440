"""The charts of a run: latency, size and error after every step, and time per kind of operator."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from effdl.render import svg
from effdl.render.markup import Markup, tag
from effdl.render.numbers import error, milliseconds, size
from effdl.render.svg import Dot, Pair, Row
from effdl.render.words import (
    STATUS,
    at_fault,
    change_ms,
    op_times,
    ratio,
    short_ms,
    why,
    worst_output,
)
from effdl.report import BenchResult, GateReport, OpChange, PassReport, RunReport

_MOST_OPS = 10
_MOST_AT_FAULT = 6
_KEYS = {
    "plain": '<rect width="12" height="9" rx="1" class="plain"/>',
    "kept": '<rect width="12" height="9" rx="1" class="kept"/>',
    "dropped": '<rect x=".5" y=".5" width="11" height="8" rx="1" class="dropped"/>',
    "inner": '<rect width="12" height="9" rx="1" class="plain"/><rect width="8" height="9" class="inner"/>',
    "mark": '<path d="M6 -1V11" class="mark"/>',
    "interval": '<path d="M1 5H11M1 1V9M11 1V9" class="interval"/>',
    "dot": '<circle cx="6" cy="5" r="4.5" class="kept"/>',
    "ring": '<circle cx="6" cy="5" r="4" class="ring"/>',
}


def section(report: RunReport) -> Markup:
    """Return the charts that the report has figures for."""
    made = [_latency(report), _size(report), _error(report), _operators(report)]
    figures = [m for m in made if m]
    figures += [_at_fault(k, p) for k, p in enumerate(report.passes, 1) if _has_fault(p)]
    if not figures:
        return Markup("")
    return tag("section", tag("h2", "Step by step"), tag("div", *figures, class_="charts"))


def _latency(report: RunReport) -> Markup:
    rows: list[Row] = []
    table: list[Sequence[object]] = []
    measured = any(_timed(p.gate) for p in report.passes)
    first, last = _ends(report)
    start = first.latency.median if first else _first_time(report)
    if start is None:
        return Markup("")
    rows.append(Row("input", milliseconds(start), amount=start, kind="plain"))
    table.append(("input", "", milliseconds(start), "", ""))
    for k, p in enumerate(report.passes, 1) if measured else ():
        rows.append(_latency_row(k, p))
        if p.gate is not None and p.gate.latency_ms is not None:
            before = "" if p.gate.before_ms is None else milliseconds(p.gate.before_ms)
            after = milliseconds(p.gate.latency_ms)
            table.append((_label(k, p), before, after, _ratio(p.gate), p.gate.verdict))
    if last is not None and report.won:
        low, high = _around(last.latency.median, last.ratio, last.ci)
        speed = f"{last.ratio:.2f}× [{last.ci[0]:.2f}, {last.ci[1]:.2f}]"
        shown = milliseconds(last.latency.median)
        rows.append(
            Row("output", shown, speed, last.latency.median, low, high, mark=start, kind="kept")
        )
        table.append(("output", milliseconds(start), shown, speed, last.verdict))
    about = "; ".join(f"{r.label}: {r.value} {r.detail}".strip() for r in rows)
    keys = [("plain", "input"), ("kept", "kept")]
    if measured:
        keys.append(("dropped", "dropped"))
    keys += [("mark", "the model before"), ("interval", "95% interval of the ratio")]
    return _figure(
        "Latency",
        "Median time of one inference; every step was timed beside the model before it."
        if measured
        else "Median time of one inference; the steps were not measured one by one.",
        keys,
        svg.bars("latency", "Latency after every step", about, rows, lambda v: f"{v:g} ms"),
        ("step", "before", "after", "ratio", "verdict"),
        table,
    )


def _latency_row(number: int, p: PassReport) -> Row:
    gate = p.gate
    if gate is None or gate.latency_ms is None:
        value = "not measured" if p.status == "changed" else STATUS.get(p.status, p.status)
        return Row(_label(number, p), value, kind=_kind(p))
    low, high = _around(gate.latency_ms, gate.ratio, gate.ci)
    detail = "" if gate.ratio is None else _ratio(gate)
    shown = milliseconds(gate.latency_ms)
    return Row(
        _label(number, p), shown, detail, gate.latency_ms, low, high, gate.before_ms, kind=_kind(p)
    )


def _around(
    median: float, value: float | None, ci: tuple[float, float] | None
) -> tuple[float | None, float | None]:
    """Return the interval of a ratio as one of times, around the median that is shown."""
    if value is None or ci is None or min(ci) <= 0:
        return None, None
    return median * value / ci[1], median * value / ci[0]


def _size(report: RunReport) -> Markup:
    b, a = report.before, report.after
    if report.dry_run or not b.file_bytes:
        return Markup("")
    rows = [_file_row("input", b.file_bytes, b.zstd_bytes, "plain")]
    for k, p in enumerate(report.passes, 1):
        if p.gate is not None and p.gate.file_bytes is not None:
            amount, shown = p.gate.file_bytes, size(p.gate.file_bytes)
        elif p.status == "changed":
            amount, shown = p.weight_bytes, f"{size(p.weight_bytes)} of weights"
        else:
            rows.append(Row(_label(k, p), STATUS.get(p.status, p.status), kind=_kind(p)))
            continue
        rows.append(Row(_label(k, p), shown, amount=amount, kind=_kind(p)))
    rows.append(_file_row("output", a.file_bytes, a.zstd_bytes, "kept"))
    about = "; ".join(f"{r.label}: {r.value} {r.detail}".strip() for r in rows)
    keys = [
        ("plain", "input"),
        ("kept", "kept"),
        ("dropped", "dropped"),
        ("inner", "compressed with zstd"),
    ]
    return _figure(
        "Size",
        "Bytes on disk after every step; of the weights alone where no file was written.",
        keys,
        svg.bars("size", "Size after every step", about, rows, _bytes),
        ("step", "size", "zstd"),
        [(r.label, r.value, r.detail.removeprefix("zstd ")) for r in rows if r.amount is not None],
    )


def _file_row(name: str, raw: int, packed: int | None, kind: str) -> Row:
    detail = "" if packed is None else f"zstd {size(packed)}"
    return Row(name, size(raw), detail, raw, inner=packed, kind=kind)


def _error(report: RunReport) -> Markup:
    rows = []
    for k, p in enumerate(report.passes, 1):
        total = p.gate.fidelity if p.gate is not None else None
        if p.error is None and total is None:
            rows.append(Dot(_label(k, p), STATUS.get(p.status, p.status), kind=_kind(p)))
            continue
        detail = "" if total is None else f"in total {error(total)}"
        rows.append(Dot(_label(k, p), error(p.error), detail, p.error, total, _kind(p)))
    worst = worst_output(report)
    if worst is not None:
        rows.append(Dot("output", error(worst.rel_l2), total=worst.rel_l2))
    values = [v for r in rows for v in (r.step, r.total) if v is not None and math.isfinite(v)]
    if not any(values):
        return Markup("")
    limit = (report.recipe.get("budget") or {}).get("fidelity")
    about = "; ".join(f"{r.label}: {r.value}" for r in rows)
    return _figure(
        "Output error",
        "Relative error of the worst output, logarithmic; 0 at the left end.",
        [("dot", "against the model before"), ("ring", "against the input")],
        svg.dots(
            "error",
            "Output error after every step",
            about,
            rows,
            limit,
            f"budget {limit:g}" if limit else "",
        ),
        ("step", "against the model before", "against the input"),
        [
            (r.label, error(r.step), error(r.total))
            for r in rows
            if (r.step, r.total) != (None, None)
        ],
    )


def _operators(report: RunReport) -> Markup:
    if not report.changes:
        return Markup("")
    return _pairs(
        "operators",
        "Time by operator",
        "Time per inference in input and output.",
        report.changes,
        _MOST_OPS,
    )


def _has_fault(p: PassReport) -> bool:
    return p.status == "dropped" and p.gate is not None and bool(p.gate.changes)


def _at_fault(number: int, p: PassReport) -> Markup:
    assert p.gate is not None
    names = at_fault(p, 3)
    blamed = f"Nodes at fault: {names}. " if names else ""
    return _pairs(
        f"fault{number}",
        f"Why {p.name} was dropped",
        f"Step {number}: {why(p)}. {blamed}Time by operator before and after the step.",
        p.gate.changes,
        _MOST_AT_FAULT,
    )


def _pairs(name: str, title: str, caption: str, changes: tuple[OpChange, ...], most: int) -> Markup:
    shown = op_times(changes, most)
    rows = [
        Pair(
            c.kind,
            f"{short_ms(c.before_ms)} → {short_ms(c.after_ms)} ms",
            _nodes(c),
            c.before_ms,
            c.after_ms,
        )
        for c in shown
    ]
    about = "; ".join(f"{r.label} {r.detail}: {r.value}" for r in rows)
    return _figure(
        title,
        caption,
        [("plain", "before"), ("kept", "after")],
        svg.pairs(name, title, about, rows, lambda v: f"{v:g} ms"),
        ("operator", "nodes", "before", "after", "change"),
        [
            (
                _kind_of_work(c),
                _nodes(c),
                f"{short_ms(c.before_ms)} ms",
                f"{short_ms(c.after_ms)} ms",
                change_ms(c),
            )
            for c in sorted(changes, key=lambda c: -abs(c.after_ms - c.before_ms))
        ],
    )


def _nodes(c: OpChange) -> str:
    if not c.before and not c.after:
        return ""
    return f"×{c.before}" if c.before == c.after else f"×{c.before} → {c.after}"


def _kind_of_work(c: OpChange) -> str:
    return f"{c.kind} (now {', '.join(c.became)})" if c.became else c.kind


def _figure(
    title: str,
    caption: str,
    keys: Sequence[tuple[str, str]],
    chart: Markup,
    head: Sequence[str],
    rows: Iterable[Sequence[object]],
) -> Markup:
    """Return a chart with its legend above and its numbers, folded, below."""
    legend = [
        tag(
            "span",
            tag("svg", Markup(_KEYS[k]), width=12, height=10, aria_hidden="true"),
            words,
            class_="key",
        )
        for k, words in keys
    ]
    cells = [tag("th", h, scope="col", class_="n" if k else None) for k, h in enumerate(head)]
    body = [
        tag("tr", tag("th", r[0], scope="row"), *(tag("td", c, class_="n") for c in r[1:]))
        for r in rows
    ]
    table = tag(
        "table", tag("thead", tag("tr", *cells)), tag("tbody", *body), class_="scroll small"
    )
    return tag(
        "figure",
        tag("h3", title),
        tag("figcaption", caption, tag("br"), *legend),
        chart,
        tag("details", tag("summary", "The numbers"), table, class_="numbers"),
    )


def _ratio(gate: GateReport) -> str:
    return ratio(gate).replace("x", "×")


def _label(number: int, p: PassReport) -> str:
    gone = p.status in ("dropped", "rolled_back")
    return f"{number} {p.name}{' · dropped' if gone else ''}"


def _kind(p: PassReport) -> str:
    return "kept" if p.status == "changed" else "dropped"


def _timed(gate: GateReport | None) -> bool:
    return gate is not None and gate.latency_ms is not None


def _ends(report: RunReport) -> tuple[BenchResult | None, BenchResult | None]:
    if report.bench is None:
        return None, None
    return report.bench.models[0], report.bench.models[-1]


def _first_time(report: RunReport) -> float | None:
    times = (p.gate.before_ms for p in report.passes if p.gate is not None)
    return next((t for t in times if t is not None), None)


def _bytes(value: float) -> str:
    return "0" if value == 0 else size(round(value)).replace(".00 ", " ").replace(".0 ", " ")
