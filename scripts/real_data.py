"""Arrays for the real models that EFFDL_SHARED names: calibration and test data as ``.npz``.

Needs Pillow (photographs, CIFAR-10 as JPEG) and tokenizers (sentences). Imported by the scripts that
measure; nothing of it is part of the package.
"""

from __future__ import annotations

import csv
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
MEAN = np.array([0.4914, 0.4822, 0.4465], np.float32)
STD = np.array([0.2470, 0.2435, 0.2616], np.float32)
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)


def shared() -> Path:
    """Return the folder of models and data."""
    place = os.environ.get("EFFDL_SHARED")
    if not place:
        raise SystemExit("EFFDL_SHARED must name the folder with models/ and data/")
    return Path(place)


def _planar(images: npt.NDArray[np.uint8], mean: Floats, std: Floats) -> Floats:
    """uint8 [N, H, W, 3] to normalised float32 [N, 3, H, W]."""
    return np.ascontiguousarray(
        ((images.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)
    )


def cifar_test() -> tuple[Floats, npt.NDArray[np.int64]]:
    """Return the 10,000 test images [10000, 3, 32, 32] and their labels."""
    from PIL import Image

    with zipfile.ZipFile(shared() / "data" / "cifar10_test_jpg.zip") as z:
        names = sorted(n for n in z.namelist() if n.endswith(".jpg"))
        classes = sorted({Path(n).parent.name for n in names})
        pictures = [np.asarray(Image.open(io.BytesIO(z.read(n))).convert("RGB")) for n in names]
        labels = np.array([classes.index(Path(n).parent.name) for n in names], np.int64)
    return _planar(np.stack(pictures), MEAN, STD), labels


def cifar_calibration() -> Floats:
    """Return 1,000 training images [1000, 3, 32, 32], no labels."""
    with np.load(shared() / "data" / "cifar10_calib_u8.npz") as data:
        return _planar(data[data.files[0]], MEAN, STD)


def photographs(size: int, crops: int, seed: int) -> Floats:
    """Return random square crops [photos * crops, 3, size, size], normalised as for ImageNet."""
    return _planar(random_crops(size, crops, seed), IMAGENET_MEAN, IMAGENET_STD)


def photographs_bgr(size: int, crops: int, seed: int) -> Floats:
    """Return the same crops as YOLOX takes them: BGR, 0..255."""
    return np.ascontiguousarray(
        random_crops(size, crops, seed)[..., ::-1].astype(np.float32).transpose(0, 3, 1, 2)
    )


def random_crops(size: int, crops: int, seed: int) -> npt.NDArray[np.uint8]:
    """Return random square crops [photos * crops, size, size, 3] of the photographs."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    folder = shared() / "data"
    files = sorted(
        f
        for d in ("faces", "objects")
        for f in (folder / d).iterdir()
        if f.suffix in (".jpg", ".png")
    )
    images = []
    for file in files:
        picture = Image.open(file).convert("RGB")
        for _ in range(crops):
            side = int(min(picture.size) * rng.uniform(0.4, 1.0))
            x = int(rng.integers(0, picture.width - side + 1))
            y = int(rng.integers(0, picture.height - side + 1))
            crop = picture.crop((x, y, x + side, y + side)).resize((size, size))
            images.append(np.asarray(crop))
    return np.stack(images)


class Sentences:
    """Sentence pairs of STS-b with MiniLM's tokenizer, truncated at 128 tokens."""

    def __init__(self, split: str) -> None:
        from tokenizers import Tokenizer

        text = shared() / "data" / "text"
        self.tokenizer = Tokenizer.from_file(str(text / "minilm_tokenizer.json"))
        self.tokenizer.enable_truncation(128)
        self.tokenizer.enable_padding()
        with (text / f"stsb-en-{split}.csv").open(newline="", encoding="utf-8") as f:
            rows = [row for row in csv.reader(f) if len(row) == 3]
        self.pairs = [(a, b) for a, b, _ in rows]
        self.scores = np.array([float(s) for _, _, s in rows])

    def batch(
        self, sentences: list[str], length: int | None = None
    ) -> dict[str, npt.NDArray[np.int64]]:
        """Return input_ids, attention_mask and token_type_ids, padded to the longest or ``length``."""
        if length is None:
            self.tokenizer.enable_padding()
        else:
            self.tokenizer.enable_padding(length=length)
        encoded = self.tokenizer.encode_batch(sentences)
        ids = np.array([e.ids for e in encoded], np.int64)
        mask = np.array([e.attention_mask for e in encoded], np.int64)
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
