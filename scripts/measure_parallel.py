"""When layers with one input are faster as one layer and a Split: forms of the same computation, by turns.

    python scripts/measure_parallel.py [--only linear conv heads flatten] [--threads 1 2] [--rounds 40]

Each row is a computation written in several ways with the same weights. All ways are loaded at
ORT_ENABLE_ALL, checked to agree, and run by turns; the figure is the median over the rounds of the
time of the first way over the time of this one (above 1: faster than the first).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

Form = tuple[str, onnx.ModelProto]
Case = tuple[str, list[Form]]
RNG = np.random.default_rng(0)
OPSET = 17


class Builder:
    """A model of one input ``x``, node by node."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = list(shape)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray[Any, Any]] = {}

    def op(self, op_type: str, *inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
        """Add a node; arrays become weights. Returns its output, or the list of its outputs."""
        names = []
        for value in inputs:
            if isinstance(value, np.ndarray):
                name = f"w{len(self.weights)}"
                self.weights[name] = value
                names.append(name)
            else:
                names.append(value)
        outs = [f"t{len(self.nodes)}_{k}" for k in range(outputs)]
        self.nodes.append(helper.make_node(op_type, names, outs, **attributes))
        return outs[0] if outputs == 1 else outs

    def model(self, *results: str) -> onnx.ModelProto:
        """Return the model with these outputs."""
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)],
            [helper.make_tensor_value_info(r, TensorProto.FLOAT, None) for r in results],
            [numpy_helper.from_array(a, n) for n, a in self.weights.items()],
        )
        imports = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=imports, ir_version=8)


def ints(*numbers: int) -> np.ndarray[Any, Any]:
    """Return an int64 array."""
    return np.array(numbers, np.int64)


def normal(*shape: int) -> np.ndarray[Any, Any]:
    """Return random weights that keep the size of what they multiply."""
    fan = shape[0] if len(shape) == 2 else max(1, int(np.prod(shape[1:])))
    return (RNG.standard_normal(shape) / np.sqrt(fan)).astype(np.float32)


def joined(parts: Sequence[np.ndarray[Any, Any]], axis: int) -> np.ndarray[Any, Any]:
    """Concatenate weights."""
    return np.concatenate(parts, axis)


def linear(rows: int, k: int, widths: Sequence[int], bias: bool = True, rank: int = 3) -> Case:
    """MatMul (and Add) with one input, apart and packed."""
    shape = [1, rows, k] if rank == 3 else [rows, k]
    weights, biases = [normal(k, n) for n in widths], [normal(n) for n in widths]

    def layer(b: Builder, w: np.ndarray[Any, Any], c: np.ndarray[Any, Any]) -> str:
        product = b.op("MatMul", "x", w)
        return b.op("Add", product, c) if bias else product

    apart = Builder(shape)
    outs = [layer(apart, w, c) for w, c in zip(weights, biases, strict=True)]
    packed = Builder(shape)
    wide = layer(packed, joined(weights, 1), joined(biases, 0))
    parts = packed.op("Split", wide, ints(*widths), outputs=len(widths), axis=-1)
    name = f"MatMul{'+Add' if bias else ''} {'x'.join(map(str, shape))} -> {list(widths)}"
    return name, [("apart", apart.model(*outs)), ("packed + Split", packed.model(*parts))]


