"""Reading packed weights: from the bytes of a sparse tensor back to the dense tensor, bit for bit.

A packed tensor is ONE one-dimensional ``uint8`` tensor that lies in the checkpoint under the name of the weight it
stands for. It describes itself:

    bytes 0..31     header (little endian): magic, version, codec, dtype, n, m, dim, ndim, number of values, CRC-32
    8 * ndim        the dense shape
    values          the kept entries, in their own dtype, in storage order
    positions       where they go: one bit an entry (``bitmask``) or one number a group (``n:m``)
    padding         zeros up to a multiple of 8 bytes

One tensor rather than values plus sidecars: whatever a loader does with names (renames, prefixes, merging experts) then
needs no second rule for us, a checkpoint keeps its own tensor names, and a loader that knows nothing of us sees a
one-dimensional tensor where it expects a matrix, and stops instead of loading noise.

Two codecs, both exact for every bit pattern (NaN, infinities, -0.0; only +0.0, all bits zero, is dropped):

    bitmask   nonzero values + 1 bit an entry, least significant bit first.       bytes = nnz * itemsize + N / 8
    n:m       of every m consecutive entries along one dimension n are stored.    bytes = N * n/m * itemsize + N/m * k / 8
              The kept places of a group are one of C(m, n) combinations, stored as its rank in k = ceil(log2 C(m, n))
              bits: 3 bits a group for 2:4, where two 2-bit indices or a bitmask take 4.

Nothing is trusted: lengths, bit counts and ranks are checked before anything is indexed, so a damaged file is an error.
This file needs only torch, because it is shipped inside every packed repository (see ``checkpoint.remote_code``).
"""

import itertools
import math
import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache

import torch

FORMAT_VERSION = 1
MAGIC = b"HFSPARSE"
HEADER = struct.Struct("<8sHBBBBbBQI4x")  # magic, version, codec, dtype, n, m, dim, ndim, values, crc32
CRC_AT = 24  # the CRC-32 covers every byte of the packed tensor except its own four

CODECS = {1: "bitmask", 2: "n:m"}
DTYPES = {1: torch.float64, 2: torch.float32, 3: torch.bfloat16, 4: torch.float16}
MAX_DIMS, MAX_M = 8, 16


class PackedTensorError(ValueError):
    """A packed tensor that is damaged, truncated, or from a newer format."""


