"""The ``delta`` layout in Triton: where CUDA sources cannot be compiled (no NVRTC, or a GPU that is not NVIDIA's).

The same arithmetic as ``delta.cu``, as far as Triton can say it: a program takes a row, 32 octets at a time, unpacks the
nibbles into a tile [32, 8] and sums them up along both axes (``tl.cumsum``); with the stored base that gives the columns, from
which x is gathered through the cache. Shared memory cannot be addressed from Triton, nor can loads run ahead of the sums, so it
is the slower of the two by far: what it is for is that a packed model runs at all. More than 4 tokens unpack the weight.
"""

from __future__ import annotations  # the kernel below annotates with tl.constexpr before tl exists

import functools
import importlib.util

import torch

__all__ = ["installed", "linear"]

tl = None  # triton.language, bound by _kernel(): the kernel finds it among this module's globals
TOKENS = 4


def installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def linear(x: torch.Tensor, tensors: dict[str, torch.Tensor], shape: tuple[int, int], bias: torch.Tensor | None):
    """``x W^T + bias`` [tokens, rows] for ``x [tokens, columns]`` with at most 4 tokens."""
    rows, columns = shape
    if len(x) == 3:  # a tile's sides are powers of two
        return torch.cat([linear(x[:2], tensors, shape, bias), linear(x[2:], tensors, shape, bias)])
    x = x.contiguous()
    y = torch.empty((len(x), rows), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    values, gaps, row_start, bases = (tensors[name] for name in ("values", "gaps", "row_start", "bases"))
    sizes = dict(TOKENS=len(x), BIAS=bias is not None, OCTETS=32, num_warps=1)
    _kernel()[(rows,)](
        x, y, values, gaps, row_start, bases, x if bias is None else bias, rows, columns, bases.shape[1], **sizes
    )
    return y


def _delta_linear(
    x_ptr, y_ptr, values_ptr, gaps_ptr, start_ptr, bases_ptr, bias_ptr, rows, columns, blocks,
    TOKENS: tl.constexpr, BIAS: tl.constexpr, OCTETS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    begin = tl.load(start_ptr + row)
    end = tl.load(start_ptr + row + 1)
    octet = tl.arange(0, OCTETS)
    entry = tl.arange(0, 8)
    token = tl.arange(0, TOKENS)
    sums = tl.zeros([TOKENS], tl.float32)
    base_ptr = bases_ptr + row.to(tl.int64) * blocks
    at = begin
    while at < end:
        base = tl.load(base_ptr).to(tl.int32) & 0xFFFF
        base_ptr += 1
        inside = (at + octet) < end
        gaps = tl.load(gaps_ptr + at + octet, mask=inside, other=0)
        steps = ((gaps[:, None] >> (4 * entry)[None, :]) & 15) + 1
        total = tl.sum(steps, 1)
        column = base + (tl.cumsum(total, 0) - total)[:, None] + tl.cumsum(steps, 1) - 1
        here = inside[:, None] & (column < columns)
        values = tl.load(values_ptr + (at + octet)[:, None] * 8 + entry[None, :], mask=here, other=0.0).to(tl.float32)
        x_at = x_ptr + token[:, None, None] * columns + column[None, :, :]
        x = tl.load(x_at, mask=here[None, :, :] & (token >= 0)[:, None, None], other=0.0).to(tl.float32)
        sums += tl.sum(tl.sum(values[None, :, :] * x, 2), 1)
        at += OCTETS
    if BIAS:
        sums += tl.load(bias_ptr + row).to(tl.float32)
    tl.store(y_ptr + token * rows + row, sums.to(y_ptr.dtype.element_ty))


@functools.cache
def _kernel():
    global tl
    import triton
    import triton.language

    tl = triton.language
    return triton.jit(_delta_linear)
