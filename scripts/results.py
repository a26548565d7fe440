"""Write docs/results.md: what effdl gains on real models, beside ONNX Runtime's own quantizer.

    EFFDL_SHARED=... python scripts/results.py [--minilm all-MiniLM-L6-v2.onnx] [--only NAME] [--write]

Each model goes through its preset and, as the peer, through onnxruntime.quantization with the same
calibration data and the number types that suit this processor (static: per channel, U8S8, after its own
pre-processing; dynamic: per channel, S8). The original and both results are then timed in one
interleaved run, one thread, ORT_ENABLE_ALL, and scored on the same samples. Needs pillow and tokenizers.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
from pathlib import Path

import effdl  # noqa: F401  (before onnxruntime: switches its telemetry off)

# isort: split
import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from real_models import Row, rows
from sections import keeping

from effdl import api
from effdl.render.numbers import size

ROOT = Path(__file__).parent.parent
MODELS = ("cifar_resnet20", "cifar_vgg", "mobilenetv2_fp32", "yolox_nano", "all-MiniLM-L6-v2")


class Reader(CalibrationDataReader):
    """Feeds the peer the calibration data."""

    def __init__(self, row: Row) -> None:
        self.feeds = row.feeds()

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next feed, None at the end."""
        return next(self.feeds, None)


def dynamic(row: Row) -> bool:
    """Whether activations are quantized at run time, which needs no calibration data."""
    return row.preset == "transformer-int8"


def peer(row: Row, goal: Path, folder: Path) -> str:
    """Quantize with onnxruntime.quantization; returns why it failed, if it did."""
    ready = folder / "ready.onnx"
    try:
        source = row.model
        opset = next(o.version for o in onnx.load(source).opset_import if o.domain == "")
        if opset < 13:  # per-channel needs 13; the peer writes an invalid graph below
            source = folder / "opset13.onnx"
            onnx.save(onnx.version_converter.convert_version(onnx.load(row.model), 13), source)
        quant_pre_process(source, ready, skip_symbolic_shape=True)
        if dynamic(row):
            quantize_dynamic(ready, goal, per_channel=True, weight_type=QuantType.QInt8)
        else:
            quantize_static(
                ready,
                goal,
                Reader(row),
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
    except Exception as e:
        return f"{type(e).__name__}: {str(e)[:80]}"
    return ""


def measure(row: Row, folder: Path, seconds: float) -> dict[str, object]:
    ours, theirs = folder / "effdl.onnx", folder / "peer.onnx"
    command = [
        sys.executable,
        "-m",
        "effdl",
        "optimize",
        str(row.model),
        "-c",
        row.preset,
        "-o",
        str(ours),
    ]
    if not dynamic(row):
        np.savez(folder / "calib.npz", **row.calibration)
        command += ["--data", str(folder / "calib.npz")]
    command += ["--report", str(folder / "run.json")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    failed = peer(row, theirs, folder)
    np.savez(folder / "timing.npz", **row.timing)
    models = [row.model, ours, *([] if failed else [theirs])]
    report = api.bench(*models, data=folder / "timing.npz", threads=1, seconds=seconds)
    scores = [row.score(m) for m in models]
    names = ["original", f"effdl {row.preset}", "onnxruntime.quantization"]
    return {
        "model": row.name,
        "metric": row.metric,
        "cpu": report.cpu,
        "onnxruntime": report.onnxruntime,
        "failed": failed,
        "gate": [
            f"{p['name']} {p['status']}: {p['reason']}"
            for p in run["passes"]
            if p["gate"] is not None and p["reason"]
        ],
        "rows": [
            {
                "what": what,
                "file": m.file_bytes,
                "zstd": m.zstd_bytes,
                "median_ms": m.latency.median,
                "ratio": m.ratio,
                "low": m.ci[0],
                "high": m.ci[1],
                "score": score,
            }
            for what, m, score in zip(names, report.models, scores, strict=False)
        ],
    }


def markdown(results: list[dict[str, object]]) -> str:
    first = results[0]
    lines = [
        "# Results on real models",
        "",
        "Written by `scripts/results.py`: effdl and, as the peer, `onnxruntime.quantization` with the same",
        "calibration data, per channel, U8 activations and S8 weights. All three files of a model are timed",
        "in one interleaved run: batch 1, one thread, ORT_ENABLE_ALL, median; the ratio is against the",
        "original (above 1: faster), with its 95 % confidence interval. effdl runs with its gate on.",
        "",
        f"Machine: {first['cpu']}, ONNX Runtime {first['onnxruntime']}.",
        "",
        "| model | variant | file | zstd | median | speed-up | score |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for k, row in enumerate(result["rows"]):
            ratio = "1" if k == 0 else f"{row['ratio']:.2f}x [{row['low']:.2f}, {row['high']:.2f}]"
            metric = f"{result['metric']} {row['score']:.4f}"
            lines.append(
                f"| {result['model'] if k == 0 else ''} | {row['what']} | {size(row['file'])} "
                f"| {size(row['zstd'])} | {row['median_ms']:.3g} ms | {ratio} | {metric} |"
            )
        if result["failed"]:
            lines.append(f"| | onnxruntime.quantization | | | | failed | {result['failed']} |")
    lines += [
        "",
        "Scores: CIFAR-10 top-1 on 10,000 test images (JPEG copies); MobileNetV2: share of 200 crops of ten",
        "photographs on which the top-1 class is that of the original; MiniLM: Spearman correlation on the",
        "STS-b test set, timed at length 128. Calibration: 200 unlabelled training images, 100 other crops,",
        "none for dynamic quantization; YOLOX-nano: relative L2 error of the output on 20 crops, lower is",
        "better, calibrated on 60 other crops.",
        "",
        *(f"What the gate said about {r['model']}: {g}.\n" for r in results for g in r["gate"]),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minilm", type=Path, help="the MiniLM model; left out when not given")
    parser.add_argument("--only", help="only this model")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--write", action="store_true", help="write docs/results.md")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    every = rows(args.minilm)
    results = []
    for name, make in every.items():
        if name in MODELS and args.only in (None, name):
            with tempfile.TemporaryDirectory(prefix="effdl-results-") as folder:
                results.append(measure(make(), Path(folder), args.seconds))
            print(json.dumps(results[-1], indent=1), file=sys.stderr)
    text = markdown(results)
    print(text)
    if args.write:
        page = ROOT / "docs" / "results.md"
        kept = keeping(text, page.read_text(encoding="utf-8"), "cuda") if page.exists() else text
        page.write_text(kept, encoding="utf-8")


if __name__ == "__main__":
    main()
