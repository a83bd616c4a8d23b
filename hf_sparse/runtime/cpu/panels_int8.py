"""The layout ``panels-int8``: weights rounded to 8 bits, one scale a row, in the panels of ``layout.py``.

    q = round(w / s), s = max|w| / 127 over the row        values int8, scales float32 [rows], sums int32 [rows]

Symmetric, so zeros stay zero and the mask of the weight stays as it is but for entries that round to zero, those below
half a step (max|w| / 254 of their row): they become zeros and are left out as well. ``sums`` is the sum of each row of q;
AVX-512 multiplies unsigned activations (q + 128) and needs it to take the 128 off again.

Activations are rounded to 8 bits for each token in the call (``multiply.py``). At 70% zeros 0.425 bytes an entry, 0.21 of
dense bfloat16.
"""

from collections.abc import Iterable

import torch

from hf_sparse.runtime.cpu import layout
from hf_sparse.runtime.cpu.layout import nbytes
from hf_sparse.runtime.cpu.multiply import prepare as _prepare
from hf_sparse.runtime.cpu.panels import unavailable

__all__ = [
    "NAMES",
    "check",
    "linear",
    "nbytes",
    "pack",
    "pack_tiles",
    "prepare",
    "quantize",
    "supports",
    "unavailable",
    "unpack",
]

NAMES = (*layout.NAMES, "scales", "sums")
MAX_COLUMNS = 1 << 17  # 127 * 128 * columns has to fit into int32


def supports(dtype: torch.dtype) -> bool:
    """Whether weights of this dtype can be rounded to 8 bits: any float of 16 or 32 bits."""
    return dtype in (torch.float32, torch.bfloat16, torch.float16)


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``q`` int8 in -127 .. 127 and the scale of each row: ``weight ~ q * scales[:, None]``, off by at most half a scale.

    Raises:
        ValueError: NaN or infinite weights.
    """
    weight = weight.detach().float()
    largest = weight.abs().amax(dim=1) if weight.shape[1] else weight.new_zeros(len(weight))
    if not torch.isfinite(largest).all():
        raise ValueError("weights with NaN or infinite entries cannot be rounded to 8 bits")
    scales = largest / 127
    # A row whose scale underflows is all zeros.
    q = torch.where(scales[:, None] > 0, weight / scales[:, None], 0).round_().clamp_(-127, 127)
    return q.to(torch.int8), scales


def pack(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Round and pack a whole matrix [rows, columns]."""
    return pack_tiles([weight], tuple(weight.shape), weight.dtype)


def pack_tiles(tiles: Iterable[torch.Tensor], shape: tuple[int, int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Round and pack a matrix that arrives as tiles of rows (``layout.pack_tiles``); ``dtype`` is that of the dense weight.

    Raises:
        ValueError: as ``quantize``; more than 131072 columns, whose sums would not fit into 32 bits.
    """
    if shape[1] > MAX_COLUMNS:
        raise ValueError(f"panels-int8 sum in 32 bits: at most {MAX_COLUMNS} columns, got {shape[1]}")
    scales, sums = [], []

    def rounded():
        for tile in tiles:
            q, scale = quantize(tile.to("cpu", dtype))
            scales.append(scale)
            sums.append(q.sum(dim=1, dtype=torch.int32))
            yield q

    tensors = layout.pack_tiles(rounded(), shape, torch.int8)
    empty = torch.empty(0)
    return tensors | {"scales": torch.cat([empty, *scales]), "sums": torch.cat([empty.int(), *sums])}


def unpack(tensors: dict[str, torch.Tensor], shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """The rounded weight, dense, in ``dtype``."""
    return (layout.unpack(tensors, shape, torch.int8) * tensors["scales"][:, None]).to(dtype)


def check(tensors: dict[str, torch.Tensor], shape: tuple[int, int], dtype: torch.dtype) -> None:
    """As ``layout.check``, and scales and sums have a float and an integer for each row, the sums being those of the rows.

    Raises:
        ValueError: otherwise.
    """
    if len(shape) == 2 and shape[1] > MAX_COLUMNS:
        raise ValueError(f"panels-int8 have at most {MAX_COLUMNS} columns, got {shape[1]}")
    layout.check(tensors, shape, torch.int8, NAMES)
    layout.require(tensors, "scales", torch.float32, (shape[0],), shape)
    layout.require(tensors, "sums", torch.int32, (shape[0],), shape)
    for top in range(0, shape[0], 1024):
        q = layout.unpack_rows(tensors, shape, torch.int8, top, min(top + 1024, shape[0]))
        if not torch.equal(q.sum(dim=1, dtype=torch.int32), tensors["sums"][top : top + 1024]):
            raise ValueError(f"sums are not those of the rows (rows {top} to {top + len(q) - 1})")


def prepare(tensors, shape, dtype, bias=None):
    """See ``multiply.prepare``; ``dtype``, that of the dense weight, matters only where there is no kernel."""
    return _prepare(tensors, shape, torch.int8, bias, dtype)


def linear(x, tensors, shape, dtype, bias=None) -> torch.Tensor:
    """``x W^T + b``, x [..., columns]; to call it again and again, ``prepare`` once."""
    return prepare(tensors, shape, dtype, bias)(x)
