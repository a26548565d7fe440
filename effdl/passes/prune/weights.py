"""The pass ``prune_weights``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from pydantic import Field, field_validator, model_validator

from effdl.graph.weights import Names
from effdl.measure.size import zstd_bytes
from effdl.passes.base import Context, NodePass
from effdl.passes.prune._by_data import ByData, Outcome, zeroed
from effdl.passes.prune._found import Finder, Weight, replace
from effdl.passes.prune._magnitude import Choice
from effdl.passes.prune._seen import correct
from effdl.passes.prune._shares import erk, uniform

Array = npt.NDArray[Any]
_ADVICE = (
    "ONNX Runtime computes zeros at dense speed: latency stays, only the compressed (zstd) file "
    "gets smaller"
)


class PruneWeights(NodePass):
    """Set weights to zero, and let the others make up for them.

    What it does: zeroes constant weights of Conv, ConvTranspose, Gemm, MatMul, LSTM, GRU and RNN
    (biases never; embedding tables of Gather only when ``targets`` names them) until the share
    ``sparsity`` of them is zero. ``pattern`` chooses single weights, n of every m consecutive input
    channels, or whole blocks of outputs x inputs. Weights that are zero already count. A weight
    with several users is pruned once for all of them. Without calibration data the smallest
    magnitudes go. With data, zeros and the weights that stay are chosen together so that the
    outputs of the layer change least; what they still lose on average goes into the bias. Samples
    held out decide in every layer whether that is better than the smallest magnitudes. Weights
    that are recurrent, in a subgraph or shared go by magnitude.

    When it helps: the compressed (zstd) file gets smaller, and runtimes with sparse kernels (2:4 on
    NVIDIA tensor cores through TensorRT) can use the pattern. With a few hundred unlabelled samples
    and ``scope: plan``, most networks bear several times the zeros that magnitude leaves them.

    When it does not: ONNX Runtime computes zeros at dense speed, so latency and the uncompressed
    file stay as they are. Without data accuracy falls fast with the sparsity: half of the weights
    often costs little, 0.8 usually nearly all.

    Example:
        passes: [{prune_weights: {sparsity: 0.8, scope: plan, ignore: ["*head*"]}}]
    """

    lossy: ClassVar[bool] = True
    claims: ClassVar[frozenset[str]] = frozenset({"size"})
    not_after: ClassVar[Mapping[str, str]] = {
        "quantize_*": "it works on floating-point weights, which are integers after quantization"
    }

    sparsity: float = Field(0.5, ge=0, lt=1)
    """Share of zeros to reach; unused by the pattern n:m, where n_m says it."""
    method: Literal["auto", "magnitude", "wanda", "obs", "admm"] = "auto"
    """How zeros are chosen: by wanda, obs (one sweep) or admm (many rounds); auto is admm. Without data
    all are magnitude."""
    scope: Literal["layer", "global", "erk", "plan"] = "layer"
    """Reach the sparsity in every weight alone (layer) or over all: by one threshold for normalised
    scores (global), by the shapes (erk), or by the measured errors of the layers (plan, needs data)."""
    pattern: Literal["unstructured", "n:m", "block"] = "unstructured"
    """What is zeroed together: single weights, m - n of m consecutive input channels, or blocks."""
    n_m: str = "2:4"
    """For the pattern n:m: keep the n largest of every m consecutive input channels."""
    block: tuple[int, int] = (4, 1)
    """For the pattern block: outputs and inputs of one block (kernel positions count as inputs)."""
    norm: Literal["l1", "l2"] = "l1"
    """For the pattern block, by magnitude: mean magnitude or root mean square of a block decides."""
    min_size: int = Field(1024, ge=0)
    """Leave weights with fewer elements than this alone."""

    @field_validator("n_m", mode="before")
    @classmethod
    def _unquoted(cls, value: object) -> object:
        # YAML 1.1 reads an unquoted 2:4 as a number of base 60.
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return f"{value // 60}:{value % 60}"
        return value

    @field_validator("n_m")
    @classmethod
    def _n_of_m(cls, value: str) -> str:
        match = re.fullmatch(r"(\d{1,3}):(\d{1,3})", value)
        if not match or not 1 <= int(match[1]) < int(match[2]):
            raise ValueError('must be "N:M" with 1 <= N < M, such as "2:4"')
        return value

    @field_validator("block")
    @classmethod
    def _positive(cls, value: tuple[int, int]) -> tuple[int, int]:
        if min(value) < 1 or value == (1, 1):
            raise ValueError("must be two positive numbers, not both 1, such as [4, 1]")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> PruneWeights:
        if self.pattern != "n:m" and self.n_m != "2:4":
            raise ValueError('n_m needs pattern: "n:m"')
        if self.pattern != "block" and (self.block != (4, 1) or self.norm != "l1"):
            raise ValueError("block and norm need pattern: block")
        if self.pattern == "n:m" and (self.scope != "layer" or self.sparsity != 0.5):
            raise ValueError('with pattern "n:m" the sparsity follows from n_m in every group')
        return self

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Return the number of weights that lost values."""
        found = self._finder().find(model, ctx)
        method = self._method(ctx)
        if method == "magnitude":
            outcome = Outcome(dict(enumerate(self._smallest(found))))
        else:
            outcome = ByData(self._choice(), method, self.scope, self.sparsity).run(
                found, model, ctx
            )
        changes = self._write(found, outcome, model, ctx)
        if changes:
            ctx.note("method", method)
            outcome.tell(ctx)
        return changes

    def _write(self, found: list[Weight], outcome: Outcome, model: ir.Model, ctx: Context) -> int:
        names, tally = Names(model), Counter[str]()
        for k, weight in enumerate(found):
            array = weight.array()
            new = outcome.new.get(k, array)
            before, after = (a.size - int(np.count_nonzero(a)) for a in (array, new))
            tally.update(total=array.size, zeros=after)
            if after <= before:
                share = _share(array, before)
                ctx.skip(weight.users[0], f"already has the zeros asked for ({share})")
                continue
            tally.update(changes=1, zeroed=after - before)
            tally.update(packed_before=zstd_bytes(array), packed_after=zstd_bytes(new))
            replace(weight, new, names)
            told = ""
            if k in outcome.layers:
                layer, pruned = outcome.layers[k]
                correct(layer, pruned, names)
                told = f", error {pruned.error:.2g} of its output's square"
            for node in weight.users:
                ctx.touch(node, f"sparsity {_share(array, before)} -> {_share(array, after)}{told}")
        if tally["changes"]:
            if any(not w.value.is_initializer() for w in found):
                model.ir_version = max(model.ir_version, 4)  # below, weights must be inputs too
            ctx.note("sparsity", round(tally["zeros"] / tally["total"], 4))
            ctx.note("weights_zeroed", tally["zeroed"])
            ctx.note("pattern", self.n_m if self.pattern == "n:m" else self.pattern)
            ctx.note("zstd_of_weights", f"{tally['packed_before']:,} -> {tally['packed_after']:,}")
            ctx.note("speed", _ADVICE)
        return tally["changes"]

    def _method(self, ctx: Context) -> Literal["magnitude", "wanda", "obs", "admm"]:
        if ctx.feeds is None or not len(ctx.feeds):
            return "magnitude"
        return "admm" if self.method == "auto" else self.method

    def _choice(self) -> Choice:
        n, m = map(int, self.n_m.split(":"))
        return Choice(self.pattern, (n, m), self.block, self.norm)

    def _finder(self) -> Finder:
        return Finder(
            self.selected,
            bool(self.targets),
            self.min_size,
            self.n_m if self.pattern == "n:m" else "",
            self.pattern != "unstructured",
        )

    def _smallest(self, found: list[Weight]) -> Iterator[Array]:
        """Yield the weights without their smallest magnitudes; a plan needs data, so it is global."""
        choice = self._choice()
        sizes = [choice.size(w) for w in found]
        if self.scope in ("global", "plan") and self.pattern != "n:m":
            keeps = choice.keep_common(found, round(self.sparsity * sum(sizes)))
            yield from (zeroed(w, keep) for w, keep in zip(found, keeps, strict=True))
            return
        share_out = uniform(sizes, self.sparsity)
        if self.scope == "erk":
            share_out = erk(found, sizes, self.sparsity)
        for weight, count in zip(found, share_out, strict=True):
            yield zeroed(weight, choice.keep(weight, count))


def _share(array: Array, zeros: int) -> str:
    return f"{zeros / array.size:.1%}"
