"""The models that ``compare_quantizers.py`` and ``results.py`` measure: data, timing and what scores each."""

from __future__ import annotations

import gzip
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import effdl  # noqa: F401  (before onnxruntime: switches its telemetry off)

# isort: split
import numpy as np
import onnxruntime as ort
import real_data

from effdl.data.metrics import METRICS

ROOT = Path(__file__).parent.parent
Arrays = dict[str, np.ndarray]


@dataclass
class Row:
    """One model.

    Args:
        name: what tables call it.
        model: its file.
        preset: effdl's.
        calibration: samples along the first axis, by input.
        metric: what ``score`` gives; ``higher`` whether more is better.
        score: judges a model's file.
        timing: one feed.
        batch: samples of a calibration feed.
    """

    name: str
    model: Path
    preset: str
    calibration: Arrays
    metric: str
    score: Callable[[Path], float]
    timing: Arrays
    higher: bool = True
    batch: int = 1

    def feeds(self) -> Iterator[Arrays]:
        """The calibration data, feed by feed."""
        count = len(next(iter(self.calibration.values())))
        for k in range(0, count, self.batch):
            yield {name: a[k : k + self.batch] for name, a in self.calibration.items()}


def run_all(model: Path, feed: Arrays, step: int = 100, output: int = 0) -> np.ndarray:
    """Run a model over all samples in batches; returns one output of all."""
    session = _session(model)
    count = len(next(iter(feed.values())))
    parts = [
        session.run(None, {k: v[i : i + step] for k, v in feed.items()})[output]
        for i in range(0, count, step)
    ]
    return np.concatenate([p.reshape(len(p), -1) if p.ndim else p.reshape(1, 1) for p in parts])


def _model(name: str) -> Path:
    return real_data.shared() / "models" / f"{name}.onnx"


