"""The ``paired`` layout: a bit an entry and the nonzeros, ordered for tensor cores; for 1 to 16 tokens.

Tensor cores take 16 x 16 weights as four registers a lane, each a pair of 16-bit weights. Their multiply-adds are free
compared with reading the weight, so nothing is saved by skipping zeros: what counts is to read the nonzeros alone, and to
put them into the halves of the registers with few instructions. Every lane owns a pair of streams, the nonzeros of its low
and those of its high halves, in the order in which it needs them; a bit for each half says whether to take the next entry or
a zero (``paired.cu``: 9.5 instructions and two reads of shared memory for 64 weights of a warp).

The streams lie in shared memory side by side, 128 bytes an entry of all 64: 32 banks, each with low and high halves. Lanes
advance at their own pace, but a lane stays in its bank, so no read waits for another. The price is that all columns of a
stretch must be equally long. Streams of 128 places hold 38 +- 5 nonzeros at 70% sparsity, and the longest of 64 a third
more; so a unit is four blocks, and in each block the longest stream goes to the bank that is emptiest so far, which leaves
4% of padding. That is why a block says where each stream begins:

    block   32 rows x 256 columns: 64 streams of up to 128 entries; the work of one warp
    unit    4 blocks side by side, 32 rows x 1024 columns, in lines of 128 bytes:

            8 lines a block   bits     u32 [2][lane][4]
            1 line a block    begins   u16 [lane][low, high]: line * 32 + bank of the first entry
            H lines           entries  u16 [line][bank][low, high]

    data    [lines, 32]   int32   all units, 32 rows after 32 rows, each from left to right
    starts  [units + 1]   int32   the first line of each unit

    where an entry lies    row    = 16 s + 8 up + g            lane = 4 g + t, register r = up + 2 k, step i = 2 h + e
    in its block           column = 64 q + 32 h + 8 t + 4 e + 2 k + half
    its place in a stream  ((4 q + i) * 2 + s) * 4 + r          its bit: word [q / 2][lane][2 (q % 2) + s], bit 8 i + 2 r + half

Columns are dealt to lanes by eights so that x is read in place, 16 bytes a lane. Bytes: 0.14 + 2.08 d an entry at density d
(0.38 of dense at 70% sparsity, 0.59 at 50%), against 0.125 + 2 d of a bare bitmask. The idea to load sparse and multiply
dense is Flash-LLM's (github.com/AlibabaResearch/flash-llm) and SpInfer's (EuroSys 2025).

One H200 at 70%: 1.7 times cuBLAS with 8 tokens and 1.5 times with 16 on 28672x8192 (``examples/benchmarks/gpu_layers.py``). The
work is the same at every sparsity (a bit is a test, a load and an addition), so above 70% fewer bytes gain little.
"""

import torch
import torch.nn.functional as F

from hf_sparse.runtime.gpu import nvrtc
from hf_sparse.runtime.gpu.plan import Plan, block_limits, check_tensors, dtype_flag, read_source, rows_at_a_time

__all__ = ["NAMES", "check", "linear", "nbytes", "pack", "pack_tiles", "prepare", "supports", "unavailable", "unpack"]

NAMES = ("data", "starts")
ROWS, COLUMNS = 32, 1024  # of a unit
HEADER = 36  # lines of a unit before its entries
TOKENS = 16  # in one pass of the kernel
PASSES = 3  # beyond that many, the dense weight is unpacked and multiplied with


def supports(dtype: torch.dtype) -> bool:
    """Whether weights of this dtype can be packed."""
    return dtype in (torch.bfloat16, torch.float16)


def unavailable(device: torch.device) -> str | None:
    """Why the kernel cannot run on a device, or None."""
    return nvrtc.missing(device)


