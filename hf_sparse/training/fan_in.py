"""Constant fan-in: RigL for weights whose every neuron reads equally many inputs (SRigL, arxiv.org/abs/2305.02299).

A neuron is a row of a weight ``[out, in]``. With the same number of inputs k in every row a sparse weight is two dense
``[out, k]`` arrays, values and column indices, which fast kernels like. SRigL trains under this constraint and lets whole
neurons go: at high sparsity RigL ablates neurons by itself, and a constant fan-in without ablation would forbid it.

One update of a weight w with gradient g (of the dense weight), n nonzeros and drop fraction α:

    K = n - int(α n) kept, P = int(α n) pruned
    salient   = top K of |w|  union  top P of |g|                 both over the whole matrix
    ablated   = rows with fewer than max(1, int(γ k)) salient weights; at most so many that the others can hold the budget
    k'        = int(density * out * in) // rows left              the new fan-in: the budget of the ablated is shared out
    kept      = top K of |w| in the rows left, per row no more than its k' largest
    grown     = per row, the largest |g| outside the kept, up to exactly k'

Differences from the authors' code, both where it decides by index: a row with more than k' kept weights keeps its largest
(the code sorts the row's boolean mask, so position decides), and only active weights are kept (where ablation takes more
weights than P, the code fills K with zeros at arbitrary places; here the row grows by gradient instead).

The number of nonzeros is k' times the rows left: the budget rounded down to a multiple of the rows. Scores are ranked in
float32 and ties are broken by index as in :mod:`hf_sparse.patterns`: the lower index is dropped first. Experts, ``[n, out,
in]``, are n weights: call once for each.
"""

import torch

from hf_sparse.patterns import _drop_lowest

__all__ = ["constant_fan_in_start", "constant_fan_in_update"]


def constant_fan_in_start(scores: torch.Tensor, density: float) -> torch.Tensor:
    """The first mask: the ``int(density * out * in) // out`` highest ``scores`` of every row.

    Args:
        scores: ``[out, in]``; uniform noise for a random start, magnitudes for one from trained weights.
        density: fraction of weights to keep, in (0, 1].

    Returns:
        Boolean mask like ``scores``, True = kept.

    Raises:
        ValueError: ``scores`` is no matrix, or the density leaves a row without inputs.
    """
    _check_matrix(scores)
    return _highest_of_rows(scores.float(), _shared_fan_in(scores, density, len(scores)))


@torch.no_grad()
def constant_fan_in_update(
    weight: torch.Tensor,
    mask: torch.Tensor,
    gradient: torch.Tensor,
    fraction: float,
    *,
    density: float,
    gamma_sal: float = 0.3,
    ablate: bool = True,
) -> torch.Tensor:
    """The mask after one SRigL update; no argument is changed.

    Args:
        weight: ``[out, in]``; entries outside ``mask`` count as zero.
        mask: ``[out, in]`` boolean, True = kept; any mask, its rows need not be equal.
        gradient: ``[out, in]``, of the loss with respect to the *dense* weight.
        fraction: α in [0, 1], the share of active weights dropped at this step.
        density: share of weights to keep in the whole matrix; the budget stays when neurons are ablated.
        gamma_sal: γ, share of the fan-in that must be salient for a neuron to stay (paper: 0.3; 0.95 for ViT).
        ablate: False for the layer whose rows are the model's outputs.

    Returns:
        Boolean mask like ``mask``: every row keeps the same number of inputs, or none (ablated).

    Raises:
        ValueError: shapes differ, or the density leaves a row without inputs.
    """
    _check_matrix(weight)
    if not weight.shape == mask.shape == gradient.shape:
        raise ValueError(
            f"weight, mask and gradient have one shape, got {tuple(weight.shape)}, {tuple(mask.shape)} and "
            f"{tuple(gradient.shape)}"
        )
    mask = mask.bool()
    size = torch.where(mask, weight.float().abs(), 0.0)
    slope = gradient.float().abs()
    active = int(mask.sum())
    keep = min(active - int(active * fraction), int(size.count_nonzero()))  # a weight still zero has nothing to keep
    rows = torch.ones(len(mask), dtype=torch.bool, device=mask.device)
    if ablate:
        salient = _highest(size, keep) | _highest(slope, active - keep)
        rows = _rows_that_stay(salient.sum(dim=1), weight, density, gamma_sal)
    fan_in = _shared_fan_in(weight, density, int(rows.sum()))

    candidates = mask & rows[:, None]
    ranked = torch.where(candidates, size, -1.0)
    kept = _highest(ranked, min(keep, int(candidates.sum()))) & _highest_of_rows(ranked, fan_in) & candidates
    # Kept entries rank above every gradient, so the best fan_in of a row are the kept and then the steepest others.
    return _highest_of_rows(torch.where(kept, torch.inf, slope), fan_in) & rows[:, None]


def _rows_that_stay(salient: torch.Tensor, weight: torch.Tensor, density: float, gamma_sal: float) -> torch.Tensor:
    """``[out]`` boolean from the number of salient weights per row: True where the neuron is not ablated."""
    out, inp = weight.shape
    enough = max(1, int(gamma_sal * _shared_fan_in(weight, density, out)))
    fewest = min(_budget(weight, density) // inp, out - 1)  # with this many full rows and one more the budget fits
    ranked = salient.sort(descending=True).values
    return salient >= ranked[fewest].clamp(max=enough)


def _budget(weight: torch.Tensor, density: float) -> int:
    return int(density * weight.numel() + 1e-6)  # 1 - 0.9 is 0.09999999999999998 and means a tenth


def _shared_fan_in(weight: torch.Tensor, density: float, rows: int) -> int:
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density is the fraction of weights kept and lies in (0, 1], got {density}")
    fan_in = _budget(weight, density) // rows
    if fan_in == 0:
        out, inp = weight.shape
        raise ValueError(
            f"density {density:g} of a {out}x{inp} weight is {_budget(weight, density)} weights, fewer than its {rows} "
            f"rows; a constant fan-in needs a density of at least {1 / inp:.3g}"
        )
    return fan_in


def _highest(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Boolean, True at the ``k`` highest of all scores."""
    return ~_drop_lowest(scores.reshape(1, -1), scores.numel() - k).reshape(scores.shape)


def _highest_of_rows(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Boolean, True at the ``k`` highest scores of every row."""
    return ~_drop_lowest(scores, scores.shape[1] - k)


def _check_matrix(weight: torch.Tensor) -> None:
    if weight.dim() != 2:
        raise ValueError(f"fan-in is counted in the rows of an [out, in] matrix, got shape {tuple(weight.shape)}")
