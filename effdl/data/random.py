"""Random inputs in a model's real shapes, shown to run before anything is measured on them."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from effdl.data.feeds import Array, Feed, Feeds
from effdl.errors import ModelError
from effdl.graph.dims import (
    ATTEMPTS,
    check_dims,
    dims_of,
    dynamic_dims,
    guess_dims,
    model_inputs,
    selector_values,
)
from effdl.graph.shapes import Shapes, infer
from effdl.graph.walk import is_op
from effdl.graph.weights import scalar
from effdl.runtime.session import Session, open_session
from effdl.runtime.target import Target

_RESHAPING = ("Identity", "Cast", "Unsqueeze", "Squeeze", "Reshape", "Flatten", "Transpose")
_DEFAULT_HIGH = 4
"""Integers that nothing is known about are below this: small counts, classes, modes."""


@dataclass(frozen=True)
class _Input:
    """What the graph says about the numbers an input wants.

    Args:
        value: the graph input.
        high: integers from 0 up to below this; None when nothing says so.
        constant: the one number to use: a mode the graph asks for, or 1 of a mask.
        positive: a logarithm or root is taken of it.
        length: it counts the steps of another input.
    """

    value: ir.Value
    high: int | None = None
    constant: int | None = None
    positive: bool = False
    length: bool = False

    @property
    def guessed(self) -> bool:
        """Whether another choice of numbers is worth trying when the model refuses these."""
        dtype = self.value.dtype
        known = self.high is not None or self.constant is not None
        wide = dtype is not None and dtype.is_integer() and dtype.itemsize > 1
        return wide and not known and not self.length


def random_feeds(
    model: ir.Model,
    *,
    dims: Mapping[str, int] | None = None,
    seed: int = 0,
    count: int = 4,
    target: Target | None = None,
) -> Feeds:
    """Make random inputs that the model runs with.

    Floats are standard normal; integers stay inside the table they index; masks are ones; an input
    that the graph compares with a constant gets that constant. Where dimensions or integers had to
    be guessed, the model is run, and other guesses follow until it does.

    Args:
        model: the model.
        dims: values of dynamic dimensions, by name or as ``input:axis``; others are guessed.
        seed: the same seed, model and dims give the same feeds.
        count: number of feeds.
        target: where guesses are tried; this machine's CPU when None.

    Raises:
        UsageError: ``dims`` names what the model does not have.
        ModelError: the model does not load, runs with none of the guesses, or wants inputs that
            cannot be made up (strings, sequences).
    """
    plans = _plans(model)
    chosen, high = _resolve(model, plans, dims, seed, target)
    feeds = tuple(_feed(plans, chosen, seed, k, high) for k in range(count))
    return Feeds(feeds, "random", False)


def larger_feeds(
    model: ir.Model,
    *,
    dims: Mapping[str, int] | None = None,
    seed: int = 0,
    count: int = 2,
    larger: int = 4,
    target: Target | None = None,
) -> tuple[Feeds, Feeds]:
    """Make the feeds of ``random_feeds``, and others where one dynamic dimension is larger by one.

    Args:
        model, dims, seed, count, target: as in ``random_feeds``.
        larger: how many of the dimensions that ``dims`` leaves open get such a feed.

    Returns:
        The feeds, which the model runs with, and the others, which it may refuse.

    Raises:
        UsageError, ModelError: as in ``random_feeds``.
    """
    plans = _plans(model)
    chosen, high = _resolve(model, plans, dims, seed, target)
    feeds = tuple(_feed(plans, chosen, seed, k, high) for k in range(count))
    free = [n for n in chosen if n not in check_dims(model, dims)][:larger]
    others = tuple(_feed(plans, {**chosen, n: chosen[n] + 1}, seed + 1, 0, high) for n in free)
    return Feeds(feeds, "random", False), Feeds(others, "random", False)


def resolve_dims(
    model: ir.Model, dims: Mapping[str, int] | None = None, *, target: Target | None = None
) -> dict[str, int]:
    """Return the value that ``random_feeds`` uses for every dynamic dimension.

    For a model that does not run at all these are the best guesses, so that it can be inspected.

    Args:
        model: the model.
        dims: values that the caller chose, by name or as ``input:axis``.
        target: where guesses are tried.

    Returns:
        ``{"batch": 1, "input:1": 576}``; empty when every shape is fixed.

    Raises:
        UsageError: ``dims`` names what the model does not have.
    """
    given = check_dims(model, dims)
    best = guess_dims(model, given)
    if all(guess_dims(model, given, k) == best for k in range(1, ATTEMPTS)):
        return best  # no other guess to choose from: a large model need not be opened
    try:
        return _resolve(model, _plans(model), given, 0, target)[0]
    except ModelError:  # running it is somebody else's task: the guess serves to count MACs
        return best


def _resolve(
    model: ir.Model,
    plans: list[_Input],
    dims: Mapping[str, int] | None,
    seed: int,
    target: Target | None,
) -> tuple[dict[str, int], int]:
    """Return dimensions and the bound of unknown integers, proven by a run where guessed."""
    given = check_dims(model, dims)
    best = guess_dims(model, given)
    if set(best) <= set(given) and not any(p.guessed for p in plans):
        return best, _DEFAULT_HIGH
    session = open_session(model, target)
    first: ModelError | None = None
    for chosen, high in _guesses(model, plans, given):
        feed = _feed(plans, chosen, seed, 0, high)
        error = _refusal(session, feed)
        if error is None:
            return chosen, high
        first = first or error
    raise _no_guess(model, given, first)


def _guesses(
    model: ir.Model, plans: list[_Input], given: Mapping[str, int]
) -> Iterator[tuple[dict[str, int], int]]:
    seen = []
    highs = (_DEFAULT_HIGH, 2, 1) if any(p.guessed for p in plans) else (_DEFAULT_HIGH,)
    for high in highs:
        for attempt in range(ATTEMPTS):
            guess = (guess_dims(model, given, attempt), high)
            if guess not in seen:
                seen.append(guess)
                yield guess


def _refusal(session: Session, feed: Feed) -> ModelError | None:
    try:
        session.run(feed)
    except ModelError as e:
        return e
    return None


def _no_guess(model: ir.Model, given: Mapping[str, int], first: ModelError | None) -> ModelError:
    free = {n: places for n, places in dynamic_dims(model).items() if n not in given}
    reason = first.message if first is not None else ""
    if not free:
        names = ", ".join(f"'{v.name}'" for v in model_inputs(model))
        return ModelError(
            f"the model does not run with random numbers in {names}: {reason}",
            hint="give real inputs with --data FILE.npz",
        )
    places = ", ".join(p for found in free.values() for p in found)
    options = " ".join(f"--dim {n}=N" for n in free)
    return ModelError(
        f"no size found that the model runs with for {places}: {reason}",
        hint=f"say which: {options}, or give real inputs with --data FILE.npz",
    )


def _plans(model: ir.Model) -> list[_Input]:
    """Read from the graph what every input wants."""
    shapes = infer(model)
    selectors = selector_values(model)
    return [_plan(value, shapes, selectors) for value in model_inputs(model)]


def _plan(value: ir.Value, shapes: Shapes, selectors: Mapping[str, int]) -> _Input:
    _check_makeable(value)
    name = value.name or ""
    rows = list(_table_rows(value, shapes))
    integer = value.dtype is not None and value.dtype.is_integer()
    if rows:
        return _Input(value, high=min(rows))
    if name in selectors:
        return _Input(value, constant=selectors[name])
    if "mask" in name.lower():
        return _Input(value, constant=1)
    rank = len(value.shape or ())
    if integer and "len" in name.lower() and rank <= 1:
        return _Input(value, length=True)
    return _Input(value, positive=_wants_positive(value))


def _check_makeable(value: ir.Value) -> None:
    hint = "give real inputs with --data FILE.npz"
    if not isinstance(value.type, ir.TensorType) or value.dtype in (None, ir.DataType.STRING):
        kind = "text" if value.dtype == ir.DataType.STRING else "no plain tensor"
        raise ModelError(f"input '{value.name}' is {kind}: it cannot be made up", hint=hint)
    if value.shape is None:
        raise ModelError(f"input '{value.name}' declares no shape: it cannot be made up", hint=hint)
    if value.dtype is not None and value.dtype.numpy().kind not in "fiub":
        raise ModelError(
            f"input '{value.name}' is {value.dtype.name.lower()}, which numpy cannot hold",
            hint=hint,
        )


def _table_rows(value: ir.Value, shapes: Shapes) -> Iterator[int]:
    """Yield the number of entries of each table that ``value`` indexes."""
    for node, index in value.uses():
        if is_op(node, *_RESHAPING) and index == 0:
            if not _to_float(node):
                yield from _table_rows(node.outputs[0], shapes)
            continue
        table: ir.Value | None = None
        axis = 0
        if is_op(node, "Gather", "GatherElements", "ScatterElements") and index == 1:
            table = node.inputs[0]
            attr = node.attributes.get("axis")
            axis = attr.as_int() if attr is not None else 0
        elif is_op(node, "GatherBlockQuantized", domain="com.microsoft") and index == 1:
            table = node.inputs[0]
        elif is_op(node, "EmbedLayerNormalization", domain="com.microsoft") and index in (0, 1):
            table = node.inputs[2 + 2 * index]
        elif is_op(node, "OneHot") and index == 0:
            depth = scalar(node.inputs[1])
            if depth is not None:
                yield int(depth)
        shape = shapes.of(table)
        if shape is not None and -len(shape) <= axis < len(shape):
            rows = shape[axis]
            if isinstance(rows, int) and rows > 0:
                yield rows


def _to_float(node: ir.Node) -> bool:
    if not is_op(node, "Cast"):
        return False
    dtype = ir.DataType(node.attributes["to"].as_int())
    return dtype.is_floating_point()


def _wants_positive(value: ir.Value) -> bool:
    return any(is_op(node, "Sqrt", "Log") for node, _ in value.uses())


def _feed(plans: list[_Input], dims: Mapping[str, int], seed: int, number: int, high: int) -> Feed:
    longest = max(dims.values(), default=1)
    feed: Feed = {}
    for plan in plans:
        name = plan.value.name or ""
        shape = tuple(
            d if isinstance(d, int) else dims[d or f"{name}:{axis}"]
            for axis, d in enumerate(dims_of(plan.value.shape) or ())
        )
        rng = np.random.default_rng([seed, number, zlib.crc32(name.encode())])
        feed[name] = _numbers(plan, shape, rng, high, longest)
    return feed


def _numbers(
    plan: _Input, shape: tuple[int, ...], rng: np.random.Generator, high: int, longest: int
) -> Array:
    assert plan.value.dtype is not None
    dtype = plan.value.dtype.numpy()
    if plan.constant is not None:
        return np.full(shape, plan.constant, dtype)
    if plan.length:
        return np.full(shape, longest, dtype)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(dtype)
    if plan.high is not None:
        top = plan.high if dtype.kind == "f" else min(plan.high, int(np.iinfo(dtype).max) + 1)
        return rng.integers(0, top, shape).astype(dtype)
    if dtype.kind == "f":
        floats = rng.standard_normal(shape)
        return np.asarray(np.abs(floats) + 0.1 if plan.positive else floats, dtype)
    if dtype.itemsize == 1:
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max + 1, shape).astype(dtype)
    return rng.integers(0 if high > 1 else 1, max(high, 2), shape).astype(dtype)
