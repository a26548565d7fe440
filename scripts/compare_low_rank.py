"""effdl's low_rank beside plain truncated SVD: accuracy, MACs and latency; docs/low-rank.md.

    EFFDL_SHARED=... python scripts/compare_low_rank.py [--minilm FILE] [--seconds S] [--write FILE]

Three ways at several targets: low_rank with calibration data (at most 1,000 unlabelled samples), low_rank
without data, and a naive peer: the weight of every layer truncated by SVD to a rank that leaves a share of
its MACs, written in numpy. The untouched model and all results are timed in one interleaved run (``effdl
bench``: ORT_ENABLE_ALL, fresh processes, an interval) and scored on test samples that no tool has seen. Needs
pillow, and tokenizers for MiniLM.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import effdl

# isort: split
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import helper, numpy_helper
from real_data import shared
from real_models import Row, cifar, minilm
from sections import with_section

from effdl import api
from effdl.data.feeds import Feeds
from effdl.graph import io
from effdl.graph.clean import clean
from effdl.graph.cost import model_cost
from effdl.passes.base import Context
from effdl.passes.low_rank import LowRank
from effdl.runtime.target import parse_target

LATENCY = (0.7, 0.55)
LATENCY_NO_DATA = (0.7,)
RATIOS = (0.7, 0.5)
MULTIPLE = 8
SAMPLES = 1000
MODELS = ("cifar_vgg",)
REFUSED = "mobilenetv2_fp32_from_qdq.onnx"


def truncated(path: Path, out: Path, ratio: float) -> None:
    """The naive peer: every Conv and Gemm by SVD of its weight, to a share of its MACs."""
    model = onnx.load(path)
    graph = model.graph
    weights = {t.name: t for t in graph.initializer}
    nodes = []
    for node in graph.node:
        tensor = weights.get(node.input[1]) if len(node.input) > 1 else None
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        usable = node.op_type == "Conv" and attributes.get("group", 1) == 1
        if tensor is None or not (usable or (node.op_type == "Gemm" and attributes.get("transB"))):
            nodes.append(node)
            continue
        w = numpy_helper.to_array(tensor)
        flat = w.reshape(len(w), -1)
        rank = int(ratio * flat.size / sum(flat.shape)) // MULTIPLE * MULTIPLE
        if rank < MULTIPLE:
            nodes.append(node)
            continue
        u, s, vt = np.linalg.svd(flat, full_matrices=False)
        root = np.sqrt(s[:rank])
        first = (root[:, None] * vt[:rank]).reshape(rank, *w.shape[1:]).astype(np.float32)
        second = (u[:, :rank] * root).reshape(len(w), rank, *[1] * (w.ndim - 2)).astype(np.float32)
        names = [f"{tensor.name}_{k}" for k in ("first", "second")]
        graph.initializer.extend(
            numpy_helper.from_array(a, n) for a, n in zip((first, second), names, strict=True)
        )
        middle = f"{node.output[0]}_middle"
        later = {} if node.op_type == "Conv" else attributes
        ins = [node.input[0], names[0]]
        nodes.append(helper.make_node(node.op_type, ins, [middle], **attributes))
        ins = [middle, names[1], *node.input[2:]]
        nodes.append(helper.make_node(node.op_type, ins, list(node.output), **later))
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [t for t in graph.initializer if t.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    onnx.save(model, out)


def prepared(path: Path, folder: Path) -> ir.Model:
    """The model as the pass gets it in a recipe."""
    made = {
        "name": "prepared",
        "description": "before low_rank",
        "passes": ["simplify", "fold_batchnorm"],
    }
    out = folder / "prepared.onnx"
    effdl.optimize(path, made, out, options=effdl.RunOptions(gate="off", bench_seconds=0))
    return io.load(out)


def ways(row: Row, folder: Path, threads: int) -> dict[str, tuple[Path, float]]:
    """All results: their files and the seconds that making them took."""
    model = prepared(row.model, folder)
    feeds = Feeds(tuple(row.feeds()), "calibration", True)
    found: dict[str, tuple[Path, float]] = {}
    for given, targets in ((feeds, LATENCY), (None, LATENCY_NO_DATA)):
        memo: dict[Any, Any] = {}
        for target in targets:
            name = f"low_rank latency {target}" + ("" if given else ", no data")
            out = folder / f"{len(found)}.onnx"
            begin = time.perf_counter()
            copy = model.clone()
            ctx = Context(parse_target("cpu", threads), given, memo=memo)
            LowRank(latency=target).run(copy, ctx)
            clean(copy)
            io.save(copy, out)
            found[name] = (out, time.perf_counter() - begin)
            for node, what in ctx.log.touched:
                print(f"    {name}: {node}: {what}", flush=True)
    for ratio in RATIOS:
        out = folder / f"{len(found)}.onnx"
        begin = time.perf_counter()
        truncated(row.model, out, ratio)
        found[f"plain SVD, {ratio:.0%} of each layer's MACs"] = (out, time.perf_counter() - begin)
    return found


def table(row: Row, args: argparse.Namespace) -> str:
    """The rows of one model."""
    with tempfile.TemporaryDirectory(prefix="effdl-low-rank-") as name:
        folder = Path(name)
        found = ways(row, folder, args.threads)
        np.savez(folder / "timing.npz", **row.timing)
        report = api.bench(
            row.model,
            *(path for path, _ in found.values()),
            data=folder / "timing.npz",
            threads=args.threads,
            seconds=args.seconds,
        )
        whole = macs(row.model)
        samples = len(next(iter(row.calibration.values())))
        lines = [
            f"{row.name} on {report.cpu}, ONNX Runtime {ort.__version__}, {args.threads} thread"
            f"{'s' if args.threads > 1 else ''}, {samples:,} unlabelled calibration samples.",
            "",
            f"| way | {row.metric} | MACs | times as fast | seconds |",
            "|---|---|---|---|---|",
            f"| untouched ({report.models[0].latency.median:.3g} ms) | {row.score(row.model):.4f} "
            "| 100 % | 1 | |",
        ]
        for (way, (path, seconds)), model in zip(found.items(), report.models[1:], strict=True):
            low, high = model.ci or (float("nan"), float("nan"))
            lines.append(
                f"| {way} | {row.score(path):.4f} | {macs(path) / whole:.0%} | "
                f"{model.ratio:.2f} ({low:.2f} to {high:.2f}) | {seconds:.0f} |"
            )
    print("\n".join(lines), flush=True)
    return "\n".join(lines)


def macs(path: Path) -> int:
    """Multiply-accumulates of one sample."""
    return model_cost(io.load(path)).macs or 0


def refusal(path: Path, threads: int) -> str:
    """What low_rank says of a network without slack."""
    with tempfile.TemporaryDirectory(prefix="effdl-low-rank-") as name:
        model = prepared(path, Path(name))
    ctx = Context(parse_target("cpu", threads))
    changes = LowRank().run(model, ctx)
    lines = [f"{path.stem}: {changes} layers replaced ({ctx.log.why_nothing()}).", ""]
    lines += [f"- {node}: {why}" for node, why in ctx.log.skipped[-6:]]
    print("\n".join(lines), flush=True)
    return "\n".join(lines)


ABOUT = """# Low rank beside plain SVD

The pass `low_rank` with calibration data, without, and truncated SVD as one writes it in numpy, made and
timed side by side. `latency 0.7` asks for 70 % of the model's time.

## Results
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--minilm", type=Path, help="the MiniLM model; left out when not given")
    parser.add_argument("--only", nargs="*", help="models; cifar_vgg, minilm")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0, help="per model and result")
    parser.add_argument("--write", type=Path, help="a page to write, docs/low-rank.md")
    args = parser.parse_args()
    made: Sequence[str] = args.only or (*MODELS, *(["minilm"] if args.minilm else []))
    tables = [
        table(minilm(args.minilm) if name == "minilm" else cifar(name, SAMPLES), args)
        for name in made
    ]
    place = shared() / "models" / REFUSED
    if place.exists() and not args.only:
        tables.append("What is refused:\n\n" + refusal(place, args.threads))
    if args.write:
        old = args.write.read_text() if args.write.exists() else ABOUT
        args.write.write_text(with_section(old, "low-rank", "\n\n".join(tables)))


if __name__ == "__main__":
    main()
