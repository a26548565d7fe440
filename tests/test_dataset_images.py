"""Pictures as samples: folders, labels, preprocessing, bad files."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from PIL import Image

from effdl.data.dataset import Dataset, load_dataset
from effdl.data.feeds import LazyFeeds
from effdl.data.spec import Labelled, Source
from effdl.errors import DataError, UsageError
from tests.support import from_text

RED, BLUE = (250, 10, 20), (10, 20, 240)


def model(shape: str = "float[N,3,8,8]") -> ir.Model:
    return from_text(
        f"""<ir_version: 8, opset_import: ["": 17]> g ({shape} x) => ({shape} y) {{ y = Identity(x) }}"""
    )


def picture(path: Path, color: object = RED, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)  # type: ignore[arg-type]
    return path


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    for name, color in (("cat", RED), ("ant", BLUE), ("dog", RED)):
        for k in range(3):
            picture(tmp_path / "set" / name / f"{k}.png", color)
    (tmp_path / "set" / ".hidden").mkdir()
    return tmp_path / "set"


def load(path: Path, preprocess: str | None = "unit", shape: str = "", **more: object) -> Dataset:
    spec = Labelled(path=path, preprocess=preprocess, **more)
    return load_dataset(spec, model(shape) if shape else model())


def first(path: Path, preprocess: str, shape: str = "") -> np.ndarray:
    return load(path, preprocess, shape).feeds.batches[0]["x"]


def test_sub_folders_are_classes_in_alphabetical_order(classes: Path) -> None:
    found = load(classes)
    assert found.labels is not None
    assert found.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert found.notes == ("3 classes in alphabetical order: ant, cat, dog",)
    assert isinstance(found.feeds.batches, LazyFeeds)
    ant = found.feeds.batches[0]["x"]
    assert ant.shape == (1, 3, 8, 8)
    assert ant.dtype == np.float32
    np.testing.assert_array_equal(ant[0, :, 0, 0], np.array(BLUE, np.float32) / 255)
    some = load(classes, limit=3)
    assert some.labels is not None
    assert some.labels.tolist() == [0, 1, 2]


def test_folders_that_are_numbers_are_the_labels(tmp_path: Path) -> None:
    for name in ("0", "2", "10"):
        picture(tmp_path / "set" / name / "a.png")
    found = load(tmp_path / "set")
    assert found.labels is not None
    assert found.labels.tolist() == [0, 10, 2]
    assert found.notes == ()


def test_labels_from_a_table_or_an_array(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for name in ("b.png", "a.jpg"):
        picture(folder / name)
    bare = load(folder)
    assert bare.labels is None
    assert "--labels FILE.csv" in bare.why_unlabelled
    table = tmp_path / "truth.csv"
    table.write_text("file,label\nb.png,4\na.jpg,7\n")
    assert load(folder, labels=str(table)).labels.tolist() == [7, 4]  # type: ignore[union-attr]
    (folder / "truth.csv").write_text("a.jpg,zebra\nb.png,ape\n")
    worded = load(folder, labels="truth.csv")
    assert worded.labels.tolist() == [1, 0]  # type: ignore[union-attr]
    assert worded.notes == ("2 classes in alphabetical order: ape, zebra",)
    np.save(tmp_path / "truth.npy", np.array([0.5, 2.5]))
    assert load(folder, labels=str(tmp_path / "truth.npy")).labels.tolist() == [0.5, 2.5]  # type: ignore[union-attr]


def test_labels_that_do_not_belong(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for name in ("b.png", "a.jpg"):
        picture(folder / name)
    table = tmp_path / "t.csv"
    for text, message in (
        ("a.jpg,1\n", "no label for the picture b.png"),
        ("a.jpg,1\nb.png,x\n", "some are words, such as 'x'"),
        ("a.jpg\nb.png\n", "expected a picture's file name"),
    ):
        table.write_text(text)
        with pytest.raises(DataError, match=message):
            load(folder, labels=str(table))
    np.save(tmp_path / "t.npy", np.zeros(3))
    with pytest.raises(DataError, match="3 labels for 2 pictures"):
        load(folder, labels=str(tmp_path / "t.npy"))
    with pytest.raises(UsageError, match=r"a \.csv or \.npy file, not 'label'"):
        load(folder, labels="label")


def test_presets_and_channels(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    picture(folder / "a.png")
    red = np.array(RED, np.float32)
    np.testing.assert_array_equal(first(folder, "raw")[0, :, 3, 3], red)
    np.testing.assert_array_equal(first(folder, "raw,color=BGR")[0, :, 3, 3], red[::-1])
    np.testing.assert_allclose(first(folder, "signed")[0, :, 3, 3], red / 127.5 - 1, atol=1e-6)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    want = (red / 255 - mean) / std
    np.testing.assert_allclose(first(folder, "imagenet,size=8")[0, :, 3, 3], want, rtol=1e-5)
    got = first(folder, "imagenet,size=8,color=BGR")[0, :, 3, 3]
    np.testing.assert_allclose(got, want[::-1], rtol=1e-5)
    got = first(folder, "raw,mean=127,std=128,layout=NHWC", "float[N,8,8,3]")
    np.testing.assert_allclose(got[0, 3, 3], (red - 127) / 128, rtol=1e-6)
    assert first(folder, "raw", "uint8[N,3,8,8]").dtype == np.uint8
    assert first(folder, "unit", "float16[N,3,8,8]").dtype == np.float16
    grey = first(folder, "raw", "float[N,1,8,8]")
    assert grey.shape == (1, 1, 8, 8)
    assert grey[0, 0, 0, 0] == np.asarray(Image.open(folder / "a.png").convert("L"))[0, 0]
    assert first(folder, "unit", "float[3,8,8]").shape == (3, 8, 8)


def test_layout_and_size_come_from_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    picture(folder / "a.png", size=(30, 20))
    assert first(folder, "unit").shape == (1, 3, 8, 8)
    assert first(folder, "unit", "float[N,6,10,3]").shape == (1, 6, 10, 3)
    assert first(folder, "unit,layout=NCHW", "float[N,C,H,W]").shape == (1, 3, 20, 30)
    assert first(folder, "imagenet,layout=NCHW", "float[N,C,H,W]").shape == (1, 3, 224, 224)
    assert first(folder, "unit,size=12x14", "float[N,3,H,W]").shape == (1, 3, 12, 14)
    with pytest.raises(UsageError, match="which axis has the channels"):
        first(folder, "unit", "float[N,C,H,W]")
    with pytest.raises(DataError, match=r"wants \[\?, 3, 8, 8\], the preprocessed picture is"):
        first(folder, "unit,size=9")


def test_resizing(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    wide = np.zeros((16, 32, 3), np.uint8)
    wide[:, 8:24] = 255  # the middle half is white
    folder.mkdir()
    Image.fromarray(wide).save(folder / "a.png")
    cropped = first(folder, "raw,resize=crop")
    assert (cropped[..., 1:-1] == 255).all()
    smaller = first(folder, "raw,resize=crop,crop=0.5,interpolation=nearest")
    assert (smaller == 255).all()
    stretched = first(folder, "raw,interpolation=nearest")
    assert stretched[0, 0, 0].tolist() == [0, 0, 255, 255, 255, 255, 0, 0]
    box = first(folder, "raw,resize=letterbox")
    assert (box[0, :, :2] == 114).all()
    assert (box[0, :, 6:] == 114).all()
    assert (box[0, :, 2:6] != 114).all()
    corner = first(folder, "raw,resize=letterbox,place=corner,fill=7")
    assert (corner[0, :, 4:] == 7).all()
    assert (corner[0, :, :4] != 7).all()


def test_a_picture_that_lies_on_its_side(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(pixels).save(folder / "a.png", exif=exif)
    got = first(folder, "raw", "float[N,3,H,W]")
    assert got.shape == (1, 3, 8, 4)
    assert (got[0, :, :4] == 255).all()


def test_a_fixed_batch_takes_several(classes: Path) -> None:
    found = load(classes, "unit", "float[3,3,8,8]")
    assert len(found.feeds) == 3
    assert found.feeds.batches[0]["x"].shape == (3, 3, 8, 8)
    with pytest.raises(DataError, match="batches of 4, 9 pictures"):
        load(classes, "unit", "float[4,3,8,8]")
    both = load_dataset(Source(path=classes, preprocess="unit"), model(), batch=4).feeds
    assert [len(f["x"]) for f in both] == [4, 4, 1]


def test_preprocessing_has_to_be_said(classes: Path) -> None:
    with pytest.raises(UsageError, match="how do the pictures become numbers") as e:
        load(classes, None)
    assert "--preprocess imagenet" in e.value.hint


@pytest.mark.parametrize(
    ("shape", "spec", "message"),
    [
        ("float[N,8]", "unit", r"is \['N', 8\]: pictures are"),
        ("uint8[N,3,8,8]", "unit", "takes uint8, unit pictures are fractions"),
        ("int64[N,3,8,8]", "raw", "takes int64"),
        ("float[N,1,8,8]", "unit,color=RGB", "has 1 channels, RGB has 3"),
        ("float[N,3,8,8]", "unit,mean=1/2", "mean has 2 numbers for 3 channels"),
    ],
)
def test_models_that_take_no_such_pictures(
    classes: Path, shape: str, spec: str, message: str
) -> None:
    with pytest.raises((DataError, UsageError), match=message):
        load(classes, spec, shape)


def test_two_inputs(classes: Path) -> None:
    two = from_text(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[N,3,8,8] x, float[N] s) => (float[N,3,8,8] y) { y = Identity(x) }"""
    )
    with pytest.raises(DataError, match=r"one input, this one has 2 \('x', 's'\)"):
        load_dataset(Source(path=classes, preprocess="unit"), two)


def test_bad_files(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    picture(folder / "a.png")
    (folder / "b.jpg").write_bytes(b"not a picture")
    found = load(folder)
    with pytest.raises(DataError, match="no picture that can be read") as e:
        list(found.feeds)
    assert e.value.where.endswith("b.jpg")
    whole = (folder / "a.png").read_bytes()
    (folder / "b.jpg").unlink()
    (folder / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="no picture that can be read"):
        load(folder)
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(folder / "a.png")
    with pytest.raises(DataError, match="not 8 bits a channel"):
        load(folder)
    picture(folder / "sub" / "c.png")
    with pytest.raises(DataError, match="both in the folder and in its sub-folders"):
        load(folder)


def test_without_pillow_one_line_names_the_extra(
    classes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    monkeypatch.setitem(sys.modules, "PIL.ImageOps", None)
    with pytest.raises(UsageError, match="Pillow, which is not installed") as e:
        load(classes)
    assert e.value.hint == "pip install 'effdl[data]'"
