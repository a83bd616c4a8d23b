"""Repair: re-fit the kept weights of any mask to the dense layer's outputs by least squares.

A mask chosen by magnitude or Wanda leaves the kept weights as they were, although they could make up for the dropped ones.
With the layer inputs X as rows and H = X^T X, each output row w of the weight has its own small problem

    minimise over v, zero outside the mask:   (w - v) H (w - v)^T + damp * sum_j H_jj (w_j - v_j)^2        (1)

whose solution is exact and unique: inside the mask the gradient (w - v)(H + damp diag H) vanishes. The ridge is a share of
each input's own energy, so that (1) does not change when an input is rescaled, and one input with huge activations does not
freeze the others (a ridge on the mean of the diagonal, as in SparseGPT, does: in the attention of SmolLM2's first layer it
adds a fifth to the error, on held-out text too).

In the units u_j = w_j sqrt(H_jj), H becomes a correlation matrix C and (1) has the matrix G = C + damp I. Every row has its own
support, and a factorisation per row costs in^3 / 3 each, so ``"exact"`` is for small layers. The default, ``"cg"``, runs
conjugate gradients on all rows at once: an iteration is a product [rows, in] x [in, in] for G and one for the preconditioner
(G^-1 cut to each row's support, symmetric and positive definite like G^-1 itself; it halves the iterations that the
diagonal alone would take, 10 to 15 come within 0.3% of the optimum). Rows that share a matrix (q/k/v, gate/up) are one
tall problem.

Cost: one Cholesky inverse (in^3 multiply-adds) and per iteration two products of 2 rows in^2 FLOP: on a GPU
one in TF32 and, inside ALPS, the preconditioner's in bf16. A 4096 -> 11008 projection: 0.37 TFLOP each.

The step after the mask in ALPS (arxiv.org/abs/2406.07831, section 3.3); :mod:`hf_sparse.pruning.admm` ends with it.
"""

import torch

from hf_sparse.pruning.solution import matmul_precision

__all__ = ["repair"]

_PRODUCT = "tf32"  # precision of products whose error is relative to something small, on a GPU
_EXACT_BUDGET = 2e10  # multiply-adds: what "auto" solves exactly, a second or so on a CPU


@torch.no_grad()
def repair(
    weights: list[torch.Tensor],
    hessian: torch.Tensor,
    masks: list[torch.Tensor],
    *,
    damp: float = 0.01,
    method: str = "auto",
    start: list[torch.Tensor] | None = None,
    tolerance: float = 1e-4,
    iterations: int = 100,
) -> list[torch.Tensor]:
    """Least squares on the support of each mask, for weights that share one input. The damped error (1) never increases.

    Args:
        weights: dense ``[out_i, in]`` each, any float dtype; not modified.
        hessian: ``[in, in]``, X^T X up to a positive factor; may be singular; not modified.
        masks: boolean ``[out_i, in]`` each, True = kept, of any pattern.
        damp: ridge as a share of each input's own energy. Zero is allowed.
        method: ``"exact"`` (float64 normal equations per row), ``"cg"``, or ``"auto"``: exact where it is cheap.
        start: where to begin, ``[out_i, in]`` each (SparseGPT's weights, say); the masked dense weights where None.
        tolerance: stop when an iteration lowers the remaining error by less than this fraction.
        iterations: at most so many.

    Returns:
        ``[out_i, in]`` float32 each, zero outside the mask. An input that never fires, where kept, keeps its dense weight.

    Raises:
        ValueError: shapes that do not match, an unknown method, NaN or infinity.
        torch.linalg.LinAlgError: the Hessian cannot be factorised even with a large ridge (it is not X^T X).
    """
    if method not in ("auto", "exact", "cg"):
        raise ValueError(f"method is 'auto', 'exact' or 'cg', got {method!r}")
    check_problem(weights, hessian, damp)
    if len(masks) != len(weights) or any(m.shape != w.shape for m, w in zip(masks, weights, strict=False)):
        raise ValueError(f"masks {[tuple(m.shape) for m in masks]} for weights {[tuple(w.shape) for w in weights]}")
    if start is not None and (
        len(start) != len(weights) or any(s.shape != w.shape for s, w in zip(start, weights, strict=False))
    ):
        raise ValueError(f"start {[tuple(s.shape) for s in start]} for weights {[tuple(w.shape) for w in weights]}")
    if not weights:
        return []
    rows = [len(w) for w in weights]
    mask = torch.cat([m.to(hessian.device, torch.bool) for m in masks])
    with matmul_precision():
        matrix, scale, dead = correlation(hessian, damp)
        dense = torch.cat([w.float() for w in weights]) * scale
        begin = torch.cat([s.float() for s in start]) * scale if start else dense
        begin = begin * mask
        if method == "exact" or (method == "auto" and len(mask) * mask.shape[1] ** 3 <= _EXACT_BUDGET):
            fitted = _exact(dense, matrix, mask)
        else:
            inverse, _ = inverse_of(matrix, max(0.0, 0.01 - damp))
            fitted = refine(dense, matrix, inverse, mask, begin, tolerance=tolerance, iterations=iterations)
        return list(unscale(fitted, weights, scale, mask, dead).split(rows))


