"""Where the runtime keeps what it would otherwise do again: compiled kernels and measured times."""

import os
from pathlib import Path

__all__ = ["cache_directory"]


def cache_directory() -> Path:
    """``$HF_SPARSE_CACHE``, or else ``hf_sparse`` in the user's cache (``$XDG_CACHE_HOME``, ``~/.cache``)."""
    if os.environ.get("HF_SPARSE_CACHE"):
        return Path(os.environ["HF_SPARSE_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "hf_sparse"
