"""A bench against an earlier one, and what is too slow for a continuous-integration run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from effdl.errors import DataError, UsageError
from effdl.measure import verdict
from effdl.measure.verdict import Ratio
from effdl.report import (
    BaselineChange,
    BaselineReport,
    BenchReport,
    BenchResult,
    BenchScan,
    from_json,
)

_HINT = "effdl bench ... --export-json base.json writes one"
_YARDSTICK_FLOOR = 0.03
"""What a yardstick of matrix products cannot tell about the speed of another model on another day."""


def read_baseline(path: Path) -> tuple[BenchReport, ...]:
    """Read the reports of ``--export-json``: one, or those of a scan.

    Raises:
        DataError: no such file, or not JSON.
        UsageError: not a report of ``effdl bench``.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise DataError(
            f"the baseline cannot be read: {e.strerror or e}", hint=_HINT, where=str(path)
        ) from None
    except ValueError:
        raise DataError("the baseline is no JSON file", hint=_HINT, where=str(path)) from None
    try:
        if isinstance(data, dict) and "cells" in data:
            return from_json(BenchScan, data, where=str(path)).cells
        return (from_json(BenchReport, data, where=str(path)),)
    except UsageError as e:
        raise UsageError(e.message, hint=_HINT, where=str(path)) from None


def with_baseline(now: BenchReport, earlier: Sequence[BenchReport], path: Path) -> BenchReport:
    """Return the report with its comparison with an earlier one.

    With two models or more, each model's ratio to the first is compared with what it was; the first
    must be the same file. A single model's latency is compared, in units of the yardstick's.

    Args:
        now: the report; ``earlier`` those of the baseline, of which one must be of the same setting.
        path: the baseline's file.

    Raises:
        DataError: what was measured then is something else: other threads, inputs or models.
    """
    then = _same_setting(now, earlier, path)
    notes = _differences(now, then)
    by = "ratio" if len(now.models) > 1 else "latency"
    changes: list[BaselineChange] = []
    if by == "ratio":
        for number in range(1, len(now.models)):
            changes.append(_by_ratio(now, then, number, path))
    elif now.cpu != then.cpu:
        notes.append("latencies of two processors cannot be compared: nothing was judged")
    else:
        changes.append(_by_latency(now, then, path))
    return replace(now, baseline=BaselineReport(str(path), by, tuple(changes), tuple(notes)))


def _same_setting(now: BenchReport, earlier: Sequence[BenchReport], path: Path) -> BenchReport:
    """Return the earlier report that measured the same."""
    unlike = [_unlike(now, then) for then in earlier]
    for then, why in zip(earlier, unlike, strict=True):
        if not why:
            return then
    what = unlike[0] if len(earlier) == 1 else f"none of its {len(earlier)} cells is like this one"
    raise DataError(
        f"the baseline measured something else: {what}",
        hint="measure with the same options, or write a new baseline with --export-json",
        where=str(path),
    )


def _unlike(now: BenchReport, then: BenchReport) -> str:
    if (then.target, then.provider) != (now.target, now.provider):
        return f"{then.provider} on {then.target}, now {now.provider} on {now.target}"
    if then.threads != now.threads:
        return f"{threads_of(then)}, now {threads_of(now)}"
    if then.feeds != now.feeds:
        return f"inputs {_ports(then.feeds)}, now {_ports(now.feeds)}"
    if len(now.models) > 1 and len(then.models) < 2:
        return "a single model, now there are two or more"
    if len(now.models) > 1 and then.models[0].sha256 != now.models[0].sha256:
        return f"another base model ({Path(then.models[0].path).name} has changed since)"
    return ""


def _ports(feeds: dict[str, str]) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in feeds.items())


def _differences(now: BenchReport, then: BenchReport) -> list[str]:
    """What else is different and may explain a change."""
    said = []
    for what, a, b in (
        ("processor", then.cpu, now.cpu),
        ("ONNX Runtime", then.onnxruntime, now.onnxruntime),
        ("source of the inputs", then.source, now.source),
    ):
        if a != b:
            said.append(f"another {what}: {a} then, {b} now; a difference may come from that")
    return said


