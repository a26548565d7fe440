"""Models scored on the same labelled samples."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelScore:
    """One model of an evaluation.

    Args:
        score: the metric over all samples; ``ci`` its 95 % confidence interval over samples.
        difference: its score less that of the first model on the same samples, ``difference_ci`` the
            paired 95 % confidence interval; None for the first model, and where the first model is
            itself the reference that all others are scored against.
        verdict: ``better`` or ``worse`` than the first model where the interval excludes 0, else
            ``same``: no measurable difference. ``reference`` for the first; empty where there is no
            difference.
    """

    path: str
    score: float
    ci: tuple[float, float]
    difference: float | None
    difference_ci: tuple[float, float] | None
    verdict: str


@dataclass(frozen=True)
class EvaluateReport:
    """Models scored on the same samples.

    Args:
        metric: its name, or ``module:function``; ``higher_is_better`` is False for an error, ``share``
            says that it lies between 0 and 1.
        output: the graph output that was scored.
        samples: how many; ``source`` is where they come from.
        reference: the model whose outputs were the labels, empty where the data has labels.
        target, onnxruntime: where and how.
        verdict: one sentence per model after the first.
        max_drop: the largest loss allowed, in units of the metric; None for no limit.
        failed: a sentence for each model that lost more.
        notes: what a reader of the scores should know.
    """

    metric: str
    higher_is_better: bool
    share: bool
    output: str
    samples: int
    source: str
    reference: str
    target: str
    onnxruntime: str
    models: tuple[ModelScore, ...]
    verdict: tuple[str, ...]
    max_drop: float | None = None
    failed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
