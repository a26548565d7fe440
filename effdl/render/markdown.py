"""A run as GitHub-flavoured Markdown, short enough for a comment on a pull request."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from effdl.render.numbers import change, count, error, milliseconds, score, size
from effdl.render.words import (
    STATUS,
    at_fault,
    change_ms,
    evidence,
    headline,
    name_of,
    op_times,
    output_name,
    plural,
    ratio,
    recipe_name,
    score_change,
    settled,
    short_ms,
    tally,
    where,
    why,
    worst_output,
)
from effdl.report import OpChange, PassReport, RunReport

_SPECIAL = re.compile(r"([\\`*\[\]{}~|])|(?<!\w)_|_(?!\w)")
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]+")
_MOST_OPS = 8
_MOST_SKIPPED = 30


def run_markdown(report: RunReport) -> str:
    """Return the report as Markdown: verdict, passes, before and after, operators, where."""
    report = settled(report)
    parts = [
        f"### {_plain(headline(report))}",
        _about(report),
        *[f"> {_plain(w)}" for w in report.warnings],
        _passes(report),
        _facts(report),
        _outputs(report),
        _operators(report),
        _skipped(report),
        f"<sub>{_environment(report)}</sub>",
    ]
    return "\n\n".join(p for p in parts if p) + "\n"


def _about(report: RunReport) -> str:
    way = _code(name_of(report.before))
    if output_name(report):
        way += f" → {_code(output_name(report))}"
    said = "nothing was checked, measured or written" if report.dry_run else tally(report)
    return f"{way} with {_code(recipe_name(report))}: {said}."


def _passes(report: RunReport) -> str:
    if not report.passes:
        return ""
    gated = any(p.gate is not None and p.gate.ratio is not None for p in report.passes)
    filed = any(p.gate is not None and p.gate.file_bytes is not None for p in report.passes)
    head = ["", "pass", "result", *(["speed"] if gated else []), "error"]
    head += [*(["file"] if filed else []), "why"]
    rows = []
    for k, p in enumerate(report.passes, 1):
        row = [str(k), _code(p.name, table=True), _result(report, p)]
        row += [ratio(p.gate).replace("-", "")] if gated else []
        row.append("" if p.error is None else error(p.error))
        if filed:
            known = p.gate is not None and p.gate.file_bytes is not None
            row.append(size(p.gate.file_bytes) if p.gate is not None and known else "")
        rows.append([*row, _why(p)])
    return _table(head, rows, {"speed", "error", "file"})


def _result(report: RunReport, p: PassReport) -> str:
    word = STATUS.get(p.status, p.status)
    if p.status == "changed":
        return f"{'would make' if report.dry_run else 'kept,'} {plural(p.changes, 'change')}"
    return f"**{word}**" if p.status in ("dropped", "rolled_back") else word


def _why(p: PassReport) -> str:
    said = "" if why(p) == STATUS["unchanged"] else _plain(why(p))
    blamed = at_fault(p, 3)
    return f"{said}; at fault: {_code(blamed, table=True)}" if blamed else said


def _facts(report: RunReport) -> str:
    if not report.won:
        return ""
    b, a = report.before, report.after
    rows = [
        ["nodes", f"{b.nodes:,}", f"{a.nodes:,}", change(b.nodes, a.nodes)],
        ["params", count(b.params), count(a.params), change(b.params, a.params)],
        ["MACs", count(b.macs), count(a.macs), change(b.macs, a.macs)],
    ]
    if not report.dry_run:
        packed = change(b.zstd_bytes, a.zstd_bytes)
        rows += [
            ["file", size(b.file_bytes), size(a.file_bytes), change(b.file_bytes, a.file_bytes)],
            ["file, zstd", size(b.zstd_bytes), size(a.zstd_bytes), packed],
        ]
    if report.bench is not None:
        old, new = report.bench.models[0], report.bench.models[-1]
        speed = f"**{new.ratio:.2f}x** [{new.ci[0]:.2f}, {new.ci[1]:.2f}]"
        times = [f"{milliseconds(m.latency.median)} ±{m.latency.spread:.0%}" for m in (old, new)]
        rows.append(["latency", *times, speed])
        memory = change(old.peak_bytes, new.peak_bytes)
        rows.append(["peak memory", size(old.peak_bytes), size(new.peak_bytes), memory])
    if report.accuracy is not None:
        before, after = (score(report.accuracy[k]) for k in ("before", "after"))
        name = _plain(str(report.accuracy["metric"]))
        rows.append([name, before, after, score_change(report.accuracy)])
    return _table(["", "before", "after", "change"], rows, {"before", "after", "change"})


def _outputs(report: RunReport) -> str:
    if report.dry_run or not report.won:
        return ""
    if report.verified is None:
        return f"**Outputs not verified**: {_plain(report.unverified)}."
    worst = worst_output(report)
    on = _plain(evidence(report))
    if report.verified.equal or worst is None:
        return f"Outputs equal the original's ({on})."
    top1 = f", same top-1 on {worst.top1:.1%}" if worst.top1 is not None else ""
    found = f"{error(worst.rel_l2)} relative, {worst.sqnr_db:.1f} dB{top1}"
    return f"Output error of {_code(worst.name)}: {found} ({on})."


def _operators(report: RunReport) -> str:
    if not report.changes:
        return ""
    rows = [
        [
            _code(c.kind, table=True),
            _nodes(c),
            f"{short_ms(c.before_ms)} ms",
            f"{short_ms(c.after_ms)} ms",
            change_ms(c),
        ]
        for c in op_times(report.changes, _MOST_OPS)
    ]
    head = ["operator", "nodes", "before", "after", "change"]
    return _table(head, rows, set(head[1:]))


def _nodes(c: OpChange) -> str:
    if not c.before and not c.after:
        return ""
    return str(c.before) if c.before == c.after else f"{c.before} → {c.after}"


def _skipped(report: RunReport) -> str:
    rows = [(p.name, node, reason) for p in report.passes for node, reason in p.skipped]
    if not rows:
        return ""
    lines = [f"- {_code(name)} {_code(node)}: {_plain(reason)}" for name, node, reason in rows]
    if len(rows) > _MOST_SKIPPED:
        lines[_MOST_SKIPPED:] = [f"- and {len(rows) - _MOST_SKIPPED:,} more"]
    listed = "\n".join(lines)
    summary = f"{plural(len(rows), 'node')} left alone"
    return f"<details><summary>{summary}</summary>\n\n{listed}\n\n</details>"


def _environment(report: RunReport) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in report.versions.items() if k != "onnxruntime")
    parts = [where(report), f"recipe {recipe_name(report)}", versions, f"{report.seconds:.1f} s"]
    if report.bench is None:
        parts.insert(0, f"latency not measured ({report.unmeasured or 'a dry run'})")
    return _plain(", ".join(p for p in parts if p))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], figures: set[str]) -> str:
    """Return a table; the columns named in ``figures`` stand to the right."""
    rule = ["---:" if h in figures else "---" for h in head]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def _plain(words: str) -> str:
    """Return ``words`` as text that no Markdown turns into anything: no markup, mention or issue link."""
    line = _UNSEEN.sub(" ", words).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = _SPECIAL.sub(lambda m: "\\" + m.group(0), line)
    return re.sub(r"[@#](?=\w)", lambda m: f"{m.group(0)}<!-- -->", line)


def _code(words: str, *, table: bool = False) -> str:
    """Return ``words`` as a code span, which holds backticks and, in a table, bars."""
    line = _UNSEEN.sub(" ", words) or " "
    fence = "`" * (max((len(run) for run in re.findall("`+", line)), default=0) + 1)
    pad = " " if line[0] == "`" or line[-1] == "`" else ""
    inside = line.replace("|", "\\|") if table else line
    return f"{fence}{pad}{inside}{pad}{fence}"
