"""Write the section "CUDA" of docs/results.md: float32 and float16 on this machine's GPU.

    EFFDL_SHARED=... python scripts/cuda_table.py [--minilm all-MiniLM-L6-v2.onnx] [--seconds 10] [--write]

Three models run in float32, as the preset fp16-cuda makes them, and as the peer does it:
onnxruntime.transformers.float16, else onnxconverter-common, else nobody. All variants of a model are
timed in one interleaved run, data on the device, and their outputs compared with those in float32.
Without a GPU the script ends with code 3, and --write records that the table is still to be made.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import effdl  # noqa: F401  (before onnxruntime: switches its telemetry off)

# isort: split
import onnx
import onnx_ir as ir
import real_data
from sections import with_section

from effdl import api
from effdl.errors import EffdlError
from effdl.graph import io
from effdl.graph.dims import input_dims
from effdl.render.numbers import size
from effdl.render.roof import peaks_line
from effdl.report import BenchReport
from effdl.runtime.doctor import doctor

PAGE = Path(__file__).parent.parent / "docs" / "results.md"
PEERS = ("onnxruntime.transformers.float16", "onnxconverter_common.float16")
MISSING = """## CUDA

Still to be run: no NVIDIA GPU has been at hand. On a machine with one,

    pip install 'effdl[gpu]'
    EFFDL_SHARED=... python scripts/cuda_table.py --write

puts the table of float32 and float16 here, with the machine named.
"""


@dataclass
class Variant:
    """One row: a model file and its error against float32, or why there is none."""

    name: str
    path: Path | None
    failed: str = ""
    error: float | None = None


def why_not() -> str:
    """Return why no model runs on a GPU here, empty when one does."""
    state = doctor().cuda
    if state == "works":
        return ""
    return "this onnxruntime has no CUDA" if state == "not installed" else state


def gpu_name() -> str:
    """Return the GPU and its driver, as nvidia-smi tells."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "an NVIDIA GPU"
    name, _, driver = done.stdout.splitlines()[0].partition(",")
    return f"{name.strip()}, driver {driver.strip()}"


def models(minilm: Path | None) -> dict[str, Path]:
    """Return the three models by name."""
    folder = real_data.shared() / "models"
    last = (
        {"all-MiniLM-L6-v2": minilm}
        if minilm
        else {"squeezenet": folder / "squeezenet_fp32_from_fp16.onnx"}
    )
    return {
        "mobilenetv2_fp32": folder / "mobilenetv2_fp32_from_qdq.onnx",
        "cifar_vgg": folder / "cifar_vgg.onnx",
        **last,
    }


def ours(model: Path, goal: Path, target: str) -> Variant:
    """Make float16 with effdl's preset."""
    command = [sys.executable, "-m", "effdl", "optimize", str(model), "-c", "fp16-cuda"]
    command += ["-o", str(goal), "--target", target, "--gate", "off", "--bench-seconds", "0", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return Variant("effdl fp16-cuda", None, done.stderr.strip().splitlines()[0])
    return Variant("effdl fp16-cuda", goal)


def peer(model: Path, goal: Path) -> Variant:
    """Make float16 with the first converter that can be imported."""
    for module in PEERS:
        try:
            convert = importlib.import_module(module).convert_float_to_float16
        except ImportError:
            continue
        try:
            made = ir.from_proto(convert(onnx.load(model), keep_io_types=True))
            made.graph.sort()  # it puts its Casts at the end
            io.save(made, goal)
        except Exception as e:
            return Variant(module, None, f"{type(e).__name__}: {str(e)[:80]}")
        return Variant(module, goal)
    return Variant("peer", None, "no float16 converter is installed")


def measure(
    name: str, model: Path, folder: Path, seconds: float, target: str, batch: int
) -> dict[str, Any]:
    """Bench float32, effdl's and the peer's float16 side by side."""
    dims = {n: batch for n, _, axis in input_dims(io.load(model)) if axis == 0}
    made = [ours(model, folder / "effdl.onnx", target), peer(model, folder / "peer.onnx")]
    good = [Variant("float32", model)]
    failed = []
    for variant in made:  # a model that does not run must not end the others' comparison
        try:
            if variant.path is not None:
                variant.error = worst_error(model, variant.path, target)
        except EffdlError as e:
            variant.failed = e.message
        (failed if variant.failed else good).append(variant)
    paths = [v.path for v in good if v.path is not None]
    report = api.bench(*paths, target=target, seconds=seconds, peaks=True, dims=dims)
    return {
        "model": f"{name}, batch {batch}" if dims else name,
        "report": report,
        "good": good,
        "failed": failed,
    }


def worst_error(model: Path, other: Path, target: str) -> float:
    """Return the relative L2 error of the worst output on random inputs."""
    return max(o.rel_l2 for o in api.compare(model, other, target=target, samples=2).outputs)


def markdown(results: list[dict[str, Any]], machine: str) -> str:
    """Return the section."""
    first: BenchReport = results[0]["report"]
    peaks = f"; measured peaks: {peaks_line(first.peaks)}" if first.peaks else ""
    lines = [
        "## CUDA",
        "",
        "Written by `scripts/cuda_table.py`: one interleaved run per model, inputs and outputs on",
        "the device (IOBinding), ORT_ENABLE_ALL, median; float32 in TF32 where the GPU has it, as ONNX",
        "Runtime does by default. The error is the relative L2 distance of the worst output to float32 on",
        "random inputs.",
        "",
        f"Machine: {machine}, ONNX Runtime {first.onnxruntime}{peaks}.",
        "",
        "| model | variant | file | device memory | median | speed-up | of peak | energy | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for k, (variant, m) in enumerate(zip(result["good"], result["report"].models, strict=True)):
            ratio = "1" if k == 0 else f"{m.ratio:.2f}x [{m.ci[0]:.2f}, {m.ci[1]:.2f}]"
            share = "-" if m.peak_share is None else f"{m.peak_share:.0%}"
            energy = "-" if m.energy_mj is None else f"{m.energy_mj:.3g} mJ"
            error = "-" if variant.error is None else f"{variant.error:.1e}"
            lines.append(
                f"| {result['model'] if k == 0 else ''} | {variant.name} | {size(m.file_bytes)} "
                f"| {size(m.device_bytes)} | {m.latency.median:.3g} ms | {ratio} | {share} | {energy} "
                f"| {error} |"
            )
        lines += [f"| | {v.name} | failed: {v.failed} | | | | | | |" for v in result["failed"]]
    elsewhere = [
        f"- {result['model']}, {warning}"
        for result in results
        for warning in result["report"].warnings
        if "ExecutionProvider" in warning
    ]
    lines += ["", *elsewhere]
    return "\n".join(lines)


def write(body: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(with_section(page, "cuda", body), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minilm", type=Path, help="the MiniLM model; squeezenet when not given")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--batch", type=int, default=64, help="where the model's batch is dynamic")
    parser.add_argument("--target", default="cuda", help="cuda or tensorrt")
    parser.add_argument("--write", action="store_true", help="write docs/results.md")
    args = parser.parse_args()
    if why := why_not():
        print(f"no CUDA table: {why}", file=sys.stderr)
        if args.write:
            write(MISSING)
        return 3
    results = []
    for name, model in models(args.minilm).items():
        with tempfile.TemporaryDirectory(prefix="effdl-cuda-") as folder:
            results.append(
                measure(name, model, Path(folder), args.seconds, args.target, args.batch)
            )
    text = markdown(results, gpu_name())
    print(text)
    if args.write:
        write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
