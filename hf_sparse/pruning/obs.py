"""SparseGPT: choose and update a layer's weights in one pass over its columns (arxiv.org/abs/2301.00774).

Removing weight w_j of a row and re-fitting the others costs w_j^2 / [H^-1]_jj, H = X^T X (Optimal Brain Surgeon). SparseGPT
walks the columns from left to right; at column j only the columns right of it may still change, so the inverse that matters
is that of H without the columns already done. All of these inverses are rows of one matrix: with H^-1 = U^T U, U upper
triangular, row j of U divided by U_jj is the update direction and U_jj^2 the [H^-1]_jj of the remaining problem.

    for each block of 128 columns:
        scores = W_block^2 / diag(U)_block^2;  keep = pattern.mask(scores)        (n:m: chosen group by group, on the way)
        for each column j of the block:
            e_j = (w_j - q_j) / U_jj,  q_j = w_j where kept else 0
            W_block[:, j:] -= e_j U[j, j:]
        W[:, after the block] -= E_block U[block, after]

Rows are independent once U is known, so weights with the same input (q/k/v, gate/up) are solved as one taller matrix while
the mask of each is ranked on its own. U comes from one Cholesky factorisation of H read backwards and one triangular
inverse (U = P inv(chol(P H P)) P, P reversing the order) instead of the two factorisations and an inverse of H itself.
"""

import torch

from hf_sparse.patterns import NM, Block, Channel, ConstantFanIn, Pattern, Unstructured
from hf_sparse.pruning.obs_kernel import lowest_mask, prune_block
from hf_sparse.pruning.solution import Solution

__all__ = ["sparsegpt", "upper_factor"]


@torch.no_grad()
def sparsegpt(
    weights: list[torch.Tensor],
    hessian: torch.Tensor,
    patterns: list[Pattern],
    sparsities: list[float],
    *,
    damp: float = 0.01,
    block_size: int = 128,
) -> list[Solution]:
    """SparseGPT on weights that share one input.

    Args:
        weights: ``[out_i, in]`` each, any float dtype; not modified.
        hessian: ``[in, in]`` float32, X^T X up to a positive factor; not modified.
        patterns: one per weight; any but whole output channels, which no update of other columns can repair.
        sparsities: one per weight.
        damp: ridge on the diagonal as a fraction of its mean; ten times more on each failed factorisation.
        block_size: columns per block, rounded to a multiple of an n:m or block pattern's width.

    Returns:
        One :class:`Solution` per weight, with exactly the zeros its pattern asks for.

    Raises:
        ValueError: a pattern it cannot serve.
        torch.linalg.LinAlgError: the Hessian cannot be factorised even with a large ridge.
    """
    for pattern in patterns:
        if isinstance(pattern, Channel):
            raise ValueError(
                "sparsegpt cannot prune whole output channels; use a saliency such as wanda with 'channel'"
            )
    dead = hessian.diagonal() == 0  # inputs that never fire: any weight does there, and zero is the sparsest
    upper, ridge = upper_factor(hessian, dead, damp)
    solutions: list[Solution | None] = [None] * len(weights)
    for pattern in dict.fromkeys(patterns):  # same pattern, one stacked solve
        chosen = [i for i, p in enumerate(patterns) if p == pattern]
        rows = [len(weights[i]) for i in chosen]
        stacked = torch.cat([weights[i].float() for i in chosen])
        stacked[:, dead] = 0
        dense = stacked.clone()
        keep, losses = _solve(stacked, upper, pattern, rows, [sparsities[i] for i in chosen], block_size)
        # U (H + ridge) U^T = 1, so the errors e already sum to tr(D (H + ridge) D^T), D = W - W'; no product with H needed
        losses -= ridge * (dense - stacked).square().sum(dim=1)
        energies = ((dense @ hessian) * dense).sum(dim=1)
        split = (part.split(rows) for part in (stacked, keep, losses, energies))
        for i, new, mask, loss, energy in zip(chosen, *split, strict=True):
            error = float(loss.sum() / energy.sum().clamp_min(torch.finfo(torch.float32).tiny))
            solutions[i] = Solution(weight=new, mask=mask, error=max(0.0, error))
    return solutions


def upper_factor(hessian: torch.Tensor, dead: torch.Tensor, damp: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``(U, ridge)``: U upper triangular with (H + ridge)^-1 = U^T U; dead inputs get a unit diagonal."""
    matrix = hessian.flip(0, 1)  # reversed rows and columns, a copy
    diagonal = matrix.diagonal()
    diagonal.masked_fill_(dead.flip(0), 1.0)
    ridge = damp * diagonal.mean()
    added = torch.zeros_like(ridge)
    for _ in range(5):
        diagonal += ridge
        added += ridge
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info) == 0:
            identity = torch.eye(len(matrix), device=matrix.device, dtype=matrix.dtype)
            return torch.linalg.solve_triangular(factor, identity, upper=False).flip(0, 1).contiguous(), added
        ridge = 10 * ridge if float(ridge) > 0 else 1e-4 * diagonal.mean()
    raise torch.linalg.LinAlgError(
        "the Hessian is not positive definite even with a ridge of 100 times its mean diagonal; is the input finite?"
    )


def _solve(
    weight: torch.Tensor,
    upper: torch.Tensor,
    pattern: Pattern,
    rows: list[int],
    sparsities: list[float],
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prunes the stacked ``weight`` [sum(rows), in] in place; returns its mask and each row's sum of squared errors."""
    inputs = weight.shape[1]
    width = {NM: getattr(pattern, "m", 1), Block: getattr(pattern, "cols", 1)}.get(type(pattern), 1)
    step = max(width, block_size // width * width)
    mask = torch.empty_like(weight, dtype=torch.bool)
    losses = torch.zeros_like(weight[:, 0])
    for start in range(0, inputs, step):
        end = min(start + step, inputs)
        block, factor = weight[:, start:end], upper[start:end, start:end]
        if isinstance(pattern, NM):
            _, error, keep = prune_block(block, factor, None, pattern.n, pattern.m, out=block)
        else:
            scores = (block / factor.diagonal()).square()
            keep = _block_mask(scores, pattern, rows, sparsities, start, end)
            _, error, keep = prune_block(block, factor, keep, out=block)
        mask[:, start:end] = keep
        losses += error.square().sum(dim=1)
        weight[:, end:].addmm_(error, upper[start:end, end:], alpha=-1)
    return mask, losses


def _block_mask(scores, pattern, rows, sparsities, start, end):
    """The mask of columns ``start:end``, ranked per weight; counts follow the running total, so the whole is exact. Rows of
    the ``row`` pattern may differ by one weight a block."""
    if isinstance(pattern, Unstructured) and pattern.scope == "tensor":
        counts = [round(s * r * end) - round(s * r * start) for s, r in zip(sparsities, rows, strict=True)]
        return lowest_mask(scores, counts, rows)
    parts = []
    for part, sparsity, r in zip(scores.split(rows), sparsities, rows, strict=True):
        unit = {ConstantFanIn: r, Block: getattr(pattern, "rows", 1) * getattr(pattern, "cols", 1)}.get(
            type(pattern), 1
        )
        count = round(sparsity * r * end / unit) - round(sparsity * r * start / unit)
        parts.append(pattern.mask(part, count * unit / part.numel()))
    return torch.cat(parts)
