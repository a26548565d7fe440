"""One job of ``compare_quantizers.py`` in a process of its own: a quantizer on a model.

    python scripts/quantizer_tools.py TOOL JOB      (JOB is JSON; one line of JSON comes out)

Every tool gets the same calibration samples, and the settings that suit this processor: uint8 activations,
int8 weights, one scale per output channel. A model of an opset before 13 is converted first for peers, which
write an invalid graph otherwise.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import effdl

# isort: split
import numpy as np
import onnx

Job = dict[str, Any]


def feeds(job: Job) -> Iterator[dict[str, np.ndarray]]:
    """The calibration data, feed by feed."""
    with np.load(job["data"], allow_pickle=False) as arrays:
        data = {name: arrays[name] for name in arrays.files}
    count, batch = len(next(iter(data.values()))), job["batch"]
    for k in range(0, count, batch):
        yield {name: a[k : k + batch] for name, a in data.items()}


def run_effdl(job: Job) -> Job:
    """The preset as ``effdl optimize`` runs it, gate and all."""
    options = effdl.RunOptions(bench_seconds=3, threads=job["threads"], gate=job["gate"])
    report = effdl.optimize(
        job["model"], job["preset"], job["out"], data=Path(job["data"]), options=options
    )
    return {
        "passes": {p.name: f"{p.status}: {p.reason}" for p in report.passes if p.gate is not None}
    }


def prepared(job: Job) -> Path:
    """The model as ONNX Runtime's quantizer wants it."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    folder = Path(job["out"]).parent
    model = onnx.load(job["model"])
    version = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    if version < 13:
        model = onnx.version_converter.convert_version(model, 13)
        model.ir_version = max(model.ir_version, 8)  # initializers need not be inputs
    source, ready = folder / "source.onnx", folder / "ready.onnx"
    onnx.save(model, source)
    try:
        quant_pre_process(source, ready)
    except Exception:  # symbolic shape inference refuses some graphs
        quant_pre_process(source, ready, skip_symbolic_shape=True)
    return ready


def static(method: str) -> Callable[[Job], Job]:
    """onnxruntime.quantization.quantize_static with a calibration method."""

    def run(job: Job) -> Job:
        from onnxruntime.quantization import (
            CalibrationDataReader,
            CalibrationMethod,
            QuantFormat,
            QuantType,
            quantize_static,
        )

        class Reader(CalibrationDataReader):
            def __init__(self) -> None:
                self.all = feeds(job)

            def get_next(self) -> dict[str, np.ndarray] | None:
                return next(self.all, None)

        quantize_static(
            prepared(job),
            job["out"],
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            reduce_range=job["reduce_range"],
            calibrate_method=getattr(CalibrationMethod, method),
        )
        return {}

    return run


def dynamic(job: Job) -> Job:
    """onnxruntime.quantization.quantize_dynamic."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        prepared(job),
        job["out"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        reduce_range=job["reduce_range"],
    )
    return {}


def run_nncf(job: Job) -> Job:
    """nncf.quantize on the ONNX model, told what kind of model and processor it is for."""
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix

    model = onnx.load(prepared(job))
    fix = OverflowFix.ENABLE if job["reduce_range"] else OverflowFix.DISABLE
    made = nncf.quantize(
        model,
        nncf.Dataset(list(feeds(job))),
        target_device=nncf.TargetDevice.CPU,
        model_type=nncf.ModelType.TRANSFORMER if "transformer" in job["preset"] else None,
        advanced_parameters=AdvancedQuantizationParameters(overflow_fix=fix),
    )
    onnx.save(made, job["out"])
    return {}


def run_onnxsim(job: Job) -> Job:
    """onnxsim.quantize_static on the simplified model."""
    import onnxsim

    model, _ = onnxsim.simplify(onnx.load(prepared(job)))
    onnx.save(onnxsim.quantize_static(model, list(feeds(job))), job["out"])
    return {}


TOOLS: dict[str, Callable[[Job], Job]] = {
    "effdl": run_effdl,
    "ort_minmax": static("MinMax"),
    "ort_entropy": static("Entropy"),
    "ort_percentile": static("Percentile"),
    "ort_dynamic": dynamic,
    "nncf": run_nncf,
    "onnxsim": run_onnxsim,
}


def main() -> None:
    logging.disable(logging.WARNING)
    job = json.loads(sys.argv[2])
    out = os.dup(1)
    os.dup2(2, 1)  # what a tool prints is talk
    start = time.perf_counter()
    told = TOOLS[sys.argv[1]](job)
    told["seconds"] = round(time.perf_counter() - start, 2)
    told["bytes"] = Path(job["out"]).stat().st_size
    os.write(out, json.dumps(told).encode())


if __name__ == "__main__":
    main()
