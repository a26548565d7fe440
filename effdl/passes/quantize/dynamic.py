"""The pass ``quantize_dynamic``."""

from __future__ import annotations

from effdl.passes.quantize._dynamic import DynamicQuantizer


class QuantizeDynamic(DynamicQuantizer):
    """Compute matrix products in 8-bit integers, with activation ranges found at run time.

    What it does: gives MatMul and Gemm nodes with constant weights int8 weights, one scale per
    output column, and quantizes their inputs to uint8 at every run; products that read the same
    input share that step. Embedding tables (Gather of rows) are stored as int8 with one scale per
    row, LSTM layers become DynamicQuantizeLSTM. Needs no calibration data.

    When it helps: transformers and other networks of matrix products on CPUs: about twice as fast
    with VNNI or AMX, at a quarter of the weight size.

    When it does not: convolutions, for which the run-time form is several times slower than float
    (use quantize_static); small products, where finding the range costs more than it saves; CUDA,
    where the pass declines; GRU and RNN layers, which stay float.

    Example:
        passes: [simplify, fuse_layernorm, fuse_gelu, quantize_dynamic]
    """
