"""A packed layer as one ``torch.library`` operator, so that ``torch.compile`` and autograd can see it.

    torch.ops.hf_sparse.packed_linear(x [..., in], handle, bias, out) -> [..., out]

``handle`` is a tensor of one byte that stands for the layer: its address finds the packed weight. The packed tensors themselves
are no arguments, because their sizes differ from layer to layer by the number of nonzeros: the compiler would take each size
for a new program, and after eight of them give up. The gradient is that with respect to the input, ``dy W``, by unpacking,
and to the bias: adapters on top of a packed model can be trained, the packed weight cannot.
"""

import weakref

import torch

__all__ = ["packed_linear", "register", "version_of"]

NAME = "hf_sparse::packed_linear"
# Not torch.library.custom_op: its checks cost more than the multiplication of a small layer.
torch.library.define(NAME, "(Tensor x, Tensor handle, Tensor? bias, int out_features) -> Tensor")

_layers: weakref.WeakValueDictionary = weakref.WeakValueDictionary()  # address of the handle -> layer


def register(layer) -> None:
    """From now on ``layer.handle`` stands for this layer, which has ``multiply(x, bias)`` and ``dense()``."""
    _layers[layer.handle.data_ptr()] = layer


def _layer_of(handle: torch.Tensor):
    layer = _layers.get(handle.data_ptr())
    if layer is None:
        raise RuntimeError(
            "this is no packed layer's handle: its address counts, so a copy of it (or of a dead layer's) is none"
        )
    return layer


def version_of(tensor: torch.Tensor | None) -> int | None:
    """A number that changes when the tensor is written to; None where torch does not count (inference mode)."""
    return None if tensor is None or tensor.is_inference() else tensor._version


@torch.library.impl(NAME, ("cpu", "cuda"))
def _run(x, handle, bias, out_features):
    return _layer_of(handle).multiply(x, bias)


@torch.library.register_fake(NAME)
def _(x, handle, bias, out_features):
    return x.new_empty(*x.shape[:-1], out_features)


def _keep_for_backward(ctx, inputs, output):
    _, handle, _, _ = inputs
    ctx.save_for_backward(handle)


def _backward(ctx, gradient):
    weight = _layer_of(ctx.saved_tensors[0]).dense()
    of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
    return gradient @ weight.to(gradient.dtype), None, of_bias, None


torch.library.register_autograd(NAME, _backward, setup_context=_keep_for_backward)

packed_linear = torch.ops.hf_sparse.packed_linear.default
