"""Writing packed weights: the other half of ``unpack``, and the choice of the smallest codec.

    pack_bitmask(w)           -> {"values": [nnz], "bitmask": uint8 [ceil(N/8)]}
    pack_nm(w, n, m, dim)     -> {"values": [N/m*n], "ranks": uint8 [ceil(N/m * k / 8)]}
    nbytes_bitmask, nbytes_nm    their sizes without packing
    choose(w)                 -> the header of the smallest packing of w
    pack_tensor(w, header)    -> the self-describing uint8 tensor that goes into the checkpoint

At 50% unstructured zeros a bf16 weight takes 0.5 + 1/16 = 0.5625 of its dense bytes, at 75% 0.3125; 2:4 takes 0.547.
An entry counts as zero only if all its bits are zero, so that -0.0 survives; numpy does the work on integer views.
"""

import math
import struct

import numpy as np
import torch

from hf_sparse.formats.unpack import (
    CODECS,
    CRC_AT,
    DTYPES,
    FORMAT_VERSION,
    HEADER,
    MAGIC,
    MAX_DIMS,
    MAX_M,
    Header,
    checksum,
    combinations,
    rank_bits,
)

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
GROUP_SIZES = (2, 4, 8, 16)  # the m that choose() looks for on its own


def _bits(tensor: torch.Tensor) -> np.ndarray:
    """The bit patterns of a tensor as integers of the same shape, on the CPU."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(_INTEGERS[tensor.element_size()]).numpy()


def _grouped(bits: np.ndarray, n: int, m: int, dim: int) -> np.ndarray:
    """``[groups, m]``, the groups in storage order once ``dim`` has been moved last."""
    if not 0 < n <= m <= MAX_M:
        raise ValueError(f"n:m keeps n of m with 0 < n <= m <= {MAX_M}, got {n}:{m}")
    if dim not in (-1, -2) or bits.ndim < -dim or bits.shape[dim] % m:
        raise ValueError(f"dimension {dim} of shape {bits.shape} is not made of groups of {m}")
    return np.ascontiguousarray(bits if dim == -1 else bits.swapaxes(-1, -2)).reshape(-1, m)


def pack_bitmask(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The nonzero values ``[nnz]`` and one bit an entry (uint8, least significant bit first), on the CPU."""
    bits = _bits(tensor).reshape(-1)
    mask = bits != 0
    return {
        "values": torch.from_numpy(bits[mask]).view(tensor.dtype),
        "bitmask": torch.from_numpy(np.packbits(mask, bitorder="little")),
    }


def pack_nm(tensor: torch.Tensor, n: int, m: int, dim: int = -1) -> dict[str, torch.Tensor]:
    """The ``n`` stored values of every ``m`` consecutive entries along ``dim`` (-1 or -2) and the rank of their places.

    A group with fewer than ``n`` nonzero entries stores zeros for the rest, at its first free places.

    Raises:
        ValueError: the dimension does not divide by ``m``, or a group has more than ``n`` nonzero entries.
    """
    groups = _grouped(_bits(tensor), n, m, dim)
    mask = groups != 0
    counts = mask.sum(axis=1, dtype=np.uint8)
    if counts.size and counts.max() > n:
        raise ValueError(f"not {n}:{m}: {int((counts > n).sum())} groups have more than {n} nonzero entries")
    if counts.size and counts.min() < n:
        free = ~mask
        mask |= free & (np.cumsum(free, axis=1, dtype=np.int8) <= (n - counts)[:, None])
    table = combinations(n, m).numpy()
    rank_of = np.zeros(1 << m, dtype=np.uint16)
    rank_of[table @ (1 << np.arange(m))] = np.arange(len(table))
    code = np.zeros(len(mask), dtype=np.uint16)
    for place in range(m):
        code |= mask[:, place].astype(np.uint16) << np.uint16(place)
    ranks = rank_of[code]
    places = (ranks[:, None] >> np.arange(rank_bits(n, m), dtype=np.uint16) & 1).astype(bool)
    return {
        "values": torch.from_numpy(groups[mask]).view(tensor.dtype),
        "ranks": torch.from_numpy(np.packbits(places.reshape(-1), bitorder="little")),
    }


def nbytes_bitmask(shape: tuple[int, ...], dtype: torch.dtype, nnz: int) -> int:
    """Bytes of a packed tensor with ``nnz`` nonzero entries, header included."""
    return Header("bitmask", dtype, tuple(shape), nnz).nbytes


