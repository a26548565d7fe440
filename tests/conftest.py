"""Fixtures of all tests."""

import sys

import pytest

from effdl.cli.app import main
from tests.support import Effdl, Result


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees, or leaves, statistics in the user's cache."""
    monkeypatch.setenv("EFFDL_CACHE_MB", "0")


@pytest.fixture
def effdl(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Effdl:
    """The command line: ``effdl("bench", path)`` returns exit code and what was printed."""

    def run(*args: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["effdl", *map(str, args)])
        code = 0
        try:
            main()
        except SystemExit as e:
            code = int(e.code or 0)
        return Result(code, *capfd.readouterr())

    return run
