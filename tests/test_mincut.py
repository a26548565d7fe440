"""The minimum cut against trying every cut."""

from __future__ import annotations

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from effdl.solve.mincut import SINK, SOURCE, Network

POINTS = 5


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, POINTS + 1), st.integers(0, POINTS + 1), st.integers(0, 9)),
        max_size=16,
    )
)
def test_no_cut_is_cheaper(edges: list[tuple[int, int, int]]) -> None:
    network = Network()
    assert [network.point() for _ in range(POINTS)] == list(range(2, POINTS + 2))
    for tail, head, capacity in edges:
        network.edge(tail, head, capacity)

    def price(side: set[int]) -> int:
        return sum(c for a, b, c in edges if a in side and b not in side)

    found = network.source_side()
    assert SOURCE in found
    assert SINK not in found
    sides = [
        {SOURCE} | {p + 2 for p, taken in enumerate(choice) if taken}
        for choice in product((False, True), repeat=POINTS)
    ]
    cheapest = min(map(price, sides))
    assert price(found) == cheapest
    assert all(found <= side for side in sides if price(side) == cheapest)
