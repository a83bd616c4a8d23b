"""The ``2:4`` layout: the GPU's own sparse tensor cores, through torch and cuSPARSELt; for prompts and large batches.

Only for weights of which every four consecutive inputs keep at most two (``--pattern 2:4``):

    compressed  [9/16 rows * columns]  bfloat16 or float16   values and 2-bit places, in an order cuSPARSELt keeps to itself

Sparse tensor cores halve the arithmetic, so they can gain where arithmetic is the limit; with few tokens the bytes are, and
the other layouts move fewer. cuSPARSELt has several kernels for a product, and its default can be half as fast as the best:
on one H200 (torch 2.11) 4096 x 4096 with 2,048 tokens takes 87 us dense, 130 by the default, 63 by the best. So the library
tries them once for each shape of at least a million entries, with 2,048 tokens: what it finds there is within 3% of the best
from 1,500 tokens on, where 2:4 gains, and ahead of the default everywhere. It is not asked for float16, with which its search
meets an illegal instruction whatever the shape, after which a process has lost the GPU, nor for small weights, with which it
sometimes does.
Places are two bits within their group of four, so no content of ``compressed`` can lead a kernel outside of x.
"""

import functools
import warnings

import torch
import torch.nn.functional as F

from hf_sparse.patterns import NM

__all__ = ["NAMES", "check", "fits", "linear", "nbytes", "pack_tiles", "prepare", "supports", "unavailable", "unpack"]

NAMES = ("compressed",)
PATTERN = NM(2, 4)
MULTIPLE = 64  # rows and columns; torch itself allows 16, but smaller weights gain nothing
TOKENS = 8  # x is padded to a multiple of
WORTH_SEARCHING = 1 << 20  # entries of a weight
PROMPT = 2048  # tokens to search with
_kernels: dict[tuple, int] = {}
_COLUMNS_AT_ONCE = 2048  # of the identity that unpacking multiplies with


def supports(dtype: torch.dtype) -> bool:
    """Whether weights of this dtype can be packed."""
    return dtype in (torch.bfloat16, torch.float16)


def unavailable(device: torch.device) -> str | None:
    """Why the kernel cannot run on a device, or None."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"2:4 kernels run on NVIDIA GPUs, not on {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "2:4 tensor cores need compute capability 8.0"
    return None if torch.backends.cusparselt.is_available() else "this torch comes without cuSPARSELt"


def fits(weight: torch.Tensor) -> bool:
    """Whether a dense weight [rows, columns] is 2:4 and finite, in a shape that the kernels take.

    Unpacking multiplies with the identity, in which an infinity would turn zeros into NaN.
    """
    rows, columns = weight.shape
    if rows % MULTIPLE or columns % MULTIPLE or not supports(weight.dtype) or not weight.numel():
        return False
    return PATTERN.check(weight) and bool(weight.isfinite().all())


def pack_tiles(tiles, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Packs a weight that comes as dense row tiles, on their device.

    Raises:
        ValueError: it is not 2:4, not finite, or of a shape or dtype that the kernels do not take.
    """
    weight = torch.cat(list(tiles))
    if weight.shape != shape or weight.dtype != dtype or not fits(weight):
        raise ValueError(
            f"the 2:4 layout takes finite bfloat16 and float16 weights with two nonzeros in four and multiples of "
            f"{MULTIPLE} rows and columns; this one is {weight.dtype} {list(weight.shape)}, or has other zeros"
        )
    return {"compressed": torch._cslt_compress(weight)}


def unpack(tensors: dict[str, torch.Tensor], shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """The dense weight [rows, columns]: its product with the identity, in which each sum has one term that is not zero."""
    compressed, (_, columns) = tensors["compressed"], shape
    parts = []
    for left in range(0, columns, _COLUMNS_AT_ONCE):
        width = min(_COLUMNS_AT_ONCE, columns - left)
        unit = torch.zeros(columns, width, dtype=dtype, device=compressed.device)
        unit[left : left + width].fill_diagonal_(1)
        parts.append(torch._cslt_sparse_mm(compressed, unit))
    return torch.cat(parts, 1)


@functools.lru_cache(maxsize=64)
def _compressed_size(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> int:
    return torch._cslt_compress(torch.zeros(shape, dtype=dtype, device=device)).numel()


def check(tensors: dict[str, torch.Tensor], shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Raises ValueError for any tensors with which the kernel would read or write what it must not."""
    if set(tensors) != set(NAMES):
        raise ValueError(f"the packed weight has tensors {sorted(tensors)}; it must have {sorted(NAMES)}")
    compressed = tensors["compressed"]
    if not supports(dtype) or shape[0] % MULTIPLE or shape[1] % MULTIPLE:
        raise ValueError(f"2:4: {dtype} {list(shape)} is not what the kernels take")
    size = _compressed_size(tuple(shape), dtype, compressed.device)
    if compressed.dtype != dtype or compressed.numel() != size or not compressed.is_contiguous():
        raise ValueError(
            f"2:4: a {dtype} weight {list(shape)} has {size} compressed entries; these are {compressed.numel()} of "
            f"{compressed.dtype}"
        )


def nbytes(tensors: dict[str, torch.Tensor]) -> int:
    """Bytes in memory."""
    return tensors["compressed"].nbytes


def prepare(tensors: dict[str, torch.Tensor], shape: tuple[int, int], dtype: torch.dtype, bias: torch.Tensor | None):
    """A function of ``x [tokens, columns]`` of the weight's dtype that returns ``x W^T + bias`` [tokens, rows]."""
    _kernel(tensors["compressed"], bias, tuple(shape))  # now, not in the midst of recording a graph
    return functools.partial(linear, tensors=tensors, shape=tuple(shape), dtype=dtype, bias=bias)


def linear(x, tensors, shape, dtype, bias):
    """``x W^T + bias`` for ``x [tokens, columns]``."""
    compressed = tensors["compressed"]
    if x.dtype != dtype or x.dim() != 2 or x.shape[1] != shape[1] or x.device != compressed.device:
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)} on {x.device}; this packed weight takes {dtype} [tokens, {shape[1]}] on "
            f"{compressed.device}"
        )
    tokens = len(x)
    if tokens == 0:
        return x.new_zeros((0, shape[0]))
    if tokens % TOKENS:
        x = F.pad(x, (0, 0, 0, -tokens % TOKENS))
    bias, x = None if bias is None else bias.detach(), x.contiguous().t()
    kernel = _kernel(compressed, bias, tuple(shape))
    return torch._cslt_sparse_mm(compressed, x, bias=bias, transpose_result=True, alg_id=kernel)[:tokens]


def _kernel(compressed: torch.Tensor, bias: torch.Tensor | None, shape: tuple[int, int]) -> int:
    """The library's number of its fastest kernel for a prompt; 0, its default, where it is not to be asked."""
    key = shape, compressed.dtype, bias is not None, compressed.device
    if key not in _kernels:
        searchable = compressed.dtype == torch.bfloat16 and shape[0] * shape[1] >= WORTH_SEARCHING
        if not searchable or torch.cuda.is_current_stream_capturing():
            return 0
        x = torch.zeros(PROMPT, shape[1], dtype=compressed.dtype, device=compressed.device)
        bias = None if bias is None else bias.detach()
        with warnings.catch_warnings():
            # it is to move to another name, which torch 2.11 lacks in part
            warnings.simplefilter("ignore", UserWarning)
            _kernels[key] = torch._cslt_sparse_mm_search(compressed, x.t(), bias=bias, transpose_result=True)
    return _kernels[key]
