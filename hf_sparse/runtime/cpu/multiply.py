"""``y = x W^T + b`` with ``W`` in panels: a function of x alone, prepared once for each weight.

The kernel takes up to 16 tokens (AVX2: 4) in one pass over a panel, and more in equal chunks while the panel is in the cache.
Beyond ``kernel_tokens`` it is faster to unpack rows of W, two megabytes at a time, into one scratch tile for torch to multiply
with. Measured on Zen 4: with bfloat16 that is from about 200 tokens on, with float32 or int8 never.

Sums are in float32 (int8: exact int32), the bias is added before
the result is rounded to the dtype of x:

    weights    activations          products
    float32    any float            float32
    bfloat16   bfloat16             vdpbf16ps where the machine has it (pairs summed in float32, denormals are zero), else exact
    bfloat16   float32, float16     exact, in float32
    float16    any float            exact, in float32
    int8       any float            activations rounded to 8 bits for each token: q = round(x 127/max|x|), exact int32 sums

A token with a NaN or an infinity gives NaN throughout with int8 weights; one whose largest entry is below 1e-30 counts as 0.

A call costs about 3 us of Python beyond the kernel. It may be made from several threads at once (ctypes releases the GIL) and
after a fork (a child computes on one thread, because OpenMP's other threads stay with the parent).
"""

import ctypes
import math
from collections.abc import Callable

import torch

from hf_sparse.runtime.cpu import layout, library

__all__ = ["prepare"]

TILE_BYTES = 2 << 20  # of unpacked rows; they stay in the cache between unpacking and multiplying
X_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def prepare(
    tensors: dict[str, torch.Tensor],
    shape: tuple[int, int],
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    dense_dtype: torch.dtype | None = None,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function ``x [..., columns] -> y [..., rows]`` of the dtype of x; it keeps the tensors alive.

    The tensors must have passed ``layout.check``: here only their sizes are looked at. Without a kernel the weight is
    unpacked once and kept dense, in ``dense_dtype`` (by default its own), and multiplied by torch in the dtype it has
    in common with x.

    Raises:
        ValueError: sizes do not fit together.
    """
    rows, columns = shape
    code = library.isa_code()
    check_bias(bias, rows)
    bias = None if bias is None else bias.detach().to("cpu", torch.float32).contiguous()
    if not code:
        return _dense(tensors, shape, dtype, bias, dense_dtype or dtype)
    plan = layout.plan(tensors, shape, dtype, code, bias)
    for tensor in tensors.values():
        library.load().hfs_huge_pages(tensor.data_ptr(), tensor.nbytes, 1)
    address, run, codes, threads = ctypes.addressof(plan), library.load().hfs_linear, X_CODES, torch.get_num_threads
    most = {kind: kernel_tokens(dtype, kind, code) for kind in X_CODES}

    def call(x: torch.Tensor) -> torch.Tensor:
        size = x.shape
        x_code = codes.get(x.dtype)
        if x_code is None or size[-1] != columns or not x.is_cpu:
            raise wrong_input(x, columns)
        tokens = x.numel() // columns if columns else size[:-1].numel()
        if tokens > most[x.dtype]:
            return in_tiles(x, tensors, shape, dtype, bias)
        if not x.is_contiguous():
            x = x.contiguous()
        y = x.new_empty((*size[:-1], rows))
        if run(address, x.data_ptr(), y.data_ptr(), tokens, x_code, threads()):
            raise MemoryError(f"no memory to rearrange activations {list(size)}")
        return y

    call.keep = plan, tensors, bias
    return call


def kernel_tokens(weights: torch.dtype, activations: torch.dtype, isa_code: int) -> float:
    """The largest number of tokens that goes to the kernel."""
    if weights == torch.int8:
        return math.inf
    if isa_code < library.ISA_CODES["avx512"]:
        return 64
    if weights == activations == torch.bfloat16 and isa_code == library.ISA_CODES["avx512_bf16"]:
        return 16 if library.load().hfs_amx() else 192
    return math.inf


def check_bias(bias: torch.Tensor | None, rows: int) -> None:
    if bias is not None and (tuple(bias.shape) != (rows,) or not bias.is_floating_point()):
        raise ValueError(
            f"the bias of a weight with {rows} rows has {rows} floats, got {bias.dtype} {list(bias.shape)}"
        )


def wrong_input(x: torch.Tensor, columns: int) -> ValueError:
    return ValueError(
        f"activations are float32, bfloat16 or float16 [..., {columns}] on the CPU, "
        f"got {x.dtype} {list(x.shape)} on {x.device}"
    )


def in_tiles(x, tensors, shape, dtype, bias: torch.Tensor | None) -> torch.Tensor:
    """Many tokens: unpack some rows, multiply, go on to the next; no more than ``TILE_BYTES`` of W are dense at a time."""
    (rows, columns), size = shape, x.shape
    kind = torch.promote_types(x.dtype, dtype)
    x = x.reshape(-1, columns)
    y = x.new_empty(len(x), rows)
    as_computed = x.to(kind)
    step = max(layout.ROWS, TILE_BYTES // max(1, columns * dtype.itemsize) // layout.ROWS * layout.ROWS)
    tile = torch.empty(min(step, rows), columns, dtype=dtype)
    for top in range(0, rows, step):
        part = layout.unpack_rows(tensors, shape, dtype, top, min(top + step, rows), tile).to(kind)
        part_bias = None if bias is None else bias[top : top + step].to(kind)
        y[:, top : top + step] = torch.nn.functional.linear(as_computed, part, part_bias)
    return y.view(*size[:-1], rows)


def _dense(tensors, shape, dtype, bias, dense_dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    layout.check_sizes(tensors, shape, dtype, tuple(tensors))
    weight = layout.unpack(tensors, shape, dtype)
    if dtype == torch.int8:
        weight = weight * tensors["scales"][:, None]
    weight = weight.to(dense_dtype)

    def call(x: torch.Tensor) -> torch.Tensor:
        if x.dtype not in X_CODES or x.shape[-1] != shape[1]:
            raise wrong_input(x, shape[1])
        kind = torch.promote_types(x.dtype, dense_dtype)
        y = torch.nn.functional.linear(x.to(kind), weight.to(kind), None if bias is None else bias.to(kind))
        return y.to(x.dtype)

    return call
