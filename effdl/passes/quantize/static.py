"""The pass ``quantize_static``."""

from __future__ import annotations

from effdl.passes.quantize._static import StaticQuantizer


class QuantizeStatic(StaticQuantizer):
    """Compute convolutions and matrix products in 8-bit integers, with ranges from calibration data.

    What it does: runs the model on the calibration data, chooses a range per activation, and writes
    QuantizeLinear and DequantizeLinear pairs around Conv, MatMul and Gemm with constant weights, and
    around the Add, Mul, Concat, pooling, Resize, Sigmoid and data-moving nodes between them, where
    ONNX Runtime's 8-bit kernels take them up. Weights become int8 with one scale per output channel,
    biases int32. The number types follow the target: uint8 activations with int8 weights on x86,
    int8 with int8 on Arm. Relu and Clip disappear into the ranges. A model of an opset before 13 is
    converted to it.

    When it helps: convolutional networks on CPUs with VNNI, AMX or Arm dot products, at a quarter of
    the weight size. Fold batch norms first.

    When it does not: on CUDA (the provider has no such kernels, the pass declines); where float
    operations between the layers (SiLU variants, layer norms) force conversions back and forth; for
    transformers quantize_dynamic is often better.

    Example:
        passes: [simplify, fold_batchnorm, {quantize_static: {calibration_method: mse}}]
    """
