"""Several models on the same samples: scores, paired differences, and what they mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from effdl.data.dataset import Dataset
from effdl.errors import EffdlError, UsageError
from effdl.measure.accuracy import (
    Difference,
    Scored,
    difference,
    reference_labels,
    score_interval,
    score_model,
)
from effdl.report import EvaluateReport, ModelScore
from effdl.runtime.target import Target
from effdl.solve.paired import Interval

Progress = Callable[[str, float], None]
"""Called with a model's name and the share of the samples that is done."""
_NO_REFERENCE = ("top1", "top5", "f1")


def evaluate_models(
    models: Sequence[Path],
    dataset: Dataset,
    metric: str,
    target: Target,
    *,
    reference: Path | None = None,
    output: str | None = None,
    max_drop: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> EvaluateReport:
    """Score models on the same samples and compare each with the first.

    Args:
        models: model files; the first is what the others are compared with.
        dataset: the samples.
        metric: as in ``score_model``.
        target: where all of them run.
        reference: a model whose outputs stand in for labels; for ``agreement`` on data without labels
            the first model when None.
        output: which graph output; the first when None.
        max_drop: the largest loss of score allowed against the first model, in the metric's units.
        seed: of the resampling.
        progress: told how far it is.

    Raises:
        EffdlError: as ``score_model``; UsageError where there is nothing to agree with.
    """
    say = progress or (lambda name, share: None)
    first_is_reference = metric == "agreement" and reference is None and dataset.labels is None
    if first_is_reference and len(models) < 2:
        raise UsageError(
            "agreement needs a model to agree with", hint="--reference MODEL, or a second model"
        )
    if reference is not None and metric in _NO_REFERENCE:
        raise UsageError(
            f"{metric} wants labels, not a reference model",
            hint="--metric agreement: the share of samples with the reference's class",
        )
    judge = models[0] if first_is_reference else reference
    if judge is not None:
        with _Naming(judge):
            dataset = reference_labels(
                judge,
                dataset,
                metric,
                target,
                output=output,
                progress=lambda share: say(judge.name, share),
            )
    scored: list[Scored] = []
    for number, path in enumerate(models):
        if first_is_reference and number == 0:
            continue
        with _Naming(path):
            scored.append(
                score_model(
                    path,
                    dataset,
                    metric,
                    target,
                    output=output,
                    progress=lambda share, name=path.name: say(name, share),  # type: ignore[misc]
                )
            )
    rows = _rows(models, scored, first_is_reference, seed)
    labels = _labels(models)
    some = scored[0]
    return EvaluateReport(
        metric=metric,
        higher_is_better=some.higher_is_better,
        share=some.share,
        output=some.output,
        samples=some.count,
        source=dataset.source,
        reference=str(judge or ""),
        target=target.name,
        onnxruntime=ort.__version__,
        models=tuple(rows),
        verdict=tuple(_sentence(row, some, labels[0]) for row in rows[1:]),
        max_drop=max_drop,
        failed=_failed(rows, labels, some, max_drop, first_is_reference),
        notes=dataset.notes,
    )


class _Naming:
    """Names the model in errors that are its own."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, tb: object) -> None:
        if isinstance(error, EffdlError):
            error.where = error.where or str(self._path)


def _rows(
    models: Sequence[Path], scored: list[Scored], first_is_reference: bool, seed: int
) -> list[ModelScore]:
    """Return a row per model; a reference that is itself a model agrees with itself."""
    rows = []
    if first_is_reference:
        rows.append(ModelScore(str(models[0]), 1.0, (1.0, 1.0), None, None, "reference"))
    for path, one in zip(models[len(rows) :], scored, strict=True):
        bounds = score_interval(one, seed)
        found: Difference | None = None
        verdict = "" if first_is_reference else "reference"
        if not first_is_reference and one is not scored[0]:
            found = difference(scored[0], one, seed)
            verdict = found.verdict
        rows.append(
            ModelScore(
                path=str(path),
                score=one.value,
                ci=(bounds.low, bounds.high),
                difference=found.value if found else None,
                difference_ci=(found.low, found.high) if found else None,
                verdict=verdict,
            )
        )
    return rows


def _failed(
    rows: Sequence[ModelScore],
    labels: Sequence[str],
    some: Scored,
    max_drop: float | None,
    first_is_reference: bool,
) -> tuple[str, ...]:
    if max_drop is None:
        return ()
    said = []
    for label, row in zip(labels[1:], rows[1:], strict=True):
        gain = row.score - 1.0 if first_is_reference else row.difference
        assert gain is not None
        drop = -gain if some.higher_is_better else gain
        if drop <= max_drop:
            continue
        lost, allowed = amount(drop, some.share), amount(max_drop, some.share)
        if np.isnan(drop):  # a correlation with numbers that are all the same
            said.append(f"{label}: has no score")
        elif first_is_reference:
            said.append(f"{label}: disagrees by {lost}, at most {allowed} allowed")
        else:
            said.append(f"{label}: lost {lost}, at most {allowed} allowed")
    return tuple(said)


def _sentence(row: ModelScore, some: Scored, first: str) -> str:
    """Return what the difference means, such as ``worse: lost 0.31 points [0.12, 0.50]``."""
    if row.difference is None or row.difference_ci is None:
        share = f"{100 * row.score:.2f} % [{100 * row.ci[0]:.2f}, {100 * row.ci[1]:.2f}]"
        return f"agrees with {first} on {share} of {some.count} samples"
    if np.isnan(row.difference):
        return "worse: no score" if row.verdict == "worse" else "no score to compare"
    found = Interval(row.difference, *row.difference_ci)
    if row.verdict == "same":
        return f"no measurable difference ({_signed(found, some.share)})"
    rose = found.value > 0
    if not rose:
        found = Interval(-found.value, -found.high, -found.low)
    words = ("gained", "lost") if some.higher_is_better else ("rose by", "fell by")
    word = words[0 if rose else 1]
    return f"{row.verdict}: {word} {amount(found.value, some.share)} {_range(found, some.share)}"


def amount(value: float, share: bool) -> str:
    """Return a difference of scores: ``0.31 points`` of a share, else a plain number."""
    return f"{100 * value:.2f} points" if share else f"{value:.3g}"


def _signed(found: Interval, share: bool) -> str:
    if share:
        value, low, high = 100 * found.value, 100 * found.low, 100 * found.high
        return f"{value:+.2f} points [{low:+.2f}, {high:+.2f}]"
    return f"{found.value:+.3g} [{found.low:+.3g}, {found.high:+.3g}]"


def _range(found: Interval, share: bool) -> str:
    low, high = found.low, found.high
    return f"[{100 * low:.2f}, {100 * high:.2f}]" if share else f"[{low:.3g}, {high:.3g}]"


def _labels(paths: Sequence[Path]) -> list[str]:
    """File names, or paths where another file has the same name."""
    return [str(p) if any(q.name == p.name and q != p for q in paths) else p.name for p in paths]
