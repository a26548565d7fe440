"""What one pass would do to a model, and why not more."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExplainReport:
    """One pass, tried on a copy of a model.

    Args:
        name: the pass; ``options`` those that were given.
        path: the model; ``simplified`` whether it was cleaned up before, as recipes do.
        changes: how many changes the pass would make.
        touched: the nodes that would change, with what would be done to each.
        skipped: the nodes that were candidates, with the first condition that did not hold.
        reason: why nothing would change, empty when something would.
    """

    name: str
    options: dict[str, object]
    path: str
    simplified: bool
    changes: int
    touched: tuple[tuple[str, str], ...]
    skipped: tuple[tuple[str, str], ...]
    reason: str
