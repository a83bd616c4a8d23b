"""Where the runtime keeps what it would otherwise do again: compiled kernels and measured times."""

import json
import os
from pathlib import Path

from hf_sparse.atomic import atomic_write_text

__all__ = ["cache_directory", "recall", "remember"]


def cache_directory() -> Path:
    """``$HF_SPARSE_CACHE``, or else ``hf_sparse`` in the user's cache (``$XDG_CACHE_HOME``, ``~/.cache``)."""
    if os.environ.get("HF_SPARSE_CACHE"):
        return Path(os.environ["HF_SPARSE_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "hf_sparse"


def recall(name: str) -> dict:
    """What :func:`remember` put into the JSON file ``name``; empty where there is none, or a damaged one."""
    try:
        content = json.loads((cache_directory() / name).read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError):
        return {}


def remember(name: str, key: str, value) -> None:
    """Adds an entry to the JSON file ``name``. Where it cannot be written (a read-only home) the work is done again."""
    file = cache_directory() / name
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(file, json.dumps(recall(name) | {key: value}, indent=1) + "\n")
    except OSError:
        pass
