"""Whether a fused operator is faster than the formula it stands for, in ONNX Runtime on this machine.

    python scripts/measure_fusions.py [--only NAME ...] [--threads 1 2] [--rounds 15]

Each form is a chain of equal blocks, timed interleaved with the other forms of its kind at
ORT_ENABLE_ALL. ONNX Runtime fuses some formulas itself when it loads a model: the last column says which
operators really ran. With one thread the processor's time counts, not the clock's, so that other work
on the machine disturbs less. Prints Markdown; a ratio above 1 is faster than the first form.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

BLOCKS = 8
Shape = tuple[int, ...]
Constants = dict[str, np.ndarray]
TOKENS: tuple[Shape, ...] = ((1, 128, 384), (1, 197, 768), (1, 512, 2048))
MAPS: tuple[Shape, ...] = ((1, 32, 112, 112), (1, 96, 28, 28))
GROUPS = 16


def number(value: float) -> np.ndarray:
    """Return a float32 scalar."""
    return np.array(value, np.float32)


def constants(shape: Shape) -> Constants:
    """Return every constant that a form may name, for inputs of ``shape``."""
    last, length = shape[-1], shape[-2]
    channels = shape[1]
    rng = np.random.default_rng(3)
    angles = np.outer(np.arange(length), 1e4 ** -(np.arange(0, last, 2) / last))
    twice = np.concatenate([angles, angles], -1)
    table = {
        "three": 3, "zero": 0, "six": 6, "one": 1, "half": 0.5, "two": 2, "e": 1e-5,
        "r2": 2**0.5, "quick": 1.702, "cube": 0.044715, "tanh": (2 / np.pi) ** 0.5,
    }  # fmt: skip
    floats = {
        "g": rng.uniform(0.5, 1.5, last),
        "b": rng.uniform(-0.5, 0.5, last),
        "gc": rng.uniform(0.5, 1.5, (channels, 1, 1)),
        "bc": rng.uniform(-0.5, 0.5, (channels, 1, 1)),
        "gv": rng.uniform(0.5, 1.5, channels),
        "bv": rng.uniform(-0.5, 0.5, channels),
        "ones": np.ones(GROUPS),
        "zeros": np.zeros(GROUPS),
        "cos": np.cos(twice),
        "sin": np.sin(twice),
        "cosh": np.cos(angles),
        "sinh": np.sin(angles),
    }
    ints = {"ax": [-1], "n0": [0], "mid": [last // 2], "end": [last], "split": [0, GROUPS, -1]}
    return (
        {k: number(v) for k, v in table.items()}
        | {k: v.astype(np.float32) for k, v in floats.items()}
        | {k: np.array(v, np.int64) for k, v in ints.items()}
    )


# name -> (shapes, form -> (opset, nodes)); IN and OUT are a block's ends, r a second input, @ its number
FORMS: dict[str, tuple[tuple[Shape, ...], dict[str, tuple[int, str]]]] = {
    "gelu, erf": (
        (*TOKENS, *MAPS),
        {
            "written out": (
                20,
                "a@ = Div(IN, r2) b@ = Erf(a@) c@ = Add(b@, one) d@ = Mul(IN, c@) "
                "OUT = Mul(d@, half)",
            ),
            "Gelu": (20, "OUT = Gelu(IN)"),
            "com.microsoft Gelu": (20, "OUT = com.microsoft.Gelu(IN)"),
        },
    ),
    "gelu, tanh": (
        TOKENS,
        {
            "with Pow": (
                20,
                "a@ = Pow(IN, three) b@ = Mul(a@, cube) c@ = Add(IN, b@) d@ = Mul(c@, tanh) "
                "t@ = Tanh(d@) u@ = Add(t@, one) v@ = Mul(IN, half) OUT = Mul(v@, u@)",
            ),
            "with Mul": (
                20,
                "q@ = Mul(IN, IN) a@ = Mul(q@, IN) b@ = Mul(a@, cube) c@ = Add(IN, b@) "
                "d@ = Mul(c@, tanh) t@ = Tanh(d@) u@ = Add(t@, one) v@ = Mul(IN, half) "
                "OUT = Mul(v@, u@)",
            ),
            "Gelu tanh": (20, 'OUT = Gelu<approximate = "tanh">(IN)'),
            "FastGelu": (20, "OUT = com.microsoft.FastGelu(IN)"),
        },
    ),
    "bias and gelu": (
        TOKENS,
        {
            "Add, Gelu": (20, "a@ = Add(IN, b) OUT = Gelu(a@)"),
            "BiasGelu": (20, "OUT = com.microsoft.BiasGelu(IN, b)"),
        },
    ),
    "quick gelu": (
        TOKENS,
        {
            "written out": (20, "a@ = Mul(IN, quick) s@ = Sigmoid(a@) OUT = Mul(IN, s@)"),
            "QuickGelu": (20, "OUT = com.microsoft.QuickGelu<alpha = 1.702>(IN)"),
        },
    ),
    "silu": (
        (*TOKENS, *MAPS),
        {
            "Sigmoid, Mul": (24, "s@ = Sigmoid(IN) OUT = Mul(IN, s@)"),
            "QuickGelu": (24, "OUT = com.microsoft.QuickGelu<alpha = 1.0>(IN)"),
            "Swish": (24, "OUT = Swish(IN)"),
        },
    ),
    "hardswish": (
        MAPS,
        {
            "Add, Clip, Mul, Div": (
                14,
                "a@ = Add(IN, three) c@ = Clip(a@, zero, six) q@ = Mul(IN, c@) OUT = Div(q@, six)",
            ),
            "HardSigmoid, Mul": (
                14,
                "h@ = HardSigmoid<alpha = 0.16666667, beta = 0.5>(IN) OUT = Mul(IN, h@)",
            ),
            "HardSwish": (14, "OUT = HardSwish(IN)"),
        },
    ),
    "hardsigmoid": (
        MAPS,
        {
            "Add, Clip, Div": (
                14,
                "a@ = Add(IN, three) c@ = Clip(a@, zero, six) OUT = Div(c@, six)",
            ),
            "HardSigmoid": (14, "OUT = HardSigmoid<alpha = 0.16666667, beta = 0.5>(IN)"),
        },
    ),
    "layer norm": (
        TOKENS,
        {
            "written out": (
                18,
                "m@ = ReduceMean(IN, ax) d@ = Sub(IN, m@) s@ = Pow(d@, two) "
                "v@ = ReduceMean(s@, ax) w@ = Add(v@, e) q@ = Sqrt(w@) n@ = Div(d@, q@) "
                "p@ = Mul(n@, g) OUT = Add(p@, b)",
            ),
            "TensorFlow's": (
                18,
                "m@ = ReduceMean(IN, ax) d@ = Sub(IN, m@) s@ = Mul(d@, d@) "
                "v@ = ReduceMean(s@, ax) w@ = Add(v@, e) q@ = Sqrt(w@) i@ = Reciprocal(q@) "
                "f@ = Mul(i@, g) p@ = Mul(IN, f@) o@ = Mul(m@, f@) h@ = Sub(b, o@) "
                "OUT = Add(p@, h@)",
            ),
            "LayerNormalization": (18, "OUT = LayerNormalization<axis = -1>(IN, g, b)"),
        },
    ),
    "rms norm": (
        TOKENS,
        {
            "with Reciprocal": (
                23,
                "s@ = Pow(IN, two) v@ = ReduceMean(s@, ax) w@ = Add(v@, e) q@ = Sqrt(w@) "
                "i@ = Reciprocal(q@) n@ = Mul(IN, i@) OUT = Mul(n@, g)",
            ),
            "with Div": (
                23,
                "s@ = Pow(IN, two) v@ = ReduceMean(s@, ax) w@ = Add(v@, e) q@ = Sqrt(w@) "
                "n@ = Div(IN, q@) OUT = Mul(n@, g)",
            ),
            "RMSNormalization": (23, "OUT = RMSNormalization<axis = -1>(IN, g)"),
        },
    ),
    "sum and layer norm": (
        TOKENS,
        {
            "Add": (17, "a@ = Add(IN, r) OUT = LayerNormalization<axis = -1>(a@, g, b)"),
            "SkipLayerNormalization": (
                17,
                "OUT = com.microsoft.SkipLayerNormalization<epsilon = 1e-5>(IN, r, g, b)",
            ),
            "Sum": (17, "a@ = Sum(IN, r) OUT = LayerNormalization<axis = -1>(a@, g, b)"),
        },
    ),
    "sum and rms norm": (
        TOKENS,
        {
            "Add": (23, "a@ = Add(IN, r) OUT = RMSNormalization<axis = -1>(a@, g)"),
            "SkipSimplifiedLayerNormalization": (
                23,
                "OUT = com.microsoft.SkipSimplifiedLayerNormalization<epsilon = 1e-5>(IN, r, g)",
            ),
        },
    ),
    "group norm": (
        MAPS,
        {
            "InstanceNormalization": (
                21,
                "t@ = Reshape(IN, split) n@ = InstanceNormalization(t@, ones, zeros) "
                "h@ = Shape(IN) k@ = Reshape(n@, h@) m@ = Mul(k@, gc) OUT = Add(m@, bc)",
            ),
            "GroupNormalization": (21, "OUT = GroupNormalization<num_groups = 16>(IN, gv, bv)"),
        },
    ),
    "rotary": (
        ((1, 8, 128, 64), (1, 12, 512, 64)),
        {
            "Slice, Neg, Concat": (
                23,
                "f@ = Slice(IN, n0, mid, ax) s@ = Slice(IN, mid, end, ax) n@ = Neg(s@) "
                "k@ = Concat<axis = -1>(n@, f@) p@ = Mul(IN, cos) q@ = Mul(k@, sin) "
                "OUT = Add(p@, q@)",
            ),
            "com.microsoft RotaryEmbedding": (
                23,
                "OUT = com.microsoft.RotaryEmbedding(IN, n0, cosh, sinh)",
            ),
        },
    ),
}


def chain(nodes: str, shape: Shape, version: int) -> bytes:
    """Return a model of ``BLOCKS`` blocks, one after the other."""
    body = " ".join(
        nodes.replace("IN", f"x{k}").replace("OUT", f"x{k + 1}").replace("@", f"_{k}")
        for k in range(BLOCKS)
    )
    dims = ",".join(map(str, shape))
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": {version}, "com.microsoft": 1]>
        g (float[{dims}] x0, float[{dims}] r) => (float[{dims}] x{BLOCKS}) {{ {body} }}"""
    )
    used = {name for node in model.graph.node for name in node.input}
    for name, array in constants(shape).items():
        if name in used:
            model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return bytes(model.SerializeToString())


