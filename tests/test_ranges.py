import numpy as np
import pytest

from effdl.data.feeds import Feeds
from effdl.observe import ranges as observe
from effdl.solve.ranges import Histogram, select_range, silu, squared_error
from tests.support import from_text, outputs


def histogram(values: np.ndarray, bins: int = 2048) -> Histogram:
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    counts, _ = np.histogram(values, bins, (low, high))
    return Histogram(counts.astype(float), low, high, float(values.min()), float(values.max()))


def exact_error(values: np.ndarray, low: float, high: float, levels: int = 256) -> float:
    step = (high - low) / (levels - 1)
    zero = np.clip(np.round(-low / step), 0, levels - 1)
    grid = np.clip(np.round(values / step) + zero, 0, levels - 1)
    return float(np.mean(((grid - zero) * step - values) ** 2))


@pytest.fixture
def normal() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(200_000)


def test_minmax_takes_all_and_zero() -> None:
    assert select_range(histogram(np.array([1.0, 2.0, 7.0])), "minmax") == (0.0, 7.0)
    assert select_range(histogram(np.array([-3.0, -1.0])), "minmax") == (-3.0, 0.0)
    both = select_range(histogram(np.array([-3.0, 5.0])), "minmax", symmetric=True)
    assert both == (-5.0, 5.0)


def test_percentile_cuts_both_ends(normal: np.ndarray) -> None:
    found = histogram(np.concatenate([normal, [40.0, -60.0]]), 8192)
    low, high = select_range(found, "percentile", percentile=99.0)
    want = np.percentile(normal, [0.5, 99.5])
    width = 100 / 8192
    assert abs(low - want[0]) <= 2 * width
    assert abs(high - want[1]) <= 2 * width
    assert select_range(found, "percentile", percentile=100) == (-60.0, 40.0)


def test_squared_error_is_that_of_the_values(normal: np.ndarray) -> None:
    got = squared_error(histogram(normal, 4096), np.array([-2.0, -4.0]), np.array([3.0, 4.0]), 16)
    want = [exact_error(normal, -2, 3, 16), exact_error(normal, -4, 4, 16)]
    np.testing.assert_allclose(got, want, rtol=0.02)


@pytest.mark.parametrize("levels", [16, 256])
def test_mse_is_as_good_as_a_brute_force_grid(levels: int) -> None:
    values = np.random.default_rng(1).standard_t(3, 50_000) + 0.5
    found = histogram(values, 4096)
    low, high = select_range(found, "mse", levels=levels)
    ends = np.linspace(1, 0.05, 40)
    brute = min(
        exact_error(values, float(values.min() * a), float(values.max() * b), levels)
        for a in ends
        for b in ends
    )
    assert exact_error(values, low, high, levels) <= 1.05 * brute


def test_mse_clips_an_outlier_that_minmax_keeps(normal: np.ndarray) -> None:
    values = np.concatenate([np.abs(normal), [50.0]])
    found = histogram(values, 4096)
    low, high = select_range(found, "mse", levels=16)
    assert low == 0
    assert high < 10
    assert exact_error(values, low, high, 16) < 0.1 * exact_error(values, 0, 50, 16)


def test_mse_through_silu_drops_what_silu_drops(normal: np.ndarray) -> None:
    values = 8 * normal - 10
    found = histogram(values, 4096)
    plain, aware = select_range(found, "mse"), select_range(found, "mse", through=silu)
    assert aware[0] > plain[0]

    def error(ends: tuple[float, float]) -> float:
        return float(squared_error(found, *ends, through=silu)[0])

    assert error(aware) < 0.7 * error(plain)


def test_entropy_ignores_rare_outliers_and_keeps_the_body(normal: np.ndarray) -> None:
    relu = np.maximum(normal, 0)
    low, high = select_range(histogram(np.concatenate([relu, [30.0] * 3]), 4096), "entropy")
    assert low == 0
    assert 2.5 < high < 15


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy", "mse"])
def test_all_zero_tensor_has_an_empty_range(method: str) -> None:
    found = Histogram(np.array([5.0, 0.0]), 0.0, 0.0, 0.0, 0.0)
    assert select_range(found, method) == (0.0, 0.0)  # type: ignore[arg-type]


TEXT = """<ir_version: 8, opset_import: ["": 17]>
g (float[N,8] x) => (float[N,8] y) {
  a = Relu(x)
  b = Add(a, x)
  c = Log(a)
  y = Mul(b, b)
}"""


def feeds(count: int = 6) -> Feeds:
    rng = np.random.default_rng(5)
    scale = [0.01, 1, 30, 2, 500, 3]
    sizes = [1, 2, 3, 1, 5, 2]
    return Feeds(
        tuple(
            {"x": (scale[i] * rng.standard_normal((sizes[i], 8))).astype(np.float32)}
            for i in range(count)
        ),
        "x",
        True,
    )


def test_collect_sees_every_value_of_every_feed() -> None:
    model = from_text(TEXT)
    before = str(model)
    found = observe.collect(model, ["x", "a", "b", "y"], feeds())
    assert str(model) == before
    everything = np.concatenate([f["x"].ravel() for f in feeds()])
    relu = np.maximum(everything, 0)
    for name, values in {"x": everything, "a": relu, "b": relu + everything}.items():
        got = found[name]
        assert got.minimum == values.min()
        assert got.maximum == values.max()
        assert got.counts.sum() == values.size
        assert got.low <= values.min()
        assert got.high >= values.max()
        edges = np.linspace(got.low, got.high, got.counts.size + 1)
        # Doubling bins keeps them exact up to values that lie on an edge.
        want = np.cumsum(np.histogram(values, edges)[0])
        assert np.abs(np.cumsum(got.counts) - want).max() <= 1 + (values == 0).sum()


def test_collect_leaves_out_what_is_not_finite() -> None:
    assert set(observe.collect(from_text(TEXT), ["a", "c"], feeds())) == {"a"}


def test_collect_gives_the_same_in_small_parts() -> None:
    model = from_text(TEXT)
    whole = observe.collect(model, ["a", "b", "y"], feeds())
    parts = observe.collect(model, ["a", "b", "y"], feeds(), max_bytes=1)
    for name, got in whole.items():
        np.testing.assert_array_equal(got.counts, parts[name].counts)
        assert (got.low, got.high) == (parts[name].low, parts[name].high)


def test_collect_subsamples_large_tensors_but_keeps_the_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(observe, "_SAMPLES", 300_000)
    model = from_text("""<ir_version: 8, opset_import: ["": 17]>
        g (float[N] x) => (float[N] y) { y = Relu(x) }""")
    x = np.random.default_rng(0).standard_normal(1_000_000).astype(np.float32)
    x[12345] = 99
    feed = {"x": x}
    found = observe.collect(model, ["y"], Feeds((feed,) * 3, "x", True))["y"]
    assert found.maximum == 99
    assert found.counts.sum() < 350_000
    share = found.counts[found.centers > 1].sum() / found.counts.sum()
    assert abs(share - (outputs(model, feed)[0] > 1).mean()) < 0.005


def test_nothing_to_collect() -> None:
    assert observe.collect(from_text(TEXT), [], feeds()) == {}
    assert observe.collect(from_text(TEXT), ["a"], Feeds((), "x", True)) == {}
