from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from effdl.data.npz import from_arrays, load_labels, load_npz
from effdl.data.random import random_feeds, resolve_dims
from effdl.errors import DataError, ModelError, UsageError
from effdl.graph import io
from effdl.runtime.session import open_session
from tests.support import SAMPLES, SHARED, from_text, needs_shared

HEADER = '<ir_version: 8, opset_import: ["": 17]>\n'


def model(signature: str, body: str) -> ir.Model:
    return from_text(f"{HEADER}g ({signature}) => {body}")


def runs(m: ir.Model, **options: object) -> dict[str, np.ndarray]:
    feeds = random_feeds(m, **options)  # type: ignore[arg-type]
    session = open_session(m)
    for feed in feeds:
        session.run(feed)
    return feeds.batches[0]


def test_deterministic_and_different() -> None:
    m = model("float[N,3] a, float[N,3] b", "(float[N,3] y) { y = Add(a, b) }")
    first, again = random_feeds(m, seed=3), random_feeds(m, seed=3)
    assert (len(first), first.source, first.real) == (4, "random", False)
    for p, q in zip(first, again, strict=True):
        assert all(np.array_equal(p[k], q[k]) for k in p)
    assert not np.array_equal(first.batches[0]["a"], first.batches[0]["b"])
    assert not np.array_equal(first.batches[0]["a"], first.batches[1]["a"])
    assert not np.array_equal(first.batches[0]["a"], random_feeds(m, seed=4).batches[0]["a"])
    assert first.batches[0]["a"].dtype == np.float32
    longer = random_feeds(m, seed=3, count=6)
    assert np.array_equal(longer.batches[3]["a"], first.batches[3]["a"])


def test_given_dims_win_and_unknown_ones_are_refused() -> None:
    m = model("float[N,C] a", "(float[N,C] y) { y = Relu(a) }")
    assert runs(m, dims={"N": 3, "C": 7})["a"].shape == (3, 7)
    assert runs(m, dims={"a:0": 2, "C": 7})["a"].shape == (2, 7)
    assert resolve_dims(m, {"a:0": 2, "C": 7}) == {"N": 2, "C": 7}
    with pytest.raises(UsageError):
        random_feeds(m, dims={"M": 3})
    with pytest.raises(UsageError):
        resolve_dims(m, {"M": 3})


def test_values_the_graph_asks_for() -> None:
    m = model(
        "int64[N,seq] ids, int64[N,seq] mask, uint8[N] u, bool[N] b, float[N] pos, int64 mode, int32[N] two",
        """(float[?] a, int64[?] c, uint8[?] d, bool[?] e, float[?] f, bool g, float[?] h)
        <float[7,2] table = {0,1,2,3,4,5,6,7,8,9,10,11,12,13}, float[2] small = {1,2}>
        { a = Gather(table, ids)
          c = Neg(mask)
          d = Identity(u)
          e = Not(b)
          f = Log(pos)
          k = Constant <value_int = 8000> ()
          g = Equal(mode, k)
          axis = Constant <value_ints = [0]> ()
          two1 = Unsqueeze(two, axis)
          h = Gather(small, two1) }""",
    )
    feeds = random_feeds(m, dims={"N": 16}, count=8)
    ids = np.concatenate([f["ids"].ravel() for f in feeds])
    assert (ids.min(), ids.max()) == (0, 6)
    feed = feeds.batches[0]
    assert feed["ids"].shape == (16, 64)
    assert (feed["mask"] == 1).all()
    assert feed["u"].dtype == np.uint8
    assert feed["u"].max() > 100
    assert set(feed["b"]) == {True, False}
    assert (feed["pos"] > 0).all()
    assert feed["mode"].shape == ()
    assert feed["mode"] == 8000
    assert set(np.concatenate([f["two"] for f in feeds])) == {0, 1}
    runs(m)


