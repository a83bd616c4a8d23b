"""The layer that takes the place of ``nn.Linear`` (and of GPT-2's ``Conv1D``) when its weight is packed.

It has the name, the bias and the call of the layer it replaces. Its weight is a handful of tensors in one of the layouts
(buffers, so that ``to`` and ``get_memory_footprint`` see them), and reaches the outside as the dense one:

    state_dict()        gives ``weight`` dense: what is saved from a packed model is a stock checkpoint
    load_state_dict()   takes ``weight`` dense, and packs it
    layer.weight        the dense weight, unpacked anew at every access: for code that looks, not for code that runs
    to("cuda")          packs it in the layout of that device; ``to(torch.bfloat16)`` rounds and packs it

The forward pass calls the kernel directly; under ``torch.compile``, or where a gradient with respect to the input is
asked for (adapters on top of a packed model), it goes through the operator of ``ops``.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from hf_sparse.runtime import ops
from hf_sparse.runtime.layouts import LAYOUTS, layout_module, layouts_for
from hf_sparse.runtime.ops import version_of

__all__ = ["PackedLinear", "positive_zeros", "row_tiles_of"]

TILE_ROWS = 1024  # of a dense weight that is packed tile by tile; a multiple of every layout's panel


def row_tiles_of(weight: torch.Tensor, rows: int = TILE_ROWS) -> Iterator[torch.Tensor]:
    """The rows of a dense matrix in tiles, contiguous each, to be packed."""
    return positive_zeros(weight[top : top + rows].contiguous() for top in range(0, max(1, len(weight)), rows))


def positive_zeros(tiles: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The same tiles with -0.0 as 0.0. A layout keeps every bit pattern but that of 0.0, and half of the zeros of a weight
    that was masked by multiplication (``weight *= mask``) are negative: kept, they would take as much as weights."""
    for tile in tiles:
        yield tile.masked_fill(tile == 0, 0)


class PackedLinear(nn.Module):
    """``y = x W^T + b`` with a packed ``W`` [out_features, in_features].

    Args:
        layout: a name of ``layouts.LAYOUTS``; it says which device the tensors are on.
        tensors: the packed weight.
        shape: (out_features, in_features).
        dtype: of the weight.
        bias: [out_features] or None.
        transposed: the layer replaced stored its weight ``[in, out]`` (``Conv1D``), and state dicts have it like that.

    Raises:
        ValueError: the tensors are not a weight of this layout, shape and dtype.
    """

    def __init__(self, layout, tensors, shape, dtype, bias=None, *, transposed=False):
        super().__init__()
        self.out_features, self.in_features = shape
        self.dtype, self.transposed = dtype, transposed
        self.register_parameter("bias", bias)
        self.layout = self._bias_key = None
        self._set(layout, tensors)

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The packed weight."""
        return {name: self._buffers[name] for name in self._names}

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight in memory."""
        return layout_module(self.layout).nbytes(self.tensors)

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight as the replaced layer stored it; a new tensor at every access."""
        dense = self.dense()
        return dense.t().contiguous() if self.transposed else dense

    def dense(self) -> torch.Tensor:
        """The dense weight [out_features, in_features], unpacked anew."""
        return layout_module(self.layout).unpack(self.tensors, self.shape, self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.bias
        learns = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        if learns or torch.compiler.is_compiling():
            return ops.packed_linear(x, self.handle, bias, self.out_features)
        return self.multiply(x, bias)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x W^T + bias`` by the kernel, for ``x [..., in_features]``."""
        if self._call is None or (bias is not None and self._bias_key != (bias.data_ptr(), version_of(bias))):
            if bias is not None:  # a prepared call may hold a copy of it
                self._bias_key = bias.data_ptr(), version_of(bias)
            self._call = layout_module(self.layout).prepare(self.tensors, self.shape, self.dtype, bias)
        if x.dim() == 2:
            return self._call(x)
        return self._call(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        share = self.nbytes / (self.out_features * self.in_features * self.dtype.itemsize)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"layout={self.layout}, {share:.0%} of dense"
        )

    # -- the packed tensors

    def _set(self, layout: str, tensors: dict[str, torch.Tensor]) -> None:
        layout_module(layout).check(tensors, self.shape, self.dtype)
        for name in self._names if self.layout else ():
            del self._buffers[name]
        self.layout, self._names, self._call = layout, tuple(tensors), None
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)
        self._set_handle()

    def _set_handle(self) -> None:
        """A new tensor whose address stands for this layer where there are only tensors (``ops``)."""
        device = next(iter(self.tensors.values())).device
        self.register_buffer("handle", torch.empty(1, dtype=torch.uint8, device=device), persistent=False)
        ops.register(self)

    def _apply(self, fn, recurse=True):
        """What ``to``, ``cuda`` and ``half`` do: another device or dtype of the weight means another packing."""
        like = fn(torch.empty(0, dtype=self.dtype, device=next(iter(self.tensors.values())).device))
        if like.is_meta:
            raise NotImplementedError("a packed layer has no meta form: unpack(model) first")
        bias = None if self.bias is None else fn(self.bias.data)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)
        if like.dtype == self.dtype and like.device.type == LAYOUTS[self.layout].device:
            for name, tensor in self.tensors.items():  # moved, never cast: scales and gaps have dtypes of their own
                self._buffers[name] = tensor.to(like.device)
            self._call = None
            self._set_handle()
            return self
        layouts = layouts_for(like.device, like.dtype)
        if not layouts:
            raise ValueError(
                f"no layout for {like.dtype} weights on {like.device}: unpack(model) before moving it there"
            )
        tiles = (tile.to(like.device, like.dtype) for tile in row_tiles_of(self.dense()))
        self.dtype = like.dtype
        self._set(layouts[0], layout_module(layouts[0]).pack_tiles(tiles, self.shape, like.dtype))
        return self

    def __getstate__(self):
        # The prepared call is pointers; the tensors may lie in memory shared with other layers (``cpu.arena``).
        buffers = {name: tensor if tensor is None else tensor.clone() for name, tensor in self._buffers.items()}
        return {**self.__dict__, "_call": None, "_buffers": buffers}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._set_handle()

    # -- stock checkpoints

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        weight = state_dict.get(prefix + "weight")
        stored = self.shape[::-1] if self.transposed else self.shape
        if weight is None:
            missing.append(prefix + "weight")
        elif tuple(weight.shape) != stored:
            errors.append(f"size mismatch for {prefix}weight: {tuple(weight.shape)} in the file, {stored} here")
        else:
            matrix = weight.t() if self.transposed else weight
            device = next(iter(self.tensors.values())).device
            tiles = (tile.to(device, self.dtype) for tile in row_tiles_of(matrix))
            self._set(self.layout, layout_module(self.layout).pack_tiles(tiles, self.shape, self.dtype))
        if self.bias is not None:
            bias = state_dict.get(prefix + "bias")
            if bias is None:
                missing.append(prefix + "bias")
            else:
                with torch.no_grad():
                    self.bias.copy_(bias)
        self._call = None
