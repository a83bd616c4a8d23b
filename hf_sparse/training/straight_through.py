"""Training with dense weights behind a sparse forward: SR-STE (arxiv.org/abs/2102.04010) and Top-KAST (2106.03517).

Both keep all weights θ and show the network only the masked ones, w = m ⊙ θ, the mask taken anew from |θ|. The gradient
g = dL/dw passes straight through the mask to θ. The two differ in who receives it and in what is added:

    SR-STE      all of θ:      g + λ (1 - m) ⊙ θ                λ pulls masked weights to zero, so that a mask settles
    Top-KAST    θ in B only:   g + λ θ in A,  g + λ/D θ in B \\ A,  nothing outside B

with A the top D of |θ| (forward), B ⊃ A the top D + M (backward). B \\ A explores: its weights are trained as if they were
used, and decay 1/D times faster, so that they must prove themselves or fall behind. Weights outside B wait unchanged.

The penalty of Top-KAST is written as a weight decay, λ/2 (|θ_A|² + |θ_{B\\A}|² / D): L2, with the paper's factor 1/D on the
exploring weights. torch_topkast adds the norms themselves, |θ_A| + |θ_{B\\A}| / D (its ``p_forward`` is the forward
*sparsity*, so it divides by ``1 - p_forward``). Factor and direction are the same within A and within B \\ A, but the pull of
a norm does not shrink with the weights and depends on how many share it; a decay reads like the optimizer's own.

All functions take plain tensors of one weight in any layout and change nothing but what ends in ``_``.
"""

import torch

__all__ = ["sr_ste_decay_", "top_kast_penalty_"]


@torch.no_grad()
def sr_ste_decay_(gradient: torch.Tensor, dense: torch.Tensor, mask: torch.Tensor, decay: float = 2e-4) -> torch.Tensor:
    """Adds ``decay * dense`` to the gradient where the mask is False, in place.

    Args:
        gradient: dL/dw of the masked weight, passed on to the dense one; changed.
        dense: θ, the same shape.
        mask: boolean, the same shape, True = kept.
        decay: λ.

    Returns:
        ``gradient`` itself.

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes(gradient=gradient, dense=dense, mask=mask)
    return gradient.add_(dense.to(gradient.dtype).masked_fill(mask.bool(), 0), alpha=decay)


@torch.no_grad()
def top_kast_penalty_(
    gradient: torch.Tensor,
    dense: torch.Tensor,
    forward: torch.Tensor,
    backward: torch.Tensor,
    density: float,
    strength: float,
) -> torch.Tensor:
    """Adds the gradient of λ/2 (|θ_A|² + |θ_{B\\A}|² / D), in place; the caller has masked ``gradient`` with B.

    Args:
        gradient: changed; any shape, the other tensors have the same.
        dense: θ.
        forward: A, boolean.
        backward: B, boolean, contains A.
        density: D, the forward density.
        strength: λ.

    Returns:
        ``gradient`` itself.

    Raises:
        ValueError: the shapes differ, or the density is not in (0, 1].
    """
    _check_shapes(gradient=gradient, dense=dense, forward=forward, backward=backward)
    if not 0.0 < density <= 1.0:
        raise ValueError(f"the forward density lies in (0, 1], got {density}")
    dense = dense.to(gradient.dtype)
    forward = forward.bool()
    gradient.add_(dense.masked_fill(~forward, 0), alpha=strength)
    return gradient.add_(dense.masked_fill(forward | ~backward.bool(), 0), alpha=strength / density)


def _check_shapes(**tensors: torch.Tensor) -> None:
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"one weight, one shape, got {shapes}")
