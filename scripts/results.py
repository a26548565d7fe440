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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import effdl  # noqa: F401  (before onnxruntime: switches its telemetry off)

# isort: split
import numpy as np
import onnx
import onnxruntime as ort
import real_data
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from sections import keeping

from effdl import api
from effdl.data.metrics import METRICS
from effdl.render.numbers import size

ROOT = Path(__file__).parent.parent
CALIBRATION = 200


@dataclass
class Row:
    """One model: its preset, what scores it, how it is timed."""

    name: str
    model: Path
    preset: str
    calibration: dict[str, np.ndarray] | None
    metric: str
    score: Callable[[Path], float]
    timing: dict[str, np.ndarray]


def run_all(model: Path, feed: dict[str, np.ndarray], step: int = 100) -> list[np.ndarray]:
    """Run a model over all samples in batches; returns its first output's batches."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(model, options)
    count = len(next(iter(feed.values())))
    return [
        session.run(None, {k: v[i : i + step] for k, v in feed.items()})[0]
        for i in range(0, count, step)
    ]


def cifar(name: str) -> Row:
    images, labels = real_data.cifar_test()
    path = real_data.shared() / "models" / f"{name}.onnx"
    key = ort.InferenceSession(path).get_inputs()[0].name
    calibration = {key: real_data.cifar_calibration()[:CALIBRATION]}
    return Row(
        name,
        path,
        "cnn-int8",
        calibration,
        "top-1",
        lambda m: METRICS["top1"](np.concatenate(run_all(m, {key: images})), labels),
        {key: images[:1]},
    )


def mobilenet() -> Row:
    path = real_data.shared() / "models" / "mobilenetv2_fp32_from_qdq.onnx"
    test = real_data.photographs(244, 20, seed=2)
    want = np.concatenate(run_all(path, {"image": test}, 20))
    return Row(
        "mobilenetv2_fp32",
        path,
        "cnn-int8",
        {"image": real_data.photographs(244, 10, seed=1)},
        "top-1 agreement",
        lambda m: METRICS["top1"](np.concatenate(run_all(m, {"image": test}, 20)), want.argmax(-1)),
        {"image": test[:1]},
    )


def yolox() -> Row:
    path = real_data.shared() / "models" / "yolox_nano.onnx"
    test = real_data.photographs_bgr(416, 2, seed=2)
    want = np.concatenate(run_all(path, {"images": test}, 1))

    def error(model: Path) -> float:
        got = np.concatenate(run_all(model, {"images": test}, 1))
        return float(np.linalg.norm(got - want) / np.linalg.norm(want))

    calibration = {"images": real_data.photographs_bgr(416, 6, seed=1)}
    return Row(
        "yolox_nano", path, "cnn-int8", calibration, "output error", error, {"images": test[:1]}
    )


def minilm(path: Path) -> Row:
    data = real_data.Sentences("test")

    def embed(session: ort.InferenceSession, sentences: list[str]) -> np.ndarray:
        order = np.argsort([len(s) for s in sentences])
        out = np.zeros((len(sentences), 384), np.float32)
        for i in range(0, len(order), 32):
            chosen = order[i : i + 32]
            feed = data.batch([sentences[k] for k in chosen])
            out[chosen] = session.run(["sentence_embedding"], feed)[0]
        return out

    def spearman(model: Path) -> float:
        session = ort.InferenceSession(model)
        a, b = (embed(session, [p[k] for p in data.pairs]) for k in (0, 1))
        return METRICS["spearman"]((a * b).sum(-1), data.scores)

    text = " ".join(a for a, _ in data.pairs[:40])
    feed = data.batch([text], length=128)
    return Row(
        "all-MiniLM-L6-v2", path, "transformer-int8", None, "Spearman, STS-b", spearman, feed
    )


class Reader(CalibrationDataReader):
    """Feeds the peer one sample at a time."""

    def __init__(self, samples: dict[str, np.ndarray]) -> None:
        count = len(next(iter(samples.values())))
        self.feeds = iter([{k: v[i : i + 1] for k, v in samples.items()} for i in range(count)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next feed, None at the end."""
        return next(self.feeds, None)


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
        if row.calibration is None:
            quantize_dynamic(ready, goal, per_channel=True, weight_type=QuantType.QInt8)
        else:
            quantize_static(
                ready,
                goal,
                Reader(row.calibration),
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
    if row.calibration is not None:
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
    rows: dict[str, Callable[[], Row]] = {
        "cifar_resnet20": lambda: cifar("cifar_resnet20"),
        "cifar_vgg": lambda: cifar("cifar_vgg"),
        "mobilenetv2_fp32": mobilenet,
        "yolox_nano": yolox,
    }
    if args.minilm:
        rows["all-MiniLM-L6-v2"] = lambda: minilm(args.minilm)
    results = []
    for name, make in rows.items():
        if args.only in (None, name):
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
