"""Write a large ONNX model with random weights in a file beside it, in little memory.

    python scripts/make_big_model.py big.onnx --gb 3

The model is a stack of feed-forward blocks (layer norm, MatMul, Add, Relu, MatMul, Add, residual
Add), as wide as ``--width``. Weights are written row by row: the memory used does not depend on the
size. The same arguments give the same bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper

OPSET = 17
CHUNK_BYTES = 1 << 24
ALIGNMENT = 4096  # weights start on a page, so that they can be memory-mapped


@dataclass
class Weights:
    """The data file being written, and the tensors that point into it."""

    file: BinaryIO
    rng: np.random.Generator
    tensors: list[onnx.TensorProto] = field(default_factory=list)

    def normal(self, name: str, shape: tuple[int, ...], scale: float) -> None:
        """Append normal random numbers."""
        count, step = int(np.prod(shape)), CHUNK_BYTES // 4
        sizes = (min(step, count - i) for i in range(0, count, step))
        chunks = (self.rng.standard_normal(n, np.float32) * np.float32(scale) for n in sizes)
        self._append(name, shape, chunks)

    def constant(self, name: str, shape: tuple[int, ...], value: float) -> None:
        """Append the same number everywhere."""
        self._append(name, shape, iter([np.full(shape, value, np.float32)]))

    def _append(self, name: str, shape: tuple[int, ...], chunks: Iterator[np.ndarray]) -> None:
        self.file.write(b"\0" * (-self.file.tell() % ALIGNMENT))
        offset = self.file.tell()
        for chunk in chunks:
            self.file.write(chunk.data)
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        place = {"location": Path(self.file.name).name, "offset": offset}
        place["length"] = self.file.tell() - offset
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        self.tensors.append(tensor)


def block(k: int, x: str, width: int, weights: Weights) -> tuple[str, list[onnx.NodeProto]]:
    """Write the weights of block ``k`` and return its output with its nodes."""
    p = f"block{k}/"
    scale = float(np.sqrt(2 / width))
    weights.constant(p + "norm/scale", (width,), 1.0)
    weights.constant(p + "norm/bias", (width,), 0.0)
    for layer in ("up", "down"):
        weights.normal(p + layer + "/weight", (width, width), scale)
        weights.normal(p + layer + "/bias", (width,), 0.01)
    steps = [
        ("LayerNormalization", "norm", [x, p + "norm/scale", p + "norm/bias"]),
        ("MatMul", "up", [p + "norm", p + "up/weight"]),
        ("Add", "up_bias", [p + "up", p + "up/bias"]),
        ("Relu", "relu", [p + "up_bias"]),
        ("MatMul", "down", [p + "relu", p + "down/weight"]),
        ("Add", "down_bias", [p + "down", p + "down/bias"]),
        ("Add", "out", [p + "down_bias", x]),
    ]
    nodes = [helper.make_node(op, inputs, [p + name], name=p + name) for op, name, inputs in steps]
    return p + "out", nodes


def write_model(out: Path, size: float, width: int, seed: int) -> int:
    """Write ``out`` and ``out.data`` with about ``size`` bytes of weights; return the real number."""
    blocks = max(1, round(size / (2 * width * width * 4)))
    nodes: list[onnx.NodeProto] = []
    x = "x"
    with Path(f"{out}.data").open("wb") as file:
        weights = Weights(file, np.random.default_rng(seed))
        for k in range(blocks):
            x, new = block(k, x, width, weights)
            nodes += new
        written = file.tell()
    nodes.append(helper.make_node("Identity", [x], ["y"], name="y"))
    shape: list[str | int | None] = ["batch", width]
    graph = helper.make_graph(
        nodes,
        "big",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        weights.tensors,
    )
    imports = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8)
    out.write_bytes(model.SerializeToString())
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="the .onnx file to write")
    parser.add_argument("--gb", type=float, default=3.0, help="size in 1e9 bytes (default: 3)")
    parser.add_argument("--width", type=int, default=4096, help="features (default: 4096)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: 0)")
    args = parser.parse_args()
    written = write_model(args.out, args.gb * 1e9, args.width, args.seed)
    print(f"{args.out}: {written / 1e9:.2f} GB of weights in {args.out}.data")


if __name__ == "__main__":
    main()
