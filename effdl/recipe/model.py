"""What a recipe says, checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, StringConstraints, with_config
from typing_extensions import TypedDict

from effdl.passes.base import Pass
from effdl.recipe.located import Located

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Device = Literal["cpu", "cuda", "arm"]
Extension = Literal[
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx_vnni_int8",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "neon",
    "dotprod",
    "i8mm",
    "bf16",
    "fp16",
    "sve",
]
_STRICT = ConfigDict(
    frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
)


class _Part(BaseModel):
    model_config = _STRICT


@with_config(ConfigDict(extra="forbid", use_attribute_docstrings=True))
class TargetSpec(TypedDict, total=False):
    """The place the model is made for, in detail."""

    device: Device
    """cpu: this machine. cuda: its GPU. arm: a 64-bit Arm CPU that need not be here."""
    isa: list[Extension]
    """Instruction-set extensions of the processor, when it is another one than this machine's."""
    threads: Annotated[int, Field(ge=0)]
    """Intra-op threads, 0 for ONNX Runtime's own choice."""


class Evaluation(_Part):
    """Labelled samples to score the model on, before and after."""

    path: Path
    """An .npz with one array per graph input, first axis the samples, and the labels."""
    labels: Text = "label"
    """The array in it that holds the labels."""
    metric: Literal["top1", "top5", "mse", "spearman", "agreement"] = "top1"
    """What is computed: top1 is the share of samples whose largest output is the label."""


class Data(_Part):
    """Data files; relative paths start at the recipe's folder."""

    calibration: Path | None = None
    """An .npz with one array per graph input, named as the input, first axis the samples."""
    evaluation: Evaluation | None = None
    """Labelled samples to score the model on."""


class Budget(_Part):
    """What the result must hold; a result that does not is not written."""

    accuracy_drop: Annotated[float, Field(ge=0)] | None = None
    """The metric of data.evaluation may fall by at most this: 0.005 is half a point of accuracy."""
    fidelity: Annotated[float, Field(ge=0)] | None = None
    """Largest relative L2 error of an output against the original model's."""
    latency: Annotated[float, Field(gt=0)] | None = None
    """Largest median latency in milliseconds."""
    speedup: Annotated[float, Field(gt=0)] | None = None
    """Smallest speed-up against the original model: 2.0 is twice as fast."""
    size: Annotated[float, Field(gt=0)] | None = None
    """Largest file size as a share of the original's: 0.5 is half."""


class Head(_Part):
    """Everything in a recipe but its passes."""

    name: Text
    """A short name; it is written into the result."""
    description: Text
    """What the recipe does, in a line."""
    target: Device | TargetSpec = "cpu"
    """Where the result will run."""
    data: Data = Data()
    """Calibration and evaluation data."""
    budget: Budget | None = None
    """What the result must hold."""
    objective: Literal["latency", "size"] | None = None
    """What the recipe is after."""


@dataclass(frozen=True)
class Step:
    """One pass of a recipe with its options.

    Args:
        name: of the pass.
        options: those that the recipe gives, as plain data.
        pass_: the pass, ready to run.
        where: file:line:column of the step.
    """

    name: str
    options: dict[str, Any]
    pass_: Pass
    where: str = field(default="", compare=False)


class Recipe(Head):
    """A checked recipe: its passes exist, their options are valid and their order makes sense.

    Made by ``effdl.recipe.load``.
    """

    passes: tuple[Step, ...]
    """The steps, in order."""
    _source: Located | None = PrivateAttr(default=None)

    @property
    def source(self) -> Located | None:
        """The values as they were written, with their places; None when made by hand."""
        return self._source
