"""Charts as inline SVG, drawn by hand: rows of bars and dots under their labels.

Horizontal places are per cent of the width and vertical ones pixels, without a ``viewBox``: a chart takes
the width it is given, and its letters stay as large as the text around it, on a phone as on a desk.
Colours come from the classes, see ``page.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from effdl.render.markup import Markup, join, tag

_LABEL = 14
"""From the top of a row to the base line of its label."""
_BAR = 21
"""From the top of a row to the top of its bar."""
_THICK = 9
_ROW = 42
_QUIET_ROW = 24
_AXIS = 22
_LONGEST = 34


@dataclass(frozen=True)
class Row:
    """One line of a chart.

    Args:
        label: on the left; ``value`` on the right, ``detail`` after it where there is room.
        amount: length of the bar, None for a row without one.
        low, high: ends of the interval around ``amount``.
        mark: a line across the row, such as the level before.
        inner: length of a second bar inside the first.
        kind: ``plain``, ``kept`` or ``dropped``.
    """

    label: str
    value: str = ""
    detail: str = ""
    amount: float | None = None
    low: float | None = None
    high: float | None = None
    mark: float | None = None
    inner: float | None = None
    kind: str = "kept"


@dataclass(frozen=True)
class Pair:
    """A quantity before and after, one bar each."""

    label: str
    value: str
    detail: str
    before: float
    after: float


@dataclass(frozen=True)
class Dot:
    """A place on a logarithmic axis.

    Args:
        label, value, detail, kind: as in ``Row``.
        step: filled dot; ``total`` ring. None for none, 0 stands at the left end.
    """

    label: str
    value: str = ""
    detail: str = ""
    step: float | None = None
    total: float | None = None
    kind: str = "kept"


def bars(
    name: str, title: str, about: str, rows: Sequence[Row], unit: Callable[[float], str]
) -> Markup:
    """Return a chart of horizontal bars that start at 0, with intervals where rows have them.

    Args:
        name: unique in the document, for the references inside the chart.
        title, about: what it shows, for readers who hear it.
        rows: from top to bottom.
        unit: writes a value of the axis.
    """
    ends = [
        v for r in rows for v in (r.amount, r.high, r.mark) if v is not None and math.isfinite(v)
    ]
    axis = _Linear(max(ends, default=1.0))
    body, y = [], 0
    for row in rows:
        body.append(_labels(row.label, row.value, row.detail, row.kind, y))
        if row.amount is not None:
            body.append(_bar(row, axis, y))
        y += _ROW if row.amount is not None else _QUIET_ROW
    ticks = [(axis.at(t), unit(t)) for t in axis.ticks]
    return _chart(name, title, about, body, ticks, y)


def _bar(row: Row, axis: _Linear, y: int) -> Markup:
    assert row.amount is not None
    top, middle = y + _BAR, y + _BAR + _THICK / 2
    parts = [_rect(0, axis.at(row.amount), top, _THICK, f"bar {row.kind}")]
    if row.inner is not None:
        parts.append(_rect(0, axis.at(row.inner), top, _THICK, "bar inner"))
    if row.mark is not None:
        parts.append(_line(axis.at(row.mark), axis.at(row.mark), top - 4, top + _THICK + 4, "mark"))
    if row.low is not None and row.high is not None:
        low, high = axis.at(row.low), axis.at(row.high)
        parts += [_line(low, high, middle, middle, style) for style in ("halo", "interval")]
        parts += [_line(x, x, middle - 4, middle + 4, "interval") for x in (low, high)]
    return join(parts)


def pairs(
    name: str, title: str, about: str, rows: Sequence[Pair], unit: Callable[[float], str]
) -> Markup:
    """Return a chart with two bars in each row, before and after; arguments as in ``bars``."""
    axis = _Linear(max((max(r.before, r.after) for r in rows), default=1.0))
    body = []
    for k, row in enumerate(rows):
        y = k * _ROW
        body += [
            _labels(row.label, row.value, row.detail, "kept", y),
            _rect(0, axis.at(row.before), y + _BAR - 1, 6, "bar plain"),
            _rect(0, axis.at(row.after), y + _BAR + 6, 6, "bar kept"),
        ]
    ticks = [(axis.at(t), unit(t)) for t in axis.ticks]
    return _chart(name, title, about, body, ticks, len(rows) * _ROW)


def dots(
    name: str,
    title: str,
    about: str,
    rows: Sequence[Dot],
    limit: float | None = None,
    limit_text: str = "",
) -> Markup:
    """Return a chart of dots on a logarithmic axis.

    Args:
        name, title, about: as in ``bars``.
        rows: from top to bottom; 0 is drawn at the left end.
        limit: a line that should not be crossed; ``limit_text`` what it is.
    """
    found = [v for r in rows for v in (r.step, r.total, limit) if v and math.isfinite(v)]
    axis = _Log(min(found, default=1e-3), max(found, default=1e-1))
    top = _QUIET_ROW if limit is not None else 0
    body, y = [], top
    for row in rows:
        body.append(_labels(row.label, row.value, row.detail, row.kind, y))
        drawn = row.step is not None or row.total is not None
        if drawn:
            middle = y + _BAR + 4
            body.append(_line(0, 100, middle, middle, "track"))
            for value, style in ((row.total, "ring"), (row.step, f"dot {row.kind}")):
                if value is not None and math.isfinite(value):
                    body.append(tag("circle", cx=_x(axis.at(value)), cy=middle, r=5, class_=style))
        y += _ROW - 4 if drawn else _QUIET_ROW
    if limit is not None:
        at = axis.at(limit)
        body.insert(0, _line(at, at, top - 6, y, "limit"))
        anchor = "end" if at > 50 else "start"
        body.append(_text(limit_text, at, _LABEL - 2, "limit-text", anchor))
    ticks = [(axis.at(t), _power(t)) for t in axis.ticks]
    return _chart(name, title, about, body, ticks, y)


class _Linear:
    """An axis from 0 with round ticks."""

    def __init__(self, largest: float) -> None:
        largest = largest if largest > 0 and math.isfinite(largest) else 1.0
        rough = largest / 4
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
        self.end = largest * 1.01
        self.ticks = [step * k for k in range(int(self.end / step) + 1)]

    def at(self, value: float) -> float:
        """Return the place of ``value`` in per cent."""
        return 100 * min(max(value / self.end, 0.0), 1.0)


class _Log:
    """An axis of whole powers of ten around what is shown; 0 is at the left end."""

    def __init__(self, smallest: float, largest: float) -> None:
        self.low = math.floor(math.log10(smallest)) - 1
        self.high = max(math.ceil(math.log10(largest) + 0.05), self.low + 2)
        every = max(1, math.ceil((self.high - self.low) / 6))
        self.ticks = [10.0**k for k in range(self.high, self.low, -every)]

    def at(self, value: float) -> float:
        """Return the place of ``value`` in per cent, with room for a dot at both ends."""
        if value <= 0:
            return 2.0
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return 2 + 96 * min(max(share, 0.0), 1.0)


def _chart(
    name: str,
    title: str,
    about: str,
    body: Sequence[Markup],
    ticks: Sequence[tuple[float, str]],
    height: int,
) -> Markup:
    grid = [_line(x, x, 0, height, "grid") for x, _ in ticks]
    axis = [
        _text(t, x, height + 16, "tick", "start" if x < 4 else "end" if x > 96 else "middle")
        for x, t in ticks
    ]
    return tag(
        "svg",
        tag("title", title, id=f"{name}-title"),
        tag("desc", about, id=f"{name}-about"),
        *grid,
        *body,
        *axis,
        role="img",
        aria_labelledby=f"{name}-title {name}-about",
        width="100%",
        height=height + _AXIS,
        class_="chart",
    )


def _labels(label: str, value: str, detail: str, kind: str, y: int) -> Markup:
    shown = label if len(label) <= _LONGEST else label[: _LONGEST - 1] + "…"
    figures: list[object] = [tag("tspan", value)]
    if detail:
        figures.append(tag("tspan", f" {detail}", class_="detail"))
    return join(
        (
            _text(shown, 0, y + _LABEL, f"label {kind}", "start"),
            tag("text", *figures, x="100%", y=y + _LABEL, text_anchor="end", class_="value"),
        )
    )


def _rect(left: float, right: float, y: float, height: float, style: str) -> Markup:
    width = max(right - left, 0.0)
    return tag("rect", x=_x(left), y=y, width=_x(width), height=height, rx=1, class_=style)


def _line(left: float, right: float, top: float, bottom: float, style: str) -> Markup:
    return tag("line", x1=_x(left), x2=_x(right), y1=top, y2=bottom, class_=style)


def _text(words: str, x: float, y: float, style: str, anchor: str) -> Markup:
    return tag("text", words, x=_x(x), y=y, text_anchor=anchor, class_=style)


def _x(place: float) -> str:
    return f"{place:.2f}%"


def _power(value: float) -> str:
    """``10⁻³``."""
    digits = str(round(math.log10(value))).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{digits}"
