"""Reshape and Flatten in another order of axes.

A Reshape splits into blocks: the fewest axes before and after it that hold the same elements. Axes
of size 1 belong to no block. Whole blocks can change places before or after the Reshape alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from effdl.graph.dims import Dims
from effdl.graph.transposes import Ask, Declined, Perm, Plan
from effdl.graph.transposes_axes import put_input, put_int
from effdl.graph.walk import int_attr


@dataclass(frozen=True)
class Size:
    """The number of elements along some axes: ``number`` times the sizes of unknown ``axes``.

    Args:
        number: what is known of it.
        axes: axes of the input whose sizes are not known, in order.
    """

    number: int = 1
    axes: tuple[int, ...] = ()

    def times(self, other: Size) -> Size:
        """Return the product."""
        return Size(self.number * other.number, tuple(sorted(self.axes + other.axes)))

    def over(self, other: Size) -> Size:
        """Return the quotient; decline where it is not a whole product."""
        rest = Counter(self.axes)
        rest.subtract(other.axes)
        if any(n < 0 for n in rest.values()) or not other.number or self.number % other.number:
            raise Declined("its sizes do not show which axes it splits or merges")
        return Size(self.number // other.number, tuple(sorted(rest.elements())))


ONE = Size()


def product(sizes: Sequence[Size]) -> Size:
    """Return the product of ``sizes``."""
    total = ONE
    for size in sizes:
        total = total.times(size)
    return total


def reshape(ask: Ask) -> Plan:
    """Reshape to a constant goal, whole blocks of axes at a time."""
    ask.on_data()
    if ask.opset < 5:
        raise Declined("before opset 5 its goal is an attribute")
    before = _sizes(ask.dims(0))
    goal = ask.array(1, "goals")
    after = _goal(goal, before, bool(int_attr(ask.node, "allowzero", 0)))
    blocks = find_blocks(before, after)
    if ask.output:
        out = ask.perm
        perm = _carry(out, [b for _, b in blocks], [a for a, _ in blocks], len(before))
    else:
        perm = ask.perm
        out = _carry(perm, [a for a, _ in blocks], [b for _, b in blocks], len(after))
    wanted = _emit([after[a] for a in out], perm, -1 in goal)
    if np.array_equal(wanted, goal):
        return Plan((perm, None), (out,))
    edit = put_input(1, np.array(wanted, np.int64))
    return Plan((perm, None), (out,), edit)


def flatten(ask: Ask) -> Plan:
    """Flatten, where only axes of size 1 move."""
    ask.on_data()
    if ask.output:
        raise Declined("both its axes are made of several")
    dims = ask.dims(0)
    rank = len(dims)
    axis = int_attr(ask.node, "axis", 1)
    axis = axis + rank if axis < 0 else axis
    real = [a for a in ask.perm if dims[a] != 1]
    left = [a for a in range(axis) if dims[a] != 1]
    if real != sorted(real):
        raise Declined("its axes would hold their elements in another order")
    for goal in sorted(range(rank + 1), key=lambda g: abs(g - axis)):
        if [a for a in ask.perm[:goal] if dims[a] != 1] == left:
            return Plan((ask.perm,), (None,), None if goal == axis else put_int("axis", goal))
    raise AssertionError("axes in order split somewhere")


def _sizes(dims: Dims) -> list[Size]:
    if 0 in dims:
        raise Declined("its tensor is empty")
    return [Size(d) if isinstance(d, int) else Size(1, (a,)) for a, d in enumerate(dims)]


def _goal(goal: npt.NDArray[np.generic], before: list[Size], allowzero: bool) -> list[Size]:
    """The sizes after a Reshape: 0 copies the axis at its place, -1 is what is left."""
    numbers = [int(g) for g in goal.ravel()]
    if 0 in numbers and allowzero:
        raise Declined("its goal is empty")
    if any(n == 0 and i >= len(before) for i, n in enumerate(numbers)):
        raise Declined("its goal copies an axis that is not there")
    known = [before[i] if n == 0 else Size(n) for i, n in enumerate(numbers) if n != -1]
    rest = product(before).over(product(known))
    if -1 not in numbers and rest != ONE:
        raise Declined("its sizes do not show which axes it splits or merges")
    return [rest if n == -1 else before[i] if n == 0 else Size(n) for i, n in enumerate(numbers)]


def find_blocks(
    before: Sequence[Size], after: Sequence[Size]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return pairs of axes before and after that hold the same elements, as small as they get."""
    left = [a for a, size in enumerate(before) if size != ONE]
    right = [a for a, size in enumerate(after) if size != ONE]
    blocks = []
    i = j = 0
    while i < len(left) or j < len(right):
        first, second = (i, j)
        i, j = min(i + 1, len(left)), min(j + 1, len(right))
        while True:
            a = product([before[k] for k in left[first:i]])
            b = product([after[k] for k in right[second:j]])
            if a == b:
                break
            grow_left, grow_right = _behind(a, b), _behind(b, a)
            if not (grow_left and i < len(left)) and not (grow_right and j < len(right)):
                raise Declined("its sizes do not show which axes it splits or merges")
            i += int(grow_left and i < len(left))
            j += int(grow_right and j < len(right))
        blocks.append((tuple(left[first:i]), tuple(right[second:j])))
    return blocks


def _behind(a: Size, b: Size) -> bool:
    """Whether ``a`` has to grow to become ``b``."""
    missing = Counter(b.axes) - Counter(a.axes)
    return bool(missing) or (not Counter(a.axes) - Counter(b.axes) and a.number < b.number)


def _carry(
    perm: Perm, mine: Sequence[tuple[int, ...]], theirs: Sequence[tuple[int, ...]], rank: int
) -> Perm:
    """The order on the other side of a Reshape; axes of size 1 stay at their places there."""
    in_block = {a: i for i, block in enumerate(mine) for a in block}
    real = [a for a in perm if a in in_block]
    order = list(dict.fromkeys(in_block[a] for a in real))
    if [a for i in order for a in mine[i]] != real:
        raise Declined("it splits or merges axes that would be torn apart")
    rest = iter([a for i in order for a in theirs[i]])
    inside = {a for block in theirs for a in block}
    return tuple(next(rest) if a in inside else a for a in range(rank))


def _emit(after: Sequence[Size], perm: Perm, had_rest: bool) -> list[int]:
    """The goal that says ``after``, for an input in the order ``perm``."""
    goal = []
    for at, size in enumerate(after):
        if not size.axes:
            goal.append(size.number)
        elif at < len(perm) and size == Size(1, (perm[at],)):
            goal.append(0)
        else:
            goal.append(-1)
    if goal.count(-1) > 1:
        raise Declined("its goal would have two unknown sizes")
    if -1 in goal and 0 in goal and not had_rest:
        raise Declined("its goal would fail on an empty tensor")
    return goal


def is_view(dims: Dims, perm: Perm) -> bool:
    """Whether ``perm`` only moves axes of size 1, so that the elements stay in order."""
    real = [a for a in perm if dims[a] != 1]
    return real == sorted(real)
