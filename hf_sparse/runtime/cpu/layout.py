"""Bitmask panels: how a sparse matrix lies in memory for the CPU kernel.

``W`` [rows, columns] is cut into panels of 16 rows. Within a panel the columns are walked in groups of ``G`` (float32 1,
bfloat16 and float16 2, int8 4), so that a block of 16 rows x G columns is 64 bytes, one vector register:

    masks    uint8 [panels, blocks * 2 G]   bit r*G + g of block b: W[16 p + r, G b + g] is stored (least significant first)
    values   dtype [nonzeros + 64 bytes]    the stored entries of a panel in the order of the bits, panel after panel
    offsets  int64 [panels + 1]             where in values each panel begins; the last is the number of nonzeros

``blocks`` is ceil(columns / G), rounded up to a multiple of 4; bits outside the matrix are 0. The kernel reads values a whole
register at a time, hence the 64 bytes at the end, zeros that nothing looks at. Bytes: itemsize * density + 1/8 an entry; for
bfloat16 at 70% zeros 0.3 + 1/16 = 0.3625 of dense.

An entry is left out only if all its bits are zero: -0.0, denormals and NaN payloads come back as they were.

Packing and unpacking go through the kernel where there is one; the functions ``*_reference`` are the same in numpy.
"""

import ctypes
from collections.abc import Iterable

import numpy as np
import torch

from hf_sparse.runtime.cpu import library

__all__ = ["GROUP", "NAMES", "blocks_of", "check", "nbytes", "pack_tiles", "plan", "unpack", "unpack_rows"]

ROWS = 16
PAD_BYTES = 64
GROUP = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 2, torch.int8: 4}
TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}  # plan.h
NAMES = ("values", "masks", "offsets")
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
_UNPACK_PANELS = 64  # unpacked at a time by the reference


