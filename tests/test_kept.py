"""Second moments that are kept from one command to the next."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from effdl.data.feeds import Feeds
from effdl.graph.digest import digests
from effdl.observe import moments as module
from effdl.observe.kept import VARIABLE
from effdl.observe.rows import Rows
from effdl.runtime.cache import ArrayCache
from tests.support import from_text

TEXT = """
<ir_version: 8, opset_import: ["": 17]>
agraph (float[N,4] x) => (float[N,3] y)
<float[4,4] w = {1,2,3,4, 5,6,7,8, 1,0,1,0, 2,2,2,2}, float[4,3] v = {1,2,3, 4,5,6, 7,8,9, 1,2,3}>
{
    a = MatMul(x, w)
    r = Relu(a)
    y = MatMul(r, v)
}
"""
ROWS = {"first": Rows("x", 4), "second": Rows("r", 4)}


def data(seed: int = 0) -> Feeds:
    rng = np.random.default_rng(seed)
    return Feeds(
        [{"x": rng.normal(size=(2, 4)).astype(np.float32)} for _ in range(6)], "test", True
    )


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(VARIABLE, "64")
    monkeypatch.setattr(module, "_LONG", -1.0)
    return tmp_path


def seen(model: ir.Model, feeds: Feeds) -> dict[str, module.Moments]:
    return dict(module.moments(model, ROWS, feeds))


def runs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Record which tensors were asked for."""
    asked: list[list[str]] = []
    plain = module.tensors

    def recorded(model: ir.Model, names: list[str], *args: object, **kw: object) -> object:
        asked.append(list(names))
        return plain(model, names, *args, **kw)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "tensors", recorded)
    return asked


def test_moments_come_from_the_cache_the_second_time(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = runs(monkeypatch)
    fresh, again = seen(from_text(TEXT), data()), seen(from_text(TEXT), data())
    assert asked == [["x", "r"], []]
    for key in ROWS:
        np.testing.assert_array_equal(fresh[key].covariance, again[key].covariance)
        np.testing.assert_array_equal(fresh[key].mean, again[key].mean)
        np.testing.assert_array_equal(fresh[key].magnitude, again[key].magnitude)
        assert fresh[key].rows == again[key].rows == 12


def test_only_what_changed_is_seen_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = runs(monkeypatch)
    seen(from_text(TEXT), data())
    seen(from_text(TEXT.replace("v = {1,", "v = {9,")), data())  # behind what both layers read
    seen(from_text(TEXT.replace("w = {1,", "w = {9,")), data())
    seen(from_text(TEXT.replace("Relu", "Sigmoid")), data())
    seen(from_text(TEXT), data(1))
    assert asked == [["x", "r"], [], ["r"], ["r"], ["x", "r"]]


def test_it_can_be_turned_off(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "0")
    asked = runs(monkeypatch)
    seen(from_text(TEXT), data())
    seen(from_text(TEXT), data())
    assert asked == [["x", "r"]] * 2
    assert not list(home.iterdir())


def test_what_is_had_at_once_is_not_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LONG", 1000.0)
    seen(from_text(TEXT), data())
    assert not list(home.rglob("*.npz"))


def test_a_broken_file_is_made_again(home: Path) -> None:
    fresh = seen(from_text(TEXT), data())
    for file in home.rglob("*.npz"):
        file.write_bytes(file.read_bytes()[:50])
    again = seen(from_text(TEXT), data())
    np.testing.assert_array_equal(fresh["second"].covariance, again["second"].covariance)


def test_digests_follow_graphs_inside_nodes() -> None:
    text = """
    <ir_version: 8, opset_import: ["": 17]>
    agraph (bool c, float[2] x) => (float[2] y)
    <float[2] w = {1, 2}>
    {
        a = Mul(x, w)
        y = If (c) <
            then_branch = t () => (float[2] p) { p = Neg(a) },
            else_branch = e () => (float[2] q) { q = Identity(a) }
        >
    }
    """
    plain, other = (digests(from_text(t)) for t in (text, text.replace("{1, 2}", "{1, 3}")))
    inner = digests(from_text(text.replace("Neg", "Abs")))
    assert plain["x"] == other["x"]
    assert plain["y"] not in (other["y"], inner["y"])
    assert plain["a"] == inner["a"] != other["a"]
    assert plain == digests(from_text(text))


def test_the_oldest_arrays_go_first(tmp_path: Path) -> None:
    cache = ArrayCache("kind", 10_000, tmp_path)
    array = np.zeros(300)  # 2.4 kB and a header: three fit
    for k, name in enumerate("abc"):
        cache.put(name, {"x": array + k})
        os.utime(tmp_path / "kind" / f"{name}.npz", (k, k))
    found = cache.get("a")  # used: it stays
    assert found is not None
    np.testing.assert_array_equal(found["x"], array)
    cache.put("d", {"x": array})
    assert sorted(f.stem for f in (tmp_path / "kind").iterdir()) == ["a", "c", "d"]
    cache.put("large", {"x": np.zeros(1000)})
    assert cache.get("large") is None