def conv(
    channels: int,
    size: int,
    widths: Sequence[int],
    kernel: int = 1,
    after: str = "",
    follow: int = 0,
    concat: bool = False,
) -> Case:
    """Convs with one input, apart and packed, with an activation and a 3x3 Conv behind each."""
    shape = [1, channels, size, size]
    weights = [normal(n, channels, kernel, kernel) for n in widths]
    biases = [normal(n) for n in widths]
    ends = [normal(n, n, 3, 3) for n in widths]
    first = normal(channels, channels, 1, 1)
    border = {"pads": [kernel // 2] * 4}

    def act(b: Builder, value: str) -> str:
        if after == "silu":
            return str(b.op("Mul", value, b.op("Sigmoid", value)))
        return str(b.op(after, value)) if after else value

    def rest(b: Builder, values: Sequence[str]) -> list[str]:
        done = [
            b.op("Conv", v, w, pads=[1] * 4) if k < follow else v
            for k, (v, w) in enumerate(zip(values, ends, strict=True))
        ]
        return [b.op("Concat", *done, axis=1)] if concat else done

    def begin() -> tuple[Builder, str]:
        b = Builder(shape)
        return b, b.op("Conv", "x", first)

    forms: list[Form] = []
    b, x = begin()
    values = [act(b, b.op("Conv", x, w, c, **border)) for w, c in zip(weights, biases, strict=True)]
    forms.append(("apart", b.model(*rest(b, values))))
    for moved in (True, False) if after else (False,):
        b, x = begin()
        wide = b.op("Conv", x, joined(weights, 0), joined(biases, 0), **border)
        if moved:
            wide = act(b, wide)
        parts = b.op("Split", wide, ints(*widths), outputs=len(widths), axis=1)
        values = parts if moved or not after else [act(b, p) for p in parts]
        how = f"{after} first" if moved else "packed + Split"
        forms.append((how, b.model(*rest(b, values))))
    if concat and not follow:
        b, x = begin()
        wide = b.op("Conv", x, joined(weights, 0), joined(biases, 0), **border)
        forms.append(("packed, no Split", b.model(act(b, wide))))
    tail = f", {follow} of them to a 3x3" if follow else ""
    name = f"Conv {kernel}x{kernel} {channels}x{size}x{size} -> {list(widths)} {after}{tail}"
    return name + (", Concat" if concat else ""), forms


def heads(batch: int, length: int, count: int, depth: int) -> Case:
    """Attention from x to the context, by where queries, keys and values come from."""
    n = count * depth
    w, c = [normal(n, n) for _ in range(3)], [normal(n) for _ in range(3)]
    scale = np.array(depth**-0.5, np.float32)
    split = ints(batch, length, count, depth)

    def core(b: Builder, q: str, k: str, v: str) -> str:
        scores = b.op("Mul", b.op("MatMul", q, k), scale)
        mixed = b.op("MatMul", b.op("Softmax", scores, axis=-1), v)
        together = b.op("Transpose", mixed, perm=[0, 2, 1, 3])
        return str(b.op("Reshape", together, ints(batch, length, n)))

    def per_head(b: Builder, value: str, perm: Sequence[int]) -> str:
        return str(b.op("Transpose", b.op("Reshape", value, split), perm=list(perm)))

    def apart(b: Builder) -> list[str]:
        return [b.op("Add", b.op("MatMul", "x", w[i]), c[i]) for i in range(3)]

    def packed(b: Builder) -> str:
        return str(b.op("Add", b.op("MatMul", "x", joined(w, 1)), joined(c, 0)))

    def three(source: Callable[[Builder], list[str]], turned: bool) -> onnx.ModelProto:
        b = Builder([batch, length, n])
        q, k, v = source(b)
        key = per_head(b, k, (0, 2, 3, 1) if turned else (0, 2, 1, 3))
        key = key if turned else b.op("Transpose", key, perm=[0, 1, 3, 2])
        return b.model(core(b, per_head(b, q, (0, 2, 1, 3)), key, per_head(b, v, (0, 2, 1, 3))))

    def sliced(b: Builder) -> list[str]:
        return list(b.op("Split", packed(b), ints(n, n, n), outputs=3, axis=-1))

    def at_once(take: str) -> onnx.ModelProto:
        b = Builder([batch, length, n])
        five = b.op("Reshape", packed(b), ints(batch, length, 3, count, depth))
        five = b.op("Transpose", five, perm=[2, 0, 3, 1, 4])
        if take == "Split":
            parts = b.op("Split", five, ints(1, 1, 1), outputs=3, axis=0)
            q, k, v = (b.op("Squeeze", p, ints(0)) for p in parts)
        else:
            q, k, v = (b.op("Gather", five, np.array(i, np.int64), axis=0) for i in range(3))
        return b.model(core(b, q, b.op("Transpose", k, perm=[0, 1, 3, 2]), v))

    def four(b: Builder) -> list[str]:
        """Split where heads are an axis of their own."""
        all_heads = b.op("Reshape", packed(b), ints(batch, length, 3 * count, depth))
        turned = b.op("Transpose", all_heads, perm=[0, 2, 1, 3])
        return list(b.op("Split", turned, ints(count, count, count), outputs=3, axis=1))

    def one_transpose() -> onnx.ModelProto:
        b = Builder([batch, length, n])
        q, k, v = four(b)
        return b.model(core(b, q, b.op("Transpose", k, perm=[0, 1, 3, 2]), v))

    def contrib(op_type: str) -> onnx.ModelProto:
        b = Builder([batch, length, n])
        if op_type == "Attention":
            inputs = ["x", joined(w, 1), joined(c, 0)]
            return b.model(b.op(op_type, *inputs, domain="com.microsoft", num_heads=count))
        if op_type == "MultiHeadAttention, own bias":
            plain = [b.op("MatMul", "x", w[i]) for i in range(3)]
            inputs = [*plain, joined(c, 0)]
        elif op_type == "MultiHeadAttention, packed":
            inputs = sliced(b)
        else:
            inputs = apart(b)
        name = op_type.split(",", maxsplit=1)[0]
        return b.model(b.op(name, *inputs, domain="com.microsoft", num_heads=count))

    contribs = ["Attention", "MultiHeadAttention", "MultiHeadAttention, own bias"]
    contribs.append("MultiHeadAttention, packed")
    return f"attention {batch}x{length}x{n}, {count} heads", [
        ("apart, k by (0,2,3,1)", three(apart, True)),
        ("apart, k by two Transposes", three(apart, False)),
        ("packed, Split, k by (0,2,3,1)", three(sliced, True)),
        ("packed, Split, k by two", three(sliced, False)),
        ("packed, 5-D, Split", at_once("Split")),
        ("packed, 5-D, Gather", at_once("Gather")),
        ("packed, 4-D, Split of heads", one_transpose()),
        *((op, contrib(op)) for op in contribs),
    ]


def flatten(batch: int, rows: int, k: int, n: int) -> Case:
    """MatMul and Add of rank 3, against Reshape, Gemm, Reshape."""
    w, c = normal(k, n), normal(n)
    plain = Builder([batch, rows, k])
    y = plain.op("Add", plain.op("MatMul", "x", w), c)
    flat = Builder([batch, rows, k])
    z = flat.op("Gemm", flat.op("Reshape", "x", ints(-1, k)), w, c)
    z = flat.op("Reshape", z, ints(batch, rows, n))
    turned = Builder([batch, rows, k])
    t = turned.op("Gemm", turned.op("Reshape", "x", ints(-1, k)), w.T.copy(), c, transB=1)
    t = turned.op("Reshape", t, ints(batch, rows, n))
    return f"MatMul+Add {batch}x{rows}x{k} -> {n}", [
        ("MatMul + Add", plain.model(y)),
        ("Gemm between Reshapes", flat.model(z)),
        ("Gemm transB between Reshapes", turned.model(t)),
    ]


def cases(kind: str) -> Iterator[Case]:
    """Yield the computations of one kind."""
    if kind == "linear":
        for rows in (1, 4, 16, 32, 64, 128):
            yield linear(rows, 384, [384] * 3)
        for rows in (1, 16, 197, 512):
            yield linear(rows, 768, [768] * 3)
        yield linear(32, 128, [128] * 3)
        yield linear(1, 2048, [2048, 256, 256], bias=False)
        yield linear(1, 2048, [5632, 5632], bias=False)
        yield linear(128, 384, [384] * 3, bias=False)
        yield linear(128, 384, [384] * 2)
        yield linear(128, 512, [512] * 12)
        yield linear(1, 64, [10, 4], rank=2)
        yield linear(8, 64, [10, 4], rank=2)
        yield linear(1, 512, [2, 3, 4], rank=2)
        yield linear(128, 2048, [5632, 5632], bias=False)
    elif kind == "conv":
        yield conv(64, 80, [32, 32], after="silu", follow=1)
        yield conv(128, 40, [64, 64], after="silu", follow=1)
        yield conv(24, 52, [24, 24], after="silu", follow=1)
        yield conv(192, 28, [64, 96, 16], after="Relu", follow=2)
        yield conv(480, 14, [192, 96, 16], after="Relu", follow=3, concat=True)
        yield conv(832, 7, [256, 160, 32], after="Relu", follow=3, concat=True)
        yield conv(768, 17, [192, 128, 128], after="Relu", follow=2)
        yield conv(64, 80, [32, 32], follow=1)
        yield conv(64, 40, [64, 80], kernel=3, after="silu", follow=2)
        yield conv(96, 20, [80, 4, 1])
        yield conv(64, 52, [4, 1])
        yield conv(96, 20, [12, 24])
        yield conv(96, 20, [6, 12], kernel=3)
        yield conv(96, 20, [20, 20])
        yield conv(96, 20, [18, 18], after="Relu")
        yield conv(32, 80, [16, 16], after="Relu", concat=True)
    elif kind == "heads":
        yield heads(1, 128, 12, 32)
        yield heads(1, 197, 12, 64)
        yield heads(1, 16, 12, 32)
        yield heads(4, 64, 8, 64)
    else:
        for batch, rows, k, n in (
            (1, 128, 384, 1536),
            (1, 128, 1536, 384),
            (1, 197, 768, 768),
            (1, 1, 384, 384),
            (8, 16, 384, 384),
        ):
            yield flatten(batch, rows, k, n)


class Runner:
    """A loaded model whose input is bound and whose outputs stay in ONNX Runtime."""

    def __init__(self, model: onnx.ModelProto, threads: int, x: np.ndarray[Any, Any]) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        data = model.SerializeToString()
        self._session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        self._binding = self._session.io_binding()
        self._binding.bind_cpu_input("x", x)
        for output in self._session.get_outputs():
            self._binding.bind_output(output.name)

    def outputs(self) -> list[Any]:
        """Run once and return what came out."""
        self._session.run_with_iobinding(self._binding)
        return list(self._binding.copy_outputs_to_cpu())

    def seconds(self, times: int) -> float:
        """Return how long ``times`` runs take."""
        begin = time.perf_counter()
        for _ in range(times):
            self._session.run_with_iobinding(self._binding)
        return time.perf_counter() - begin


def compare(forms: Sequence[Form], threads: int, rounds: int) -> list[float]:
    """Return, for each form, the median over rounds of the first form's time over its own."""
    dims = forms[0][1].graph.input[0].type.tensor_type.shape.dim
    x = RNG.standard_normal([d.dim_value for d in dims]).astype(np.float32)
    runners = [Runner(model, threads, x) for _, model in forms]
    wanted = runners[0].outputs()
    for (name, _), runner in zip(forms, runners, strict=True):
        for want, got in zip(wanted, runner.outputs(), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3, err_msg=name)
    runners[0].seconds(3)
    times = max(1, int(0.004 / (runners[0].seconds(5) / 5)))
    spent = np.empty((rounds, len(runners)))
    for k in range(rounds):
        order = np.roll(np.arange(len(runners)), k)
        for i in order:
            spent[k, i] = runners[i].seconds(times)
    ratios: list[float] = np.median(spent[:, :1] / spent, axis=0).tolist()
    return ratios


def main() -> None:
    """Measure and print one table per kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = ["linear", "conv", "heads", "flatten"]
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=40)
    given = parser.parse_args()
    for kind in given.only:
        print(f"\n{kind}: times faster than the first form, at {given.threads} threads")
        for name, forms in cases(kind):
            columns = [compare(forms, t, given.rounds) for t in given.threads]
            print(f"  {name}")
            for k, (form, _) in enumerate(forms):
                row = "  ".join(f"{column[k]:5.2f}" for column in columns)
                print(f"    {form:32} {row}", flush=True)


if __name__ == "__main__":
    main()
