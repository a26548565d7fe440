"""The algebra of kernels against a convolution written as its definition."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from effdl.solve.convolve import (
    Kernel,
    beside,
    bias_behind,
    identity,
    in_a_row,
    regrouped,
)


def convolve(x: np.ndarray, kernel: Kernel, bias: np.ndarray | None = None) -> np.ndarray:
    """[channels, *space] -> [outputs, *space], one number at a time."""
    pads = [(0, 0), *zip(kernel.begins, kernel.ends, strict=True)]
    x = np.pad(x, pads)
    geometry = list(zip(x.shape[1:], kernel.window, kernel.strides, kernel.dilations, strict=True))
    sizes = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in geometry]
    outputs, inner = kernel.weight.shape[:2]
    result = np.zeros((outputs, *(max(n, 0) for n in sizes)))
    for at in itertools.product(*map(range, result.shape[1:])):
        window = tuple(
            slice(p * s, p * s + d * (k - 1) + 1, d)
            for p, (_, k, s, d) in zip(at, geometry, strict=True)
        )
        for o in range(outputs):
            g = o // (outputs // kernel.group)
            part = x[(slice(g * inner, (g + 1) * inner), *window)]
            result[(o, *at)] = (part * kernel.weight[o]).sum()
    return result if bias is None else result + bias.reshape(-1, *(1,) * (x.ndim - 1))


def kernel_of(draw: st.DrawFn, inputs: int, outputs: int, group: int, axes: int) -> Kernel:
    numbers = [
        tuple(draw(st.integers(low, high)) for _ in range(axes))
        for low, high in ((1, 3), (1, 2), (1, 2), (0, 2), (0, 2))
    ]
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    weight = rng.standard_normal((outputs, inputs // group, *numbers[0]))
    return Kernel(weight, numbers[1], numbers[2], numbers[3], numbers[4], group)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_two_in_a_row(data: st.DataObject) -> None:
    axes = data.draw(st.integers(1, 2))
    groups = data.draw(st.sampled_from([(1, 1), (2, 2), (4, 2), (2, 4), (1, 4), (4, 1)]))
    first = data.draw(st.composite(kernel_of)(4, 4, groups[0], axes))
    second = data.draw(st.composite(kernel_of)(4, 8, groups[1], axes))
    zeros = (0,) * axes
    second = Kernel(second.weight, second.strides, second.dilations, zeros, zeros, second.group)
    x = np.random.default_rng(1).standard_normal((4, *(15, 13)[:axes]))
    whole = in_a_row(first, second)
    want = convolve(convolve(x, first), second)
    assume(want.size)
    got = convolve(x, whole)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=1e-9)
    bias = np.arange(1.0, 5.0)
    want = convolve(convolve(x, first, bias), second)
    np.testing.assert_allclose(convolve(x, whole, bias_behind(bias, second)), want, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_one_tap_before_a_padded_kernel(data: st.DataObject) -> None:
    second = data.draw(st.composite(kernel_of)(4, 2, data.draw(st.sampled_from([1, 2])), 2))
    ones, zeros = (1, 1), (0, 0)
    weight = np.random.default_rng(0).standard_normal((4, 3, 1, 1))
    first = Kernel(weight, ones, ones, zeros, zeros)
    x = np.random.default_rng(1).standard_normal((3, 7, 8))
    want = convolve(convolve(x, first), second)
    np.testing.assert_allclose(convolve(x, in_a_row(first, second)), want, atol=1e-9)


def test_a_padded_kernel_behind_a_window_is_refused() -> None:
    wide = Kernel(np.ones((1, 1, 3)), (1,), (1,), (1,), (1,))
    with pytest.raises(ValueError, match="pads"):
        in_a_row(wide, wide)


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_side_by_side(data: st.DataObject) -> None:
    axes = data.draw(st.integers(1, 2))
    group = data.draw(st.sampled_from([1, 2]))
    kernels = []
    like = data.draw(st.composite(kernel_of)(4, 4, group, axes))
    for _ in range(data.draw(st.integers(1, 3))):
        other = data.draw(st.composite(kernel_of)(4, 4, group, axes))
        begins = tuple(
            b + d * data.draw(st.integers(-1, 1))
            for b, d in zip(like.begins, like.dilations, strict=True)
        )
        ends = tuple(
            g + d * (k - 1) - b
            for g, d, k, b in zip(like.gains, like.dilations, other.window, begins, strict=True)
        )
        assume(min((*begins, *ends)) >= 0)
        kernels.append(Kernel(other.weight, like.strides, like.dilations, begins, ends, group))
    total = beside([like, *kernels])
    assert total is not None
    x = np.random.default_rng(1).standard_normal((4, *(11, 12)[:axes]))
    want = sum(convolve(x, k) for k in (like, *kernels))
    np.testing.assert_allclose(convolve(x, total), want, atol=1e-9)


def test_kernels_that_do_not_fit_side_by_side() -> None:
    base = Kernel(np.ones((2, 2, 3)), (1,), (1,), (1,), (1,))
    for other in (
        Kernel(np.ones((2, 2, 3)), (2,), (1,), (1,), (1,)),
        Kernel(np.ones((2, 2, 3)), (1,), (2,), (2,), (2,)),
        Kernel(np.ones((2, 2, 3)), (1,), (1,), (1,), (0,)),
        Kernel(np.ones((3, 2, 3)), (1,), (1,), (1,), (1,)),
        Kernel(np.ones((2, 1, 3)), (1,), (1,), (1,), (1,), 2),
    ):
        assert beside([base, other]) is None
    between = Kernel(np.ones((2, 2, 2)), (1,), (2,), (2,), (2,))
    odd = Kernel(np.ones((2, 2, 2)), (1,), (2,), (1,), (3,))
    assert beside([between, odd]) is None


@pytest.mark.parametrize("group", [1, 2, 4])
def test_identity_and_groups(group: int) -> None:
    x = np.random.default_rng(0).standard_normal((4, 5))
    ones, zeros = (1,), (0,)
    np.testing.assert_array_equal(
        convolve(x, Kernel(identity(4, group, 1), ones, ones, zeros, zeros, group)), x
    )
    weight = np.random.default_rng(1).standard_normal((8, 4 // group, 2))
    want = convolve(x, Kernel(weight, ones, ones, zeros, zeros, group))
    for fewer in (1, 2, 4):
        if group % fewer == 0:
            same = Kernel(regrouped(weight, group, fewer), ones, ones, zeros, zeros, fewer)
            np.testing.assert_allclose(convolve(x, same), want)
