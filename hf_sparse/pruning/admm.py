"""ALPS: choose a mask and its weights together with ADMM (arxiv.org/abs/2406.07831).

The best k-sparse weight V for a dense W and inputs X solves ``min tr((W - V) G (W - V)^T)`` with G = X^T X damped. ALPS splits
the two difficulties over two copies, B fitting the outputs and S sparse, and pulls them together with a growing rho:

    B = W - [U - rho (S - W)] (G + rho I)^-1         least squares near S
    S = keep the largest of B + U / rho              the pattern's exact count: any pattern
    U = U + rho (B - S)                              what the constraint costs: zero on the support, rho (B + U/rho) off it

A small rho lets the mask move, a large one freezes it; then the kept weights are re-fitted (:mod:`hf_sparse.pruning.repair`).
Rows with the same input (q/k/v, gate/up) are one tall problem; the mask of each weight is ranked on its own.

Three things differ from the published algorithm:

* **The metric.** ALPS measures weights in units of their input's norm, w_j sqrt(G_jj): what dropping costs when nothing
  else may change. Here the unit is the Optimal Brain Surgeon's, w_j / sqrt([G^-1]_jj): what it costs after the others were
  re-fitted. In this metric rho = 1 is the curvature of a single weight, and one range of rho served all layers tried.
* **Few factorisations.** (G + rho I)^-1 for each new rho would need an eigendecomposition (ALPS: in
  float64). A proximal term (r - rho)/2 |B - B_previous|^2 in the first step replaces G + rho I by G + r I: rho moves in every
  iteration while r takes ``stages`` values. With the inverse for the metric (kept as the preconditioner) that is three
  Cholesky inverses per Hessian.
* **Differences.** The first step is written in W - B, never through W G: the large directions of G cancel before anything is
  multiplied. bfloat16 products, emulated on a CPU, change 1 to 4% of the mask and less than 0.1% of the error.

The ridge is ``damp`` times each input's own energy (see repair): where few inputs have huge activations, most others would
drown in a ridge on the mean.

Measured on layers 0, 5, 15 and 29 of SmolLM2-135M (50, 60, 70% and 2:4; 32k tokens of WikiText-2) against the authors' code:
the calibration error is lower on all 112 matrices (1 to 4% on gate and up, 1 to 13% on down, 1 to 11% in attention, 5 to 38% in
layer 0's attention, much of it the ridge), on other text between 33% lower and 0.7% higher. The settings were chosen on some
of these same matrices and, for the ridge, that same text. On an ill-conditioned synthetic problem at 80% it is 8 to 13% worse.

Cost for weights [R, n] in total: 3 factorisations and inverses (n^3 multiply-adds each), ``iterations`` products of 2 R n^2
FLOP in bf16, and about 10 conjugate-gradient steps of 2 R n^2 in TF32. Measured on one H200 for a Llama of 7B shape: 0.82 s a
layer, where SparseGPT's solve takes 0.19 s; with forward passes and Hessians ALPS then takes 1.5 times as long
(examples/results/one_shot_speed_alps.json).
"""

import torch

from hf_sparse.patterns import Pattern, Unstructured, pruned_count
from hf_sparse.pruning.admm_kernel import pull, step
from hf_sparse.pruning.obs_kernel import lowest_mask
from hf_sparse.pruning.repair import check_problem, correlation, fast, inverse_of, refine, unscale
from hf_sparse.pruning.solution import Solution, matmul_precision, relative_error

__all__ = ["alps"]


