"""What a recipe says, checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    StringConstraints,
    WithJsonSchema,
    with_config,
)
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from effdl.data.spec import Labelled, Source
from effdl.errors import UsageError
from effdl.passes.base import Pass
from effdl.recipe.located import Located
from effdl.runtime.target import parse_target

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Device = Literal["cpu", "cuda", "tensorrt", "arm", "ssh", "arm-emulated"]
Core = Literal["a53", "n1", "v1"]
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


def _place(text: str) -> str:
    """Accept ``ssh:HOST`` and ``arm-emulated:CORE``."""
    if ":" not in text:
        raise PydanticCustomError("place", "ssh:HOST")
    try:
        parse_target(text)
    except UsageError as e:
        raise ValueError(e.message) from None
    return text


Place = Annotated[
    str,
    AfterValidator(_place),
    WithJsonSchema({"type": "string", "pattern": "^(ssh:.+|arm-emulated:(a53|n1|v1))$"}),
]
"""A target with its machine or core in it."""


class _Part(BaseModel):
    model_config = _STRICT


@with_config(ConfigDict(extra="forbid", use_attribute_docstrings=True))
class TargetSpec(TypedDict, total=False):
    """The place the model is made for, in detail."""

    device: Device | Place
    """cpu: this machine. cuda, tensorrt: its GPU. arm: a 64-bit Arm CPU that need not be here. ssh: a
    machine that the OpenSSH client reaches. arm-emulated: an emulated Arm CPU, for right or wrong, not for
    time."""
    host: Text
    """Of ssh: the machine, as the OpenSSH client takes it, such as user@pi4."""
    provider: Literal["cpu", "cuda", "tensorrt"]
    """Of ssh: what computes there, its CPU or its GPU (by ONNX Runtime's kernels or by TensorRT's)."""
    core: Core
    """Of arm-emulated: the core; all of them when not given."""
    python: Text
    """Of ssh and arm-emulated: the command that starts a Python with onnxruntime there."""
    isa: list[Extension]
    """Instruction-set extensions of the processor, when it is another one than this machine's."""
    threads: Annotated[int, Field(ge=0)]
    """Intra-op threads, 0 for ONNX Runtime's own choice."""


def _together(spec: TargetSpec) -> TargetSpec:
    """Refuse keys that do not go together."""
    try:
        parse_target(spec)
    except UsageError as e:
        raise ValueError(e.message) from None
    return spec


_Spec = Annotated[TargetSpec, AfterValidator(_together)]


class Evaluation(Labelled):
    """Labelled samples to score the model on, before and after."""

    metric: Literal["top1", "top5", "f1", "mse", "psnr", "spearman", "agreement"] = "top1"
    """What is computed: top1 is the share of samples whose largest output is the label."""
    output: Text | None = None
    """The graph output that is scored; the first when not given."""


class Data(_Part):
    """Data files; relative paths start at the recipe's folder."""

    calibration: Path | Source | None = None
    """Real inputs: an .npz or a folder with an array per input, or a mapping for pictures and texts."""
    evaluation: Evaluation | None = None
    """Labelled samples to score the model on."""


class Budget(_Part):
    """What the result must hold; a result that does not is not written."""

    accuracy_drop: Annotated[float, Field(ge=0)] | None = None
    """The metric of data.evaluation may fall by at most this: 0.005 is half a point of accuracy."""
    fidelity: Annotated[float, Field(ge=0)] | None = None
    """Largest relative L2 error of an output against the original model's. Where accuracy_drop is
    given and there is evaluation data, that decides instead."""
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
    target: Literal["cpu", "cuda", "tensorrt", "arm", "arm-emulated"] | Place | _Spec = "cpu"
    """Where the result will run."""
    data: Data = Data()
    """Calibration and evaluation data."""
    budget: Budget | None = None
    """What the result must hold."""
    objective: Literal["latency", "size"] | None = None
    """What the recipe is after: where that does not come, passes are taken back. Without it latency, if a
    pass trades accuracy for speed."""


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