def _units(shape: tuple[int, int]) -> tuple[int, int]:
    """Units of a weight, down and across."""
    return -(-shape[0] // ROWS), -(-shape[1] // COLUMNS)


# ------------------------------------------------------------------------------------------------ the layout


def pack(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Packs a dense weight [rows, columns] on its device."""
    return pack_tiles([weight], tuple(weight.shape), weight.dtype)


def pack_tiles(tiles, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Packs a weight that comes as dense row tiles, on the device of the tiles.

    Raises:
        ValueError: the dtype is not supported, or the tiles are not ``shape`` together.
    """
    rows, columns = shape
    if not supports(dtype):
        raise ValueError(f"the paired layout holds bfloat16 and float16 weights, not {dtype}")
    _, across = _units(shape)
    step = rows_at_a_time(across * COLUMNS, ROWS)
    data, lines, seen, rest = [], [], 0, None

    def take(part: torch.Tensor) -> None:
        if len(part):
            piece = _pack_rows(part, across)
            data.append(piece[0])
            lines.append(piece[1])

    for tile in tiles:
        if tile.dim() != 2 or tile.shape[1] != columns or tile.dtype != dtype:
            raise ValueError(f"a tile is {list(tile.shape)} {tile.dtype}; [any, {columns}] {dtype} was announced")
        seen += len(tile)
        tile = tile.contiguous().view(torch.int16)
        tile = tile if rest is None else torch.cat([rest, tile])
        whole = len(tile) // ROWS * ROWS
        for part in tile[:whole].split(step):
            take(part)
        rest = tile[whole:].clone() if whole < len(tile) else None
    if rest is not None:
        take(rest)
    if seen != rows:
        raise ValueError(f"the tiles have {seen} rows together; {rows} were announced")
    starts = F.pad(torch.cat(lines).cumsum(0), (1, 0)) if lines else torch.zeros(1, dtype=torch.int64)
    if int(starts[-1]) >= 2**31:
        raise ValueError(f"a weight of {rows}x{columns} has more lines than the kernel's 32-bit numbers can count")
    return {
        "data": torch.cat(data) if data else torch.zeros((0, 32), dtype=torch.int32),
        "starts": starts.to(torch.int32),
    }


# row = (unit, s, up, g), column = (unit, block, q, h, t, e, k, half), and the order in which a stream has them
_SIZES = (-1, 2, 2, 8, -1, 4, 4, 2, 4, 2, 2, 2)
_FORWARD = (0, 4, 5, 11, 3, 8, 6, 7, 9, 1, 10, 2)
_BACKWARD = tuple(_FORWARD.index(i) for i in range(12))


def _split(dense: torch.Tensor, across: int) -> torch.Tensor:
    """[rows, columns] -> [units, 4 blocks, 2 halves, 32 lanes, 128 places], padded with zeros."""
    rows, columns = dense.shape
    down = -(-rows // ROWS)
    dense = F.pad(dense, (0, across * COLUMNS - columns, 0, down * ROWS - rows))
    return dense.view(down, *_SIZES[1:4], across, *_SIZES[5:]).permute(_FORWARD).reshape(-1, 4, 2, 32, 128)


def _join(units: torch.Tensor, across: int) -> torch.Tensor:
    """The inverse, with the padding."""
    sizes = (len(units) // across, *_SIZES[1:4], across, *_SIZES[5:])
    return units.view([sizes[i] for i in _FORWARD]).permute(_BACKWARD).reshape(-1, across * COLUMNS)


def _place(kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where streams go: kept [units, 4, 2, 32, 128] -> (line, bank) of the first entry [units, 4, 2, 32], lines [units].

    Block by block, the longest stream goes to the bank that is emptiest; low and high streams apart.
    """
    runs = kept.sum(-1)
    line, bank = torch.zeros_like(runs), torch.zeros_like(runs)
    height = torch.zeros_like(runs[:, 0])
    for block in range(4):
        stream = runs[:, block].argsort(dim=-1, descending=True, stable=True)
        place = height.argsort(dim=-1, stable=True)
        line[:, block].scatter_(-1, stream, height.gather(-1, place))
        bank[:, block].scatter_(-1, stream, place)
        height.scatter_add_(-1, place, runs[:, block].gather(-1, stream))
    return line, bank, height.amax((-1, -2))


def _header(kept: torch.Tensor, line: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    """Bits and begins of units [units, 36, 32] int32."""
    units = len(kept)
    bits = kept.view(units, 4, 2, 8, 4, 2, 2, 4, 2, 4)  # unit, block, half, g, t, q/2, q%2, i, s, r
    bits = bits.permute(0, 1, 5, 3, 4, 6, 8, 7, 9, 2)  # unit, block, q/2, g, t, q%2, s, i, r, half
    weights = 1 << torch.arange(8, device=kept.device, dtype=torch.uint8)
    words = (bits.reshape(-1, 8) * weights).sum(-1, dtype=torch.uint8).view(torch.int32)
    begins = (line * 32 + bank).transpose(2, 3).to(torch.int16).contiguous().view(torch.int32)  # unit, block, lane
    return torch.cat([words.view(units, 32, 32), begins.view(units, 4, 32)], 1)


def _entries(kept, line, bank, first) -> torch.Tensor:
    """Index of each kept entry, in order, among the 16-bit numbers of the data; ``first`` [units] in lines."""
    unit, block, half, lane, _ = kept.nonzero(as_tuple=True)
    order = (kept.cumsum(-1) - 1)[kept]
    at = first[unit] + HEADER + line[unit, block, half, lane] + order
    return at * 64 + bank[unit, block, half, lane] * 2 + half


def _pack_rows(bits: torch.Tensor, across: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bit patterns [rows, columns] -> data [lines, 32], lines of each unit."""
    entries = _split(bits, across)
    kept = entries != 0
    line, bank, height = _place(kept)
    lines = height + HEADER
    first = lines.cumsum(0) - lines
    data = torch.zeros((int(lines.sum()), 32), dtype=torch.int32, device=bits.device)
    data[first[:, None] + torch.arange(HEADER, device=bits.device)] = _header(kept, line, bank)
    data.view(torch.int16).view(-1)[_entries(kept, line, bank, first)] = entries[kept]
    return data, lines


def _parts(tensors, shape):
    """(first row, data, lines of each unit, header, kept [units, 4, 2, 32, 128]) of a bounded number of rows."""
    down, across = _units(shape)
    step = rows_at_a_time(across * COLUMNS, ROWS) // ROWS
    starts = tensors["starts"].long()
    for group in range(0, down, step):
        here = starts[group * across : min(down, group + step) * across + 1]
        data = tensors["data"][int(here[0]) : int(here[-1])]
        first = (here - here[0])[:-1]
        header = data[first[:, None] + torch.arange(HEADER, device=data.device)]
        words = header[:, :32].contiguous().view(torch.uint8)
        bits = (words[..., None] >> torch.arange(8, device=data.device, dtype=torch.uint8)) & 1
        bits = bits.view(-1, 4, 2, 8, 4, 2, 2, 4, 4, 2)  # unit, block, q/2, g, t, q%2, s, i, r, half
        kept = bits.permute(0, 1, 9, 3, 4, 2, 5, 7, 6, 8).reshape(-1, 4, 2, 32, 128).bool()
        yield group * ROWS, data, here.diff(), header, kept


def unpack(tensors: dict[str, torch.Tensor], shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """The dense weight [rows, columns], bit for bit."""
    if tensors["data"].is_cuda and unavailable(tensors["data"].device) is None:
        return PairedPlan.of(tensors, NAMES, shape, dtype, None).dense()
    dense = torch.zeros(shape, dtype=torch.int16, device=tensors["data"].device)
    _, across = _units(shape)
    for top, data, lines, _, kept in _parts(tensors, shape):
        line, bank, _ = _place(kept)
        entries = torch.zeros(kept.shape, dtype=torch.int16, device=data.device)
        entries[kept] = data.reshape(-1).view(torch.int16)[_entries(kept, line, bank, lines.cumsum(0) - lines)]
        part = _join(entries, across)[: shape[0] - top, : shape[1]]
        dense[top : top + len(part)] = part
    return dense.view(dtype)


def check(tensors: dict[str, torch.Tensor], shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Raises ValueError for any tensors with which the kernel would read or write what it must not."""
    if not supports(dtype) or shape[1] < 1:
        raise ValueError(f"the paired layout holds bfloat16 and float16 of at least 1 column, not {dtype} {shape}")
    check_tensors(tensors, dict(zip(NAMES, (torch.int32, torch.int32), strict=True)))
    data, starts = tensors["data"], tensors["starts"]
    down, across = _units(shape)
    if starts.shape != (down * across + 1,) or data.dim() != 2 or data.shape[1] != 32:
        raise ValueError(
            f"paired: {shape[0]}x{shape[1]} needs starts [{down * across + 1}] and data [any, 32]; "
            f"they are {list(starts.shape)} and {list(data.shape)}"
        )
    lines = starts.long().diff()
    if int(starts[0]) != 0 or int(starts[-1]) != len(data) or (len(lines) and int(lines.min()) < HEADER):
        raise ValueError(f"paired: starts do not rise from 0 to {len(data)} by at least {HEADER} lines a unit")
    for top, _, lines, header, kept in _parts(tensors, shape):
        where = f"paired: units of rows {top} and on"
        line, bank, height = _place(kept)
        if not torch.equal(height + HEADER, lines):
            raise ValueError(f"{where} do not have as many lines as their bits ask for")
        if not torch.equal(_header(kept, line, bank)[:, 32:], header[:, 32:]):
            raise ValueError(f"{where} have streams that do not begin where their bits put them")
        outside = _join(kept.to(torch.uint8), across)
        if bool(outside[:, shape[1] :].any()) or bool(outside[max(0, shape[0] - top) :].any()):
            raise ValueError(f"{where} have weights outside the {shape[0]}x{shape[1]} matrix")


def nbytes(tensors: dict[str, torch.Tensor]) -> int:
    """Bytes in memory."""
    return sum(tensors[name].nbytes for name in NAMES)


# ------------------------------------------------------------------------------------------------ the product


def prepare(tensors: dict[str, torch.Tensor], shape: tuple[int, int], dtype: torch.dtype, bias: torch.Tensor | None):
    """A function of ``x [tokens, columns]`` of the weight's dtype that returns ``x W^T + bias`` [tokens, rows].

    Kernels are compiled at the first call with up to 8 and up to 16 tokens; call once before capturing a CUDA graph.
    """
    return PairedPlan({name: tensors[name] for name in NAMES}, tuple(shape), dtype, bias)


def linear(x, tensors, shape, dtype, bias):
    """``x W^T + bias`` for ``x [tokens, columns]``."""
    return PairedPlan.of(tensors, NAMES, shape, dtype, bias)(x)


class PairedPlan(Plan):
    """The launches of one packed weight, made as they are asked for."""

    name = "paired"

    def __init__(self, tensors, shape, dtype, bias):
        super().__init__(tensors, shape, dtype, bias)
        self.down, self.across = _units(shape)
        lines = tensors["starts"].diff()
        self.slot = 128 * (int(lines.max()) if len(lines) else HEADER)

    def passes(self, tokens: int) -> int | None:
        return None if tokens > PASSES * TOKENS else TOKENS

    def bucket(self, tokens: int) -> int:
        return -(-tokens // 8) * 8

    def ready(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of x are read 16 bytes at a time."""
        if self.columns % 8:
            x = F.pad(x, (0, 8 - self.columns % 8))
        x = x if x.is_contiguous() else x.contiguous()
        return x if x.data_ptr() % 16 == 0 else x.clone()

    def candidates(self, tokens: int) -> list[dict[str, int]]:
        """Configurations worth trying, the one that is likeliest the fastest first."""
        multiprocessors, shared = block_limits(self.device)
        found = []
        for groups, stages in ((1, 2), (2, 2), (4, 2), (4, 1), (2, 1), (8, 1), (1, 1)):
            room = (shared + 1024) // (self._shared(groups, stages, tokens) + 1024)
            if room and groups <= self.across and stages <= -(-self.across // groups):
                # more blocks at a time leave each thread fewer registers: no more than there are to go round
                blocks = min(room, 8 // groups, -(-self.down // multiprocessors))
                found.append({"groups": groups, "stages": stages, "blocks": blocks})
        enough = 1 if self.down >= 3 * multiprocessors else 2 if self.down > multiprocessors else 4
        return sorted(found, key=lambda c: (abs(c["groups"] - min(enough, self.across)), -c["stages"]))[:5]

    def _shared(self, groups: int, stages: int, tokens: int) -> int:
        return 128 + max(groups * stages * self.slot, groups * 4096 * -(-tokens // 8))

    def launch(self, tokens: int, groups: int, stages: int, blocks: int) -> nvrtc.Launch:
        """One configuration of the kernel, with its launch."""
        defines = {"HALF": dtype_flag(self.dtype), "EARLY": self.early, "TILES": -(-tokens // 8)}
        defines |= {"GROUPS": groups, "STAGES": stages, "BLOCKS": blocks}
        function = nvrtc.build(read_source("paired.cu"), "paired_linear", defines, self.device)
        width = -(-self.columns // 8) * 8
        fixed = [*(self.tensors[n] for n in NAMES), self.bias, tokens, self.rows, width, self.across, self.slot]
        shared = self._shared(groups, stages, tokens)
        return nvrtc.Launch(function, (self.down, 1), 128 * groups, shared, 2, fixed, early=bool(self.early))

    def make_unpack(self) -> nvrtc.Launch:
        defines = {"HALF": dtype_flag(self.dtype), "EARLY": 0, "TILES": 1, "GROUPS": 1, "STAGES": 1, "BLOCKS": 4}
        function = nvrtc.build(read_source("paired.cu"), "paired_unpack", defines, self.device)
        fixed = [*(self.tensors[n] for n in NAMES), self.rows, self.columns, self.across, self.slot]
        return nvrtc.Launch(function, (self.down * self.across, 1), 128, 128 + self.slot, 1, fixed)