@torch.no_grad()
def alps(
    weights: list[torch.Tensor],
    hessian: torch.Tensor,
    patterns: list[Pattern],
    sparsities: list[float],
    *,
    damp: float = 0.01,
    iterations: int = 48,
    rho: tuple[float, float] = (0.6, 3.0),
    stages: int = 2,
    tolerance: float = 1e-4,
) -> list[Solution]:
    """ALPS on weights that share one input.

    Args:
        weights: ``[out_i, in]`` each, any float dtype; not modified.
        hessian: ``[in, in]``, X^T X up to a positive factor; may be singular or have dead inputs; not modified.
        patterns: one per weight, any.
        sparsities: one per weight.
        damp: ridge as a share of each input's own energy.
        iterations: ADMM iterations. 24 raise the error by about 1%, 128 lower it by half a percent.
        rho: first and last penalty, in units of a weight's own curvature; geometric in between.
        stages: how many inverses serve all these penalties.
        tolerance: the final refinement stops when an iteration gains less than this fraction of the error.

    Returns:
        One :class:`Solution` per weight, with exactly the zeros its pattern asks for. Inputs that never fire are dropped
        first; one that the pattern has to keep keeps its dense weight.

    Raises:
        ValueError: NaN or infinity, shapes that do not match, a pattern that does not fit, rho or counts out of range.
        torch.linalg.LinAlgError: the Hessian cannot be factorised even with a large ridge (it is not X^T X).
    """
    check_problem(weights, hessian, damp)
    if not len(weights) == len(patterns) == len(sparsities):
        raise ValueError(f"{len(weights)} weights, {len(patterns)} patterns and {len(sparsities)} sparsities")
    if not (0 < rho[0] <= rho[1]) or iterations < 1 or stages < 1:
        raise ValueError(
            f"rho must rise and be positive, iterations and stages at least 1: {rho}, {iterations}, {stages}"
        )
    if not weights:
        return []
    rows = [len(w) for w in weights]
    with matmul_precision():
        matrix, scale, dead = correlation(hessian, damp)
        # The others can make up for a weight only while they are kept; a little ridge stands for those that will not be.
        inverse, _ = inverse_of(matrix, 0.01)
        unit = inverse.diagonal().rsqrt()  # the OBS metric: afterwards the inverse has a unit diagonal
        matrix = matrix.div_(unit).div_(unit[:, None])
        inverse = inverse.mul_(unit).mul_(unit[:, None])
        scale = scale * unit
        dense = torch.cat([w.float() for w in weights]) * scale

        def choose(scores: torch.Tensor) -> torch.Tensor:
            return _mask(scores, patterns, sparsities, rows)

        mask, start = _admm(dense, matrix, dead, choose, iterations, rho, stages)
        fitted = refine(dense, matrix, fast(inverse), mask, start, tolerance=tolerance, iterations=30)
        solved = unscale(fitted, weights, scale, mask, dead)
        return [
            Solution(weight=new, mask=kept, error=relative_error(old.float(), new, hessian.float()))
            for old, new, kept in zip(weights, solved.split(rows), mask.split(rows), strict=True)
        ]


def _admm(dense, matrix, dead, choose, iterations, rho, stages):
    """The mask ``[rows, in]`` and the sparse copy S at the end of the ladder; everything in the OBS metric.

    S and the dual live in the last candidate: S where the mask keeps it, the dual over its rho where not.
    """
    mask = choose(dense.square().masked_fill_(dead, 0.0))
    candidate, previous = dense.clone(), 0.0  # the dual begins at zero
    change = fast(torch.where(mask, 0.0, -dense))  # B - W
    ladder = [rho[0] * (rho[1] / rho[0]) ** (t / max(iterations - 1, 1)) for t in range(iterations)]
    for part in range(stages):
        penalties = ladder[part * iterations // stages : (part + 1) * iterations // stages]
        if not penalties:
            continue
        # The middle of the stage: proximal below it, slightly extrapolating above; both converge, and faster than its end.
        exact, anchor = inverse_of(matrix, (penalties[0] * penalties[-1]) ** 0.5)
        inverse = fast(exact)
        del exact
        for penalty in penalties:
            change = pull(candidate, mask, dense, change, penalty, previous, anchor) @ inverse
            candidate, scores = step(candidate, mask, dense, change, penalty, previous, dead)
            mask, previous = choose(scores), penalty
    return mask, torch.where(mask, candidate, 0.0)


def _mask(scores, patterns, sparsities, rows):
    """Stacked ``[sum(rows), in]`` mask, each weight ranked on its own by its pattern."""
    if all(isinstance(p, Unstructured) and p.scope == "tensor" for p in patterns):
        parts = scores.split(rows)
        if all(0.0 <= s <= 1.0 for s in sparsities):  # else the pattern's own error below
            return lowest_mask(
                scores, [pruned_count(s, p.numel()) for s, p in zip(sparsities, parts, strict=True)], rows
            )
    masks = [p.mask(part, s) for p, part, s in zip(patterns, scores.split(rows), sparsities, strict=True)]
    return torch.cat(masks)
