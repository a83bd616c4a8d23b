"""The packed kernels as one ``torch.library`` operator, so that ``torch.compile`` and autograd can see them.

    torch.ops.hf_sparse.packed_linear(x [..., in], tensors, bias, layout, out, in, dtype) -> [..., out]

The compiler needs to know only the shape of the result (the fake implementation); the operator itself runs the layout's
kernel. The gradient is that with respect to the input, ``dy W``, by unpacking: adapters on top of a packed model can be
trained, the packed weight cannot.
"""

import torch

from hf_sparse.runtime.layouts import layout_module

__all__ = ["packed_linear"]


@torch.library.custom_op("hf_sparse::packed_linear", mutates_args=())
def packed_linear(
    x: torch.Tensor,
    tensors: list[torch.Tensor],
    bias: torch.Tensor | None,
    layout: str,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``y = x W^T + b`` with ``W`` packed in ``layout``; see ``PackedLinear``."""
    module, shape = layout_module(layout), (out_features, in_features)
    y = module.linear(x.reshape(-1, in_features), dict(zip(module.NAMES, tensors, strict=True)), shape, dtype, bias)
    return y.reshape(*x.shape[:-1], out_features)


@packed_linear.register_fake
def _(x, tensors, bias, layout, out_features, in_features, dtype):
    return x.new_empty(*x.shape[:-1], out_features)


def _keep_for_backward(ctx, inputs, output):
    _, tensors, _, ctx.layout, out_features, in_features, ctx.dtype = inputs
    ctx.save_for_backward(*tensors)
    ctx.shape = out_features, in_features


def _backward(ctx, gradient):
    module, tensors = layout_module(ctx.layout), ctx.saved_tensors
    weight = module.unpack(dict(zip(module.NAMES, tensors, strict=True)), ctx.shape, ctx.dtype)
    of_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
    return gradient @ weight.to(gradient.dtype), [None] * len(tensors), of_bias, None, None, None, None


packed_linear.register_autograd(_backward, setup_context=_keep_for_backward)
