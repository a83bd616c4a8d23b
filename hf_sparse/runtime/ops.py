"""The packed kernels as one ``torch.library`` operator, so that ``torch.compile`` and autograd can see them.

    torch.ops.hf_sparse.packed_linear(x [..., in], tensors, bias, layout, out, in, dtype) -> [..., out]

The compiler needs to know only the shape of the result (the fake implementation); the operator itself runs the layout's
kernel. The gradient is that with respect to the input, ``dy W``, by unpacking: adapters on top of a packed model can be
trained, the packed weight cannot.
"""

import torch

from hf_sparse.runtime.layouts import layout_module

__all__ = ["packed_linear", "version_of"]

NAME = "hf_sparse::packed_linear"
# Not torch.library.custom_op: its checks cost more than the multiplication of a small layer.
torch.library.define(
    NAME,
    "(Tensor x, Tensor[] tensors, Tensor? bias, str layout, int out_features, int in_features, ScalarType dtype) -> Tensor",
)


@torch.library.impl(NAME, ("cpu", "cuda"))
def _run(x, tensors, bias, layout, out_features, in_features, dtype):
    call = _prepared(tensors, bias, layout, (out_features, in_features), dtype)
    return call(x.reshape(-1, in_features)).view(*x.shape[:-1], out_features)


def version_of(tensor: torch.Tensor | None) -> int | None:
    """A number that changes when the tensor is written to; None where torch does not count (inference mode)."""
    return None if tensor is None or tensor.is_inference() else tensor._version


def _prepared(tensors, bias, layout, shape, dtype):
    """The prepared call of these very tensors, kept with the first of them: compiled code has no layer to keep it in."""
    key = [None if bias is None else bias.data_ptr(), version_of(bias), *(tensor.data_ptr() for tensor in tensors)]
    kept = getattr(tensors[0], "_hf_sparse_call", None)
    if kept is None or kept[0] != key:
        module = layout_module(layout)
        kept = key, module.prepare(dict(zip(module.NAMES, tensors, strict=True)), shape, dtype, bias)
        tensors[0]._hf_sparse_call = kept
    return kept[1]


@torch.library.register_fake(NAME)
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


torch.library.register_autograd(NAME, _backward, setup_context=_keep_for_backward)

packed_linear = torch.ops.hf_sparse.packed_linear.default
