"""The pass ``low_rank``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import ClassVar

import onnx_ir as ir
from pydantic import Field, model_validator

from effdl.graph.cost import model_cost
from effdl.graph.walk import all_nodes, is_op
from effdl.graph.weights import Names
from effdl.observe.batches import batched
from effdl.passes._fit import Kept, fit
from effdl.passes._low_rank_all import forms
from effdl.passes._low_rank_choice import (
    Candidate,
    describe,
    fastest,
    gains,
    within_macs,
    within_time,
)
from effdl.passes._low_rank_forms import Form, Ranks, Seen, all_ranks, most_rank
from effdl.passes._low_rank_layer import LAYERS, MARK, Layer, put_chain, usable_weight
from effdl.passes._low_rank_survey import Option, Survey
from effdl.passes.base import Context, NodePass
from effdl.solve.factorize import rank_for_ratio, round_rank

_DEFAULT_ENERGY = 0.99
_LEAST_OF_MODEL = 0.03
"""Where all layers together save less than this share of the model's time, none is worth an error."""
_WORTH = 0.75
"""Share of a layer's MACs above which two kernels are not faster by ``min_gain`` than one."""


class LowRank(NodePass):
    """Replace a layer by two or three thinner ones that give nearly the same outputs.

    What it does: a MatMul or Gemm with a constant matrix becomes two; a Conv becomes a thin Conv with its
    kernel and a 1x1 Conv behind or before it, or both, or a column and a row of the kernel; whichever loses
    least. With calibration data that is the error of the layer's outputs, which is known exactly from the
    covariance of its inputs, and the mean of the outputs stays (output-PCA, reduced-rank regression);
    without data it is the error of the weight. Ranks come from ``energy`` (layer by layer), ``ratio`` (MACs,
    layer by layer), ``macs`` or ``latency`` (of the whole model, shared out so that the sum of errors is
    least). A layer is replaced only where that is faster as timed on the target, alone and in its real size;
    with energy or ratio only if ``measure`` asks for it. A replaced layer is marked and never split again.

    When it helps: large matrices with redundant columns, such as the fully connected layers and wide
    3x3 convolutions of over-parameterised networks.

    When it does not: most layers of compact networks have no slack: depthwise and narrow layers are
    declined. Two kernels instead of one cost time that the MACs do not show. Without data the error of the
    outputs can be larger or smaller than that of the weights.

    Example:
        passes: [{low_rank: {latency: 0.7, ignore: ["*head*"]}}]
    """

    lossy: ClassVar[bool] = True
    claims: ClassVar[frozenset[str]] = frozenset({"latency", "size"})
    not_after: ClassVar[Mapping[str, str]] = {
        "quantize_*": "it works on floating-point weights, which are integers after quantization"
    }

    energy: float | None = Field(None, gt=0, le=1)
    """Share of each layer's output energy (of its squared weights without data) that stays; default 0.99."""
    ratio: float | None = Field(None, gt=0, lt=1)
    """MACs of every layer relative to before, but for the rounding of ranks; instead of energy."""
    macs: float | None = Field(None, gt=0, lt=1)
    """MACs of the whole model relative to before; instead of energy."""
    latency: float | None = Field(None, gt=0, lt=1)
    """Time of the whole model on the target relative to before, by its layers; instead of energy."""
    measure: bool | None = None
    """Whether a layer is timed before it is replaced; none: unless energy or ratio is given."""
    min_gain: float = Field(0.1, ge=0, lt=1)
    """Leave a layer alone that, as timed, would be faster by less than this share."""
    refit: bool = True
    """Fit each replaced layer, first to last, to what the original model gives there; needs data."""
    min_rank: int = Field(1, ge=1)
    """Never a rank below this."""
    multiple_of: int | None = Field(None, ge=1)
    """Ranks are multiples of this; none: what the target's vectors hold, 16 or 8."""
    min_saving: float = Field(0.1, ge=0, lt=1)
    """Leave a layer alone that would save less than this share of its MACs."""

    @model_validator(mode="after")
    def _one_goal(self) -> LowRank:
        goals = ("energy", "ratio", "macs", "latency")
        given = [name for name in goals if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} exclude each other")
        if self.ratio is not None and self.ratio > 1 - self.min_saving:
            raise ValueError(f"ratio {self.ratio} saves less than min_saving {self.min_saving}")
        if self.latency is not None and self.measure is False:
            raise ValueError("latency cannot be kept without measure")
        return self

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Return the number of layers replaced."""
        tensors = dict(self._layers(model, ctx))
        if not tensors:
            return 0
        planned = self.macs is not None or self.latency is not None
        if planned and any(MARK in n.metadata_props for n in all_nodes(model)):
            for node in tensors:
                ctx.skip(node, "a plan for the whole model was made before, without it")
            return 0
        survey = Survey(model, ctx, tensors, self._forms(ctx))
        chosen, with_data = self._choose(survey, ctx)
        if not chosen:
            return 0
        names = Names(model)
        made = sorted(survey.built(chosen), key=lambda m: list(chosen).index(m[0]))
        original = model.clone() if self.refit and with_data else None
        params = 0
        changed: set[str] = set()
        for node, layer, option, weights, shift in made:
            error = f"{'output' if node in with_data else 'weight'} error {option.error**0.5:.2%}"
            part = f"{option.macs / layer.macs:.1%} of {layer.macs:,} MACs"
            ctx.touch(node, f"{describe(option)}: {part}, {error}")
            params += tensors[node].size - sum(w.size for w in weights)
            mark = "x".join(map(str, option.ranks))
            new = put_chain(layer, node, option.links, weights, shift, names, mark)
            changed.update(v.name or "" for n in new[:-1] for v in n.outputs)
        if original is not None and ctx.feeds is not None:
            threads = ctx.target.threads
            feeds = batched(original, ctx.feeds, threads=threads)
            fitted = fit(
                original,
                model,
                Kept(),
                feeds,
                changed=changed,
                threads=threads,
                max_bytes=ctx.max_bytes,
            )
            ctx.note("layers_fitted", len(fitted))
        model.ir_version = max(model.ir_version, 4)  # below, weights must be graph inputs too
        _note(ctx, [(layer, option) for _, layer, option, _, _ in made], params, survey)
        return len(made)

    def _layers(self, model: ir.Model, ctx: Context) -> Iterator[tuple[ir.Node, ir.TensorProtocol]]:
        """Yield the nodes that can be split, with their weights; log the candidates that cannot."""
        in_functions = {n for f in model.functions.values() for n in f}
        for node in all_nodes(model):
            if is_op(node, "Attention", domain="com.microsoft"):
                ctx.skip(
                    node, "packed attention stays whole: fuse_attention {form: mha} can be split"
                )
            if not is_op(node, *LAYERS) or not self.selected(node):
                continue
            tensor, reason = usable_weight(node, node in in_functions)
            if tensor is not None:
                yield node, tensor
            elif reason:
                ctx.skip(node, reason)

    def _forms(self, ctx: Context) -> Callable[[Layer, Seen], Iterator[Form]]:
        own = self.ratio is None and self.macs is None and self.latency is None
        energy = self._kept if own else None
        return partial(_forms, most=self._most, energy=energy, seed=ctx.seed)

    @property
    def _most(self) -> float:
        """The greatest share of a layer's MACs that is looked at."""
        planned = self.macs is not None or self.latency is not None
        return min(1 - self.min_saving, _WORTH) if planned else 1 - self.min_saving

    def _choose(self, survey: Survey, ctx: Context) -> tuple[dict[ir.Node, Option], set[ir.Node]]:
        """Return the options to take, and the nodes whose errors data told."""
        candidates: list[Candidate] = []
        with_data: set[ir.Node] = set()
        order = {node: k for k, node in enumerate(survey.tensors)}
        grid = partial(self._grid, multiple=self.multiple_of or ctx.target.channel_block)
        reasons: dict[ir.Node, str] = {}
        key = (self._most, self.ratio, self.min_rank, grid.keywords["multiple"], bool(ctx.feeds))
        found = survey.options(list(survey.tensors), grid, (*key, self.energy))
        for node, layer, options, by_data in found:
            kept = self._allowed(options)
            if by_data:
                with_data.add(node)
            if kept:
                candidates.append(Candidate(node, layer, kept))
            else:
                reasons[node] = self._nothing(layer, options, grid.keywords["multiple"])
        candidates.sort(key=lambda c: order[c.node])
        for node in sorted(reasons, key=order.__getitem__):
            ctx.skip(node, reasons[node])
        chosen = self._plan(candidates, survey, ctx)
        return {n: chosen[n] for n in order if n in chosen}, with_data

    def _plan(
        self, candidates: list[Candidate], survey: Survey, ctx: Context
    ) -> dict[ir.Node, Option]:
        timed = self.measure
        if timed is None:
            timed = self.energy is None and self.ratio is None
        if timed and survey.untimed:
            ctx.note("not_timed", survey.untimed)
        refused = partial(self._refused, survey) if timed else _never
        goal = self.macs
        if self.latency is not None:
            found = within_time(candidates, survey, self.latency, self.min_gain, ctx)
            if found is not None:
                return found
            ctx.note("latency", "no time was measured: taken as a share of the MACs")
            goal = self.latency
        if goal is not None:
            whole = model_cost(survey.model, survey.dims).macs or 0
            here = sum(c.layer.macs for c in candidates)
            return within_macs(candidates, here - (1 - goal) * whole, refused, ctx)
        chosen: dict[ir.Node, Option] = {}
        for c in candidates:
            option: Option | None = None
            reason = ""
            if self.ratio is not None or not timed:
                by_error = self.ratio is not None
                option = min(c.options, key=lambda o: o.error if by_error else o.macs)
                reason = refused(c, option)
            else:
                option, reason = fastest(survey, c, self.min_gain)
            if reason or option is None:
                ctx.skip(c.node, reason)
            else:
                chosen[c.node] = option
        if timed and self.energy is None and self.ratio is None:
            return _worthwhile(chosen, candidates, survey, ctx)
        return chosen

    def _refused(self, survey: Survey, candidate: Candidate, option: Option) -> str:
        return gains(survey, candidate.layer, option, self.min_gain)

    def _grid(self, layer: Layer, form: Form, *, multiple: int) -> list[Ranks]:
        """Return the ranks of a form that are looked at."""
        budget = self._most * layer.macs
        if self.ratio is None:
            return all_ranks(form, budget, multiple, self.min_rank)
        if len(form.limits) > 1:
            return all_ranks(form, self.ratio * layer.macs, multiple, self.min_rank)
        per_rank = form.macs((1,))
        rank = round_rank(rank_for_ratio(layer.macs, per_rank, self.ratio), multiple, up=False)
        cap = most_rank(form, budget)
        if rank > cap:
            rank -= multiple
        if rank:
            rank = max(rank, self.min_rank)
        return [(rank,)] if 0 < rank <= cap else []

    @property
    def _kept(self) -> float:
        return self.energy or _DEFAULT_ENERGY

    def _allowed(self, options: list[Option]) -> list[Option]:
        """Return the options that lose little enough."""
        if self.ratio is not None or self.macs is not None or self.latency is not None:
            return options
        lost = 1 - self._kept
        return [o for o in options if o.error <= lost + 1e-12]

    def _nothing(self, layer: Layer, options: list[Option], multiple: int) -> str:
        """Return why no option is left."""
        first = next(self._plain(layer))
        per_rank, side = first.macs((1,)), first.limits[0]
        if self.ratio is not None:
            fits = rank_for_ratio(layer.macs, per_rank, self.ratio)
            least = max(multiple, self.min_rank)
            allow = f"{self.ratio:.0%} of {layer.macs:,} MACs allow rank {fits} of {side}"
            return f"{allow}, the least is {least}"
        cap = most_rank(first, (1 - self.min_saving) * layer.macs)
        allows = f"saving {self.min_saving:.0%} of {layer.macs:,} MACs allows rank {cap} of {side}"
        floor = round_rank(self.min_rank, multiple, up=True)
        if not options:
            return f"{allows}, below {floor}"
        return f"{self._kept:.1%} of the energy needs more; {allows}"

    def _plain(self, layer: Layer) -> Iterator[Form]:
        return forms(layer, Seen(), 1 - self.min_saving)


