from __future__ import annotations

import os
from pathlib import Path

import pytest

from xloom.storage.folder_cache import FolderCache

KEY = "k" * 8


def cache_in(folder: Path) -> FolderCache:
    return FolderCache(folder, lambda path: (path / "whole").is_file())


def test_a_folder_is_found_once_it_is_made_whole(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    with cache.make(KEY) as folder:
        (folder / "half").write_text("")
    assert cache.find(KEY) is None
    with cache.make(KEY) as folder:
        (folder / "whole").write_text("")
        assert not cache.path(KEY).joinpath("whole").exists()
    assert cache.find(KEY) == tmp_path / KEY
    assert [path.name for path in tmp_path.iterdir()] == [KEY]


def test_what_was_there_stays_when_making_fails(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    with cache.make(KEY) as folder:
        (folder / "whole").write_text("first")
    with pytest.raises(FileNotFoundError), cache.make(KEY) as folder:
        (folder / "lacking" / "file").write_text("second")
    assert (tmp_path / KEY / "whole").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == [KEY]


def test_a_lock_is_held_by_one_or_shared_by_many(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    first, second = (cache.try_lock(KEY, "use", shared=True) for _ in range(2))
    assert first is not None
    assert second is not None
    assert cache.try_lock(KEY, "use") is None
    os.close(first)
    os.close(second)
    alone = cache.try_lock(KEY, "use")
    assert alone is not None
    assert cache.try_lock(KEY, "use", shared=True) is None
    cache.remove(KEY, ("use",))
    fresh = cache.try_lock(KEY, "use")  # of a new file: the removed one's lock binds nobody
    assert fresh is not None
    os.close(alone)
    os.close(fresh)
