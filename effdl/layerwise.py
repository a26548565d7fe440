"""Layer by layer: what 8-bit integers would save, what they would cost, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from effdl.data.feeds import Feeds
from effdl.data.spec import Source
from effdl.errors import DataError, ModelError
from effdl.forms import names_touched
from effdl.gate.islands import Islands
from effdl.graph import io
from effdl.graph.clean import name_nodes
from effdl.graph.scratch import scratch
from effdl.graph.walk import is_op
from effdl.graph.weights import constant
from effdl.measure.fidelity import compare
from effdl.measure.locate import locate
from effdl.measure.profile import profile
from effdl.pipeline import optimize
from effdl.recipe import Recipe, load
from effdl.report import LayerRow, LayersReport, PassReport, TensorError
from effdl.run_options import Progress, RunOptions
from effdl.runtime.target import Target

_PRESET = "int8"
_QUANTIZERS = ("quantize_auto", "strip_metadata")
_WEIGHTED = ("Conv", "MatMul", "Gemm", "LSTM", "Gather")
_FEEDS = 2
"""Inputs that the effect of each layer is measured on."""


def layers(
    model: Path,
    data: Path | Source | None,
    target: Target,
    *,
    feeds: Feeds,
    dims: Mapping[str, int],
    threads: int,
    seconds: float,
    seed: int,
    tell: Progress,
) -> LayersReport:
    """Make the float and the 8-bit form of a model, measure both, and judge every layer.

    Args:
        model: the model; stays as it is.
        data: calibration data; without them ranges are found at every run (the dynamic form), or, where
            that makes nothing faster, taken from random inputs.
        target: this machine's CPU.
        feeds: inputs to measure with.
        dims: values of dynamic dimensions.
        threads: intra-op threads.
        seconds: measuring time per form.
        seed: of random choices.
        tell: told what is being done.

    Raises:
        ModelError: nothing in the model can be 8-bit, or it cannot be read or run.
    """
    recipe = load(_PRESET)
    options = RunOptions(
        gate="off", bench_seconds=0, threads=threads, dims=dict(dims), keep_going=True, seed=seed
    )
    with scratch() as folder:
        first, second = folder / "float.onnx", folder / "int8.onnx"
        before = tuple(s for s in recipe.passes if s.name not in _QUANTIZERS)
        folds = recipe.model_copy(update={"passes": before, "budget": None})
        optimize(model, folds, first, data=data, options=options, progress=tell)
        named = io.load(first)
        name_nodes(named)
        io.save(named, first)
        for form in ("static",) if data is not None else ("dynamic", "static"):
            given = data
            if form == "static" and data is None:  # ranges of random inputs will do for the times
                given = _written(feeds, folder / "random.npz")
            pass_ = _one(f"quantize_{form}")
            report = optimize(
                first, pass_, second, data=given, options=options, progress=tell
            ).passes[0]
            if report.status == "changed":
                break
        else:
            raise ModelError(f"nothing becomes 8-bit: {report.reason}")
        tell("layers", "measuring both forms")
        times = profile([first, second], feeds, target, threads=threads, seconds=seconds, seed=seed)
        few = feeds.first(_FEEDS)
        right, wrong = io.load(first), io.load(second)
        tell("layers", "measuring the effect of each layer")
        compared = compare(right, wrong, few, target=target)
        error = max((o.rel_l2 for o in compared.outputs), default=0.0)
        jumps = locate(right, wrong, few, target, top=None).jumps
        limit = (recipe.budget.fidelity if recipe.budget else None) or math.inf
        table = _Table(right, wrong, report, jumps)
        islands = Islands(right, names_touched(report), *times.profiles)
        slow = set(islands.slower())
        bad = set(islands.repair(jumps, error, limit)) - slow if error > limit else set()
        rows = table.rows(islands, slow, bad)
        return LayersReport(
            path=str(model),
            target=target.name,
            cpu=times.cpu,
            form=form,
            reason=str(report.notes.get("format_reason", "")),
            source=feeds.source,
            real=feeds.real,
            rows=rows,
            before_ms=times.profiles[0].wall_ms,
            after_ms=times.profiles[1].wall_ms,
            error=error,
            limit=limit,
            left=(len(slow), len(bad)),
        )


def _written(feeds: Feeds, path: Path) -> Path:
    """Write feeds as samples."""
    all_feeds = list(feeds)
    if len({a.shape[0] if a.ndim else -1 for f in all_feeds for a in f.values()}) != 1:
        raise DataError(
            "the inputs do not share a first axis of samples",
            hint="give real ones: --data FILE.npz",
        )
    arrays: dict[str, Any] = {n: np.concatenate([f[n] for f in all_feeds]) for n in all_feeds[0]}
    np.savez(path, **arrays)
    return path


def _one(name: str) -> Recipe:
    return load({"name": name, "description": "one pass", "passes": [name]})


class _Table:
    """Rows for the places of a model.

    Args:
        model: in float; ``other`` in 8 bits.
        report: of the pass between them.
        jumps: effect of the steps.
    """

    def __init__(
        self,
        model: ir.Model,
        other: ir.Model,
        report: PassReport,
        jumps: tuple[TensorError, ...],
    ) -> None:
        self._nodes = {n.name or "": n for n in model.graph}
        self._other = {n.name or "": n for n in other.graph}
        self._report = report
        self._effects: dict[str, float] = {}
        for jump in jumps:
            for name in jump.nodes:
                if jump.effect is not None and name:
                    self._effects[name] = max(jump.effect, self._effects.get(name, 0.0))

    def rows(self, islands: Islands, slow: set[str], bad: set[str]) -> tuple[LayerRow, ...]:
        """Return a row for each place with a candidate, in the graph's order."""
        touched = dict(self._report.touched)
        skipped = dict(self._report.skipped)
        found: dict[tuple[str, ...], LayerRow] = {}
        for name in self._nodes:
            if name not in touched and name not in skipped:
                continue
            place = islands.place(name)
            names = tuple(n for n in place.names if n in self._nodes) or (name,)
            chief = next((n for n in names if is_op(self._nodes[n], *_WEIGHTED)), name)
            if names in found:
                continue
            row = LayerRow(
                names=(chief, *(n for n in names if n != chief)),
                op_type=self._nodes[chief].op_type,
                kind="",
                low=None,
                high=None,
                effect=max(
                    (e for n in names if (e := self._effects.get(n)) is not None), default=None
                ),
                before_ms=place.before_ms,
                after_ms=None,
                decision=f"float: {skipped.get(name, '')}",
            )
            if any(n in touched for n in names):
                row = self._judged(row, place.after_ms + place.border_ms, names, slow, bad)
            found[names] = row
        return tuple(found.values())

    def _judged(
        self, row: LayerRow, ms: float, names: tuple[str, ...], slow: set[str], bad: set[str]
    ) -> LayerRow:
        decision = "8-bit"
        if slow & set(names):
            decision = "float: slower"
        elif bad & set(names):
            decision = "float: hurts"
        low, high = self._range(row.names[0])
        notes = self._report.notes
        kind = f"{notes.get('activation_type', '')} x {notes.get('weight_type', '')}"
        if not is_op(self._nodes[row.names[0]], *_WEIGHTED):
            kind = str(notes.get("activation_type", ""))
        return replace(row, kind=kind, low=low, high=high, after_ms=ms, decision=decision)

    def _range(self, name: str) -> tuple[float | None, float | None]:
        """Return what the integers of a node's input stand for."""
        node = self._other.get(name)
        value = node.inputs[0] if node is not None and node.inputs else None
        source = value.producer() if value is not None else None
        if source is None or not is_op(source, "DequantizeLinear"):
            return None, None
        scale, zero = constant(source.inputs[1]), constant(source.inputs[2])
        if scale is None or zero is None or scale.size != 1:
            return None, None
        info = np.iinfo(np.int8 if zero.dtype == np.int8 else np.uint8)
        at = int(zero.reshape(-1)[0])
        step = float(scale.reshape(-1)[0])
        return (info.min - at) * step, (info.max - at) * step
