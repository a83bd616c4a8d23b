"""Reading the safetensors files of the formats that are ours: every damage is a ValueError that names the file."""

import json
import os
from pathlib import Path
from typing import Any

import torch

__all__ = ["read_file"]


def read_file(
    path: str | os.PathLike, kind: str, version: int, table: str, device: str = "cpu"
) -> tuple[dict[str, torch.Tensor], dict[str, str], Any]:
    """``(tensors, metadata, table)`` of a file whose metadata says ``format=kind``.

    Args:
        version: the newest version that the caller reads.
        table: the key of the metadata whose JSON is parsed and returned.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, of another format, newer, or its metadata is damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safe_open(path, "pt", device=device) as reader:
            metadata = reader.metadata() or {}
            tensors = {name: reader.get_tensor(name) for name in reader.offset_keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from None
    if metadata.get("format") != kind:
        raise ValueError(f"{path} is no {kind} file: its metadata says format={metadata.get('format')!r}")
    try:
        found, content = int(metadata["version"]), json.loads(metadata[table])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged: its metadata cannot be read: {error!r}") from None
    if found > version:
        raise ValueError(f"{path} is of version {found}, this hf_sparse reads up to {version}: upgrade hf_sparse")
    return tensors, metadata, content
