"""A run as one self-contained HTML file, to be mailed, attached or printed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from effdl.render import charts
from effdl.render.markup import Markup, join, tag
from effdl.render.numbers import change, count, error, milliseconds, score, size
from effdl.render.page import page
from effdl.render.words import (
    STATUS,
    at_fault,
    evidence,
    figure,
    headline,
    interval,
    name_of,
    options,
    output_name,
    percent,
    plural,
    recipe_name,
    score_change,
    settled,
    tally,
    why,
    worst_output,
)
from effdl.report import BenchResult, ModelStats, PassReport, RunReport

_MOST_BLAMED = 20


def run_html(report: RunReport) -> str:
    """Return the report as an HTML document: no script, no network, light and dark, phone to paper."""
    report = settled(report)
    title = f"{name_of(report.before)} with {recipe_name(report)}"
    return page(
        f"effdl: {title}",
        _top(report),
        _tiles(report),
        *[tag("p", w, class_="note") for w in report.warnings],
        _steps(report),
        charts.section(report),
        _facts(report),
        _outputs(report),
        _how(report),
        _nodes(report),
        tag("footer", f"effdl {report.versions.get('effdl', '')}, {report.seconds:.1f} s"),
    )


def _top(report: RunReport) -> Markup:
    way = [tag("b", "effdl"), " · ", name_of(report.before)]
    if output_name(report):
        way += [" → ", output_name(report)]
    said = f"{plural(len(report.passes), 'step')}: {tally(report)}."
    if report.dry_run:
        said = "Nothing was checked, measured or written."
    return tag(
        "header",
        tag("p", *way, f" · recipe {recipe_name(report)} · target {report.target}", class_="over"),
        tag("h1", headline(report).replace("x ", "× ", 1)),
        tag("p", said, class_="muted"),
    )


def _tiles(report: RunReport) -> Markup:
    if report.dry_run:
        cells = _planned_tiles(report)
    else:
        third = _steps_tile(report) if report.accuracy is None else _score_tile(report.accuracy)
        cells = [_speed_tile(report), _size_tile(report), third, _output_tile(report)]
    boxes = [
        tag(
            "div",
            tag("dt", name),
            tag("dd", big, class_="big"),
            tag("dd", _keep(small), class_="sub"),
        )
        for name, big, small in cells
    ]
    return tag("dl", *boxes, class_="tiles")


def _keep(words: str) -> str:
    """Return ``words`` with figures that stay on one line with their units, and intervals whole."""
    return re.sub(r"(?<=\d) (?=[a-zA-Z])|(?<=\d,) (?=[\d.]+\])", "\u00a0", words)


def _planned_tiles(report: RunReport) -> list[tuple[str, str, str]]:
    b, a = report.before, report.after
    old, new = (sum(s.weight_bytes.values()) for s in (b, a))
    return [
        ("Nodes", change(b.nodes, a.nodes), f"{b.nodes:,} → {a.nodes:,}"),
        ("Parameters", change(b.params, a.params), f"{count(b.params)} → {count(a.params)}"),
        ("Multiply-accumulates", change(b.macs, a.macs) or "–", f"{_macs(b)} → {_macs(a)}"),
        ("Weights", change(old, new), f"{size(old)} → {size(new)}"),
    ]


def _speed_tile(report: RunReport) -> tuple[str, str, str]:
    if report.bench is None:
        return "Latency", "–", f"not measured: {report.unmeasured}" if report.unmeasured else ""
    old, new = report.bench.models[0], report.bench.models[-1]
    times = f"{milliseconds(old.latency.median)} → {milliseconds(new.latency.median)}"
    word = {"same": ", within noise", "noisy": ", too noisy to say"}.get(new.verdict, "")
    low, high = new.ci
    return "Speed", f"{new.ratio:.2f}×", f"{times}, interval [{low:.2f}, {high:.2f}]{word}"


def _size_tile(report: RunReport) -> tuple[str, str, str]:
    b, a = report.before, report.after
    packed = f", zstd {size(b.zstd_bytes)} → {size(a.zstd_bytes)}" if b.zstd_bytes else ""
    said = change(b.file_bytes, a.file_bytes) or "–"
    return "File size", said, f"{size(b.file_bytes)} → {size(a.file_bytes)}{packed}"


def _output_tile(report: RunReport) -> tuple[str, str, str]:
    worst = worst_output(report)
    if not report.won:
        return "Outputs", "the input's", "nothing was changed"
    if report.verified is None:
        return "Outputs", "not checked", report.unverified
    if report.verified.equal or worst is None:
        return "Outputs", "equal", evidence(report)
    top1 = f"same top-1 on {worst.top1:.1%}; " if worst.top1 is not None else ""
    return "Output error", percent(worst.rel_l2), f"{top1}{evidence(report)}"


def _score_tile(found: Mapping[str, Any]) -> tuple[str, str, str]:
    before, after = score(found["before"]), score(found["after"])
    samples = f" on {found['samples']:,} samples" if found.get("samples") else ""
    same = ", no measurable difference" if found.get("verdict") == "same" else ""
    moved = f": {score_change(found)}" if score_change(found) else ""
    small = f"{before} before{moved}{same}{samples}"
    return str(found["metric"]), after, small


def _steps_tile(report: RunReport) -> tuple[str, str, str]:
    kept = sum(p.status == "changed" for p in report.passes)
    dropped = sum(p.status in ("dropped", "rolled_back") for p in report.passes)
    gate = {"each": "gate after each step", "final": "gate at the end", "off": "no gate"}
    small = f"{dropped} dropped; {gate.get(report.gate, report.gate)}"
    return "Steps", f"{kept} of {len(report.passes)} kept", small


def _steps(report: RunReport) -> Markup:
    rows = [_step_cells(report, p) for p in report.passes]
    shown = [k for k, _ in enumerate(_columns(report)) if k == 0 or any(row[k] for row in rows)]
    head = [_columns(report)[k] for k in shown]
    made = []
    for number, (p, row) in enumerate(zip(report.passes, rows, strict=True), 1):
        cells = [_step_name(number, p)]
        for label, cell in zip(head, (row[k] for k in shown), strict=True):
            style = label if label in ("result", "why") else "n"
            style = style if cell else f"{style} empty"
            cells.append(tag("td", tag("span", cell), class_=style, data_label=label, role="cell"))
        made.append(tag("tr", *cells, role="row"))
    about = "Every step, kept or dropped, against the model before it."
    if any(p.gate is not None and p.gate.ratio is not None for p in report.passes):
        about += " Speed above 1 is faster, with its 95% confidence interval."
    if not report.dry_run:
        about += " Error is relative, of the worst output."
    return tag(
        "section",
        tag("h2", "What was tried"),
        tag("p", about, class_="muted"),
        tag(
            "table",
            _head(["pass", *head], set(head) - {"result", "why"}),
            tag("tbody", *made, role="rowgroup"),
            class_="steps",
            role="table",
        ),
    )


def _columns(report: RunReport) -> list[str]:
    metric = str((report.accuracy or {}).get("metric", "score"))
    return ["result", "speed", "error", metric, "file", "why"]


def _step_cells(report: RunReport, p: PassReport) -> list[object]:
    gate = p.gate
    speed: object = ""
    if gate is not None and gate.ratio is not None:
        speed = join((f"{gate.ratio:.2f}×", tag("span", interval(gate), class_="muted")))
    said = why(p)
    return [
        _status(report, p),
        speed,
        "" if p.error is None else error(p.error),
        "" if gate is None or gate.score is None else score(gate.score),
        "" if gate is None or gate.file_bytes is None else size(gate.file_bytes),
        "" if said == STATUS["unchanged"] else said,
    ]


def _step_name(number: int, p: PassReport) -> Markup:
    given = options(p)
    name = [tag("span", f"{number} ", class_="muted"), tag("span", p.name, class_="name")]
    if given:
        name += [Markup(" "), tag("span", given, class_="muted small options")]
    return tag("th", *name, scope="row", role="rowheader")


def _status(report: RunReport, p: PassReport) -> Markup:
    style = {"changed": "kept", "dropped": "dropped", "rolled_back": "dropped"}.get(
        p.status, "none"
    )
    word = STATUS.get(p.status, p.status)
    if report.dry_run and p.status == "changed":
        word = "would make"
    many = plural(p.changes, "change") if style != "none" and p.changes else ""
    return join(
        (tag("span", word, class_=f"tag {style}"), tag("span", f" {many}", class_="muted small"))
    )


def _head(names: Iterable[str], numbers: Iterable[str]) -> Markup:
    cells = [
        tag("th", n, scope="col", class_="n" if n in numbers else None, role="columnheader")
        for n in names
    ]
    return tag("thead", tag("tr", *cells, role="row"), role="rowgroup")


def _facts(report: RunReport) -> Markup:
    if not report.won:
        return Markup("")
    b, a = report.before, report.after
    rows = [
        ("nodes", f"{b.nodes:,}", f"{a.nodes:,}", change(b.nodes, a.nodes)),
        ("parameters", count(b.params), count(a.params), change(b.params, a.params)),
        ("multiply-accumulates", _macs(b), _macs(a), change(b.macs, a.macs)),
    ]
    if not report.dry_run:
        rows += [
            ("file", size(b.file_bytes), size(a.file_bytes), change(b.file_bytes, a.file_bytes)),
            (
                "file, zstd",
                size(b.zstd_bytes),
                size(a.zstd_bytes),
                change(b.zstd_bytes, a.zstd_bytes),
            ),
        ]
    if report.bench is not None:
        rows += _measured(report.bench.models[0], report.bench.models[-1])
    if report.accuracy is not None:
        before, after = (score(report.accuracy[k]) for k in ("before", "after"))
        name = f"{report.accuracy['metric']}, {report.accuracy.get('samples', '?')} samples"
        rows.append((name, before, after, score_change(report.accuracy)))
    return tag(
        "section", tag("h2", "Before and after"), _table(["", "before", "after", "change"], rows)
    )


def _measured(old: BenchResult, new: BenchResult) -> list[tuple[str, str, str, str]]:
    def row(name: str, x: float, y: float, last: str = "") -> tuple[str, str, str, str]:
        return name, milliseconds(x), milliseconds(y), last or change(x, y)

    rows = [
        row("latency, median", old.latency.median, new.latency.median, f"{new.ratio:.2f}×"),
        row("latency, 90th percentile", old.latency.p90, new.latency.p90),
        row("latency, 99th percentile", old.latency.p99, new.latency.p99),
        row("load time", old.load_ms, new.load_ms),
        row("first run", old.first_ms, new.first_ms),
    ]
    memory = change(old.peak_bytes, new.peak_bytes)
    rows.append(("peak memory", size(old.peak_bytes), size(new.peak_bytes), memory))
    return rows


def _macs(stats: ModelStats) -> str:
    text = count(stats.macs)
    return f"{text} +?" if stats.macs_unknown and stats.macs is not None else text


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], style: str = "facts") -> Markup:
    """Return a table whose first column names the rows and whose others are figures."""
    body = [
        tag("tr", tag("th", r[0], scope="row"), *(tag("td", c, class_="n") for c in r[1:]))
        for r in rows
    ]
    cells = [tag("th", h, scope="col", class_="n" if k else None) for k, h in enumerate(head)]
    return tag("table", tag("thead", tag("tr", *cells)), tag("tbody", *body), class_=style)


def _outputs(report: RunReport) -> Markup:
    if report.verified is None:
        if report.dry_run or not report.won:
            return Markup("")
        text = f"The outputs were not verified: {report.unverified}."
        return tag("section", tag("h2", "Outputs"), tag("p", text, class_="note"))
    rows = [
        (
            o.name,
            error(o.rel_l2),
            error(o.max_abs),
            f"{o.cosine:.6f}",
            f"{o.sqnr_db:.1f} dB",
            "" if o.top1 is None else f"{o.top1:.1%}",
            o.reason or ("equal" if o.equal else "differs"),
        )
        for o in report.verified.outputs
    ]
    head = ["output", "relative error", "largest", "cosine", "SQNR", "same top-1", ""]
    about = f"The written file, read back, against the original on {evidence(report)}."
    return tag(
        "section",
        tag("h2", "Outputs"),
        tag("p", about, class_="muted"),
        _table(head, rows, "scroll"),
        *[tag("p", n, class_="muted") for n in report.verified.notes],
    )


def _how(report: RunReport) -> Markup:
    rows: list[tuple[str, object]] = []
    bench = report.bench
    if bench is not None:
        threads = plural(bench.threads, "thread") if bench.threads else "all threads"
        noise = max(m.noise_floor for m in bench.models)
        rows = [
            ("machine", bench.cpu),
            (
                "runtime",
                f"ONNX Runtime {bench.onnxruntime}, {bench.provider}, {threads}, ORT_ENABLE_ALL",
            ),
            (
                "inputs",
                "; ".join(f"{k} {v}" for k, v in bench.feeds.items()) + f" ({bench.source})",
            ),
            (
                "runs",
                f"{bench.models[-1].latency.runs:,} in {bench.models[-1].rounds} interleaved rounds",
            ),
            ("noise floor", f"{noise:.1%}"),
        ]
    else:
        rows.append(("latency", f"not measured: {report.unmeasured or 'a dry run'}"))
    rows.append(("target", report.target))
    if report.seed is not None:
        rows.append(("seed", str(report.seed)))
    rows.append(("versions", ", ".join(f"{k} {v}" for k, v in report.versions.items())))
    for name, stats in (("input", report.before), ("output", report.after)):
        if stats.sha256 and not (report.dry_run and stats is report.after):
            rows.append((name, join((name_of(stats), " ", tag("code", f"sha256 {stats.sha256}")))))
    body = [tag("tr", tag("th", k, scope="row"), tag("td", v)) for k, v in rows]
    return tag(
        "section",
        tag("h2", "How it was measured"),
        tag("table", tag("tbody", *body)),
        *[tag("p", w, class_="muted") for w in (bench.warnings if bench is not None else ())],
        tag("h3", "Recipe"),
        tag("pre", _yaml(report)),
    )


def _yaml(report: RunReport) -> str:
    import yaml

    text: str = yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True, width=88)
    return text


def _nodes(report: RunReport) -> Markup:
    """Return what each pass touched and left alone, folded away."""
    found = []
    for k, p in enumerate(report.passes, 1):
        if not (p.touched or p.skipped or p.notes or at_fault(p, 1)):
            continue
        items = [f"{name}: {figure(value)}" for name, value in p.notes.items()]
        if at_fault(p, 1):
            items.append(f"at fault: {at_fault(p, _MOST_BLAMED)}")
        lines = [tag("li", i) for i in items]
        lines += [tag("li", tag("code", n), " ", what) for n, what in p.touched]
        lines += [tag("li", tag("code", n), f" left alone: {reason}") for n, reason in p.skipped]
        counts = (
            (len(items), plural(len(items), "figure")),
            (len(p.touched), f"{len(p.touched):,} touched"),
            (len(p.skipped), f"{len(p.skipped):,} left alone"),
        )
        said = f"{k} {p.name}: {', '.join(words for number, words in counts if number)}"
        folded = None if report.dry_run else "nodes"  # of a dry run they are the result
        opened = "open" if report.dry_run else None
        found.append(
            tag("details", tag("summary", said), tag("ul", *lines), class_=folded, open=opened)
        )
    if not found:
        return Markup("")
    return tag("section", tag("h2", "Node by node"), *found)
