"""Write a safetensors file one tensor at a time.

``safetensors.torch.save_file`` wants every tensor of a file in memory, and transformers 5 writes shards of up to 50 GB.
The format makes streaming easy once all sizes are known: 8 bytes of header length, a JSON header padded to a multiple
of 8, then the tensors back to back. Reading is left to ``safetensors.safe_open``.
"""

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Entry", "write_safetensors"]


@dataclass(frozen=True)
class Entry:
    """One tensor to write: its safetensors dtype code (``"BF16"``), shape and size, and how to get it when its turn
    comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    tensor: Callable[[], torch.Tensor]


def write_safetensors(path: str | os.PathLike, entries: list[Entry], metadata: dict[str, str] | None) -> None:
    """Write ``entries`` in the given order; one tensor is in memory at a time.

    Raises:
        ValueError: a tensor turns out to have another size than its entry says.
        OSError: the disk is full; what was written stays, so write inside ``atomic_directory``.
    """
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for entry in entries:
            data = entry.tensor().detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            if data.nbytes != entry.nbytes:
                raise ValueError(f"{entry.name}: {entry.nbytes} bytes were announced, {data.nbytes} came")
            file.write(memoryview(data))
