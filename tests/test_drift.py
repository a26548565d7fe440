"""What a layer reads in two versions of a model."""

import numpy as np

from effdl.data.feeds import Feeds
from effdl.observe.drift import drift
from effdl.observe.rows import Rows
from tests.weighted import normal, weighted

TEXT = """<ir_version: 8, opset_import: ["": 17]>
    g (float[N,6] x, float[6,5] A, float[5,3] B) => (float[N,3] y) { h = MatMul(x, A)  y = MatMul(h, B) }"""


def test_joint_moments() -> None:
    a, b = normal(6, 5), normal(5, 3)
    changed = a + 0.3 * normal(6, 5, seed=1)
    before, after = weighted(TEXT, A=a, B=b), weighted(TEXT, A=changed, B=b)
    x = normal(400, 6, seed=2) + 3
    feeds = Feeds(tuple({"x": x[k : k + 2]} for k in range(0, 400, 2)), "test", True)
    found = drift(before, after, Rows("h", 5), feeds)
    assert found is not None
    old, new = x @ a, x @ changed
    np.testing.assert_allclose(found.mean[0], old.mean(0), rtol=1e-4)
    np.testing.assert_allclose(found.moved[0], new.mean(0), rtol=1e-4)
    want = np.cov(old.T, new.T, bias=True)
    np.testing.assert_allclose(found.covariance[0], want[5:, 5:], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.cross[0], want[:5, 5:], rtol=1e-3, atol=1e-4)


def test_inputs_that_are_not_finite() -> None:
    a, b = normal(6, 5), normal(5, 3)
    model = weighted(TEXT, A=a, B=b)
    feeds = Feeds(({"x": np.full((2, 6), np.inf, np.float32)},), "test", True)
    assert drift(model, model, Rows("h", 5), feeds) is None
