"""Time and memory of prune_channels on a network of the size of ResNet-50, 25 million parameters.

    python scripts/measure_pruning.py [--samples 512] [--size 224] [--macs 0.6]

The network is made here, bottleneck by bottleneck (He et al. 2015, table 1), with random weights: what is
measured is work, not accuracy. Its pictures are smooth noise. The pass runs with calibration data, its plan
and its repair; time and peak memory are those of ``effdl optimize`` itself.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import effdl

# isort: split
import numpy as np
import onnx
from onnx import helper, numpy_helper

STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))
"""Width of the bottleneck, blocks, stride of the first."""
WIDER = 4


class Builder:
    """Nodes and weights of a network on its way."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._rng = np.random.default_rng(0)

    def add(self, op: str, *inputs: str, **attributes: object) -> str:
        """Append a node, return its output."""
        out = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [out], name=out, **attributes))
        return out

    def conv(self, x: str, width: int, made: int, kernel: int, stride: int = 1) -> str:
        """A convolution with a bias; norms are folded already."""
        name = f"w{len(self.weights)}"
        fan = width * kernel * kernel
        weight = self._rng.normal(size=(made, width, kernel, kernel)) * np.sqrt(2 / fan)
        self._weight(name, weight)
        self._weight(f"{name}_b", self._rng.normal(size=made) * 0.1)
        pads = [kernel // 2] * 4
        return self.add("Conv", x, name, f"{name}_b", strides=[stride] * 2, pads=pads)

    def gemm(self, x: str, width: int, made: int) -> str:
        """The classifier."""
        self._weight("classes", self._rng.normal(size=(made, width)) / np.sqrt(width))
        self._weight("classes_b", np.zeros(made))
        return self.add("Gemm", x, "classes", "classes_b", transB=1)

    def _weight(self, name: str, array: np.ndarray) -> None:
        self.weights.append(numpy_helper.from_array(array.astype(np.float32), name))


def resnet50(size: int) -> onnx.ModelProto:
    """The network, batch norms folded."""
    net = Builder()
    x = net.add("Relu", net.conv("x", 3, 64, 7, 2))
    x = net.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    width = 64
    for inner, blocks, first in STAGES:
        for block in range(blocks):
            stride = first if block == 0 else 1
            y = net.add("Relu", net.conv(x, width, inner, 1))
            y = net.add("Relu", net.conv(y, inner, inner, 3, stride))
            y = net.conv(y, inner, inner * WIDER, 1)
            if block == 0:
                x = net.conv(x, width, inner * WIDER, 1, stride)
            width = inner * WIDER
            x = net.add("Relu", net.add("Add", x, y))
    x = net.add("Flatten", net.add("GlobalAveragePool", x))
    out = net.gemm(x, width, 1000)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        net.nodes,
        "resnet50",
        [value("x", onnx.TensorProto.FLOAT, ["N", 3, size, size])],
        [value(out, onnx.TensorProto.FLOAT, ["N", 1000])],
        net.weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def pictures(count: int, size: int) -> np.ndarray:
    """Smooth noise: blocks of 16 pixels and some grain."""
    rng = np.random.default_rng(1)
    coarse = rng.normal(size=(count, 3, size // 16, size // 16)).astype(np.float32)
    smooth = coarse.repeat(16, 2).repeat(16, 3)
    return smooth + rng.normal(size=smooth.shape).astype(np.float32) * 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--size", type=int, default=224, help="of the pictures, a multiple of 16")
    parser.add_argument("--macs", type=float, default=0.6)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="effdl-pruning-") as name:
        folder = Path(name)
        onnx.save(resnet50(args.size), folder / "model.onnx")
        np.savez(folder / "data.npz", x=pictures(args.samples, args.size))
        steps = ["simplify", {"prune_channels": {"macs": args.macs}}]
        report = effdl.optimize(
            folder / "model.onnx",
            {"name": "pruned", "description": "time and memory", "passes": steps},
            folder / "out.onnx",
            data=folder / "data.npz",
            options=effdl.RunOptions(gate="off", bench_seconds=0, keep_going=True),
        )
    pruned = report.passes[-1]
    print(f"{report.before.params / 1e6:.1f} M parameters, {args.samples} pictures of {args.size}")
    print(f"prune_channels: {pruned.seconds:.0f} s; the command: {report.seconds:.0f} s")
    print(f"peak memory: {report.peak_bytes / 1e6:,.0f} MB")
    print(f"MACs left: {(report.after.macs or 0) / (report.before.macs or 1):.2f}; {pruned.notes}")


if __name__ == "__main__":
    main()
