"""Facts that are kept in the user's cache folder."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

from effdl.runtime.cache import Cache, user_cache


def test_the_cache_keeps_forgets_and_never_shares(tmp_path: Path) -> None:
    cache = Cache("a", 1, tmp_path)
    cache.put({"k": 1}, {"x": 2.5})
    assert cache.get({"k": 1}, 100) == {"x": 2.5}
    assert cache.get({"k": 2}, 100) is None
    assert cache.get({"k": 1}, -1) is None
    assert Cache("b", 1, tmp_path).get({"k": 1}, 100) is None
    assert Cache("a", 2, tmp_path).get({"k": 1}, 100) is None
    (file,) = tmp_path.iterdir()
    content = json.loads(file.read_text())
    file.write_text(
        json.dumps({**content, "time": time.time() + 1000})
    )  # a clock that was set back
    assert cache.get({"k": 1}, 100) is None


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_where_nothing_can_be_written_nothing_is_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache("a", 1, tmp_path / "file" / "below")
    cache.put({"k": 1}, {"x": 1})
    assert cache.get({"k": 1}, 100) is None


def test_a_write_that_fails_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    Cache("a", 1, tmp_path).put({"k": 1}, {"x": 1})
    assert list(tmp_path.iterdir()) == []


def test_the_folder_follows_the_systems_convention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/u"))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x/cache")
    assert user_cache() == Path("/x/cache/effdl")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification says to ignore it
    assert user_cache() == Path("/home/u/.cache/effdl")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert user_cache() == Path("/home/u/.cache/effdl")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert user_cache() == Path("/home/u/Library/Caches/effdl")

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert user_cache() is None
    Cache("a", 1).put({"k": 1}, {"x": 1})
    assert Cache("a", 1).get({"k": 1}, 100) is None