def check_problem(weights: list[torch.Tensor], hessian: torch.Tensor, damp: float) -> None:
    """Raises ValueError unless the weights are finite matrices that fit a finite square Hessian of X^T X."""
    if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1]:
        raise ValueError(f"the Hessian is a square matrix [in, in], got shape {tuple(hessian.shape)}")
    if not damp >= 0:
        raise ValueError(f"damp is a share of the diagonal and at least 0, got {damp}")
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("the Hessian has NaN or infinite entries; the calibration activations overflow somewhere")
    if bool((hessian.diagonal() < 0).any()):
        raise ValueError("the Hessian has a negative diagonal entry, so it is not X^T X")
    for index, weight in enumerate(weights):
        if weight.dim() != 2 or weight.shape[1] != len(hessian):
            raise ValueError(
                f"weight {index} of shape {tuple(weight.shape)} does not fit a Hessian of {len(hessian)} inputs"
            )
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"weight {index} has NaN or infinite entries")


def correlation(hessian: torch.Tensor, damp: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """G = C + damp I ``[in, in]`` float32, the input norms sqrt(H_jj) ``[in]`` and which inputs are dead ``[in]``.

    Dead inputs (H_jj = 0) get the norm 1 and no correlation: they neither help nor disturb the others.
    """
    diagonal = hessian.diagonal().float()
    dead = diagonal == 0
    scale = diagonal.masked_fill(dead, 1.0).sqrt()
    matrix = hessian.float() / scale / scale[:, None]
    matrix.diagonal().masked_fill_(dead, 1.0).add_(damp)
    return matrix, scale, dead


def inverse_of(matrix: torch.Tensor, ridge: float) -> tuple[torch.Tensor, float]:
    """(matrix + ridge I)^-1 by Cholesky, for a matrix of about unit diagonal, and the ridge that it took.

    A failed factorisation (rounding made the matrix indefinite) is tried again with ten times the ridge.

    Raises:
        torch.linalg.LinAlgError: even a ridge of a hundred times the diagonal does not help.
    """
    attempt = matrix.clone()
    unit = float(matrix.diagonal().mean())
    added = 0.0
    while ridge <= 100 * unit:
        attempt.diagonal().add_(ridge - added)
        added = ridge
        factor, info = torch.linalg.cholesky_ex(attempt)
        if int(info) == 0:
            if not factor.is_cuda:
                return torch.cholesky_inverse(factor), ridge
            identity = torch.eye(len(factor), device=factor.device)
            factor = torch.linalg.solve_triangular(factor, identity, upper=False)
            with matmul_precision(_PRODUCT):  # a metric and a preconditioner need few digits
                return factor.T @ factor, ridge
        ridge = max(10 * ridge, 1e-4 * unit)
    raise torch.linalg.LinAlgError(
        "the Hessian is not positive definite even with a ridge of 100 times its diagonal; it is not X^T X of any inputs"
    )


def fast(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix in the dtype for products that need few digits: bfloat16 on a GPU that multiplies it, else as it is."""
    if matrix.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False):
        return matrix.bfloat16()
    return matrix


def refine(
    dense: torch.Tensor,
    matrix: torch.Tensor,
    inverse: torch.Tensor,
    mask: torch.Tensor,
    start: torch.Tensor,
    *,
    tolerance: float,
    iterations: int,
) -> torch.Tensor:
    """Conjugate gradients for (dense - x) G = 0 on the mask, every row its own problem, all rows in each product.

    Args:
        dense, mask, start: ``[rows, in]``; start is zero outside the mask.
        matrix: G ``[in, in]``.
        inverse: about G^-1, ``[in, in]``, any float dtype; cut to the support it preconditions.

    Returns:
        ``[rows, in]``, zero outside the mask; no row is worse than its start.
    """
    gap = (dense - start) @ matrix
    begin = ((dense - start) * gap).sum(dim=1)  # what each row's error is now
    remaining = float(begin.sum())
    solution, residual = start.clone(), gap.mul_(mask)
    direction, previous = None, None
    for _ in range(iterations):
        step = (residual.to(inverse.dtype) @ inverse).to(residual.dtype).mul_(mask)
        slope = (residual * step).sum(dim=1, keepdim=True).clamp_min_(0.0)
        direction = step if direction is None else direction.mul_(_ratio(slope, previous)).add_(step)
        previous = slope
        with matmul_precision(_PRODUCT):  # the error of a product is relative to the step, and steps get small
            image = (direction @ matrix).mul_(mask)
        length = _ratio(slope, (direction * image).sum(dim=1, keepdim=True))
        solution.addcmul_(direction, length)
        residual.addcmul_(image, length, value=-1)
        gained = float((length * slope).sum())  # conjugate gradients lower the error by exactly this
        remaining -= gained
        if gained <= tolerance * max(remaining, 0.0) or gained == 0.0:
            break
    lost = dense - solution
    with matmul_precision(_PRODUCT):
        worse = ((lost @ matrix) * lost).sum(dim=1) > begin  # rounding, at a row already solved; NaN compares False
    return torch.where(worse[:, None] | ~torch.isfinite(solution).all(dim=1, keepdim=True), start, solution)


def unscale(
    fitted: torch.Tensor, weights: list[torch.Tensor], scale: torch.Tensor, mask: torch.Tensor, dead: torch.Tensor
) -> torch.Tensor:
    """Back to weights. Rows that keep everything and dead inputs have nothing to make up for: exactly the dense values."""
    untouched = mask & (mask.all(dim=1, keepdim=True) | dead)
    return torch.where(untouched, torch.cat([w.float() for w in weights]), fitted / scale)


def _ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """numerator / denominator, 0 where a row is solved and nothing is left to divide by."""
    return torch.where(denominator > 0, numerator / denominator, torch.zeros_like(numerator))


def _exact(dense: torch.Tensor, matrix: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Normal equations in float64, one factorisation for each different support (rows of a block or channel share theirs).

    Outside its support a row's matrix is the identity and its right side zero, so that supports of any size stack.
    """
    target = (dense.double() @ matrix.double()).mul_(mask)
    supports, group = torch.unique(mask, dim=0, return_inverse=True)
    inputs = mask.shape[1]
    fitted = torch.zeros_like(target)
    chunk = max(1, 2**24 // inputs**2)
    full = matrix.double()
    for first in range(0, len(supports), chunk):
        support = supports[first : first + chunk].double()
        system = full * support[:, :, None] * support[:, None, :]
        diagonal = system.diagonal(dim1=1, dim2=2)
        diagonal.add_(1 - support)
        for ridge in (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3):  # undamped and singular: the smallest ridge that works
            diagonal.add_(ridge)
            factor, info = torch.linalg.cholesky_ex(system)
            if not bool(info.any()):
                break
        else:
            raise torch.linalg.LinAlgError(
                "the Hessian is not positive definite on a row's support; it is not X^T X of any inputs"
            )
        rows = ((group >= first) & (group < first + chunk)).nonzero().squeeze(1)
        for low in range(0, len(rows), chunk):  # a row each of its own factor, so many at a time
            some = rows[low : low + chunk]
            fitted[some] = torch.cholesky_solve(target[some][:, :, None], factor[group[some] - first]).squeeze(2)
    return fitted.mul_(mask).float()