def test_floats_that_become_indices_are_whole_numbers_of_the_table() -> None:
    m = model(
        "float[1,6] x",
        """(float[?,?,?] y) <float[3,2] table = {0,1,2,3,4,5}>
        { i = Cast <to = 6> (x)
          y = Gather(table, i) }""",
    )
    values = np.concatenate([f["x"].ravel() for f in random_feeds(m, count=8)])
    assert set(values) == {0, 1, 2}
    plain = model("float[40] x", "(float[40] y) { i = Cast <to = 1> (x)\n y = Relu(i) }")
    assert len(set(runs(plain)["x"])) == 40


def test_sizes_that_fail_are_followed_by_others() -> None:
    # the first guess, 64, does not fill one row of 128
    m = model(
        "int64[N,seq] x",
        "(int64[?,?] y) { s = Constant <value_ints = [-1, 128]> ()\n y = Reshape(x, s) }",
    )
    assert resolve_dims(m) == {"N": 1, "seq": 128}
    assert runs(m)["x"].shape == (1, 128)


def test_no_size_that_runs_names_input_and_option() -> None:
    m = model(
        "int64[N,seq] x",
        "(int64[?,?] y) { s = Constant <value_ints = [-1, 77]> ()\n y = Reshape(x, s) }",
    )
    with pytest.raises(ModelError) as e:
        random_feeds(m)
    assert "x[1]" in e.value.message
    assert "--dim seq=N" in e.value.hint
    assert resolve_dims(m) == {"N": 1, "seq": 64}
    assert runs(m, dims={"seq": 77})["x"].shape == (1, 77)
    assert runs(m, dims={"N": 77, "seq": 2})["x"].shape == (77, 2)


def test_unknown_integers_are_made_smaller_until_the_model_runs() -> None:
    m = model(
        "float[2,5] x, int64[1] axis",
        "(float[?] y) { y = ReduceSum(x, axis) }",
    )
    for seed in range(5):
        feed = random_feeds(m, seed=seed, count=1).batches[0]
        open_session(m).run(feed)


@pytest.mark.parametrize("kind", ["string[N]", "bfloat16[N]", "seq(float[N])", "float"])
def test_inputs_that_cannot_be_made_up(kind: str) -> None:
    m = model("float[N] x", "(float[N] y) { y = Identity(x) }")
    value = m.graph.inputs[0]
    match kind:
        case "string[N]":
            value.type = ir.TensorType(ir.DataType.STRING)
        case "bfloat16[N]":
            value.type = ir.TensorType(ir.DataType.BFLOAT16)
        case "seq(float[N])":
            value.type = ir.SequenceType(ir.TensorType(ir.DataType.FLOAT))
        case _:
            value.shape = None
    with pytest.raises(ModelError, match="input 'x'") as e:
        random_feeds(m)
    assert "--data" in e.value.hint


def test_overridable_initializers_are_not_fed() -> None:
    m = model("float[N,2] x, float[2] w", "(float[N,2] y) { y = Mul(x, w) }")
    weight = m.graph.inputs[1]
    weight.const_value = ir.tensor(np.ones(2, np.float32), name="w")
    m.graph.register_initializer(weight)
    assert set(runs(m)) == {"x"}
    assert set(from_arrays({"x": np.ones((3, 2), np.float32)}, m).batches[0]) == {"x"}


@needs_shared
def test_random_feeds_run_on_every_real_model() -> None:
    assert SHARED is not None
    shapes = {}
    for path in sorted((SHARED / "models").glob("*.onnx")):
        m = io.load(path)
        before = io.to_bytes(m)
        if path.stem.startswith("superres"):
            with pytest.raises(ModelError, match=r"com\.microsoft\.extensions"):
                random_feeds(m)
            assert resolve_dims(m) == {"num_bytes": 1}
            continue
        feed = runs(m, count=2)
        shapes[path.stem] = {k: v.shape for k, v in feed.items()}
        dims = resolve_dims(m)
        fixed = runs(m, count=1, dims=dims)
        assert all(np.array_equal(fixed[k], feed[k]) for k in feed)
        assert io.to_bytes(m) == before
    assert shapes["silero_vad"] == {"input": (1, 576), "state": (2, 1, 128), "sr": ()}
    assert shapes["nnsplit_en"] == {"input": (1, 64)}
    assert shapes["mobilenetv2_fp32_from_qdq"] == {"image": (1, 3, 244, 244)}


