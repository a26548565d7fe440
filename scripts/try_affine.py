"""Offsets, or slopes and offsets, per output channel: why effdl takes neither from its 8-bit models.

    EFFDL_SHARED=... python scripts/try_affine.py [--model mobilenetv2_fp32] [--waves 0 6]

Quantizes a network as `cnn-int8` does, without measuring, then goes through its convolutions in order. The
outputs of a group of them (so many waves; 0: one layer at a time) are compared with the float model's on
calibration data, channel by channel, and the difference goes into their biases. With slopes, their scales
take the slope of the regression of the float output on the 8-bit one. Prints the relative L2 error on
samples not used. Needs pillow.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import effdl

# isort: split
import numpy as np
import onnx
import onnxruntime as ort
from compare_repairs import KEPT, PREPARED, error
from onnx import numpy_helper
from real_models import rows

FEEDS = 24
Arrays = dict[str, np.ndarray]


class Model:
    """A model whose inner tensors can be asked for."""

    def __init__(self, path: Path) -> None:
        self.proto = onnx.load(path)
        nodes = self.proto.graph.node
        self.maker = {o: n for n in nodes for o in n.output}
        self.users: dict[str, list[Any]] = {}
        for node in nodes:
            for name in node.input:
                self.users.setdefault(name, []).append(node)
        self.weights = {i.name: i for i in self.proto.graph.initializer}

    def values(self, names: list[str], feeds: list[Arrays]) -> list[np.ndarray]:
        """Return each tensor as [channels, everything else] over all feeds."""
        copy = onnx.ModelProto()
        copy.CopyFrom(self.proto)
        del copy.graph.output[:]
        copy.graph.output.extend(onnx.helper.make_tensor_value_info(n, 1, None) for n in names)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        session = ort.InferenceSession(copy.SerializeToString(), options)
        seen = [session.run(names, feed) for feed in feeds]
        return [
            np.concatenate([np.moveaxis(s[k], 1, 0).reshape(s[k].shape[1], -1) for s in seen], 1)
            for k in range(len(names))
        ]

    def array(self, name: str) -> np.ndarray:
        """Return an initializer."""
        return numpy_helper.to_array(self.weights[name])

    def put(self, name: str, array: np.ndarray) -> None:
        """Replace an initializer."""
        self.weights[name].CopyFrom(numpy_helper.from_array(array, name))


def layers(small: Model, real: Model) -> list[tuple[Any, str, str]]:
    """Return convolutions with the names of their outputs in the float and the 8-bit model."""
    found = []
    for node in small.proto.graph.node:
        if node.op_type != "Conv" or len(node.input) < 3:
            continue
        name, users = node.output[0], small.users.get(node.output[0], [])
        if len(users) == 1 and users[0].op_type in ("Relu", "Clip"):
            name = users[0].output[0]
            users = small.users.get(name, [])
        pair = [u for u in users if u.op_type == "QuantizeLinear"]
        restored = small.users[pair[0].output[0]][0].output[0] if pair else name
        wanted = name.removesuffix("_unquantized")
        if wanted in real.maker:
            found.append((node, wanted, restored))
    return found


def correct(small: Model, node: Any, want: np.ndarray, got: np.ndarray, slopes: bool) -> None:
    """Move a layer's bias, and its scales with ``slopes``, to where its outputs are the float model's."""
    bias, scales = small.maker[node.input[2]].input[:2]
    steps, unit = small.array(bias).astype(np.float64), small.array(scales).astype(np.float64)
    want, got = want.astype(np.float64), got.astype(np.float64)
    # Behind a Relu, only the share of places that it lets through moves.
    share = np.clip(((want > 0) | (got > 0)).mean(1), 0.05, 1) if want.min() >= 0 else 1.0
    slope = np.ones(len(want))
    if slopes:
        middle = got - got.mean(1, keepdims=True)
        spread = np.maximum((middle**2).mean(1), 1e-30)
        slope = np.clip((middle * want).mean(1) / spread, 0.9, 1.1)
        name = small.maker[node.input[1]].input[1]
        small.put(name, (small.array(name) * slope).astype(np.float32))
        small.put(scales, (unit * slope).astype(np.float32))
    offset = (want.mean(1) - slope * got.mean(1)) / share
    moved = np.rint(steps + offset / (unit * slope))
    small.put(bias, np.clip(moved, -(2**31), 2**31 - 1).astype(np.int32))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="mobilenetv2_fp32")
    parser.add_argument("--waves", type=int, nargs="*", default=[0, 6])
    args = parser.parse_args()
    row = rows(None)[args.model]()
    count = len(next(iter(row.calibration.values())))
    apart = np.arange(count) % KEPT == KEPT - 1
    data = {k: a[~apart] for k, a in row.calibration.items()}
    samples = {k: a[apart] for k, a in row.calibration.items()}
    feeds = [{k: a[i : i + row.batch] for k, a in data.items()} for i in range(0, FEEDS, row.batch)]
    with tempfile.TemporaryDirectory(prefix="effdl-affine-") as name:
        folder = Path(name)
        np.savez(folder / "data.npz", **data)
        for goal, last in (("float", []), ("int8", [{"quantize_static": {"range_search": 0}}])):
            recipe = {
                "name": goal,
                "description": "prepared",
                "passes": [*PREPARED, "equalize", *last],
            }
            run = effdl.RunOptions(gate="off", bench_seconds=0)
            goal_path = folder / f"{goal}.onnx"
            effdl.optimize(row.model, recipe, goal_path, data=folder / "data.npz", options=run)
        print(f"as written: {error(row, folder / 'int8.onnx', samples):.4f}", flush=True)
        real = Model(folder / "float.onnx")
        for waves in args.waves:
            for slopes in (False, True):
                small = Model(folder / "int8.onnx")
                found = layers(small, real)
                step = -(-len(found) // waves) if waves else 1
                for k in range(0, len(found), step):
                    group = found[k : k + step]
                    want = real.values([w for _, w, _ in group], feeds)
                    got = small.values([g for _, _, g in group], feeds)
                    for (node, _, _), a, b in zip(group, want, got, strict=True):
                        correct(small, node, a, b, slopes)
                onnx.save(small.proto, folder / "moved.onnx")
                what = "slopes and offsets" if slopes else "offsets"
                how = f"in {waves} waves" if waves else "layer after layer"
                print(f"{what} {how}: {error(row, folder / 'moved.onnx', samples):.4f}", flush=True)


if __name__ == "__main__":
    main()
