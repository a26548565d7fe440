"""Techniques alone and together on one network: speed against accuracy, a table and a plot; docs/combined.md.

    EFFDL_SHARED=... python scripts/combine.py [--model cifar_vgg] [--write docs/combined.md]

Fold, prune_channels, low_rank and quantize_static, each alone at several strengths and one after the other,
all from the same unlabelled samples, nothing trained. Every result and the untouched model are timed in one
interleaved run (``effdl bench``: ORT_ENABLE_ALL, fresh processes) and scored on 10,000 test images. The plot
(SVG, beside the page) marks which points no other beats in both. Needs pillow.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import effdl

# isort: split
import numpy as np
import onnxruntime as ort
from real_models import Row, cifar
from sections import with_section

from effdl import api
from effdl.render.markup import Markup, join, tag

SAMPLES = 500
FOLDED = ("simplify", "fold_batchnorm", {"convert_opset": {"at_least": 13}})
PRUNED = (0.7, 0.4)
FACTORED = (0.6,)
INT8: dict[str, Any] = {"quantize_static": {}}
KINDS = {
    "fold": "#777777",
    "prune_channels": "#1f77b4",
    "low_rank": "#2ca02c",
    "quantize_static": "#9467bd",
    "together": "#d62728",
}


@dataclass
class Point:
    """One result.

    Args:
        name: what was done; ``kind`` one of ``KINDS``.
        path: its file.
        size: of the file, bytes.
        score, speed: accuracy, and how many times as fast as the untouched model.
    """

    name: str
    kind: str
    path: Path
    seconds: float
    size: int
    score: float
    speed: float = 1.0
    interval: tuple[float, float] = (1.0, 1.0)


class Maker:
    """Makes results from results."""

    def __init__(self, row: Row, folder: Path, threads: int) -> None:
        self.row, self.folder, self.threads = row, folder, threads
        self.made: list[Point] = []
        self._files = 0
        self.data = folder / "data.npz"
        np.savez(self.data, **row.calibration)

    def make(self, name: str, kind: str, source: Path, *passes: object) -> Path:
        """Apply passes to a file; results that a pass refused are told and not kept."""
        self._files += 1
        out = self.folder / f"{self._files}.onnx"
        start = time.perf_counter()
        report = effdl.optimize(
            source,
            {"name": "combined", "description": name, "passes": list(passes)},
            out,
            data=self.data,
            options=effdl.RunOptions(
                gate="off", bench_seconds=0, threads=self.threads, keep_going=True
            ),
        )
        seconds = time.perf_counter() - start
        score = self.row.score(out)
        print(f"{name}: {score:.2%}, {seconds:.0f} s", flush=True)
        if any(p.changes for p in report.passes):
            self.made.append(Point(name, kind, out, seconds, out.stat().st_size, score))
        return out


def everything(maker: Maker) -> None:
    """All techniques, alone and one after the other."""
    folded = maker.make("fold", "fold", maker.row.model, *FOLDED)
    pruned = {
        share: maker.make(
            f"prune {share:g}", "prune_channels", folded, {"prune_channels": {"macs": share}}
        )
        for share in PRUNED
    }
    factored = {
        share: maker.make(
            f"low rank {share:g}", "low_rank", folded, {"low_rank": {"latency": share}}
        )
        for share in FACTORED
    }
    maker.make("int8", "quantize_static", folded, INT8)
    for share, file in pruned.items():
        maker.make(f"prune {share:g}, int8", "together", file, INT8)
    for share, file in factored.items():
        maker.make(f"low rank {share:g}, int8", "together", file, INT8)
    for share in PRUNED[:1]:
        both = maker.make(
            f"prune {share:g}, low rank 0.8",
            "together",
            pruned[share],
            {"low_rank": {"latency": 0.8}},
        )
        maker.make(f"prune {share:g}, low rank 0.8, int8", "together", both, INT8)


def timed(maker: Maker, seconds: float) -> str:
    """Time all results against the untouched model; returns the processor."""
    timing = maker.folder / "timing.npz"
    np.savez(timing, **maker.row.timing)
    report = api.bench(
        maker.row.model,
        *(p.path for p in maker.made),
        data=timing,
        threads=maker.threads,
        seconds=seconds,
    )
    for point, model in zip(maker.made, report.models[1:], strict=True):
        point.speed = model.ratio or 1.0
        point.interval = model.ci or (point.speed, point.speed)
    return report.cpu


def front(points: list[Point]) -> list[Point]:
    """The points that no other beats in speed and accuracy, the most accurate first."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.score, -p.speed)):
        if not found or point.speed > found[-1].speed:
            found.append(point)
    return found


def table(points: list[Point], base: float) -> str:
    """Markdown, a row for each result."""
    best, alone = front(points), front([p for p in points if p.kind != "together"])
    lines = [
        "| what | top-1 | times as fast | file | seconds | best of all | best of those alone |",
        "|---|---|---|---|---|---|---|",
        f"| untouched | {base:.2%} | 1 | | | | |",
    ]
    for p in points:
        low, high = p.interval
        lines.append(
            f"| {p.name} | {p.score:.2%} | {p.speed:.2f} ({low:.2f} to {high:.2f}) | {p.size / 1e6:.2f} MB "
            f"| {p.seconds:.0f} | {'yes' if p in best else ''} | {'yes' if p in alone else ''} |"
        )
    return "\n".join(lines)


