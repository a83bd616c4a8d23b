"""A packed weight, a few rows at a time: what a runtime needs that repacks a weight and never holds it dense.

    for tile in row_tiles(packed): ...          # dense [rows, in] tiles, in order

The values of a tile lie behind those of the rows before it, so one running count is all the state there is. A tile has a
multiple of 16 rows (the last one may have fewer): its positions then begin at a whole byte, whatever the row length is.
"""

from collections.abc import Iterator

import torch

from hf_sparse.formats.unpack import (
    HEADER,
    PackedTensorError,
    rank_bits,
    read_header,
    unpack_bitmask,
    unpack_nm,
    unpack_tensor,
)

TILE_BYTES = 1 << 22  # dense bytes of a tile: large enough for whole-tensor operations to be quick


def row_tiles(
    packed: torch.Tensor, dtype: torch.dtype | None = None, rows: int | None = None
) -> Iterator[torch.Tensor]:
    """Dense tiles ``[rows, in]`` of a packed matrix, from the first row to the last, on its device.

    The checksum is not verified (``check_packed`` does), everything else is. Weights in groups along the first dimension
    (``n:m`` stored ``[in, out]``) have no rows to walk along: they come as one tile.

    Args:
        dtype: what the values are cast to; None keeps theirs.
        rows: rows of a tile, a multiple of 16; None: about 4 MB of them.

    Raises:
        PackedTensorError: the tensor is damaged.
        ValueError: it is not a matrix, or ``rows`` is not a multiple of 16.
    """
    header = read_header(packed)
    if len(header.shape) != 2:
        raise ValueError(f"row tiles are those of a matrix; this tensor has shape {header.shape}")
    height, width = header.shape
    if rows is None:
        rows = max(16, TILE_BYTES // max(1, width * header.dtype.itemsize) // 16 * 16)
    if rows < 16 or rows % 16:
        raise ValueError(f"rows of a tile are a multiple of 16, got {rows}")
    if header.codec == "n:m" and header.dim == -2:
        yield unpack_tensor(packed, dtype, verify=False)
        return
    dtype = dtype or header.dtype
    begin = HEADER.size + 8 * len(header.shape)
    end = begin + header.values * header.dtype.itemsize
    values = packed[begin:end]
    if values.data_ptr() % header.dtype.itemsize or values.storage_offset() % header.dtype.itemsize:
        values = values.clone()  # a view into a file may lie at any byte
    values, positions = values.view(header.dtype), packed[end : end + header.position_bytes]
    bits = width if header.codec == "bitmask" else width // header.m * rank_bits(header.n, header.m)  # of a row
    taken = 0
    for top in range(0, height, rows):
        shape = (min(rows, height - top), width)
        part = positions[top * bits // 8 : -(-(top + shape[0]) * bits // 8)]
        if header.codec == "bitmask":
            count = int(_ones(part))
            parts = {"values": values[taken : taken + count], "bitmask": part}
            yield unpack_bitmask(parts, shape, dtype)
        else:
            count = shape[0] * (width // header.m) * header.n
            parts = {"values": values[taken : taken + count], "ranks": part}
            yield unpack_nm(parts, shape, dtype, header.n, header.m)
        taken += count
    if taken != header.values:
        raise PackedTensorError(f"the positions keep {taken} entries, but there are {header.values} values")


def _ones(packed_bits: torch.Tensor) -> torch.Tensor:
    """Number of set bits of a ``uint8`` tensor."""
    pairs = packed_bits - (packed_bits >> 1 & 0x55)
    nibbles = (pairs & 0x33) + (pairs >> 2 & 0x33)
    return (nibbles + (nibbles >> 4) & 0x0F).sum()
