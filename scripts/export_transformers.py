"""Export today's transformer models with random weights by both exporters of torch, for compare_fusions.py.

    python scripts/export_transformers.py FOLDER [--only bert vit] [--variant dynamo_sdpa] [--jobs 1]

Needs torch and transformers (development tools only), no network. Every model has its real width and few
layers. Names are MODEL_EXPORTER_ATTENTION.onnx, see VARIANTS; batch and length are dynamic. Each file is
compared with torch on two shapes, and FOLDER/zoo.json tells what came out: inputs, number of attention
layers, error against torch, or why a model could not be exported. A file that is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from export_models import MODELS, Case, Made
from export_tensorflow_bert import build as build_tensorflow

TOLERANCE = 1e-4
"""Relative to the largest value; a file above it is listed as wrong."""


@dataclass(frozen=True)
class Variant:
    """An exporter, its opset, and which attention code of transformers is exported."""

    dynamo: bool
    opset: int
    attention: str


VARIANTS = {
    "torchscript_eager": Variant(False, 17, "eager"),
    "torchscript_sdpa": Variant(False, 17, "sdpa"),
    "torchscript14_eager": Variant(False, 14, "eager"),
    "dynamo_eager": Variant(True, 18, "eager"),
    "dynamo_sdpa": Variant(True, 18, "sdpa"),
    "dynamo23_sdpa": Variant(True, 23, "sdpa"),
}
BY_HAND = ("tf_google", "tf_keras")
"""BERT only: graphs of export_tensorflow_bert.py."""


def offered(name: str, label: str, folder: Path) -> bool:
    """Whether a model has such a variant; a file MODEL_tool.onnx that lies in the folder is taken too."""
    if label in VARIANTS:
        return VARIANTS[label].attention in MODELS[name].attentions
    return name == "bert" if label in BY_HAND else (folder / f"{name}_{label}.onnx").exists()


def export(made: Made, variant: Variant, goal: Path) -> None:
    """Write one model as one file."""
    case = made.case
    feed = case.feed(case.example)
    example = tuple(torch.from_numpy(v) for v in feed.values())
    common: dict[str, Any] = {
        "input_names": list(feed),
        "output_names": case.outputs,
        "opset_version": variant.opset,
    }
    if not variant.dynamo:
        axes = case.axes | case.output_axes
        torch.onnx.export(
            made.module, example, str(goal), dynamo=False, dynamic_axes=axes, **common
        )
        return
    names = sorted({d for axes in case.axes.values() for d in axes.values()})
    dims = {n: torch.export.Dim(n) for n in names}
    shapes: tuple[Any, ...] = tuple(
        {i: dims[d] for i, d in case.axes[name].items()} for name in feed
    )
    if case.star:
        shapes = (*shapes[: -case.star], shapes[-case.star :])
    torch.onnx.export(
        made.module,
        example,
        str(goal),
        dynamo=True,
        dynamic_shapes=shapes,
        external_data=False,
        verbose=False,
        **common,
    )


def by_hand(made: Made, label: str, goal: Path) -> None:
    """Write the graph of a TensorFlow BERT."""
    weights = {k: v.numpy() for k, v in made.module.model.state_dict().items()}
    build_tensorflow(weights, made.layers, made.heads, goal, label.removeprefix("tf_"))


def check(goal: Path, case: Case, expected: list[list[np.ndarray]]) -> dict[str, float]:
    """Return the largest relative error against torch by shape."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(goal, options)
    kinds = {i.name: i.type for i in session.get_inputs()}
    errors = {}
    for shape, wanted in zip(case.shapes, expected, strict=True):
        feed = {k: v for k, v in case.feed(shape).items() if k in kinds}
        feed = {k: v.astype(np.int32) if "int32" in kinds[k] else v for k, v in feed.items()}
        got = session.run(case.outputs, feed)
        pairs = zip(got, wanted, strict=True)
        errors["x".join(map(str, shape))] = max(relative(g, w) for g, w in pairs)
    return errors


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    """Return the largest difference over the largest value, infinite where shapes or finiteness differ."""
    if got.shape != wanted.shape or not np.isfinite(got).all():
        return float("inf")
    return float(np.abs(got - wanted).max() / max(np.abs(wanted).max(), 1e-12))


def one(name: str, label: str, folder: Path) -> dict[str, Any]:
    """Export and check one file; what it became."""
    goal = folder / f"{name}_{label}.onnx"
    variant = VARIANTS.get(label)
    if variant:
        made = MODELS[name](variant.attention)
    else:
        made = MODELS[name]("eager", "gelu_new") if label == "tf_google" else MODELS[name]("eager")
    case = made.case
    axes = [
        [case.axes[k].get(i, n) for i, n in enumerate(v.shape)]
        for k, v in case.feed(case.example).items()
    ]
    row: dict[str, Any] = {
        "file": goal.name,
        "model": name,
        "made_by": label,
        "layers": made.layers,
        "family": {"tf_google": "bert_tf", "tf_keras": "bert_tf"}.get(label, made.family),
        "heads": made.heads,
        "hidden": made.hidden,
        "inputs": dict(zip(case.axes, axes, strict=True)),
    }
    with torch.no_grad():
        expected = []
        for shape in case.shapes:
            out = made.module(*[torch.from_numpy(v) for v in case.feed(shape).values()])
            expected.append([t.numpy() for t in (out if isinstance(out, tuple) else (out,))])
        if variant and not goal.exists():
            export(made, variant, goal)
        elif label in BY_HAND:
            by_hand(made, label, goal)
    row["error"] = check(goal, case, expected)
    row["right"] = max(row["error"].values()) <= TOLERANCE
    for number, shape in enumerate([*case.shapes, *([case.edge] if case.edge else [])]):
        np.savez(folder / f"{name}.{number}.npz", **case.feed(shape))
    loaded = onnx.load(goal, load_external_data=False)
    row["opset"] = max(o.version for o in loaded.opset_import if o.domain == "")
    row["nodes"] = len(loaded.graph.node)
    return row


def guarded(name: str, label: str, folder: Path) -> dict[str, Any]:
    """The row of ``one``, or of its failure."""
    try:
        return one(name, label, folder)
    except Exception as error:  # whatever an exporter throws is a row of the index
        traceback.print_exc()
        goal = folder / f"{name}_{label}.onnx"
        if label in VARIANTS:
            goal.unlink(missing_ok=True)
        return {
            "file": goal.name,
            "model": name,
            "failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}",
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", default=sorted(MODELS, key=list(MODELS).index))
    parser.add_argument("--variant", nargs="*", default=[*VARIANTS, *BY_HAND, "tool"])
    parser.add_argument(
        "--here", action="store_true", help="in this process, not one for each model"
    )
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    index = args.folder / "zoo.json"
    if args.here:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        for name in args.only:
            for label in args.variant:
                if not offered(name, label, args.folder):
                    continue
                row = guarded(name, label, args.folder)
                print(json.dumps(row), flush=True)
                rows = json.loads(index.read_text()) if index.exists() else []
                rows = [r for r in rows if r["file"] != row["file"]] + [row]
                index.write_text(json.dumps(rows, indent=1))
        return
    for name in args.only:
        command = [sys.executable, __file__, str(args.folder), "--here", "--only", name]
        subprocess.run([*command, "--variant", *args.variant], check=False)


if __name__ == "__main__":
    main()
