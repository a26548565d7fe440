"""What a run report says, in words: the same on the console, in Markdown and in HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePath
from typing import Any

from effdl.report import GateReport, ModelStats, OpChange, OutputError, PassReport, RunReport

STATUS = {
    "changed": "kept",
    "dropped": "dropped",
    "rolled_back": "rolled back",
    "unchanged": "nothing to do",
    "not_run": "not run",
}
"""What became of a pass, by its status."""
_SAME_SIZE = 0.005
_LONG = 40
_SMALL = 0.01


def settled(report: RunReport) -> RunReport:
    """Return the report as it ended: of a run that won nothing no pass was kept."""
    if report.won or report.dry_run:
        return report
    passes = (
        replace(p, status="dropped", reason=p.reason or "taken back, as the result did not win")
        if p.status == "changed"
        else p
        for p in report.passes
    )
    return replace(report, passes=tuple(passes))


def headline(report: RunReport) -> str:
    """Return the verdict on a run in one line: speed, size, outputs."""
    if report.dry_run:
        would = sum(p.status == "changed" for p in report.passes)
        return f"Dry run: {would} of {len(report.passes)} passes would change the model"
    if not report.won:
        return "Nothing helped: the output is the input, unchanged"
    parts = [speed_words(report), size_words(report), output_words(report)]
    text = ", ".join(parts)
    return text[0].upper() + text[1:]


def speed_words(report: RunReport) -> str:
    """Return ``2.88x as fast``, or why no such thing can be said."""
    if report.bench is None:
        return "speed not measured"
    new = report.bench.models[-1]
    match new.verdict:
        case "faster":
            return f"{new.ratio:.2f}x as fast"
        case "slower":
            return f"slower ({new.ratio:.2f}x the speed)"
        case "same":
            return "same speed"
        case _:
            return "speed too noisy to say"


def size_words(report: RunReport) -> str:
    """Return ``73% smaller``, ``same size`` or ``4% larger``."""
    before, after = report.before.file_bytes, report.after.file_bytes
    if not before:
        return "size unknown"
    share = after / before - 1
    if abs(share) < _SAME_SIZE:
        return "same size"
    return f"{abs(share):.0%} {'smaller' if share < 0 else 'larger'}"


def output_words(report: RunReport) -> str:
    """Return how near the outputs are to the original's."""
    if report.verified is None:
        return "outputs not verified"
    if report.verified.equal:
        return "equal outputs"
    worst = worst_output(report)
    if worst is None or not math.isfinite(worst.rel_l2):
        return "outputs differ"
    return f"outputs within {percent(worst.rel_l2)} of the original's"


def percent(value: float) -> str:
    """``0.92%``: a share with two significant digits, never ``0%`` for one that is not 0."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.0%}" if value == 0 else "∞"
    digits = max(0, 1 - math.floor(math.log10(abs(value) * 100)))
    return f"{value:.{digits}%}" if digits < 5 else f"{value * 100:.0e}%"


def worst_output(report: RunReport) -> OutputError | None:
    """Return the output of the verified file that is farthest from the original's."""
    outputs = report.verified.outputs if report.verified is not None else ()
    return max(outputs, key=lambda o: o.rel_l2, default=None)


def evidence(report: RunReport) -> str:
    """Return what the outputs were compared on."""
    v = report.verified
    if v is None:
        return report.unverified
    if v.real:
        return f"{v.feeds} feeds from {v.source}"
    return f"{v.feeds} random feeds, weak evidence about accuracy"


def why(p: PassReport) -> str:
    """Return the reason that goes with the status of a pass, empty where the figures say it."""
    gate = p.gate
    if gate is not None and gate.reason and not _said_by_figures(p, gate):
        return gate.reason if p.reason in ("", gate.reason) else f"{gate.reason}; {p.reason}"
    return p.reason


def _said_by_figures(p: PassReport, gate: GateReport) -> bool:
    """Whether the speed column tells as much: a pass kept because it is faster."""
    return p.status == "changed" and gate.by == "latency" and gate.verdict == "faster"


def ratio(gate: GateReport | None) -> str:
    """Return ``1.42x [1.38, 1.46]`` against the model before the pass, ``-`` when not measured."""
    if gate is None or gate.ratio is None:
        return "-"
    return f"{gate.ratio:.2f}x{interval(gate)}"


def interval(gate: GateReport) -> str:
    """Return `` [1.38, 1.46]``, empty when there is none."""
    return "" if gate.ci is None else f" [{gate.ci[0]:.2f}, {gate.ci[1]:.2f}]"


