"""A linear layer whose weight stays dense and in place, multiplied by our own kernel for a few tokens on a CPU.

The output head of most small models is their embedding: tied, dense, and read in full for every token. Packing it would take
a second copy; but torch's product of one token with a matrix does not reach the bandwidth of memory, and a kernel that only
streams the rows does. The layer is an ``nn.Linear`` with the very same parameters (ties stay ties), only its call differs.
"""

import torch
from torch import nn

from hf_sparse.runtime.ops import version_of

__all__ = ["DenseLinear"]

MOST_TOKENS = 8


class DenseLinear(nn.Linear):
    """``nn.Linear`` with the parameters of ``layer``."""

    def __init__(self, layer: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self._call = self._prepared_for = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if (
            torch.compiler.is_compiling()
            or x.numel() > MOST_TOKENS * self.in_features
            or torch.is_grad_enabled()
            and (x.requires_grad or weight.requires_grad)
            or weight.device.type != "cpu"
        ):
            return super().forward(x)
        bias = self.bias
        key = weight.data_ptr(), weight.dtype, None if bias is None else bias.data_ptr(), version_of(bias)
        if key != self._prepared_for:  # moved, cast or tied to another tensor since the last call
            from hf_sparse.runtime.cpu.dense import prepare_dense

            self._call, self._prepared_for = prepare_dense(weight, bias), key
        return self._call(x)

    def __getstate__(self):
        return {**self.__dict__, "_call": None, "_prepared_for": None}