@dataclass(frozen=True)
class Header:
    """What a packed tensor says of itself. ``dim`` is the dimension of the groups of ``m``: -1, or -2 for weights
    stored ``[in, out]`` (GPT-2 ``Conv1D``, some fused experts)."""

    codec: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    values: int
    n: int = 0
    m: int = 0
    dim: int = -1

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def dense_bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def position_bytes(self) -> int:
        bits = self.numel if self.codec == "bitmask" else self.numel // self.m * rank_bits(self.n, self.m)
        return -(-bits // 8)

    @property
    def nbytes(self) -> int:
        """Size of the whole packed tensor."""
        size = HEADER.size + 8 * len(self.shape) + self.values * self.dtype.itemsize + self.position_bytes
        return -(-size // 8) * 8

    def __str__(self):
        return "bitmask" if self.codec == "bitmask" else f"{self.n}:{self.m}"


def rank_bits(n: int, m: int) -> int:
    """Bits that hold the rank of one of the C(m, n) ways to keep n of m."""
    return (math.comb(m, n) - 1).bit_length()


@lru_cache
def combinations(n: int, m: int) -> torch.Tensor:
    """Boolean ``[C(m, n), m]``, the row of rank r being the r-th way to keep n of m in lexicographic order."""
    with torch.device("cpu"):  # whatever default the first caller has: the table is kept
        places = torch.tensor(list(itertools.combinations(range(m), n)), dtype=torch.int64).reshape(-1, n)
        return torch.zeros(len(places), m, dtype=torch.bool).scatter_(1, places, True)


@lru_cache
def _bits_of_byte() -> torch.Tensor:
    """int64 ``[256]``: the eight bits of each byte as eight bytes 0 or 1, so that one lookup expands a byte."""
    with torch.device("cpu"):
        bits = torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1
        return bits.to(torch.uint8).view(torch.int64).reshape(256)


def unpack_bits(packed: torch.Tensor, count: int) -> torch.Tensor:
    """The first ``count`` bits of a 1-D ``uint8`` tensor as booleans ``[count]``, least significant bit first.

    Raises:
        PackedTensorError: the length is not exactly that of ``count`` bits, or a bit past the end is set.
    """
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() != -(-count // 8):
        raise PackedTensorError(
            f"{count} bits are {-(-count // 8)} bytes, got {tuple(packed.shape)} entries of {packed.dtype}"
        )
    bits = _bits_of_byte().to(packed.device).index_select(0, packed.int()).view(torch.bool)
    if bits[count:].any():
        raise PackedTensorError("bits past the end of the tensor are set")
    return bits[:count]


def unpack_bitmask(parts: dict[str, torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Dense tensor from ``{"values": [nnz], "bitmask": uint8 [ceil(numel / 8)]}``, on the device of the parts.

    ``dtype`` may differ from that of the values: they are cast on the way.

    Raises:
        PackedTensorError: the lengths disagree, or the mask does not count as many entries as there are values.
    """
    return _scatter(parts["values"], unpack_bits(parts["bitmask"], math.prod(shape)), dtype).reshape(shape)


def unpack_nm(
    parts: dict[str, torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype, n: int, m: int, dim: int = -1
) -> torch.Tensor:
    """Dense tensor from ``{"values": [numel/m*n], "ranks": uint8 [ceil(numel/m * k / 8)]}`` (k as in :func:`rank_bits`).

    The groups of ``m`` run along dimension ``dim``, -1 or -2.

    Raises:
        PackedTensorError: the lengths disagree, the dimension is not a multiple of ``m``, or a rank names no
            combination.
    """
    if not 0 < n <= m <= MAX_M or dim not in (-1, -2) or len(shape) < -dim or shape[dim] % m:
        raise PackedTensorError(f"no {n}:{m} pattern along dimension {dim} of shape {tuple(shape)}")
    groups, bits = math.prod(shape) // m, rank_bits(n, m)
    table = combinations(n, m).to(parts["values"].device)
    ranks = unpack_bits(parts["ranks"], groups * bits).view(groups, bits)
    rank = torch.zeros(groups, dtype=torch.int32, device=table.device)
    for bit in range(bits):
        rank |= ranks[:, bit].int() << bit
    if groups and int(rank.max()) >= len(table):
        raise PackedTensorError(f"rank {int(rank.max())} of a group, but {n}:{m} has only {len(table)} combinations")
    mask = table.index_select(0, rank).reshape(-1)
    if dim == -1:
        return _scatter(parts["values"], mask, dtype).reshape(shape)
    turned = (*shape[:-2], shape[-1], shape[-2])  # packed with the groups last
    return _scatter(parts["values"], mask, dtype).reshape(turned).transpose(-1, -2).contiguous()


def _scatter(values: torch.Tensor, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    values = values.reshape(-1)
    kept = int(torch.count_nonzero(mask))
    if kept != values.numel():
        raise PackedTensorError(f"the positions keep {kept} entries, but there are {values.numel()} values")
    return torch.zeros(mask.numel(), dtype=dtype, device=mask.device).masked_scatter_(mask, values.to(dtype))


def is_packed(tensor: torch.Tensor) -> bool:
    """Whether a tensor carries our header (a 1-D ``uint8`` tensor that begins with the magic)."""
    if tensor.dtype != torch.uint8 or tensor.dim() != 1 or tensor.numel() < HEADER.size:
        return False
    return bytes(tensor[: len(MAGIC)].tolist()) == MAGIC


def read_header(packed: torch.Tensor) -> Header:
    """The header of a packed tensor, checked against its length.

    Raises:
        PackedTensorError: no header, a newer version, an impossible header, or a length that does not follow from it.
    """
    if not is_packed(packed):
        raise PackedTensorError(
            f"not a packed tensor: {tuple(packed.shape)} entries of {packed.dtype} without the {MAGIC.decode()} header"
        )
    head = bytes(packed[: HEADER.size + 8 * MAX_DIMS].tolist())
    _, version, codec, dtype, n, m, dim, ndim, values, _ = HEADER.unpack_from(head)
    if version > FORMAT_VERSION:
        raise PackedTensorError(
            f"packed in format {version}, this hf_sparse reads up to {FORMAT_VERSION}: upgrade hf_sparse"
        )
    if codec not in CODECS or dtype not in DTYPES or ndim > MAX_DIMS or len(head) < HEADER.size + 8 * ndim:
        raise PackedTensorError(f"damaged header: codec {codec}, dtype {dtype}, {ndim} dimensions")
    shape = struct.unpack_from(f"<{ndim}Q", head, HEADER.size)
    header = Header(CODECS[codec], DTYPES[dtype], shape, values, n, m, dim)
    if header.codec == "n:m" and not (
        0 < n <= m <= MAX_M
        and dim in (-1, -2)
        and ndim >= -dim
        and shape[dim] % m == 0
        and values == header.numel // m * n
    ):
        raise PackedTensorError(f"damaged header: {values} values of {n}:{m} along dimension {dim} of {shape}")
    if values > header.numel or packed.numel() != header.nbytes:
        raise PackedTensorError(
            f"shape {shape} with {values} {header.dtype} values takes {header.nbytes} bytes, got {packed.numel()}"
        )
    return header


def checksum(packed: torch.Tensor) -> int:
    """CRC-32 of a packed tensor, its own field left out. On the CPU, a few GB/s."""
    data = memoryview(packed.cpu().contiguous().numpy())
    return zlib.crc32(data[CRC_AT + 4 :], zlib.crc32(data[:CRC_AT]))


def check_packed(packed: torch.Tensor) -> Header:
    """The header of a packed tensor, after its checksum.

    Raises:
        PackedTensorError: any of :func:`read_header`'s reasons, or a byte that changed since packing.
    """
    header = read_header(packed)
    stored = HEADER.unpack(bytes(packed[: HEADER.size].tolist()))[-1]
    if checksum(packed) != stored:
        raise PackedTensorError("the checksum does not match: the file was damaged after it was written")
    return header


def unpack_tensor(packed: torch.Tensor, dtype: torch.dtype | None = None, verify: bool = True) -> torch.Tensor:
    """The dense tensor of a packed one, on its device, in its own dtype or cast to ``dtype``.

    ``verify=False`` skips the checksum (for bytes already checked by :func:`check_packed`), never the other checks.

    Raises:
        PackedTensorError: the packed tensor is damaged or from a newer format.
    """
    header = check_packed(packed) if verify else read_header(packed)
    start = HEADER.size + 8 * len(header.shape)
    end = start + header.values * header.dtype.itemsize
    values = packed[start:end]
    if values.storage_offset() % header.dtype.itemsize or values.data_ptr() % header.dtype.itemsize:
        values = values.clone()  # a view into a file may lie at any byte
    values = values.view(header.dtype)
    positions = packed[end : end + header.position_bytes]
    dtype = dtype or header.dtype
    if header.codec == "bitmask":
        return unpack_bitmask({"values": values, "bitmask": positions}, header.shape, dtype)
    parts = {"values": values, "ranks": positions}
    return unpack_nm(parts, header.shape, dtype, header.n, header.m, header.dim)
