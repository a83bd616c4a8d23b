"""Moments: an optimizer's state of single weights, which starts afresh where a mask moved.

State is found by its size, whatever the optimizer calls it: a tensor with as many entries as the weight holds one for each
(momentum, exp_avg, exp_avg_sq). Factored moments (Adafactor's rows and columns) belong to no single weight and stay.
"""

import torch

from hf_sparse.training.sharding import local
from hf_sparse.training.weight import Weight

__all__ = ["moments", "reset_moments"]


def reset_moments(optimizer: torch.optim.Optimizer, weight: Weight, stayed: torch.Tensor) -> None:
    """Zeroes the optimizer's state of every weight that was dropped or grown."""
    for state in moments(optimizer, weight):
        torch.where(stayed.view(state.shape), state, state.new_zeros(()), out=state)


def moments(optimizer: torch.optim.Optimizer, weight: Weight) -> list[torch.Tensor]:
    """The optimizer's state that has an entry for every weight; factored moments (Adafactor) have not.

    Raises:
        ValueError: it is kept in a form that cannot be set to zero weight by weight (quantized).
    """
    found = []
    numel = weight.values().numel()
    for key, state in optimizer.state.get(weight.parameter, {}).items():
        if not isinstance(state, torch.Tensor) or local(state).numel() != numel or numel == 1:
            continue
        state = local(state)
        if not state.is_floating_point() or type(state) is not torch.Tensor:
            raise ValueError(
                f"{type(optimizer).__name__} keeps {key!r} of {weight.name} as {state.dtype} {type(state).__name__}, which "
                "cannot be set to zero weight by weight; use an optimizer with plain moments (torch.optim.AdamW), or a method "
                "whose masks do not grow (static, gmp)"
            )
        found.append(state)
    return found
