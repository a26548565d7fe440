"""Which number format the target's kernels run fast, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from effdl.runtime.target import Target

IntType = Literal["uint8", "int8"]
DTYPES = {"uint8": ir.DataType.UINT8, "int8": ir.DataType.INT8}


@dataclass(frozen=True)
class Format:
    """Types of an 8-bit model.

    Args:
        activation_type, weight_type: ``uint8`` or ``int8``.
        symmetric_activations: the activations' zero point is the middle of the type.
        saturation_guard: keep weights small enough for a 16-bit sum of two products.
        reason: why, in one sentence.
        explicit: pairs stand at the inputs of layers only, biases stay float, and the engine decides what
            it fuses behind them (TensorRT); else outputs have pairs too (ONNX Runtime's CPU kernels).
    """

    activation_type: IntType
    weight_type: IntType
    symmetric_activations: bool
    saturation_guard: bool
    reason: str
    explicit: bool = False


def decline(target: Target, *, dynamic: bool = False) -> str:
    """Return why 8-bit integers do not pay on the target, an empty string when they may.

    Args:
        target: where the model will run.
        dynamic: ranges are found at every run.
    """
    if target.engine == "tensorrt":
        return "TensorRT takes ranges from calibration data: quantize_static" if dynamic else ""
    if target.on_gpu:
        return (
            "ONNX Runtime's CUDA provider has no 8-bit integer kernels: the nodes would fall back "
            "to the CPU; use convert_float16 there"
        )
    return ""


def choose(
    target: Target,
    *,
    activation_type: IntType | None = None,
    weight_type: IntType = "int8",
    symmetric_activations: bool = False,
    reduce_range: bool | None = None,
) -> Format:
    """Return the format for the target; arguments that are not None override its choice.

    MLAS, ONNX Runtime's matrix library, has fast x86 kernels for uint8 activations with int8
    weights; int8 with int8 is the native form of Arm's dot product.
    """
    if target.engine == "tensorrt":
        return Format(
            activation_type or "int8",
            weight_type,
            symmetric_activations=True,
            saturation_guard=bool(reduce_range),
            reason="TensorRT takes symmetric int8 pairs at the inputs of layers and fuses what follows",
            explicit=True,
        )
    if target.arch == "arm64":
        native: IntType = "int8"
        reason = "Arm's dot product multiplies int8 by int8"
    elif target.int8_dot:
        native, reason = "uint8", "VNNI and AMX multiply uint8 activations by int8 weights exactly"
    else:
        native = "uint8"
        reason = (
            "x86 without VNNI adds two uint8 x int8 products in 16 bits: weights of channels that "
            "could overflow are kept smaller"
        )
    guard = not target.int8_dot if reduce_range is None else reduce_range
    return Format(activation_type or native, weight_type, symmetric_activations, guard, reason)
