"""The pass ``separable``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import ClassVar

import onnx_ir as ir
from pydantic import Field

from effdl.graph.walk import all_nodes, int_attr, is_op
from effdl.graph.weights import Names, constant_tensor
from effdl.passes._low_rank_all import separable_forms
from effdl.passes._low_rank_choice import Candidate, fastest, gains
from effdl.passes._low_rank_forms import Form, Ranks
from effdl.passes._low_rank_layer import Layer, put_chain, usable_weight
from effdl.passes._low_rank_survey import Option, Survey
from effdl.passes.base import Context, NodePass

_DEFAULT_ENERGY = 0.98


class Separable(NodePass):
    """Replace a dense convolution by kernels for each channel and a 1x1 that adds them up.

    What it does: a Conv becomes a depthwise Conv, with ``kernels`` kernels for each input channel, and a 1x1
    Conv over all that they give. The kernels are the principal ones of each channel, weighted with what
    calibration data shows of it; the 1x1 is fitted to the layer's outputs, and their mean stays. As few
    kernels are taken as keep the share ``energy`` of the outputs. A layer is replaced only where that is
    faster as timed on the target.

    When it helps: convolutions with large kernels, 5x5 and more, whose kernels are smooth.

    When it does not: a 3x3 whose nine places matter alike needs too many kernels, and a depthwise convolution
    waits for memory: it is seldom faster than its MACs promise. Without data the error of the weights stands
    in for that of the outputs.

    Example:
        passes: [simplify, fold_batchnorm, {separable: {energy: 0.97}}]
    """

    lossy: ClassVar[bool] = True
    claims: ClassVar[frozenset[str]] = frozenset({"latency", "size"})
    not_after: ClassVar[Mapping[str, str]] = {
        "quantize_*": "it works on floating-point weights, which are integers after quantization"
    }

    energy: float = Field(_DEFAULT_ENERGY, gt=0, le=1)
    """Share of each layer's output energy (without data: of the squared weights) that stays."""
    kernels: int | None = Field(None, ge=1)
    """Kernels for each input channel, whatever the energy."""
    measure: bool = True
    """Whether a layer is timed before it is replaced."""
    min_gain: float = Field(0.1, ge=0, lt=1)
    """Leave a layer alone that, as timed, would be faster by less than this share."""
    min_saving: float = Field(0.1, ge=0, lt=1)
    """Leave a layer alone that would save less than this share of its MACs."""

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Return the number of layers replaced."""
        tensors = dict(self._layers(model, ctx))
        if not tensors:
            return 0
        survey = Survey(
            model, ctx, tensors, partial(separable_forms, share_of_macs=1 - self.min_saving)
        )
        if self.measure and survey.untimed:
            ctx.note("not_timed", survey.untimed)
        chosen: dict[ir.Node, Option] = {}
        with_data: set[ir.Node] = set()
        for node, layer, options, by_data in survey.options(
            list(tensors), self._grid, ("separable", self.kernels, self.min_saving)
        ):
            option, reason = self._choose(survey, Candidate(node, layer, options))
            if option is None:
                ctx.skip(node, reason)
                continue
            chosen[node] = option
            with_data |= {node} if by_data else set()
        names = Names(model)
        done = list(survey.built(chosen))
        for node, layer, option, weights, shift in done:
            error = f"{'output' if node in with_data else 'weight'} error {option.error**0.5:.2%}"
            part = f"{option.macs / layer.macs:.1%} of {layer.macs:,} MACs"
            ctx.touch(node, f"{_told(option)}: {part}, {error}")
            put_chain(layer, node, option.links, weights, shift, names, f"{option.ranks[0]}")
        if done:
            model.ir_version = max(model.ir_version, 4)  # below, weights must be graph inputs too
            saved = sum(layer.macs - option.macs for _, layer, option, _, _ in done)
            ctx.note("layers", len(done))
            ctx.note("macs_saved", saved)  # at one sample
        return len(done)

    def _choose(self, survey: Survey, candidate: Candidate) -> tuple[Option | None, str]:
        """Return the option for a layer, or None and why there is none."""
        options = list(candidate.options)
        if not options:
            return None, f"not even one kernel per channel saves {self.min_saving:.0%} of its MACs"
        if self.kernels is None:
            most = options[-1]
            options = [o for o in options if o.error <= 1 - self.energy + 1e-12]
            if not options:
                kept = 1 - most.error
                return None, f"{_told(most)} keep {kept:.1%} of the energy, not {self.energy:.1%}"
        candidate = Candidate(candidate.node, candidate.layer, options[:1])
        if not self.measure:
            return options[0], ""
        if survey.untimed:
            reason = gains(survey, candidate.layer, options[0], self.min_gain)
            return (None, reason) if reason else (options[0], "")
        return fastest(survey, candidate, self.min_gain)

    def _layers(self, model: ir.Model, ctx: Context) -> Iterator[tuple[ir.Node, ir.TensorProtocol]]:
        """Yield the convolutions that can be written so, with their weights; log why others cannot."""
        in_functions = {n for f in model.functions.values() for n in f}
        for node in all_nodes(model):
            if not is_op(node, "Conv") or not self.selected(node):
                continue
            given = constant_tensor(node.inputs[1])
            if given is not None and int_attr(node, "group", 1) == 1:
                if given.size == given.shape.numpy()[0] * given.shape.numpy()[1]:
                    ctx.skip(node, "its kernel has one place")
                    continue
                if given.shape.numpy()[1] == 1:
                    ctx.skip(node, "it has one input channel")
                    continue
            tensor, reason = usable_weight(node, node in in_functions)
            if tensor is not None:
                yield node, tensor
            elif reason:
                ctx.skip(node, reason)

    def _grid(self, layer: Layer, form: Form) -> list[Ranks]:
        """Return the numbers of kernels that save enough."""
        budget = (1 - self.min_saving) * layer.macs
        counts = range(1, form.limits[0] + 1) if self.kernels is None else (self.kernels,)
        return [(n,) for n in counts if n <= form.limits[0] and form.macs((n,)) <= budget]


def _told(option: Option) -> str:
    return f"{option.ranks[0]} of {option.full[0]} kernels per channel ({option.how})"