def at_fault(p: PassReport, most: int) -> str:
    """Return the names of the nodes at fault, the worst first; empty when the reason names them."""
    names = p.gate.culprits if p.gate is not None else ()
    if not names or names[0] in why(p):
        return ""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def options(p: PassReport) -> str:
    """Return the options of a pass in a line, long values cut off."""
    texts = ((key, str(value)) for key, value in p.options.items())
    return ", ".join(f"{k}: {t if len(t) <= _LONG else t[:_LONG] + '…'}" for k, t in texts)


def notes(p: PassReport) -> str:
    """Return the figures of a pass: ``folded 9; opset 17``."""
    return "; ".join(f"{k} {figure(v)}" for k, v in p.notes.items())


def figure(value: float | str) -> str:
    """A noted figure: four significant digits, texts as they are."""
    return value if isinstance(value, str) else f"{value:,.4g}"


def tally(report: RunReport) -> str:
    """Return how many passes were kept and what became of the others."""
    counts: dict[str, int] = {}
    for p in report.passes:
        counts[p.status] = counts.get(p.status, 0) + 1
    told = STATUS | {"unchanged": "with nothing to do"}
    said = [f"{counts[s]} {words}" for s, words in told.items() if counts.get(s)]
    return ", ".join(said) if said else "no passes"


def name_of(stats: ModelStats) -> str:
    """Return the file name of a model, without its folders."""
    if stats.path == "-":
        return "stdin"
    return PurePath(stats.path).name or "model in memory"


def output_name(report: RunReport) -> str:
    """Return the file name of the result; empty in a dry run."""
    return "stdout" if report.output == "-" else PurePath(report.output).name


def recipe_name(report: RunReport) -> str:
    """Return the recipe's name, or the passes of one that has none."""
    name = report.recipe.get("name")
    if name:
        return str(name)
    return " + ".join(p.name for p in report.passes) or "no passes"


def where(report: RunReport) -> str:
    """Return the machine of the measurement in one line."""
    version = report.versions.get("onnxruntime", "")
    parts = [f"ONNX Runtime {version}".strip()]
    if report.bench is not None:
        threads = plural(report.bench.threads, "thread") if report.bench.threads else "all threads"
        parts = [
            report.bench.cpu,
            f"ONNX Runtime {report.bench.onnxruntime}",
            report.bench.provider,
            threads,
            "ORT_ENABLE_ALL",
        ]
    parts.append(f"target {report.target}")
    if report.seed is not None:
        parts.append(f"seed {report.seed}")
    return ", ".join(p for p in parts if p)


def op_times(changes: tuple[OpChange, ...], most: int) -> list[OpChange]:
    """Return the changes worth showing, the largest first; the rest is summed up in a last one.

    What takes less than 1 % of the longest time on both sides is not worth a line.
    """
    ordered = sorted(changes, key=lambda c: -abs(c.after_ms - c.before_ms))
    least = max((max(c.before_ms, c.after_ms) for c in ordered), default=0.0) * _SMALL
    shown = [c for c in ordered if max(c.before_ms, c.after_ms) >= least]
    if len(shown) > most or (len(shown) == most and len(shown) < len(ordered)):
        shown = shown[: most - 1]
    rest = [c for c in ordered if c not in shown]
    if not rest:
        return shown
    total = OpChange(
        plural(len(rest), "other kind"),
        sum(c.before for c in rest),
        sum(c.after for c in rest),
        sum(c.before_ms for c in rest),
        sum(c.after_ms for c in rest),
    )
    return [*shown, total]


def short_ms(value: float) -> str:
    """``14.2``: milliseconds with three significant digits; less than a nanosecond is ``0``."""
    return f"{value:.3g}" if abs(value) >= 1e-6 else "0"


def change_ms(c: OpChange) -> str:
    """``-8.1 ms``: by how much the time of one kind of operator changed."""
    change = c.after_ms - c.before_ms
    return f"{'+' if change > 0 else ''}{short_ms(change)} ms"


def plural(number: int, word: str, many: str = "") -> str:
    """``1 change``, ``2 changes``; ``many`` is the plural where it is not ``word`` with an s."""
    return f"{number:,} {word if number == 1 else many or word + 's'}"


def score_change(found: Mapping[str, Any]) -> str:
    """Return ``-0.0020 [-0.0050, 0.0010]``: how a score changed, with its interval where there is one.

    Empty when one of the scores is no number.
    """
    scores = found["before"], found["after"]
    if None in scores or not all(map(math.isfinite, scores)):
        return ""
    text = f"{scores[1] - scores[0]:+.4f}"
    low, high = found.get("ci") or (None, None)
    if low is None or high is None:  # none was made, or it is infinite
        return text
    return f"{text} [{low:+.4f}, {high:+.4f}]"
