"""Samples from arrays: files, folders, labels, limits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from effdl.data.dataset import load_dataset
from effdl.data.feeds import KEPT_BYTES, LazyFeeds, spread
from effdl.data.spec import Labelled, Preprocess, Source, parse_preprocess
from effdl.errors import DataError, UsageError
from effdl.graph import io
from tests.support import SAMPLES, from_text

TEST = SAMPLES / "digits_mlp.test.npz"


@pytest.fixture(scope="module")
def mlp() -> ir.Model:
    return io.load(SAMPLES / "digits_mlp.onnx")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The test samples as a folder of .npy."""
    with np.load(TEST) as data:
        np.save(tmp_path / "image.npy", data["image"])
        np.save(tmp_path / "label.npy", data["label"])
    return tmp_path


def test_npz_with_labels(mlp: ir.Model) -> None:
    found = load_dataset(Labelled(path=TEST), mlp)
    assert len(found.feeds) == 504
    assert found.labels is not None
    assert found.labels.shape == (504,)
    assert found.source == "digits_mlp.test.npz"
    bare = load_dataset(TEST, mlp)
    assert bare.labels is None
    assert len(load_dataset(TEST, mlp, batch=100).feeds) == 6


def test_npz_without_labels_says_what_is_in_it(mlp: ir.Model, tmp_path: Path) -> None:
    with np.load(TEST) as data:
        np.savez(tmp_path / "t.npz", image=data["image"], target=data["label"])
    found = load_dataset(Labelled(path=tmp_path / "t.npz"), mlp)
    assert found.labels is None
    assert "--labels KEY" in found.why_unlabelled
    assert "image, target" in found.why_unlabelled
    assert load_dataset(Labelled(path=tmp_path / "t.npz", labels="target"), mlp).labels is not None
    with pytest.raises(DataError, match="no array 'targt'") as e:
        load_dataset(Labelled(path=tmp_path / "t.npz", labels="targt"), mlp)
    assert e.value.hint == "did you mean 'target'?"


def test_folder_of_npy_is_mapped_not_read(mlp: ir.Model, folder: Path) -> None:
    found = load_dataset(Labelled(path=folder), mlp)
    image = found.feeds.batches[3]["image"]
    below: object = image
    while isinstance(below, np.ndarray) and not isinstance(below, np.memmap):
        below = below.base
    assert isinstance(below, np.memmap)
    same = load_dataset(Labelled(path=TEST), mlp)
    np.testing.assert_array_equal(image, same.feeds.batches[3]["image"])
    assert found.labels is not None
    np.testing.assert_array_equal(found.labels, same.labels)


def test_folder_of_npy_names_what_is_missing(mlp: ir.Model, folder: Path) -> None:
    with pytest.raises(DataError, match=r"no y\.npy") as e:
        load_dataset(Labelled(path=folder, labels="y"), mlp)
    assert "image.npy, label.npy" in e.value.hint
    (folder / "label.npy").rename(folder / "other.npy")
    bare = load_dataset(Labelled(path=folder), mlp)
    assert bare.labels is None
    assert "other.npy" in bare.why_unlabelled
    (folder / "image.npy").rename(folder / "picture.npy")
    with pytest.raises(DataError, match=r"no image\.npy for the model's input"):
        load_dataset(Source(path=folder), mlp)


def test_names_that_are_no_file_names(tmp_path: Path) -> None:
    model = from_text(
        """<ir_version: 8, opset_import: ["": 17]> g (float[N,2] x) => (float[N,2] y) { y = Neg(x) }"""
    )
    model.graph.inputs[0].name = "serving/x:0"
    np.save(tmp_path / "serving_x_0.npy", np.ones((3, 2), np.float32))
    assert len(load_dataset(tmp_path, model).feeds) == 3


