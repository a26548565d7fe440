"""Groups of channels, one structure at a time, and removal against masking."""

from __future__ import annotations

import numpy as np
import pytest

from effdl.graph import io
from effdl.graph.channels import channels, remove
from effdl.graph.weights import constant
from tests.channel_graphs import GRAPHS, IMAGE, build, conv, node
from tests.channel_lab import both, check, differs, some
from tests.support import SAMPLES, feed_for, from_text

SIZES = {
    "residual": [6],
    "concat": [4, 5],
    "split": [5],
    "split_into_equal_parts": [5, 5],
    "slice": [1, 2, 2, 5],
    "shuffle_by_gather": [6],
    "flatten": [6, 9],
    "reshape_with_numbers": [6],
    "depthwise": [6],
    "narrow_groups": [4],
    "wide_groups": [4, 12],
    "conv_transpose": [5, 6],
    "squeeze_excite": [4, 8],
    "depth_to_space": [2, 3, 3],
    "resize_by_sizes": [6],
    "lstm": [6],
    "gru_after_conv": [4, 6],
    "heads": [4],
    "one_matrix_for_three": [4],
    "grouped_queries": [3],
    "packed_attention": [4],
    "multi_head_attention": [4],
    "standard_attention": [3],
}
"""The groups of each graph that can lose channels, by how many they have."""


@pytest.mark.parametrize("name", GRAPHS)
def test_removed_is_masked(name: str) -> None:
    model = GRAPHS[name].clone()
    found = check(model, feed_for(model, N=2, S=5))
    assert sorted(len(g) for g in found.free) == SIZES[name]


def test_removal_takes_numbers_out_of_weights() -> None:
    model = GRAPHS["residual"].clone()
    found = channels(model)
    (group,) = found.free
    assert {n.name for n in group.makers} == {"w0", "w1"}
    assert {n.name for n in group.readers} == {"w1", "w2"}
    old = constant(model.graph.initializers["w1"])
    remove(model, found, [int(group.units[2])])
    new = constant(model.graph.initializers["w1"])
    assert old is not None
    assert new is not None
    kept = [0, 1, 3, 4, 5]
    np.testing.assert_array_equal(new, old[np.ix_(kept, kept)])


STOPPED = {
    "output": ([conv("x", "w0", "y")], {"w0": (6, 3, 3, 3)}, "the model's output y"),
    "softmax": (
        [conv("x", "w0", "a"), node("Softmax", "a", "b", "soft", axis=1), conv("b", "w1", "y")],
        {"w0": (6, 3, 3, 3), "w1": (2, 6, 3, 3)},
        "it mixes the numbers along it (Softmax soft)",
    ),
    "unknown": (
        [conv("x", "w0", "a"), node("LRN", "a", "b", "lrn", size=3), conv("b", "w1", "y")],
        {"w0": (6, 3, 3, 3), "w1": (2, 6, 3, 3)},
        "LRN is not understood",
    ),
    "mean": (
        [
            conv("x", "w0", "a"),
            node("ReduceMean", "a", "m", "mean", axes=[1]),
            node("Sub", "a m", "b"),
            conv("b", "w1", "y"),
        ],
        {"w0": (6, 3, 3, 3), "w1": (2, 6, 3, 3)},
        "it sums over it (ReduceMean mean)",
    ),
}


@pytest.mark.parametrize("name", STOPPED)
def test_what_stops_a_group_is_told(name: str) -> None:
    nodes, weights, reason = STOPPED[name]
    found = channels(build(nodes, weights, IMAGE))
    group = next(g for g in found.groups if g.name == "w0")
    assert group.reason == reason
    with pytest.raises(ValueError, match="cannot be removed"):
        remove(build(nodes, weights, IMAGE), found, [int(group.units[0])])


def test_a_group_is_not_emptied() -> None:
    model = GRAPHS["residual"].clone()
    found = channels(model)
    before = io.to_bytes(model)
    with pytest.raises(ValueError, match="all of its channels"):
        remove(model, found, found.free[0].units.tolist())
    assert io.to_bytes(model) == before


def test_values_read_inside_a_branch_stay() -> None:
    model = from_text(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[N,8] x, bool c) => (float[N,2] y)
        <float[8,6] w, float[6,2] v>
        { h = MatMul(x, w)
          y = If(c) <then_branch = t () => (float[N,2] r) { r = MatMul(h, v) },
                     else_branch = e () => (float[N,2] r) { k = Relu(h) r = MatMul(k, v) }> }""".replace(
            "float[8,6] w", "float[8,6] w = {" + ",".join(["0.5"] * 48) + "}"
        ).replace("float[6,2] v", "float[6,2] v = {" + ",".join(["0.5"] * 12) + "}")
    )
    (group,) = channels(model).groups
    assert group.reason == "read inside a branch or loop"


@pytest.mark.parametrize("name", ["digits_cnn", "digits_mlp", "digits_transformer"])
def test_sample_models(name: str) -> None:
    model = io.load(SAMPLES / f"{name}.onnx")
    found = check(model, feed_for(model, batch=2))
    assert len(found.free) >= 3


def test_a_second_removal_starts_from_the_first() -> None:
    model = io.load(SAMPLES / "digits_cnn.onnx")
    feed = feed_for(model, batch=2)
    rng = np.random.default_rng(1)
    for _ in range(2):
        found = channels(model)
        units = [u for g in found.free for u in some(g, rng, 0.3)]
        masked, smaller = both(model, units)
        assert differs(masked, smaller, feed) < 1e-5
        model = smaller