def panels_of(rows: int) -> int:
    return -(-rows // ROWS)


def blocks_of(columns: int, dtype: torch.dtype) -> int:
    """Blocks of a panel, a multiple of 4."""
    return -(-columns // (4 * GROUP[dtype])) * 4


def nbytes(tensors: dict[str, torch.Tensor]) -> int:
    """Bytes of the packed weight in memory."""
    return sum(tensor.nbytes for tensor in tensors.values())


# -- packing


def pack_tiles(tiles: Iterable[torch.Tensor], shape: tuple[int, int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Pack a matrix that arrives as tiles of rows, without ever holding it dense.

    Args:
        tiles: tensors [r, columns] in the order of the rows; every r but the last a multiple of 16. Cast to ``dtype``.
        shape: (rows, columns) of the whole.

    The buffer of values is sized by the first tile's density, grows by a quarter when that was too small, and is cut to
    its length at the end: for that moment the values exist twice.

    Raises:
        ValueError: the dtype cannot be packed, or the tiles are not these rows.
    """
    if dtype not in GROUP:
        raise ValueError(f"panels hold {', '.join(map(_name, GROUP))} weights, not {_name(dtype)}")
    rows, columns = shape
    blocks = blocks_of(columns, dtype)
    masks = torch.empty(panels_of(rows), blocks * 2 * GROUP[dtype], dtype=torch.uint8)
    offsets = torch.zeros(panels_of(rows) + 1, dtype=torch.int64)
    values = torch.empty(0, dtype=dtype)
    done = 0
    for tile in tiles:
        if tile.dim() != 2 or tile.shape[1] != columns or done % ROWS or done + len(tile) > rows:
            raise ValueError(
                f"a tile {list(tile.shape)} at row {done} of a weight {list(shape)}: tiles are [r, {columns}], "
                f"in order, and every r but the last a multiple of {ROWS}"
            )
        tile = tile.detach().to("cpu", dtype).contiguous()
        top, panels = done // ROWS, panels_of(len(tile))
        done += len(tile)
        mine, at = masks[top : top + panels], offsets[top : top + panels + 1]
        torch.cumsum(_pack_masks(tile, mine, blocks), 0, out=at[1:])
        at[1:] += at[0]
        end = int(at[-1])
        if end > len(values):
            room = end + (end // 4 if len(values) else int(end / done * (rows - done) * 1.02))
            grown = torch.empty(room, dtype=dtype)
            grown[: int(at[0])] = values[: int(at[0])]
            values = grown
        _pack_values(tile, mine, blocks, at, values)
    if done != rows:
        raise ValueError(f"the tiles have {done} rows, the weight has {rows}")
    count = int(offsets[-1])
    exact = torch.empty(count + PAD_BYTES // dtype.itemsize, dtype=dtype)
    exact[:count] = values[:count]
    exact[count:] = 0
    return {"values": exact, "masks": masks, "offsets": offsets}


def _pack_masks(tile: torch.Tensor, masks: torch.Tensor, blocks: int) -> torch.Tensor:
    """Fill the masks of a tile; the nonzeros of each of its panels."""
    code = library.isa_code()
    if not code:
        bits = (_blocks_reference(tile, blocks) != 0).reshape(len(masks), 8 * masks.shape[1])
        masks.copy_(torch.from_numpy(np.packbits(bits, axis=1, bitorder="little")))
        return torch.from_numpy(bits.sum(axis=1, dtype=np.int64))
    counts = torch.empty(len(masks), dtype=torch.int64)
    arguments = tile.data_ptr(), *tile.shape, blocks, masks.data_ptr(), counts.data_ptr(), torch.get_num_threads()
    library.load().hfs_pack_masks(code, TYPE_CODES[tile.dtype], *arguments)
    return counts


def _pack_values(tile, masks, blocks, offsets, values) -> None:
    code = library.isa_code()
    if not code:
        stored = _blocks_reference(tile, blocks)
        stored = torch.from_numpy(stored[stored != 0]).view(tile.dtype)
        values[int(offsets[0]) : int(offsets[-1])] = stored
        return
    arguments = tile.data_ptr(), *tile.shape, blocks, offsets.data_ptr(), values.data_ptr(), torch.get_num_threads()
    library.load().hfs_pack_values(code, TYPE_CODES[tile.dtype], *arguments)


def _blocks_reference(tile: torch.Tensor, blocks: int) -> np.ndarray:
    """The bit patterns of a tile as integers in storage order: [panels, blocks, 16, G]."""
    group, bits = GROUP[tile.dtype], tile.view(_INTEGERS[tile.element_size()]).numpy()
    padded = np.zeros((panels_of(len(tile)) * ROWS, blocks * group), dtype=bits.dtype)
    padded[: bits.shape[0], : bits.shape[1]] = bits
    return np.ascontiguousarray(padded.reshape(len(padded) // ROWS, ROWS, blocks, group).swapaxes(1, 2))


# -- unpacking


def unpack(tensors: dict[str, torch.Tensor], shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """The dense matrix, bit for bit."""
    return unpack_rows(tensors, shape, dtype, 0, shape[0])


def unpack_rows(tensors, shape, dtype, start: int, stop: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """Rows ``start`` to ``stop - 1`` of the dense matrix, into ``out`` [at least stop - start, columns] where one is given.

    Raises:
        IndexError: the matrix has no such rows.
        ValueError: the tensors do not fit together (their sizes; ``check`` looks at everything).
    """
    if not 0 <= start <= stop <= shape[0]:
        raise IndexError(f"rows {start} to {stop} of a matrix with {shape[0]}")
    out = torch.empty(stop - start, shape[1], dtype=dtype) if out is None else out[: stop - start]
    code = library.isa_code()
    if not code:
        out.copy_(unpack_rows_reference(tensors, shape, dtype, start, stop))
    else:
        arguments = plan(tensors, shape, dtype, code)
        library.load().hfs_unpack(ctypes.addressof(arguments), start, stop, out.data_ptr(), torch.get_num_threads())
    return out


def unpack_rows_reference(tensors, shape, dtype, start: int, stop: int) -> torch.Tensor:
    """The same without the kernel."""
    blocks, group = blocks_of(shape[1], dtype), GROUP[dtype]
    values = tensors["values"].view(_INTEGERS[dtype.itemsize]).numpy()
    dense = np.zeros((stop - start, shape[1]), dtype=values.dtype)
    for top in range(start // ROWS, panels_of(stop), _UNPACK_PANELS):
        end = min(top + _UNPACK_PANELS, panels_of(stop))
        bits = np.unpackbits(tensors["masks"][top:end].numpy(), axis=1, bitorder="little").astype(bool)
        part = np.zeros(bits.shape, dtype=values.dtype)
        part[bits] = values[int(tensors["offsets"][top]) : int(tensors["offsets"][end])]
        part = part.reshape(end - top, blocks, ROWS, group).swapaxes(1, 2)
        part = part.reshape((end - top) * ROWS, blocks * group)[:, : shape[1]]
        first, last = max(start, top * ROWS), min(stop, end * ROWS)
        dense[first - start : last - start] = part[first - top * ROWS : last - top * ROWS]
    return torch.from_numpy(dense).view(dtype)


# -- checking


def check_sizes(tensors: dict[str, torch.Tensor], shape: tuple[int, int], dtype: torch.dtype, names=NAMES) -> None:
    """What ``check`` says about everything but the contents: names, dtypes, lengths, places."""
    if dtype not in GROUP:
        raise ValueError(f"panels hold {', '.join(map(_name, GROUP))} weights, not {_name(dtype)}")
    if len(shape) != 2 or min(shape) < 0:
        raise ValueError(f"panels hold matrices, not a weight of shape {list(shape)}")
    if set(tensors) != set(names):
        raise ValueError(f"panels consist of {', '.join(names)}; got {', '.join(tensors)}")
    panels, width = panels_of(shape[0]), blocks_of(shape[1], dtype) * 2 * GROUP[dtype]
    pad = PAD_BYTES // dtype.itemsize
    for name, kind, size in (("masks", torch.uint8, (panels, width)), ("offsets", torch.int64, (panels + 1,))):
        require(tensors, name, kind, size, shape)
    values = tensors["values"]
    if values.dtype != dtype or values.dim() != 1 or len(values) < pad or not is_plain(values):
        raise ValueError(
            f"values of a {_name(dtype)} weight are a contiguous {_name(dtype)} vector on the CPU that ends with {pad} "
            f"unused entries; got {_name(values.dtype)} {list(values.shape)} on {values.device}"
        )


def require(tensors, name: str, dtype: torch.dtype, size: tuple[int, ...], shape) -> None:
    """Raises ValueError unless a tensor has this dtype and size and is contiguous on the CPU."""
    tensor = tensors[name]
    if tensor.dtype != dtype or tuple(tensor.shape) != size or not is_plain(tensor):
        raise ValueError(
            f"{name} of a weight {list(shape)} is a contiguous {_name(dtype)} tensor {list(size)} on the CPU, "
            f"got {_name(tensor.dtype)} {list(tensor.shape)} on {tensor.device}"
        )


def check(tensors: dict[str, torch.Tensor], shape: tuple[int, int], dtype: torch.dtype, names=NAMES) -> None:
    """Whatever the tensors hold, after this no kernel reads or writes outside them.

    Raises:
        ValueError: names, dtypes, sizes, offsets that decrease or do not end at the last value, masks whose number of bits
            is not what the offsets say, bits outside the matrix.
    """
    check_sizes(tensors, shape, dtype, names)
    (rows, columns), group = shape, GROUP[dtype]
    offsets, masks = tensors["offsets"].numpy(), tensors["masks"].numpy()
    stored = len(tensors["values"]) - PAD_BYTES // dtype.itemsize
    if offsets[0] != 0 or (offsets[1:] < offsets[:-1]).any() or offsets[-1] != stored:
        raise ValueError(f"offsets must rise from 0 to the {stored} stored values")
    if not masks.size:
        return
    counts = np.concatenate(
        [np.bitwise_count(masks[p : p + 256]).sum(axis=1, dtype=np.int64) for p in range(0, len(masks), 256)]
    )
    if (wrong := np.flatnonzero(counts != np.diff(offsets))).size:
        p = wrong[0]
        raise ValueError(
            f"panel {p} has {counts[p]} bits set and {offsets[p + 1] - offsets[p]} values ({wrong.size} panels differ)"
        )
    by_block = masks.reshape(len(masks), -1, 2 * group)
    outside = by_block[:, -(-columns // group) :].any()
    if columns % group:
        outside |= (by_block[:, columns // group] & _bits(lambda row, column: column >= columns % group, group)).any()
    if rows % ROWS:
        outside |= (by_block[-1] & _bits(lambda row, column: row >= rows % ROWS, group)).any()
    if outside:
        raise ValueError(f"masks have bits set outside the weight {list(shape)}")


def _bits(condition, group: int) -> np.ndarray:
    """The mask of one block [2 G] of the entries where ``condition(row, column)`` holds."""
    row, column = np.divmod(np.arange(ROWS * group), group)
    return np.packbits(condition(row, column), bitorder="little")


def is_plain(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.layout == torch.strided and tensor.is_contiguous()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- for the kernel


class Plan(ctypes.Structure):
    """``struct Plan`` of plan.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("masks", "values", "offsets", "bias", "scales", "sums")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "panels", "blocks")),
        ("type", ctypes.c_int32),
        ("isa", ctypes.c_int32),
    ]


def plan(tensors, shape: tuple[int, int], dtype: torch.dtype, isa: int, bias: torch.Tensor | None = None) -> Plan:
    """What the kernel is told about a weight: addresses, so the tensors and the bias (float32) have to live as long.

    Raises:
        ValueError: sizes do not fit together.
    """
    check_sizes(tensors, shape, dtype, tuple(tensors))
    address = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    rows, columns = shape
    return Plan(
        **address,
        bias=None if bias is None else bias.data_ptr(),
        rows=rows,
        columns=columns,
        panels=panels_of(rows),
        blocks=blocks_of(columns, dtype),
        type=TYPE_CODES[dtype],
        isa=isa,
    )