def test_limit_takes_samples_from_everywhere(mlp: ir.Model, folder: Path) -> None:
    for path in (TEST, folder):
        found = load_dataset(Labelled(path=path, limit=100), mlp)
        whole = load_dataset(Labelled(path=path), mlp)
        assert len(found.feeds) == 100
        assert found.labels is not None
        assert whole.labels is not None
        numbers = spread(504, 100)
        np.testing.assert_array_equal(found.labels, whole.labels[numbers])
        np.testing.assert_array_equal(
            found.feeds.batches[99]["image"], whole.feeds.batches[numbers[99]]["image"]
        )
    np.save(folder / "label.npy", np.zeros(503, np.int64))
    with pytest.raises(DataError, match="503 labels for 504 samples"):
        load_dataset(Labelled(path=folder, limit=100), mlp)


def test_spread() -> None:
    assert spread(10, 4).tolist() == [0, 2, 5, 7]
    assert spread(3, 9).tolist() == [0, 1, 2]
    assert spread(3, None).tolist() == [0, 1, 2]
    assert spread(0, 5).tolist() == []


def test_options_belong_to_their_kind_of_data(mlp: ir.Model, folder: Path) -> None:
    with pytest.raises(UsageError, match="preprocess is for a folder of pictures"):
        load_dataset(Source(path=TEST, preprocess="unit"), mlp)
    with pytest.raises(UsageError, match=r"tokenizer is for a \.csv"):
        load_dataset(Source(path=folder, tokenizer=Path("t.json")), mlp)


def test_nothing_there(mlp: ir.Model, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        load_dataset(tmp_path / "nowhere", mlp)
    with pytest.raises(DataError, match="no pictures in this folder"):
        load_dataset(tmp_path, mlp)


def test_lazy_feeds_are_made_once_and_sliced() -> None:
    made: list[int] = []

    def make(number: int) -> dict[str, np.ndarray]:
        made.append(number)
        return {"x": np.full(2, number)}

    feeds = LazyFeeds(make, range(10))
    assert len(feeds[2:5]) == 3
    assert feeds[2:5][0]["x"][0] == 2
    assert [int(f["x"][0]) for f in feeds[2:5]] == [2, 3, 4]
    assert feeds[-1]["x"][0] == 9
    assert made == [2, 3, 4, 9]
    feeds[2]["x"] = np.zeros(1)  # a caller's own mapping
    assert feeds[2]["x"][0] == 2
    with pytest.raises(IndexError):
        feeds[10]


def test_lazy_feeds_keep_a_bounded_number_of_bytes() -> None:
    made: list[int] = []
    big = np.broadcast_to(np.uint8(0), (KEPT_BYTES // 2,))

    def make(number: int) -> dict[str, np.ndarray]:
        made.append(number)
        return {"x": big}

    feeds = LazyFeeds(make, range(4))
    for _ in range(2):
        list(feeds)
    assert made == [0, 1, 2, 3, 2, 3]


def test_preprocessing_is_read_from_one_word() -> None:
    assert parse_preprocess("imagenet") == Preprocess(preset="imagenet")
    found = parse_preprocess(
        "raw, size=240x320,color=BGR,mean=127/127/127,std=128,resize=letterbox"
    )
    assert (found.preset, found.size, found.color) == ("raw", [240, 320], "BGR")
    assert (found.mean, found.std, found.resize) == ([127, 127, 127], 128, "letterbox")
    assert parse_preprocess("size=32").preset == "unit"
    assert parse_preprocess("signed,mean=-0.5/1e-1/2").mean == [-0.5, 0.1, 2]


@pytest.mark.parametrize(
    ("spec", "message", "hint"),
    [
        ("imagnet", "preset cannot be 'imagnet'", "did you mean 'imagenet'?"),
        ("unit,sise=3", "unknown key 'sise'", "did you mean 'size'?"),
        ("unit,size", "unknown key 'size'", "did you mean 'size'?"),
        ("unit,size=0", "size cannot be '0'", "greater than or equal to 1"),
        ("unit,size=big", "size cannot be 'big'", ""),
        ("unit,std=0", "std cannot be '0'", "greater than 0"),
        ("unit,color=bgr", "color cannot be 'bgr'", "known: BGR"),
    ],
)
def test_preprocessing_faults(spec: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as e:
        parse_preprocess(spec)
    assert message in e.value.message
    assert hint in e.value.hint
