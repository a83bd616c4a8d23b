"""The ``delta`` layout: nonzeros of a row with 4-bit gaps between them, the most compact; for 1 to 4 tokens.

A row of the weight ``[rows, columns]`` is the sequence of its nonzeros, each with its distance to the one before (the first
to column -1), minus 1, in 4 bits. A distance over 16 takes entries of value zero in between, one for every 16 columns. The
sequence is filled up with zeros to whole octets, and a lane of a warp takes an octet at a time (``delta.cu``):

    values     [8 * octets]    bfloat16 or float16   the nonzeros, row after row
    gaps       [octets]        int32                 nibble j: entry j of the octet lies (nibble + 1) columns on
    row_start  [rows + 1]      int32                 the first octet of each row
    bases      [rows, blocks]  int16 (unsigned)      1 + the column of the last entry before octet 32 b of the row

2.5 bytes a nonzero. At random positions the inserted zeros add ``s^16`` of them at sparsity s (0.3% at 70%, 2.8% at 80%,
18% at 90%), the octets 3.5 entries a row, the bases 0.3%: at 70% 0.377 of the dense bytes. An entry is zero only if all its
bits are: -0.0 and NaN are kept, and come back, bit for bit.

Gaps of 4 bits, an octet a lane and a scan across the warp are MACKO's (github.com/vlejd/macko_spmv). Different here: sums
within an octet by a multiplication, one scan for 512 nonzeros, stored bases, so that warps can share a row and no block waits
for the one before, several tokens at once, x in shared memory.

One H200 at 70%, one token: 2.1 times cuBLAS on 28672x8192 and 2.4 times on 4096x4096 (``examples/benchmarks/gpu_layers.py``);
on the large one 0.77 of what a bare bitmask's bytes allow. What limits the rest is shared memory: 32 lanes that gather from
random columns meet in its banks, which takes 3.5 turns instead of one. From 3 tokens on ``paired`` is faster, at 50% for one
as well.
"""

import functools

import torch
import torch.nn.functional as F

from hf_sparse.runtime.gpu import delta_triton, nvrtc
from hf_sparse.runtime.gpu.plan import Plan, block_limits, check_tensors, dtype_flag, read_source, rows_at_a_time

__all__ = ["NAMES", "check", "linear", "nbytes", "pack", "pack_tiles", "prepare", "supports", "unavailable", "unpack"]

NAMES = ("values", "gaps", "row_start", "bases")
MAX_COLUMNS = 65535 - 8  # bases are 16 bits
TOKENS = 4  # in one pass of the kernel
PASSES = 3  # beyond that many, the dense weight is unpacked and multiplied with
SCAN = 32  # octets between two bases


def supports(dtype: torch.dtype) -> bool:
    """Whether weights of this dtype can be packed."""
    return dtype in (torch.bfloat16, torch.float16)


def unavailable(device: torch.device) -> str | None:
    """Why the kernel cannot run on a device, or None."""
    reason = nvrtc.missing(device)
    return None if reason is None or (torch.cuda.is_available() and delta_triton.installed()) else reason


# ------------------------------------------------------------------------------------------------ the layout