def _session(model: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(model, options)


def _input(path: Path) -> str:
    return str(_session(path).get_inputs()[0].name)


def cifar(name: str, calibration: int) -> Row:
    """A CIFAR-10 classifier, by its accuracy on 10,000 test images."""
    images, labels = real_data.cifar_test()
    path = _model(name)
    key = _input(path)
    data = {key: real_data.cifar_calibration()[:calibration]}
    return Row(
        name,
        path,
        "cnn-int8",
        data,
        "top-1",
        lambda m: METRICS["top1"](run_all(m, {key: images}), labels),
        {key: images[:1]},
        batch=10,
    )


def agreement(name: str, test: np.ndarray, calibration: np.ndarray, step: int) -> Row:
    """A classifier without labels, by how often its class is that of the original."""
    path = _model(name)
    key = _input(path)
    want = run_all(path, {key: test}, step)
    return Row(
        name,
        path,
        "cnn-int8",
        {key: calibration},
        "agreement",
        lambda m: METRICS["top1"](run_all(m, {key: test}, step), want.argmax(-1)),
        {key: test[:1]},
    )


def nearness(
    name: str, test: np.ndarray, calibration: np.ndarray, preset: str = "cnn-int8", output: int = 0
) -> Row:
    """Any model, by the relative L2 error of an output."""
    path = _model(name)
    key = _input(path)
    want = run_all(path, {key: test}, 1, output)

    def error(model: Path) -> float:
        got = run_all(model, {key: test}, 1, output)
        return float(np.linalg.norm(got - want) / np.linalg.norm(want))

    return Row(
        name,
        path,
        preset,
        {key: calibration},
        "output error",
        error,
        {key: test[:1]},
        higher=False,
    )


def mnist() -> Row:
    """The MNIST attention network, by its accuracy on the test images."""
    folder = real_data.shared() / "data" / "mnist"

    def read(stem: str, head: int) -> np.ndarray:
        file = next(f for f in folder.iterdir() if stem in f.name)
        return np.frombuffer(gzip.decompress(file.read_bytes())[head:], np.uint8)

    images = read("images", 16).reshape(-1, 28, 28, 1).astype(np.float32) / 255
    labels = read("labels", 8).astype(np.int64)
    path = _model("mnist_selfattn")
    key = _input(path)
    return Row(
        "mnist_selfattn",
        path,
        "int8",
        {key: images[8000:8200]},
        "top-1",
        lambda m: METRICS["top1"](run_all(m, {key: images[:8000]}, 1), labels[:8000]),
        {key: images[:1]},
    )


def speech() -> np.ndarray:
    """A minute of speech at 16 kHz, between -1 and 1."""
    with wave.open(str(real_data.shared() / "data" / "audio" / "silero_test.wav")) as file:
        frames = file.readframes(file.getnframes())
    return np.frombuffer(frames, np.int16).astype(np.float32) / 32768


def dtln() -> Row:
    """The first network of DTLN on spectra of speech, its state kept at zero."""
    path = _model("dtln_1")
    session = _session(path)
    sound = speech()
    blocks = np.lib.stride_tricks.sliding_window_view(sound, 512)[::4096]
    spectra = np.abs(np.fft.rfft(blocks, axis=-1)).astype(np.float32)[:, None]
    feeds: Arrays = {}
    for port in session.get_inputs():
        if port.shape[-1] == 257:
            feeds[port.name] = spectra
        else:
            shape = [d if isinstance(d, int) else 1 for d in port.shape]
            feeds[port.name] = np.zeros((len(spectra), *shape[1:]), np.float32)
    half = len(spectra) // 2
    test = {k: v[half:] for k, v in feeds.items()}
    want = run_all(path, test, 1)

    def error(model: Path) -> float:
        got = run_all(model, test, 1)
        return float(np.linalg.norm(got - want) / np.linalg.norm(want))

    return Row(
        "dtln_1",
        path,
        "transformer-int8",
        {k: v[:half] for k, v in feeds.items()},
        "output error",
        error,
        {k: v[:1] for k, v in test.items()},
        higher=False,
    )


def nnsplit() -> Row:
    """The sentence splitter on the bytes of sentences, by the error of its answers."""
    text = " ".join(a for a, _ in real_data.Sentences("dev").pairs).encode()
    blocks = np.frombuffer(text[: 200 * 100], np.uint8).reshape(200, 100)
    return nearness("nnsplit_en", blocks[100:], blocks[:100], "transformer-int8")


def sample(name: str) -> Row:
    """One of the project's own digit classifiers, by its accuracy."""
    folder = ROOT / "sample_models"
    path = folder / f"{name}.onnx"
    calibration, test = (dict(np.load(folder / f"{name}.{part}.npz")) for part in ("calib", "test"))
    key = _input(path)
    labels = next(v for k, v in test.items() if k != key)
    preset = "transformer-int8" if "transformer" in name else "cnn-int8"
    return Row(
        name,
        path,
        preset,
        {key: calibration[key]},
        "top-1",
        lambda m: METRICS["top1"](run_all(m, {key: test[key]}), labels),
        {key: test[key][:1]},
        batch=10,
    )


def minilm(path: Path) -> Row:
    """MiniLM by the Spearman correlation on STS-b, timed at length 128."""
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
        session = _session(model)
        a, b = (embed(session, [p[k] for p in data.pairs]) for k in (0, 1))
        return float(METRICS["spearman"]((a * b).sum(-1), data.scores))

    text = " ".join(a for a, _ in data.pairs[:40])
    calibration = real_data.Sentences("dev")
    return Row(
        "all-MiniLM-L6-v2",
        path,
        "transformer-int8",
        calibration.batch([a for a, _ in calibration.pairs[:200]], length=64),
        "Spearman",
        spearman,
        data.batch([text], length=128),
        batch=10,
    )


def rows(minilm_path: Path | None) -> dict[str, Callable[[], Row]]:
    """Return what makes each row, by name: nothing is read before it is asked for."""
    photographs, bgr = real_data.photographs, real_data.photographs_bgr
    found: dict[str, Callable[[], Row]] = {
        "mobilenetv2_fp32": lambda: agreement(
            "mobilenetv2_fp32_from_qdq", photographs(244, 20, 2), photographs(244, 10, 1), 20
        ),
        "squeezenet_fp32": lambda: agreement(
            "squeezenet_fp32_from_fp16", photographs(224, 20, 2), photographs(224, 10, 1), 1
        ),
        "ultraface": lambda: nearness("ultraface_rfb320", faces(2, 2), faces(6, 1)),
        "yolox_nano": lambda: nearness("yolox_nano", bgr(416, 2, 2), bgr(416, 6, 1)),
        "seg_pan": lambda: nearness(
            "seg_pan_mbv3s", photographs(512, 2, 2), photographs(512, 6, 1)
        ),
        "cifar_resnet20": lambda: cifar("cifar_resnet20", 200),
        "cifar_vgg": lambda: cifar("cifar_vgg", 200),
        "mnist_selfattn": mnist,
        "nnsplit_en": nnsplit,
        "dtln_1": dtln,
        "digits_cnn": lambda: sample("digits_cnn"),
        "digits_mlp": lambda: sample("digits_mlp"),
        "digits_transformer": lambda: sample("digits_transformer"),
    }
    if minilm_path is not None:
        found["all-MiniLM-L6-v2"] = lambda: minilm(minilm_path)
    return found


def faces(crops: int, seed: int) -> np.ndarray:
    """Crops of the photographs as ultraface takes them: 240 by 320, (x - 127) / 128."""
    square = real_data.photographs_bgr(320, crops, seed)[:, ::-1, 40:280]
    return np.ascontiguousarray((square - 127) / 128, np.float32)
