"""Train the three sample models on scikit-learn's digits and export them to ONNX.

Run from the repository root, in an environment of its own (effdl itself never needs torch):

    pip install torch scikit-learn onnx onnxruntime
    python scripts/train_samples.py

It writes into sample_models/, for each model NAME: NAME.onnx (weights inline), NAME.calib.npz
(200 unlabelled training samples), NAME.test.npz (the held-out samples with their `label`), and
README.md. Nothing is written, and the exit status is 1, when a check fails: the outputs of torch
and of ONNX Runtime differ, an accuracy is below its floor, or a graph lacks the nodes that it is
there to show (BatchNormalization, decomposed LayerNorm and Gelu, ...).
"""

# ruff: noqa: D102 (the methods of torch modules say themselves what they do)
from __future__ import annotations

import argparse
import hashlib
import io
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from timeit import repeat

import numpy as np
import onnx
import onnxruntime as ort
import sklearn
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

SEED = 20
TEST_SHARE = 0.28
CALIBRATION_SAMPLES = 200
TOLERANCE = 1e-4
Array = NDArray[np.float32]
Labels = NDArray[np.int64]


class Residual(nn.Module):
    """Two 3x3 convolutions, each with batch norm, and a shortcut."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut: nn.Module | None = None
        if c_in != c_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class DigitsCNN(nn.Module):
    """A residual network that keeps the full 8x8 resolution throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(32)
        self.blocks = nn.Sequential(Residual(32, 64), Residual(64, 64), Residual(64, 128))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(128, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.stem_bn(self.stem(image)))
        return self.head(self.pool(self.blocks(x)).flatten(1))