# --- numpy files ---------------------------------------------------------------------------------

TWO = ("float[batch,3] image, int64[batch,4] ids", "(float[batch,3] y) { y = Relu(image) }")


def save(folder: Path, **arrays: np.ndarray) -> Path:
    path = folder / "data.npz"
    np.savez(path, **arrays)
    return path


def test_npz_is_cut_into_samples(tmp_path: Path) -> None:
    image = np.arange(15, dtype=np.float32).reshape(5, 3)
    path = save(tmp_path, image=image, ids=np.ones((5, 4), np.int32), label=np.arange(5))
    feeds = load_npz(path, model(*TWO))
    assert (len(feeds), feeds.source, feeds.real) == (5, "data.npz", True)
    assert set(feeds.batches[0]) == {"image", "ids"}
    np.testing.assert_array_equal(feeds.batches[2]["image"], image[2:3])
    assert feeds.batches[0]["ids"].dtype == np.int64
    pairs = load_npz(path, model(*TWO), batch=2)
    assert [len(f["image"]) for f in pairs] == [2, 2, 1]
    np.testing.assert_array_equal(load_labels(path, "label"), np.arange(5))
    with pytest.raises(DataError, match="no array 'labels'") as e:
        load_labels(path, "labels")
    assert "label" in e.value.hint


def test_sample_models_take_their_data() -> None:
    for path in SAMPLES.glob("*.onnx"):
        m = io.load(path)
        session = open_session(m)
        for kind in ("calib", "test"):
            feeds = load_npz(path.with_suffix(f".{kind}.npz"), m)
            session.run(feeds.batches[-1])


def test_fixed_batch_whole_inputs_and_scalars() -> None:
    m = model(
        "float[2,3] x, float[1,N,4] state, int64 rate",
        "(float[2,3] y, float[1,N,4] s) { y = Relu(x)\n s = Relu(state) }",
    )
    arrays = {
        "x": np.zeros((6, 3), np.float32),
        "state": np.zeros((3, 1, 5, 4), np.float32),
        "rate": np.array(16000),
    }
    feeds = from_arrays(arrays, m)
    assert [f["x"].shape for f in feeds] == [(2, 3)] * 3
    assert [f["state"].shape for f in feeds] == [(1, 5, 4)] * 3
    assert all(f["rate"] == 16000 and f["rate"].shape == () for f in feeds)
    for feed in feeds:
        open_session(m).run(feed)
    each = from_arrays({**arrays, "rate": np.array([1, 2, 3])}, m)
    assert [int(f["rate"]) for f in each] == [1, 2, 3]
    assert isinstance(each.batches[0]["rate"], np.ndarray)
    open_session(m).run(each.batches[0])


def test_npy_for_one_input(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((3, 2), np.float64))
    one = model("float[N,2] x", "(float[N,2] y) { y = Relu(x) }")
    feeds = load_npz(tmp_path / "x.npy", one)
    assert len(feeds) == 3
    assert feeds.batches[0]["x"].dtype == np.float32
    with pytest.raises(DataError, match="2 inputs"):
        load_npz(tmp_path / "x.npy", model(*TWO))


