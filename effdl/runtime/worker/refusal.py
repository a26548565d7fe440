"""Why a worker cannot do what it was told."""

from __future__ import annotations


class Refusal(Exception):
    """An answer that is no result; ``kind`` as in ``effdl.runtime.worker``."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