class DigitsMLP(nn.Module):
    """A multilayer perceptron with one batch norm between Linear and ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 512)
        self.bn1 = nn.BatchNorm1d(512)
        self.fc2 = nn.Linear(512, 512)
        self.fc3 = nn.Linear(512, 256)
        self.head = nn.Linear(256, 10)
        self.dropout = nn.Dropout(0.2)

    def forward(self, image: Tensor) -> Tensor:
        x = self.dropout(F.relu(self.bn1(self.fc1(image))))
        x = self.dropout(F.relu(self.fc2(x)))
        return self.head(F.relu(self.fc3(x)))


class EncoderLayer(nn.Module):
    """A pre-norm encoder layer in plain operations, so that ONNX shows its attention."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(0.1)

    def split(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 8, self.heads, self.head_width).transpose(1, 2)

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(self.head_width)
        mixed = torch.matmul(torch.softmax(scores, dim=-1), v)
        return self.out(mixed.transpose(1, 2).reshape(-1, 8, self.heads * self.head_width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class DigitsTransformer(nn.Module):
    """A transformer encoder whose tokens are the eight rows of the image."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, 8, width))
        self.layers = nn.Sequential(*(EncoderLayer(width, 4, 256) for _ in range(3)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, rows: Tensor) -> Tensor:
        x = self.layers(self.embed(rows) + self.position)
        return self.head(self.norm(x).mean(dim=1))


@dataclass(frozen=True)
class Recipe:
    """One sample model: how it is built, trained and exported, and what must hold of it."""

    name: str
    build: Callable[[], nn.Module]
    architecture: str
    input_name: str
    shape: tuple[int, ...]  # of one sample
    opset: int
    epochs: int
    lr: float
    floor: float  # least test accuracy
    required_ops: tuple[str, ...]


RECIPES = (
    Recipe(
        name="digits_cnn",
        build=DigitsCNN,
        architecture="residual CNN, 32-64-64-128 channels at 8x8, batch norm",
        input_name="image",
        shape=(1, 8, 8),
        opset=17,
        epochs=25,
        lr=4e-3,
        floor=0.985,
        required_ops=("BatchNormalization", "Conv", "Add", "Gemm"),
    ),
    Recipe(
        name="digits_mlp",
        build=DigitsMLP,
        architecture="MLP 64-512-512-256-10, ReLU, one batch norm",
        input_name="image",
        shape=(64,),
        opset=17,
        epochs=80,
        lr=3e-3,
        floor=0.97,
        required_ops=("BatchNormalization", "Gemm", "Relu"),
    ),
    Recipe(
        name="digits_transformer",
        build=DigitsTransformer,
        architecture="pre-norm encoder over 8 rows: width 128, 4 heads, 3 layers, FFN 256, GELU",
        input_name="rows",
        shape=(8, 8),
        opset=16,
        epochs=60,
        lr=2e-3,
        floor=0.97,
        required_ops=("Pow", "Sqrt", "Erf", "Softmax", "MatMul"),
    ),
)


@dataclass(frozen=True)
class Split:
    """The digits as 8x8 images in 0..1; the calibration images are some of the training ones."""

    train: Array
    train_label: Labels
    calibration: Array
    test: Array
    test_label: Labels


@dataclass(frozen=True)
class Result:
    """A finished model: its files by name, its row in the README's table, what is wrong."""

    files: dict[str, bytes]
    row: str
    problems: list[str]


def load_split() -> Split:
    data = load_digits()
    images = (data.images / 16.0).astype(np.float32)
    labels = data.target.astype(np.int64)
    train, test, train_label, test_label = train_test_split(
        images, labels, test_size=TEST_SHARE, stratify=labels, random_state=SEED
    )
    chosen = np.random.default_rng(SEED).choice(len(train), CALIBRATION_SAMPLES, replace=False)
    return Split(train, train_label, train[np.sort(chosen)], test, test_label)


def augment(images: Tensor) -> Tensor:
    """Shift half of the images by up to one pixel each way, and add a little noise to all."""
    padded = F.pad(images, (1, 1, 1, 1))
    count = len(images)
    moved = torch.rand(count) < 0.5
    offset = torch.where(moved[:, None], torch.randint(0, 3, (count, 2)), 1)
    index = torch.arange(8)
    rows = (offset[:, :1] + index)[:, :, None]
    columns = (offset[:, 1:] + index)[:, None, :]
    shifted = padded[torch.arange(count)[:, None, None], rows, columns]
    return (shifted + 0.03 * torch.randn_like(shifted)).clamp(0.0, 1.0)


def train(recipe: Recipe, split: Split, batch: int = 64) -> nn.Module:
    """Train for a fixed number of epochs and keep the last weights; the test set is not read."""
    torch.manual_seed(SEED)
    model = recipe.build()
    images, labels = torch.from_numpy(split.train), torch.from_numpy(split.train_label)
    steps = len(images) // batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=recipe.lr, total_steps=recipe.epochs * steps
    )
    model.train()
    for _ in range(recipe.epochs):
        order = torch.randperm(len(images))
        for step in range(steps):
            index = order[step * batch : (step + 1) * batch]
            logits = model(augment(images[index]).reshape(-1, *recipe.shape))
            loss = F.cross_entropy(logits, labels[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def export(model: nn.Module, recipe: Recipe) -> onnx.ModelProto:
    """Export with batch norm kept; drop doc strings and metadata, which may name local paths."""
    keep_norm = "BatchNormalization" in recipe.required_ops
    mode = torch.onnx.TrainingMode
    warnings.filterwarnings("ignore", message=".*legacy TorchScript-based ONNX export")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            model,
            (torch.zeros(2, *recipe.shape),),
            str(path),
            dynamo=False,  # the TorchScript exporter: it leaves LayerNorm and Gelu decomposed
            # In eval mode either way, but only PRESERVE leaves Conv + BatchNormalization unfused.
            training=mode.PRESERVE if keep_norm else mode.EVAL,
            do_constant_folding=not keep_norm,
            opset_version=recipe.opset,
            input_names=[recipe.input_name],
            output_names=["logits"],
            dynamic_axes={recipe.input_name: {0: "batch"}, "logits": {0: "batch"}},
        )
        proto = onnx.load(path)
    graph = proto.graph
    described = (proto, graph, *graph.node, *graph.input, *graph.output, *graph.value_info)
    for item in (*described, *graph.initializer):
        item.ClearField("doc_string")
        item.ClearField("metadata_props")
    onnx.checker.check_model(proto, full_check=True)
    return proto


def npz(**arrays: NDArray[np.generic]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def make(recipe: Recipe, split: Split) -> Result:
    start = time.perf_counter()
    model = train(recipe, split)
    seconds = time.perf_counter() - start
    proto = export(model, recipe)
    content = proto.SerializeToString(deterministic=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    runner = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    test = split.test.reshape(-1, *recipe.shape)
    logits = np.asarray(runner.run(["logits"], {recipe.input_name: test})[0])
    with torch.no_grad():
        difference = float(np.abs(model(torch.from_numpy(test)).numpy() - logits).max())
    accuracy = float((logits.argmax(axis=1) == split.test_label).mean())
    ops = Counter(node.op_type for node in proto.graph.node)

    problems = []
    if not difference <= TOLERANCE:
        problems.append(f"torch and ONNX Runtime differ by {difference:.2e}")
    if accuracy < recipe.floor:
        problems.append(f"accuracy {accuracy:.4f} is below {recipe.floor}")
    problems += [f"no {op} node" for op in recipe.required_ops if not ops[op]]
    if any(tensor.external_data for tensor in proto.graph.initializer):
        problems.append("weights outside the file")

    name = recipe.name
    feed = {recipe.input_name: test[:1]}
    one = 1e3 * statistics.median(repeat(lambda: runner.run(None, feed), number=1, repeat=300))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{name}: {parameters} parameters, {len(content)} bytes, trained in {seconds:.0f} s")
    print(f"  accuracy {accuracy:.4f} ({len(test)} samples), torch - ORT {difference:.1e}")
    print(f"  batch 1, one thread: {one:.3f} ms")
    print(f"  {len(proto.graph.node)} nodes: {dict(ops.most_common())}", flush=True)
    calibration = split.calibration.reshape(-1, *recipe.shape)
    files = {
        f"{name}.onnx": content,
        f"{name}.calib.npz": npz(**{recipe.input_name: calibration}),
        f"{name}.test.npz": npz(**{recipe.input_name: test}, label=split.test_label),
    }
    shape = ", ".join(["batch", *map(str, recipe.shape)])
    row = (
        f"| `{name}.onnx` | `{recipe.input_name}` float32 [{shape}] | {recipe.architecture} "
        f"| {parameters:,} | {recipe.opset} | {100 * accuracy:.2f} % |"
    )
    return Result(files, row, [f"{name}: {problem}" for problem in problems])


def readme(results: list[Result], split: Split) -> str:
    models = "\n".join(result.row for result in results)
    files = "\n".join(
        f"| `{name}` | {len(content):,} | `{hashlib.sha256(content).hexdigest()[:16]}` |"
        for result in results
        for name, content in result.files.items()
    )
    return f"""\
# Sample models

Three small networks really trained on the 8x8 handwritten digits, pixel values scaled to 0..1.
Each gives `logits` float32 [batch, 10]. This file is written by `scripts/train_samples.py`; edit
that instead.

| Model | Input | Architecture | Parameters | Opset | Test accuracy |
|---|---|---|---|---|---|
{models}

The accuracy is that of ONNX Runtime on the {len(split.test)} test samples (stratified, never
trained on); one sample is {100 / len(split.test):.2f} %. Training runs for a fixed number of epochs
and the last weights are kept, so no test sample chose them.

Batch norm is not folded, and LayerNorm and GELU are decomposed, on purpose: that is work for the
optimizer's passes.

## Files

| File | Bytes | sha256 (first 16) |
|---|---|---|
{files}

`NAME.calib.npz` holds {CALIBRATION_SAMPLES} of the {len(split.train)} training samples, unlabelled,
as an array named as the input. `NAME.test.npz` holds the test samples likewise, and `label`, int64.

## How they were made

    pip install torch scikit-learn onnx onnxruntime
    python scripts/train_samples.py

with torch {torch.__version__}, scikit-learn {sklearn.__version__}, onnx {onnx.__version__} and ONNX
Runtime {ort.__version__}, on a CPU, with fixed seeds. Another machine or another torch may give
slightly different weights.

## Licence of the data

E. Alpaydin and C. Kaynak, *Optical Recognition of Handwritten Digits*, UCI Machine Learning
Repository, 1998, <https://doi.org/10.24432/C50P49>, CC BY 4.0. The copy used is the one that
scikit-learn ships (`sklearn.datasets.load_digits`, the test part of the UCI set, 1797 images).
Changes: scaled from 0..16 to 0..1 and split.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description="Train and export the sample models.")
    default = Path(__file__).resolve().parents[1] / "sample_models"
    parser.add_argument("--out", type=Path, default=default, help="folder to write into")
    out: Path = parser.parse_args().out

    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    split = load_split()
    results = [make(recipe, split) for recipe in RECIPES]
    problems = [problem for result in results for problem in result.problems]
    if problems:
        print("nothing written:", *problems, sep="\n  ", file=sys.stderr)
        return 1
    out.mkdir(parents=True, exist_ok=True)
    for result in results:
        for name, content in result.files.items():
            (out / name).write_bytes(content)
    (out / "README.md").write_text(readme(results, split), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