IMAGE, IDS = np.zeros((5, 3), np.float32), np.zeros((5, 4), np.int64)


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"image": IMAGE}, "no array for input 'ids'"),
        ({"imag": IMAGE, "ids": IDS}, "no array for input 'image'"),
        ({"image": IMAGE, "ids": IDS[:4]}, "different numbers of samples: image 5, ids 4"),
        ({"image": IMAGE[:0], "ids": IDS}, "no samples"),
        (
            {"image": IMAGE[:, :2], "ids": IDS},
            r"input 'image' wants \[samples, 3\], the array is \[5, 2\]",
        ),
        ({"image": IMAGE[0], "ids": IDS}, "input 'image' wants"),
        ({"image": np.float32(1), "ids": IDS}, "input 'image' wants"),
        ({"image": IMAGE[:, None, None], "ids": IDS}, "input 'image' wants"),
        ({"image": IMAGE.astype(np.uint8), "ids": IDS}, "wants float32, the array is uint8"),
        ({"image": IMAGE, "ids": IDS.astype(np.float32)}, "wants int64, the array is float32"),
        ({"image": IMAGE * np.nan, "ids": IDS}, "NaN"),
        ({"image": IMAGE.astype(np.float64) + 1e300, "ids": IDS}, "overflows"),
        ({"image": IMAGE, "ids": np.full((5, 4), 2**63, np.uint64)}, "outside int64"),
    ],
)
def test_npz_that_does_not_fit(tmp_path: Path, arrays: dict[str, np.ndarray], text: str) -> None:
    path = save(tmp_path, **arrays)
    with pytest.raises(DataError, match=text) as e:
        load_npz(path, model(*TWO))
    assert e.value.where == str(path)
    assert "\n" not in e.value.message


def test_missing_input_lists_the_arrays_and_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(DataError) as e:
        load_npz(save(tmp_path, imag=IMAGE, ids=IDS), model(*TWO))
    assert e.value.hint == "the file has ids, imag; did you mean 'imag'?"


def test_a_fixed_batch_must_divide_the_samples() -> None:
    m = model("float[4,3] x", "(float[4,3] y) { y = Relu(x) }")
    assert len(from_arrays({"x": np.zeros((8, 3), np.float32)}, m)) == 2
    with pytest.raises(DataError, match="batches of 4"):
        from_arrays({"x": np.zeros((6, 3), np.float32)}, m)


def test_equal_names_must_be_equal_sizes() -> None:
    m = model("int64[b,seq] a, int64[b,seq] m", "(int64[b,seq] y) { y = Add(a, m) }")
    with pytest.raises(DataError, match="dimension 'seq' is 7 in input 'a' and 8 in input 'm'"):
        from_arrays({"a": np.zeros((2, 7), np.int64), "m": np.zeros((2, 8), np.int64)}, m)


def test_files_that_are_none(tmp_path: Path) -> None:
    m = model("float[N,2] x", "(float[N,2] y) { y = Relu(x) }")

    def message(path: Path) -> str:
        with pytest.raises(DataError) as e:
            load_npz(path, m)
        return e.value.message

    assert message(tmp_path / "no.npz") == "no such file"
    assert "folder" in message(tmp_path)
    for name, data in (
        ("empty.npz", b""),
        ("text.npz", b"a,b\n1,2\n"),
        ("zip.npz", b"PK\x03\x04 cut"),
    ):
        (tmp_path / name).write_bytes(data)
        assert "no numpy array file" in message(tmp_path / name)
    objects = tmp_path / "objects.npz"
    np.savez(objects, x=np.array([{"a": 1}, None], dtype=object))
    assert "Python objects" in message(objects)
    good = save(tmp_path, x=np.zeros((500, 2), np.float32))
    (tmp_path / "half.npz").write_bytes(good.read_bytes()[:1000])
    assert "no numpy array file" in message(tmp_path / "half.npz")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    assert "Python objects" in message(tmp_path / "objects.npy")


def test_labels_of_other_arrays_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, x=np.zeros((3, 2), np.float32), notes=np.array([{}], dtype=object))
    assert len(load_npz(path, model("float[N,2] x", "(float[N,2] y) { y = Relu(x) }"))) == 3
