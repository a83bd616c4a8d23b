"""Directories and files that appear whole or not at all."""

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from hf_sparse.atomic import atomic_directory, atomic_write_text, require_free_space


def listing(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_new_directory(tmp_path):
    with atomic_directory(tmp_path / "a" / "out") as staging:
        (staging / "x").write_text("1")
        assert not (tmp_path / "a" / "out").exists()
    assert listing(tmp_path) == ["a", "a/out", "a/out/x"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_nothing(tmp_path, error):
    with pytest.raises(error), atomic_directory(tmp_path / "out") as staging:
        (staging / "x").write_text("half")
        raise error
    assert listing(tmp_path) == []


def test_existing_directories(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with atomic_directory(out) as staging:  # an empty one is no obstacle
        (staging / "x").write_text("1")
    with pytest.raises(FileExistsError, match="not empty"), atomic_directory(out):
        pass
    with pytest.raises(RuntimeError), atomic_directory(out, overwrite=True) as staging:
        (staging / "y").write_text("2")
        raise RuntimeError
    assert listing(tmp_path) == ["out", "out/x"]
    with atomic_directory(out, overwrite=True) as staging:
        (staging / "y").write_text("2")
    assert listing(tmp_path) == ["out", "out/y"]
    with pytest.raises(FileExistsError, match="not a directory"), atomic_directory(out / "y"):
        pass


def test_a_failing_rename_restores_the_old_directory(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "x").write_text("1")
    original = Path.rename

    def failing(self, target):
        if ".tmp-" in self.name:
            raise OSError(errno.EIO, "rename failed")
        return original(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="rename failed"), atomic_directory(out, overwrite=True) as staging:
        (staging / "y").write_text("2")
    monkeypatch.undo()
    assert listing(tmp_path) == ["out", "out/x"]


def test_a_link_keeps_pointing(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_directory(tmp_path / "link") as staging:
        (staging / "x").write_text("1")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "x").read_text() == "1"


def test_write_text(tmp_path, monkeypatch):
    atomic_write_text(tmp_path / "a.json", "é\n")
    assert (tmp_path / "a.json").read_bytes() == "é\n".encode()
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        atomic_write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == "é\n" and listing(tmp_path) == ["a.json"]


def test_free_space(tmp_path, monkeypatch):
    require_free_space(tmp_path / "not" / "yet" / "there", 1)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 5_000_000))
    with pytest.raises(OSError, match=r"not enough disk space: 1\.00 GB are needed, 0\.01 GB are free") as caught:
        require_free_space(tmp_path, 1_000_000_000)
    assert caught.value.errno == errno.ENOSPC