def _forms(
    layer: Layer, seen: Seen, *, most: float, energy: float | None, seed: int
) -> Iterator[Form]:
    return forms(layer, seen, most, energy=energy, seed=seed)


def _worthwhile(
    chosen: dict[ir.Node, Option], candidates: list[Candidate], survey: Survey, ctx: Context
) -> dict[ir.Node, Option]:
    """Return what was chosen, nothing where it saves too little of the model's time to be worth an error."""
    taken = [c for c in candidates if c.node in chosen]
    told = survey.model_ms([c.layer for c in taken]) if taken else None
    if told is None:
        return chosen
    whole, layers = told
    saved = 0.0
    for c, ms in zip(taken, layers, strict=True):
        found = survey.times(c.layer, [chosen[c.node]])
        saved += ms * (1 - found[1] / found[0]) if found is not None else ms
    if saved >= _LEAST_OF_MODEL * whole:
        return chosen
    for node, option in chosen.items():
        gain = f"all layers together would save {saved:.3g} of {whole:.3g} ms"
        ctx.skip(node, f"{describe(option)}: {gain}, less than {_LEAST_OF_MODEL:.0%}")
    return {}


def _never(candidate: Candidate, option: Option) -> str:
    return ""


def _note(ctx: Context, done: list[tuple[Layer, Option]], params: int, survey: Survey) -> None:
    before, after = sum(layer.macs for layer, _ in done), sum(o.macs for _, o in done)
    ctx.note("layers", len(done))
    ctx.note("macs_saved", before - after)  # at one sample
    ctx.note("macs_of_layers", f"{before:,} -> {after:,}")
    ctx.note("params_saved", params)
    ctx.note("largest_error", round(max(o.error for _, o in done) ** 0.5, 4))
