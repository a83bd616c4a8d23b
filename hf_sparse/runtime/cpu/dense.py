"""``y = x W^T + b`` with the dense ``W`` of a stock layer, read in place, for 1 to 8 tokens.

Some weights stay dense, foremost a ``lm_head`` tied to the embedding. torch's own product of one token with a bfloat16 matrix
is limited by arithmetic (about half of the memory's bandwidth on two Zen 4 cores), its float32 one uses one thread; this one
streams the rows. bfloat16 x bfloat16 and float32 x float32; sums in float32, bias added before rounding.
"""

import ctypes
from collections.abc import Callable

import torch

from hf_sparse.runtime.cpu import layout, library
from hf_sparse.runtime.cpu.multiply import check_bias

__all__ = ["dense_linear", "prepare_dense"]

KERNEL_TOKENS = 8


def prepare_dense(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function ``x [..., columns] -> [..., rows]``; it keeps the weight alive and sees changes made to it in place.

    Activations of another dtype than the weight, more than 8 tokens, and machines without the kernel go to ``F.linear``.

    Raises:
        ValueError: the weight is not a contiguous float32 or bfloat16 matrix on the CPU.
    """
    if weight.dim() != 2 or weight.dtype not in (torch.float32, torch.bfloat16) or not layout.is_plain(weight):
        raise ValueError(
            "the weight is a contiguous float32 or bfloat16 matrix on the CPU, "
            f"got {weight.dtype} {list(weight.shape)} on {weight.device}"
        )
    weight = weight.detach()
    rows, columns = weight.shape
    check_bias(bias, rows)
    stock_bias = None if bias is None else bias.detach().to(weight.dtype)
    linear, code = torch.nn.functional.linear, library.isa_code()
    if not code or not weight.numel():
        return lambda x: linear(x, weight, stock_bias)
    bias = None if bias is None else bias.detach().to("cpu", torch.float32).contiguous()
    plan = layout.Plan(
        masks=weight.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        rows=rows,
        columns=columns,
        type=layout.TYPE_CODES[weight.dtype],
        isa=code,
    )
    address, run, dtype, threads = ctypes.addressof(plan), library.load().hfs_dense, weight.dtype, torch.get_num_threads

    def call(x: torch.Tensor) -> torch.Tensor:
        size = x.shape
        tokens = x.numel() // columns
        if tokens > KERNEL_TOKENS or x.dtype != dtype or size[-1] != columns or not x.is_cpu:
            return linear(x, weight, stock_bias)  # which also says what is wrong with x
        if not x.is_contiguous():
            x = x.contiguous()
        y = x.new_empty((*size[:-1], rows))
        if run(address, x.data_ptr(), y.data_ptr(), tokens, threads()):
            raise MemoryError(f"no memory to rearrange activations {list(size)}")
        return y

    call.keep = plan, weight, bias
    return call


def dense_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x W^T + b``; to call it again and again, ``prepare_dense`` once."""
    return prepare_dense(weight, bias)(x)