def opened(model: bytes, threads: int) -> tuple[onnxruntime.InferenceSession, str]:
    """Return a session and what runs in it."""
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(options.optimized_model_filepath).graph.node
    return session, ", ".join(f"{n} {op}" for op, n in Counter(x.op_type for x in nodes).items())


def rows(name: str, threads: int, rounds: int) -> Iterator[str]:
    """Time the forms of one operator and yield the rows of the table."""
    shapes, forms = FORMS[name]
    clock: Callable[[], float] = time.process_time if threads == 1 else time.perf_counter
    for shape in shapes:
        rng = np.random.default_rng(0)
        feed = {n: rng.standard_normal(shape).astype(np.float32) for n in ("x0", "r")}
        ready = {f: opened(chain(nodes, shape, v), threads) for f, (v, nodes) in forms.items()}
        times: dict[str, list[float]] = {f: [] for f in forms}
        for turn in range(rounds + 2):
            for form, (session, _) in ready.items():
                start = clock()
                session.run(None, feed)
                if turn > 1:
                    times[form].append(clock() - start)
        base = statistics.median(next(iter(times.values())))
        size = "x".join(map(str, shape))
        for form, (_, what) in ready.items():
            ratio = base / statistics.median(times[form])
            yield f"| {name} | {size} | {threads} | {form} | {ratio:.2f} | {what} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--only", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    print("| operator | size | threads | form | speed | what ONNX Runtime runs, in 8 blocks |")
    print("|---|---|---|---|---|---|")
    for name in args.only:
        for threads in args.threads:
            for row in rows(name, threads, args.rounds):
                print(row, flush=True)


if __name__ == "__main__":
    main()
