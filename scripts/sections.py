"""Sections of a generated page that another script writes: they survive when the page is rewritten."""

from __future__ import annotations

import re


def section(page: str, name: str) -> str:
    """Return the section ``name`` of a page with its marks, empty when there is none."""
    found = re.search(_marked(name), page, re.DOTALL)
    return found[0] if found else ""


def with_section(page: str, name: str, body: str) -> str:
    """Return the page with ``body`` as its section ``name``: in the old one's place, or at the end."""
    marked = f"<!-- {name}: begin -->\n{body.strip()}\n<!-- {name}: end -->"
    if section(page, name):
        return re.sub(_marked(name), lambda _: marked, page, flags=re.DOTALL)
    return f"{page.rstrip()}\n\n{marked}\n"


def keeping(new: str, old: str, *names: str) -> str:
    """Return the page ``new`` with the sections ``names`` of the page ``old``."""
    kept = [section(old, name) for name in names]
    return "\n\n".join([new.rstrip(), *(k for k in kept if k)]) + "\n"


def _marked(name: str) -> str:
    return rf"<!-- {re.escape(name)}: begin -->.*?<!-- {re.escape(name)}: end -->"
