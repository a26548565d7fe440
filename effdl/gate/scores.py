"""Scores models by the metric of a recipe; the input once, for all that are compared with it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from effdl.data.dataset import load_dataset
from effdl.data.feeds import Array
from effdl.graph import io
from effdl.measure.accuracy import Scored, difference, reference_labels, score_model
from effdl.recipe.model import Evaluation
from effdl.runtime.target import Target


def drop(first: Scored, now: float) -> float:
    """How much worse a score is, positive for a loss."""
    return first.value - now if first.higher_is_better else now - first.value


@dataclass
class Scores:
    """The scores of one run.

    Args:
        source: the input model's file, whose answers are the labels for ``agreement``.
        spec: data, labels and metric; None where the recipe has no evaluation.
        target: where outputs are computed.
        seed: of the resampling.
    """

    source: Path
    spec: Evaluation | None
    target: Target
    seed: int
    _answers: Array | None = field(init=False, default=None)
    _first: Scored | None = field(init=False, default=None)

    def of_input(self, model: ir.Model | Path) -> Scored:
        """Score the input model, once; what is wrong with data or labels shows here."""
        if self._first is None:
            self._first = self.of(model)
        return self._first

    def of(self, model: ir.Model | Path) -> Scored:
        """Score a model on the evaluation data, cut for its inputs."""
        spec = self.spec
        assert spec is not None
        samples = load_dataset(spec, io.load(model) if isinstance(model, Path) else model)
        if spec.metric == "agreement" and samples.labels is None:
            if self._answers is None:
                answers = reference_labels(
                    self.source, samples, spec.metric, self.target, output=spec.output
                )
                self._answers = answers.labels
            samples = replace(samples, labels=self._answers)
        return score_model(model, samples, spec.metric, self.target, output=spec.output)

    def accuracy(self, old: Path, new: Path) -> dict[str, Any]:
        """Return the metric of input and output, and the difference with its paired interval."""
        assert self.spec is not None
        first, now = self.of_input(old), self.of(new)
        gap = difference(first, now, self.seed)
        return {
            "metric": self.spec.metric,
            "before": first.value,
            "after": now.value,
            "drop": drop(first, now.value),
            "samples": first.count,
            "difference": gap.value,
            "ci": (gap.low, gap.high),
            "verdict": gap.verdict,
        }