def _by_ratio(now: BenchReport, then: BenchReport, number: int, path: Path) -> BaselineChange:
    model, old = now.models[number], _counterpart(now, then, number, path)
    ratio = verdict.quotient(Ratio(model.ratio, *model.ci), Ratio(old.ratio, *old.ci))
    floor = max(now.min_effect, model.noise_floor, old.noise_floor)
    return _change(model, old, ratio, floor, now.min_effect)


def _by_latency(now: BenchReport, then: BenchReport, path: Path) -> BaselineChange:
    if now.yardstick is None or then.yardstick is None:
        raise DataError(
            "the baseline has no yardstick: latencies of two days cannot be compared without one",
            hint=_HINT,
            where=str(path),
        )
    here, there = now.yardstick, then.yardstick
    ratio = verdict.quotient(Ratio(there.ratio, *there.ci), Ratio(here.ratio, *here.ci))
    noise = (np.log(y.ci[1] / y.ci[0]) / 2 for y in (here, there))
    floor = max(now.min_effect, _YARDSTICK_FLOOR, float(np.expm1(np.hypot(*noise))))
    return _change(now.models[0], then.models[0], ratio, floor, max(now.min_effect, floor))


def _counterpart(now: BenchReport, then: BenchReport, number: int, path: Path) -> BenchResult:
    """The model of the same file name; else the one in the same place of as many."""
    name = Path(now.models[number].path).name
    named = [m for m in then.models[1:] if Path(m.path).name == name]
    if len(named) == 1:
        return named[0]
    if len(then.models) == len(now.models):
        return then.models[number]
    names = ", ".join(Path(m.path).name for m in then.models[1:])
    raise DataError(f"the baseline has no model '{name}'", hint=f"it has {names}", where=str(path))


def _change(
    model: BenchResult, old: BenchResult, ratio: Ratio, floor: float, min_effect: float
) -> BaselineChange:
    word = verdict.judge(ratio, floor, min_effect)
    return BaselineChange(
        path=model.path,
        then=old.path,
        ratio=ratio.value,
        ci=(ratio.low, ratio.high),
        verdict=word,
        sentence=verdict.sentence(word, ratio, floor),
        noise_floor=floor,
    )


def too_slow(report: BenchReport | BenchScan, limit: float) -> tuple[list[str], list[str]]:
    """Return what is slower than allowed, and what may be but is too noisy to say, in words.

    Judged are the models against what they were, where there is a baseline, else against the first.

    Args:
        report: of ``bench``.
        limit: the slow-down that is still allowed, as a fraction of the time: 0.05.
    """
    failed: list[str] = []
    doubtful: list[str] = []
    scan = isinstance(report, BenchScan)
    for cell in report.cells if isinstance(report, BenchScan) else (report,):
        place = f" ({setting(cell)})" if scan else ""
        for path, ratio, low, word in _judged(cell):
            name = Path(path).name
            than = (
                "than the baseline" if cell.baseline else f"than {Path(cell.models[0].path).name}"
            )
            if word == "slower" and 1 / ratio - 1 > limit:
                failed.append(
                    f"{name}{place} is {1 / ratio - 1:.1%} slower {than}, "
                    f"more than the {100 * limit:.3g}% that are allowed"
                )
            elif word == "noisy" and 1 / low - 1 > limit:
                doubtful.append(
                    f"{name}{place} may be up to {1 / low - 1:.0%} slower {than}: too noisy to say, so "
                    "it does not fail; measure longer (--seconds)"
                )
        if cell.baseline and not cell.baseline.changes:
            doubtful.append(
                f"nothing could be compared with the baseline{place}, so it does not fail"
            )
    return failed, doubtful


def _judged(cell: BenchReport) -> list[tuple[str, float, float, str]]:
    if cell.baseline:
        return [(c.path, c.ratio, c.ci[0], c.verdict) for c in cell.baseline.changes]
    return [(m.path, m.ratio, m.ci[0], m.verdict) for m in cell.models[1:]]


def setting(cell: BenchReport) -> str:
    """Return what a cell of a scan was measured at, such as ``2 threads, batch=8``."""
    return ", ".join([threads_of(cell), *(f"{k}={v}" for k, v in cell.dims.items())])


def threads_of(report: BenchReport) -> str:
    """``2 threads``."""
    if not report.threads:
        return "all threads"
    return f"{report.threads} thread{'s' if report.threads != 1 else ''}"
