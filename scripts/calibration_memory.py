"""Peak memory of a calibration with many pictures, against that of one inference.

    EFFDL_SHARED=... python scripts/calibration_memory.py [--samples 1000]

Crops of photographs are written to a folder as PNG. One process loads MobileNetV2 and runs it once, another
quantizes it with all of them (`quantize_static` with its search of ranges, nothing measured or judged). Both
are Python processes; the peak is the operating system's (ru_maxrss). Needs pillow.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import real_data

MODEL = "mobilenetv2_fp32_from_qdq.onnx"
PREPROCESS = "imagenet,size=244"
ONE = """
import json, resource, sys
import numpy as np
from effdl.runtime.session import open_session
from pathlib import Path
session = open_session(Path(sys.argv[1]))
session.run({session.inputs[0].name: np.ones((1, 3, 244, 244), np.float32)})
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
"""
MANY = """
import json, resource, sys
import effdl
from effdl.data.spec import Source
recipe = {
    "name": "memory", "description": "calibration only",
    "data": {"calibration": {"path": sys.argv[2], "preprocess": sys.argv[3]}},
    "passes": ["simplify", "fold_batchnorm", "quantize_static"],
}
effdl.optimize(
    sys.argv[1], recipe, sys.argv[4], options=effdl.RunOptions(gate="off", bench_seconds=0)
)
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
"""


def peak(code: str, *arguments: str) -> int:
    """Run a script and return what it prints: bytes."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    return int(json.loads(done.stdout.splitlines()[-1]))


def write_crops(folder: Path, count: int) -> None:
    """Write square crops of the photographs, 244 pixels wide."""
    from PIL import Image

    photographs = len(real_data.random_crops(244, 1, 1))
    pixels = real_data.random_crops(244, -(-count // photographs), 1)[:count]
    for k, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{k:04d}.png", compress_level=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--samples", type=int, default=1000)
    args = parser.parse_args()
    model = str(real_data.shared() / "models" / MODEL)
    with tempfile.TemporaryDirectory(prefix="effdl-memory-") as name:
        folder = Path(name) / "pictures"
        folder.mkdir()
        write_crops(folder, args.samples)
        one = peak(ONE, model)
        many = peak(MANY, model, str(folder), PREPROCESS, str(Path(name) / "q.onnx"))
    print(f"one inference {one / 1e6:.0f} MB, calibration with {args.samples} samples ", end="")
    print(f"{many / 1e6:.0f} MB: {many / one:.2f}x")


if __name__ == "__main__":
    main()
