"""Where the time of a model goes when it is quantized in several ways: the table of docs/profiling.md.

    python scripts/profile_int8.py MODEL.onnx DATA.npz [--samples 8] [--seconds 5]

The models are made by onnxruntime.quantization and by effdl, in a temporary folder, and each is profiled
against the model itself. DATA has one array per input, first axis the samples, as for `effdl optimize`.
Prints Markdown.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

import effdl
from effdl.data.npz import load_npz
from effdl.graph import io


class Samples(CalibrationDataReader):
    """The first samples of a data set."""

    def __init__(self, model: Path, data: Path, count: int) -> None:
        self.feeds: Iterator[dict[str, Any]] = iter(load_npz(data, io.load(model)).first(count))

    def get_next(self) -> dict[str, Any] | None:
        """Return the next one."""
        return next(self.feeds, None)


def main() -> None:
    """Make, profile, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=5.0)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    unsigned = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    naive: dict[str, dict[str, Any]] = {
        "`quantize_static` with its defaults (int8 activations)": {},
        "the same, only `Conv`, uint8 activations": {**unsigned, "op_types_to_quantize": ["Conv"]},
        "the same, all operators, uint8 activations": unsigned,
    }
    print("| made by | latency | what the profile says |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        goal = Path(folder) / "int8.onnx"
        for name, options in naive.items():
            quantize_static(
                args.model, goal, Samples(args.model, args.data, args.samples), **options
            )
            print(row(name, args.model, goal, args.seconds), flush=True)
        ungated = effdl.RunOptions(bench_seconds=0, gate="off", keep_going=True)
        effdl.optimize(args.model, "cnn-int8", goal, data=args.data, options=ungated)
        print(
            row(
                "`effdl optimize -c cnn-int8 --gate off --keep-going`",
                args.model,
                goal,
                args.seconds,
            )
        )


def row(name: str, model: Path, quantized: Path, seconds: float) -> str:
    """Return a row of the table."""
    report = effdl.profile(model, quantized, seconds=seconds)
    before, after = report.profiles
    return f"| {name} | {before.wall_ms:.1f} -> {after.wall_ms:.1f} ms | {report.reason} |"


if __name__ == "__main__":
    main()
