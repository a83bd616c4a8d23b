"""The layout ``panels``: exact bitmask panels for the CPU. ``layout.py`` has the bytes, ``multiply.py`` the products.

pack(weight) -> {"values", "masks", "offsets"}          unpack(tensors, shape, dtype) -> weight, bit for bit
prepare(tensors, shape, dtype, bias)(x) -> y            linear(x, tensors, shape, dtype, bias) -> y
"""

import torch

from hf_sparse.runtime.cpu import library
from hf_sparse.runtime.cpu.layout import NAMES, check, nbytes, pack_tiles, unpack, unpack_rows
from hf_sparse.runtime.cpu.multiply import prepare

__all__ = [
    "NAMES",
    "check",
    "linear",
    "nbytes",
    "pack",
    "pack_tiles",
    "prepare",
    "supports",
    "unavailable",
    "unpack",
    "unpack_rows",
]


def supports(dtype: torch.dtype) -> bool:
    """Whether weights of this dtype can be packed exactly: float32, bfloat16, float16."""
    return dtype in (torch.float32, torch.bfloat16, torch.float16)


def unavailable(device: torch.device | str) -> str | None:
    """Why packed weights cannot be multiplied with on this device, or None."""
    if torch.device(device).type != "cpu":
        return f"panels are for the CPU, not for {torch.device(device).type}"
    return library.missing()


def pack(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A whole matrix [rows, columns].

    Raises:
        ValueError: it is no matrix of a dtype that ``supports``.
    """
    if weight.dim() != 2 or not supports(weight.dtype):
        raise ValueError(f"panels hold float32, bfloat16 or float16 matrices, got {weight.dtype} {list(weight.shape)}")
    return pack_tiles([weight], tuple(weight.shape), weight.dtype)


def linear(x, tensors, shape, dtype, bias=None) -> torch.Tensor:
    """``x W^T + b``, x [..., columns]; to call it again and again, ``prepare`` once."""
    return prepare(tensors, shape, dtype, bias)(x)
