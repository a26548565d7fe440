"""How few bits a sequence of symbols can take: the order-0 entropy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def entropy_bits(counts: npt.NDArray[Any]) -> float:
    """Return the bits that symbols with these counts need in all, coded one by one without error.

    No code that treats symbols as independent takes fewer (Shannon, 1948); an arithmetic coder comes
    within a percent.

    Args:
        counts: of each symbol, any shape, not negative.
    """
    seen = np.asarray(counts, np.float64).ravel()
    seen = seen[seen > 0]
    return float(seen @ np.log2(seen.sum() / seen)) if len(seen) else 0.0


def code_lengths(counts: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the bits of each symbol along the last axis under an ideal code for these counts.

    A symbol that was not seen is taken as seen once.
    """
    seen = np.maximum(np.asarray(counts, np.float64), 1.0)
    lengths: npt.NDArray[np.float64] = np.log2(seen.sum(-1, keepdims=True) / seen)
    return lengths