WIDTH, HEIGHT, EDGE = 720, 440, 60
_DEEPEST = 0.08
"""Accuracy that a result may lose and still be on the plot."""


@dataclass
class Plot:
    """An SVG with speed to the right and accuracy upwards."""

    fastest: float
    low: float
    high: float

    def x(self, speed: float) -> float:
        """From the left."""
        return EDGE + (speed - 0.9) / (self.fastest - 0.9) * (WIDTH - 2 * EDGE)

    def y(self, score: float) -> float:
        """From the top."""
        return HEIGHT - EDGE - (score - self.low) / (self.high - self.low) * (HEIGHT - 2 * EDGE)

    def drawn(self, points: list[Point], title: str) -> str:
        """The SVG."""
        alone = front([p for p in points if p.kind != "together"])
        parts = [
            tag("rect", width=WIDTH, height=HEIGHT, fill="white"),
            _text(title, EDGE, 24, font_weight="bold"),
            _text(
                "times as fast as the untouched model", WIDTH / 2, HEIGHT - 16, text_anchor="middle"
            ),
            _text("top-1", 8, EDGE - 14),
            *self._scales(),
            self._line(alone, stroke="#777777", stroke_dasharray="4 3"),
            self._line(front(points), stroke=KINDS["together"]),
        ]
        for p in points:
            parts += [_dot(self.x(p.speed), self.y(p.score), p.kind)]
            parts += [_text(p.name, self.x(p.speed) + 7, self.y(p.score) - 5, fill="#333")]
        for k, kind in enumerate(KINDS):
            height = HEIGHT - 160 + 16 * k
            parts += [_dot(EDGE + 10, height, kind), _text(kind, EDGE + 20, height + 4)]
        size = f"0 0 {WIDTH} {HEIGHT}"
        return tag(
            *("svg", join(parts)),
            xmlns="http://www.w3.org/2000/svg",
            viewBox=size,
            font_family="sans-serif",
            font_size=11,
        )

    def _scales(self) -> list[Markup]:
        parts = []
        for k in range(1, int(self.fastest) + 1):
            parts += [
                _text(f"{k}x", self.x(k), HEIGHT - EDGE + 18, text_anchor="middle", fill="#555")
            ]
        for k in range(int(self.low * 100) + 1, int(self.high * 100) + 1, 2):
            y = self.y(k / 100)
            parts += [_text(f"{k} %", EDGE - 8, y + 4, text_anchor="end", fill="#555")]
            parts += [
                tag("line", x1=EDGE, x2=WIDTH - EDGE, y1=f"{y:.1f}", y2=f"{y:.1f}", stroke="#ddd")
            ]
        return parts

    def _line(self, points: list[Point], **style: str) -> Markup:
        corners = " ".join(f"{self.x(p.speed):.1f},{self.y(p.score):.1f}" for p in points)
        return tag("polyline", points=corners, fill="none", **style)


def _text(words: str, x: float, y: float, **style: str) -> Markup:
    return tag("text", words, x=f"{x:.1f}", y=f"{y:.1f}", **style)


def _dot(x: float, y: float, kind: str) -> Markup:
    return tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=4, fill=KINDS[kind])


ABOUT = """# Techniques together

What folding, channels, low rank and 8-bit integers give alone and one after the other, on one network:
nothing trained, no labels. `scripts/combine.py` makes everything here.

![speed against accuracy](combined.svg)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="cifar_vgg", choices=["cifar_vgg", "cifar_resnet20"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0, help="per result")
    parser.add_argument("--write", type=Path, help="the page; the plot lies beside it")
    args = parser.parse_args()
    row = cifar(args.model, SAMPLES)
    with tempfile.TemporaryDirectory(prefix="effdl-combine-") as name:
        maker = Maker(row, Path(name), args.threads)
        everything(maker)
        cpu = timed(maker, args.seconds)
    base = row.score(row.model)
    told = (
        f"{row.name}, {cpu}, ONNX Runtime {ort.__version__}, threads {args.threads}, batch 1, "
        f"{SAMPLES:,} unlabelled images"
    )
    text = f"{told}.\n\n{table(maker.made, base)}"
    print(text)
    if args.write:
        shown = [p for p in maker.made if p.score >= base - _DEEPEST]
        low = min(p.score for p in shown)
        drawing = Plot(max(p.speed for p in shown) * 1.08, low - 0.004, base + 0.004)
        old = args.write.read_text(encoding="utf-8") if args.write.exists() else ABOUT
        args.write.write_text(with_section(old, "combined", text), encoding="utf-8")
        args.write.with_suffix(".svg").write_text(drawing.drawn(shown, told), encoding="utf-8")


if __name__ == "__main__":
    main()
