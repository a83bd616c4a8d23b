"""Files and directories that appear whole or not at all.

A model directory is written under a temporary name beside its place and renamed into it, so that an error, a full disk
or Ctrl-C leaves nothing half-written and whatever was there before untouched. (A process killed outright leaves the
temporary sibling, ``.NAME.tmp-…``, which can be deleted.) Both lie in one directory, hence on one file system, where a
rename is a single step.

    with atomic_directory("out") as staging:
        model.save_pretrained(staging)
"""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_directory", "atomic_write_text", "require_free_space"]


@contextmanager
def atomic_directory(path: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """A new empty directory beside ``path`` that becomes ``path`` when the block ends without an error.

    An existing empty directory is used; a non-empty one is replaced with ``overwrite=True``, after the block is done.

    Raises:
        FileExistsError: ``path`` is a non-empty directory (without ``overwrite``) or not a directory.
    """
    path = Path(os.path.abspath(path))
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} exists and is not a directory")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise FileExistsError(f"{path} is not empty; pass overwrite=True to replace it, or choose another directory")
    if path.is_symlink():
        path = path.resolve()  # replace what the link points to, keep the link
    path.parent.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex[:8]
    staging = path.parent / f".{path.name}.tmp-{token}"
    staging.mkdir()
    try:
        yield staging
        _move_into_place(staging, path, path.parent / f".{path.name}.old-{token}")
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _move_into_place(staging: Path, path: Path, old: Path) -> None:
    if not path.exists():
        staging.rename(path)
        return
    path.rename(old)
    try:
        staging.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def atomic_write_text(path: str | os.PathLike, text: str) -> None:
    """Write a UTF-8 text file in one step: readers see the old content or the new, never a part."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def require_free_space(path: str | os.PathLike, nbytes: int) -> None:
    """Check that the file system of ``path`` (which need not exist yet) has ``nbytes`` free.

    Raises:
        OSError: (ENOSPC) it has not; the message says how much is missing.
    """
    place = Path(os.path.abspath(path))
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < nbytes:
        raise OSError(
            errno.ENOSPC,
            f"not enough disk space: {nbytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free at {place}",
        )