def pack(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Packs a dense weight [rows, columns] on its device."""
    return pack_tiles([weight], tuple(weight.shape), weight.dtype)


def pack_tiles(tiles, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Packs a weight that comes as dense row tiles, on the device of the tiles.

    Raises:
        ValueError: the dtype or the width is not supported, or the tiles are not ``shape`` together.
    """
    rows, columns = shape
    if not supports(dtype):
        raise ValueError(f"the delta layout holds bfloat16 and float16 weights, not {dtype}")
    if not 0 < columns <= MAX_COLUMNS:
        raise ValueError(f"the delta layout holds weights of 1 to {MAX_COLUMNS} columns, this one has {columns}")
    values, gaps, counts, bases = [], [], [], []
    for tile in tiles:
        if tile.dim() != 2 or tile.shape[1] != columns or tile.dtype != dtype:
            raise ValueError(f"a tile is {list(tile.shape)} {tile.dtype}; [any, {columns}] {dtype} was announced")
        for part in tile.contiguous().view(torch.int16).split(rows_at_a_time(columns)):
            for kept, piece in zip((values, gaps, counts, bases), _pack_rows(part), strict=True):
                kept.append(piece)
    counts = torch.cat(counts) if counts else torch.zeros(0, dtype=torch.int64)
    if len(counts) != rows:
        raise ValueError(f"the tiles have {len(counts)} rows together; {rows} were announced")
    row_start = F.pad(counts.cumsum(0), (1, 0))
    if rows and int(row_start[-1]) >= 2**31 // 32:
        raise ValueError(f"a weight of {rows}x{columns} has more octets than the kernel's 32-bit numbers can count")
    blocks = max(1, max((piece.shape[1] for piece in bases), default=1))
    return {
        "values": torch.cat(values).view(dtype) if values else torch.zeros(0, dtype=dtype),
        "gaps": torch.cat(gaps) if gaps else torch.zeros(0, dtype=torch.int32),
        "row_start": row_start.to(torch.int32),
        "bases": torch.cat([F.pad(piece, (0, blocks - piece.shape[1])) for piece in bases])
        if bases
        else torch.zeros((0, blocks), dtype=torch.int16),
    }


def _pack_rows(bits: torch.Tensor):
    """Bit patterns [rows, columns] -> values [8 octets], gaps [octets], octets of each row, bases [rows, blocks]."""
    rows, device = bits.shape[0], bits.device
    row, column = bits.nonzero(as_tuple=True)
    before = F.pad(column, (1, 0))[:-1]
    first = F.pad(row, (1, 0), value=-1)[:-1] != row
    gap = column - torch.where(first, -1, before) - 1  # 0 for the next column
    entries_to = (gap // 16 + 1).cumsum(0)  # inserted zeros count
    per_row = torch.zeros(rows, dtype=torch.int64, device=device).scatter_add_(0, row, gap // 16 + 1)
    octets = (per_row + 7) // 8
    start = octets.cumsum(0) - octets
    place = 8 * start[row] + entries_to - 1 - (per_row.cumsum(0) - per_row)[row]
    total = int(octets.sum())
    values = torch.zeros(8 * total, dtype=torch.int16, device=device)
    values[place] = bits[row, column]
    nibbles = torch.full((8 * total,), 15, dtype=torch.int32, device=device)
    nibbles[place] = (gap % 16).to(torch.int32)
    fill = 8 * octets - per_row  # entries after the last nonzero, up to 7: to the next columns, where x is 0 at worst
    last = (8 * (start + octets))[:, None] - 1 - torch.arange(7, device=device)
    nibbles[last[torch.arange(7, device=device) < fill[:, None]]] = 0
    nibbles = nibbles.view(-1, 8)
    gaps = (nibbles << (4 * torch.arange(8, device=device, dtype=torch.int32))).sum(1, dtype=torch.int32)
    return values, gaps, octets, _bases(nibbles, octets)


def _bases(nibbles: torch.Tensor, octets: torch.Tensor) -> torch.Tensor:
    """Where the 32-octet blocks of each row begin, from the nibbles [octets, 8] and the octets of each row."""
    blocks = max(1, -(-int(octets.max()) // SCAN)) if len(octets) else 1
    advanced = F.pad((nibbles.sum(1) + 8).cumsum(0), (1, 0))
    start = octets.cumsum(0) - octets
    inside = SCAN * torch.arange(blocks, device=octets.device) < octets[:, None]
    at = (start[:, None] + SCAN * torch.arange(blocks, device=octets.device)).clamp(max=len(nibbles))
    return torch.where(inside, advanced[at] - advanced[start][:, None], 0).to(torch.int16)


def _nibbles(gaps: torch.Tensor) -> torch.Tensor:
    return (gaps[:, None] >> (4 * torch.arange(8, device=gaps.device, dtype=torch.int32))) & 15


def _parts(tensors: dict[str, torch.Tensor], columns: int):
    """(first row, octets of each row, values [octets, 8] as bits, nibbles [octets, 8]) of a bounded number of rows."""
    row_start = tensors["row_start"].cpu().tolist()
    rows, step = len(row_start) - 1, rows_at_a_time(columns)
    for top in range(0, rows, step):
        bottom = min(rows, top + step)
        one, end = row_start[top], row_start[bottom]
        octets = tensors["row_start"][top : bottom + 1].long().diff()
        values = tensors["values"][8 * one : 8 * end].view(torch.int16).view(-1, 8)
        yield top, octets, values, _nibbles(tensors["gaps"][one:end])


def _columns(octets: torch.Tensor, nibbles: torch.Tensor) -> torch.Tensor:
    """The column of every entry [octets, 8]."""
    advanced = F.pad((nibbles.reshape(-1) + 1).cumsum(0), (1, 0))
    start = (octets.cumsum(0) - octets).repeat_interleave(octets) * 8
    return (advanced[1:] - advanced[start.repeat_interleave(8)] - 1).view(-1, 8)


def unpack(tensors: dict[str, torch.Tensor], shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """The dense weight [rows, columns], bit for bit."""
    rows, columns = shape
    if tensors["gaps"].is_cuda and nvrtc.missing(tensors["gaps"].device) is None:
        return DeltaPlan.of(tensors, NAMES, shape, dtype, None).dense()
    dense = torch.zeros((rows, columns), dtype=torch.int16, device=tensors["gaps"].device)
    for top, octets, values, nibbles in _parts(tensors, columns):
        row = torch.arange(len(octets), device=dense.device).repeat_interleave(octets)
        kept = values != 0
        dense[top + row[:, None].expand(-1, 8)[kept], _columns(octets, nibbles)[kept]] = values[kept]
    return dense.view(dtype)


def check(tensors: dict[str, torch.Tensor], shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Raises ValueError for any tensors with which the kernel would read or write what it must not."""
    rows, columns = shape
    if not supports(dtype) or not 0 < columns <= MAX_COLUMNS:
        raise ValueError(
            f"the delta layout holds bfloat16 and float16 of 1 to {MAX_COLUMNS} columns, not {dtype} {shape}"
        )
    check_tensors(tensors, dict(zip(NAMES, (dtype, torch.int32, torch.int32, torch.int16), strict=True)))
    values, gaps, row_start, bases = (tensors[name] for name in NAMES)
    if row_start.shape != (rows + 1,) or gaps.dim() != 1 or values.shape != (8 * len(gaps),):
        raise ValueError(
            f"delta: {rows} rows need row_start [{rows + 1}] and 8 values for each of the gaps; there are "
            f"{list(row_start.shape)}, {list(values.shape)} and {list(gaps.shape)}"
        )
    octets = row_start.long().diff()
    if int(row_start[0]) != 0 or int(row_start[-1]) != len(gaps) or bool((octets < 0).any()):
        raise ValueError(f"delta: row_start does not rise from 0 to the {len(gaps)} octets there are")
    blocks = max(1, -(-int(octets.max()) // SCAN)) if rows else 1
    if bases.dim() != 2 or bases.shape[0] != rows or bases.shape[1] < blocks or rows * bases.shape[1] >= 2**31:
        raise ValueError(f"delta: the longest row needs bases [{rows}, {blocks}]; they are {list(bases.shape)}")
    for top, octets, values, nibbles in _parts(tensors, columns):
        at = _columns(octets, nibbles)
        if at.numel() and int(at.max()) >= columns + 8:
            raise ValueError(f"delta: gaps of rows {top} to {top + len(octets) - 1} lead beyond the {columns} columns")
        if bool(((at >= columns) & (values != 0)).any()):
            raise ValueError(f"delta: rows {top} to {top + len(octets) - 1} have weights beyond the {columns} columns")
        here = bases[top : top + len(octets)]
        right = _bases(nibbles, octets)
        if not torch.equal(here[:, : right.shape[1]], right) or bool(here[:, right.shape[1] :].any()):
            raise ValueError(f"delta: bases of rows {top} to {top + len(octets) - 1} are not where their gaps lead")


def nbytes(tensors: dict[str, torch.Tensor]) -> int:
    """Bytes in memory."""
    return sum(tensors[name].nbytes for name in NAMES)


# ------------------------------------------------------------------------------------------------ the product


def prepare(tensors: dict[str, torch.Tensor], shape: tuple[int, int], dtype: torch.dtype, bias: torch.Tensor | None):
    """A function of ``x [tokens, columns]`` of the weight's dtype that returns ``x W^T + bias`` [tokens, rows].

    Kernels are compiled at the first call with each number of tokens up to 4; call once before capturing a CUDA graph.
    """
    if nvrtc.missing(tensors["gaps"].device):
        return functools.partial(_linear_in_triton, tensors=tensors, shape=tuple(shape), dtype=dtype, bias=bias)
    return DeltaPlan({name: tensors[name] for name in NAMES}, tuple(shape), dtype, bias)


def linear(x, tensors, shape, dtype, bias):
    """``x W^T + bias`` for ``x [tokens, columns]``."""
    if nvrtc.missing(x.device):
        return _linear_in_triton(x, tensors, shape, dtype, bias)
    return DeltaPlan.of(tensors, NAMES, shape, dtype, bias)(x)


def _linear_in_triton(x, tensors, shape, dtype, bias):
    if x.dtype != dtype or x.dim() != 2 or x.shape[1] != shape[1]:
        raise ValueError(f"x is {x.dtype} {list(x.shape)}; this packed weight takes {dtype} [tokens, {shape[1]}]")
    if len(x) <= delta_triton.TOKENS:
        return delta_triton.linear(x, tensors, shape, bias)
    return F.linear(x, unpack(tensors, shape, dtype), bias)


class DeltaPlan(Plan):
    """The launches of one packed weight, made as they are asked for."""

    name = "delta"

    def passes(self, tokens: int) -> int | None:
        most = next((t for t in range(TOKENS, 0, -1) if self.candidates(t)), 0)  # tokens whose x fits shared memory
        return None if most == 0 or tokens > PASSES * most else most

    def candidates(self, tokens: int) -> list[dict[str, int]]:
        """Configurations worth trying, the one that is likeliest the fastest first: warps of a block, warps that share a
        row, blocks of a multiprocessor."""
        multiprocessors, shared = block_limits(self.device)
        found = []
        for warps, split, blocks in ((16, 1, 2), (32, 1, 1), (16, 1, 3), (8, 1, 4), (16, 2, 2), (8, 2, 4), (8, 4, 4)):
            choice = {"warps": warps, "split": split, "blocks": blocks}
            size = self._shape(tokens, **choice)[1]
            choice["blocks"] = min(blocks, (shared + 1024) // (size + 1024))
            if choice["blocks"] and size <= shared and choice not in found:
                found.append(choice)
        rows_of_a_warp = self.rows / (32 * multiprocessors)
        split = 4 if rows_of_a_warp < 0.4 else 2 if rows_of_a_warp < 0.75 else 1
        return sorted(found, key=lambda c: (abs(c["split"] - split), c["warps"] * c["blocks"] < 32))[:5]

    def _shape(self, tokens: int, warps: int, split: int, blocks: int) -> tuple[int, int]:
        """(blocks of the grid, bytes of shared memory of each): x, and if warps share rows, their sums."""
        grid = min(-(-self.rows * split // warps), block_limits(self.device)[0] * max(1, blocks))
        turns = -(-self.rows * split // (grid * warps))
        x = -(-(self.columns + 8) * (4 if tokens == 1 else 4 * ((tokens + 1) // 2)) // 16) * 16
        return grid, x + (turns * warps * tokens * 4 if split > 1 else 0)

    def launch(self, tokens: int, warps: int, split: int, blocks: int) -> nvrtc.Launch:
        """One configuration of the kernel, with its launch."""
        defines = {"HALF": dtype_flag(self.dtype), "EARLY": self.early, "TOKENS": tokens}
        defines |= {"WARPS": warps, "SPLIT": split, "BLOCKS": blocks}
        function = nvrtc.build(read_source("delta.cu"), "delta_linear", defines, self.device)
        grid, shared = self._shape(tokens, warps, split, blocks)
        fixed = [
            *(self.tensors[name] for name in NAMES),
            self.bias,
            self.rows,
            self.columns,
            self.tensors["bases"].shape[1],
        ]
        return nvrtc.Launch(function, (grid, 1), 32 * warps, shared, 2, fixed, early=bool(self.early))

    def make_unpack(self) -> nvrtc.Launch:
        defines = {"HALF": dtype_flag(self.dtype), "EARLY": 0, "TOKENS": 1, "WARPS": 8, "SPLIT": 1, "BLOCKS": 4}
        function = nvrtc.build(read_source("delta.cu"), "delta_unpack", defines, self.device)
        grid = min(self.rows, block_limits(self.device)[0] * 8)
        shared = -(-(self.columns + 8) // 8) * 16
        fixed = [*(self.tensors[name] for name in NAMES), self.rows, self.columns, self.tensors["bases"].shape[1]]
        return nvrtc.Launch(function, (grid, 1), 256, shared, 1, fixed)