def nbytes_nm(shape: tuple[int, ...], dtype: torch.dtype, n: int, m: int) -> int:
    """Bytes of a packed ``n:m`` tensor, header included; the same along either dimension."""
    return Header("n:m", dtype, tuple(shape), math.prod(shape) // m * n, n, m).nbytes


def choose(tensor: torch.Tensor, group_sizes: tuple[int, ...] = GROUP_SIZES) -> Header | None:
    """The smallest packing of a tensor, or None where there is none (not a float matrix).

    Looks at the zeros themselves: any ``n:m`` with ``m`` in ``group_sizes`` is found along either of the last two
    dimensions, so neither the pattern nor the storage order has to be told. Ties go to the bitmask.
    """
    if tensor.dtype not in DTYPES.values() or not 2 <= tensor.dim() <= MAX_DIMS or tensor.numel() == 0:
        return None  # 1-D tensors stay: packed bytes could have the very shape of a bias, and load as noise
    shape = tuple(tensor.shape)
    mask = _bits(tensor) != 0
    best = Header("bitmask", tensor.dtype, shape, int(np.count_nonzero(mask)))
    if best.nbytes >= best.dense_bytes:
        return best  # hardly any zeros: no group can be emptier
    for dim in (-1, -2):
        for m in group_sizes:
            if not 1 < m <= MAX_M or shape[dim] % m:
                continue
            for sample in (True, False):  # most weights have no pattern, and a few rows show it
                part = mask
                if sample:
                    part = mask.reshape(-1, *shape[-2:])[:1]
                    part = part[:, :64] if dim == -1 else part[:, :, :64]
                n = max(1, int(_group_counts(part, m, dim).max()))
                header = Header("n:m", tensor.dtype, shape, math.prod(shape) // m * n, n, m, dim)
                if header.nbytes >= best.nbytes:
                    break
            else:
                best = header
    return best


def _group_counts(mask: np.ndarray, m: int, dim: int) -> np.ndarray:
    """How many entries of every group of ``m`` along ``dim`` are set."""
    mask = mask.view(np.uint8)
    if dim == -1:
        return mask.reshape(*mask.shape[:-1], -1, m).sum(axis=-1, dtype=np.uint8)
    return mask.reshape(*mask.shape[:-2], -1, m, mask.shape[-1]).sum(axis=-2, dtype=np.uint8)


def pack_tensor(tensor: torch.Tensor, header: Header | None = None) -> torch.Tensor:
    """One packed ``uint8`` tensor ``[nbytes]`` on the CPU, in the packing of ``header`` or the one of :func:`choose`.

    Raises:
        ValueError: the tensor cannot be packed, or does not have the pattern of the header.
    """
    header = header or choose(tensor)
    if header is None:
        raise ValueError(
            f"only float tensors of 2 to {MAX_DIMS} dimensions pack, got {tensor.dtype} {tuple(tensor.shape)}"
        )
    parts = pack_bitmask(tensor) if header.codec == "bitmask" else pack_nm(tensor, header.n, header.m, header.dim)
    values, positions = parts.values()
    if values.numel() != header.values:
        raise ValueError(f"the header announces {header.values} values, the tensor has {values.numel()}")
    codec = next(code for code, name in CODECS.items() if name == header.codec)
    dtype = next(code for code, kind in DTYPES.items() if kind == header.dtype)
    head = HEADER.pack(
        MAGIC, FORMAT_VERSION, codec, dtype, header.n, header.m, header.dim, len(header.shape), header.values, 0
    )
    packed = np.zeros(header.nbytes, dtype=np.uint8)
    at = 0
    for piece in (head, struct.pack(f"<{len(header.shape)}Q", *header.shape), _bytes(values), _bytes(positions)):
        packed[at : at + len(piece)] = np.frombuffer(piece, dtype=np.uint8)
        at += len(piece)
    crc = checksum(torch.from_numpy(packed))
    packed[CRC_AT : CRC_AT + 4] = np.frombuffer(struct.pack("<I", crc), dtype=np.uint8)
    return torch.from_numpy(packed)


def _bytes(tensor: torch.Tensor) -> memoryview | bytes:
    return memoryview(tensor.view(torch.uint8).numpy()) if tensor.numel() else b""  # torch cannot view an empty one
