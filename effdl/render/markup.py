"""Elements of HTML and SVG as text, with everything escaped that is not markup already."""

from __future__ import annotations

import html
import re

_UNSEEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
_VOID = frozenset({"meta", "br", "hr"})


class Markup(str):
    """Text that is markup; any other text is escaped on its way into an element."""

    __slots__ = ()


def text(value: object) -> Markup:
    """Return ``value`` as it can stand in markup.

    Characters that no XML may hold, and those that turn the direction of what follows, become U+FFFD.
    """
    if isinstance(value, Markup):
        return value
    return Markup(html.escape(_UNSEEN.sub("\ufffd", str(value)), quote=True))


def join(parts: object, between: str = "") -> Markup:
    """Return the parts (an iterable) one after the other."""
    return Markup(between.join(text(p) for p in parts))  # type: ignore[attr-defined]


def tag(element: str, *children: object, **attributes: object) -> Markup:
    """Return an element.

    Args:
        element: its name.
        children: elements, or texts, which are escaped.
        attributes: by name; an underscore stands for a hyphen, one at the end for nothing (``class_``).
            None leaves the attribute out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if element in _VOID:
        return Markup(f"<{element}{written}>")
    return Markup(f"<{element}{written}>{join(children)}</{element}>")
