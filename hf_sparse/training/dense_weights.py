"""Dense weights behind a sparse forward: how SR-STE and Top-KAST train without a change to the model.

The model's parameter holds the masked weight, w = m * dense, so forward and backward are stock and sparse; the gradient of w
is the straight-through gradient of the dense weight. Around ``optimizer.step`` the two change places:

    before    parameter <- dense;  gradient += the method's penalty
    step      the optimizer trains the dense weight
    after     dense <- parameter;  m <- the mask of the dense weight, where it is due;  parameter <- m * dense

It costs one more copy of the sparse weights, and at no moment does a saved model hold anything but its masked weights (the
dense ones are buffers beside them, in checkpoints only). The penalty is added after clipping.
"""

import torch

from hf_sparse.training.sharding import local
from hf_sparse.training.straight_through import sr_ste_decay_, top_kast_penalty_
from hf_sparse.training.topology import masks_by_score
from hf_sparse.training.weight import Weight

__all__ = ["begin", "choose", "swap_in", "swap_out"]


@torch.no_grad()
def begin(weights: list[Weight], method: str, options: dict) -> None:
    """Keeps the dense weights aside and chooses the first masks from them."""
    for weight in weights:
        if weight.companion("dense") is None:
            weight.put("dense", weight.values().clone())
    choose(weights, method, options)


@torch.no_grad()
def choose(weights: list[Weight], method: str, options: dict) -> None:
    """Masks by the magnitude of the dense weights; for Top-KAST also the set that receives gradients."""
    size = [weight.companion("dense").abs() for weight in weights]
    for weight, mask in zip(weights, masks_by_score(weights, size, [w.sparsity for w in weights]), strict=True):
        weight.put("mask", mask)
    if method == "top-kast":
        wider = [_backward_sparsity(weight, options) for weight in weights]
        for weight, mask in zip(weights, masks_by_score(weights, size, wider), strict=True):
            weight.put("trained", mask)


def _backward_sparsity(weight: Weight, options: dict) -> float:
    """What receives no gradient: never more than what the forward leaves out."""
    return min(weight.sparsity, options["backward_sparsity"])


@torch.no_grad()
def swap_in(weights: list[Weight], method: str, options: dict, scale: float = 1.0) -> None:
    """Before the optimizer's step: the dense weights in the parameters, the penalty in their gradients."""
    for weight in weights:
        dense = weight.companion("dense")
        weight.values().copy_(dense)
        gradient = weight.parameter.grad
        if gradient is None:
            continue
        gradient = local(gradient)
        if method == "sr-ste":
            sr_ste_decay_(gradient, dense, weight.mask, options["decay"] * scale)
        else:
            density = 1.0 - weight.sparsity
            trained = weight.companion("trained")
            top_kast_penalty_(gradient, dense, weight.mask, trained, density, options["strength"] * scale)


@torch.no_grad()
def swap_out(weights: list[Weight], method: str, options: dict, refresh: bool) -> None:
    """After the step: the trained dense weights aside, new masks where they are due, masked weights in the parameters."""
    for weight in weights:
        values, dense = weight.values(), weight.companion("dense")
        if method == "top-kast":  # weights without gradients wait unchanged, whatever decay the optimizer adds
            torch.where(weight.companion("trained"), values, dense, out=dense)
        else:
            dense.copy_(values)
    if refresh:
        choose(weights, method, options)
    for weight in weights:
        values, dense = weight.values(), weight.companion("dense")
        torch.where(weight.mask, dense, dense.new_zeros(()), out=values)
