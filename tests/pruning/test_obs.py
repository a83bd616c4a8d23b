"""SparseGPT against a literal transcription of the published algorithm, and against exact least squares."""

import pytest
import torch

from hf_sparse.patterns import parse
from hf_sparse.pruning.obs import sparsegpt, upper_factor
from hf_sparse.pruning.solution import relative_error


def problem(rows=24, inputs=96, tokens=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) * torch.logspace(0, -1.5, inputs)
    x = torch.randn(tokens, inputs, generator=generator) @ mix
    return torch.randn(rows, inputs, generator=generator) * 0.05, x.T @ x


def published(weight, hessian, sparsity, n=0, m=0, block=32, damp=0.01):
    """arXiv 2301.00774, algorithm 1, one column and one block at a time; float64 so that nothing hides in rounding.

    As in the authors' code, a block's mask takes every score up to the k-th sorted value; here exactly k of them.
    """
    w, h = weight.double().clone(), hessian.double().clone()
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h += torch.eye(len(h), dtype=torch.float64) * damp * h.diagonal().mean()
    inverse = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    for first in range(0, w.shape[1], block):
        last = min(first + block, w.shape[1])
        errors = torch.zeros(w.shape[0], last - first, dtype=torch.float64)
        keep = torch.ones_like(errors, dtype=torch.bool)
        if not m:
            score = w[:, first:last] ** 2 / inverse.diagonal()[first:last] ** 2
            k = round(sparsity * w.shape[0] * last) - round(sparsity * w.shape[0] * first)
            keep.view(-1)[score.flatten().argsort()[:k]] = False
        for column in range(first, last):
            if m and column % m == 0:
                score = w[:, column : column + m] ** 2 / inverse.diagonal()[column : column + m] ** 2
                keep[:, column - first : column - first + m] = True
                for row, order in enumerate(score.argsort(dim=1)):
                    keep[row, column - first + order[: m - n]] = False
            q = w[:, column] * keep[:, column - first]
            error = (w[:, column] - q) / inverse[column, column]
            w[:, column:last] -= error[:, None] * inverse[column, column:last]
            w[:, column] = q
            errors[:, column - first] = error
        w[:, last:] -= errors @ inverse[first:last, last:]
    return w


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
def test_equals_the_published_algorithm(pattern):
    weight, hessian = problem()
    hessian[5] = hessian[:, 5] = 0  # an input that never fires
    parsed = parse(pattern)
    n, m = (getattr(parsed, "n", 0), getattr(parsed, "m", 0))
    (solution,) = sparsegpt([weight], hessian, [parsed], [0.5], block_size=32)
    expected = published(weight, hessian, 0.5, n, m)
    assert torch.equal(solution.mask, expected != 0) or (solution.mask == (expected != 0)).float().mean() > 0.999
    torch.testing.assert_close(solution.weight.double(), expected, atol=2e-5, rtol=1e-3)


def test_stacked_weights_equal_separate_ones():
    a, hessian = problem(seed=1)
    b = problem(rows=40, seed=2)[0]
    unstructured = parse("unstructured")
    together = sparsegpt([a, b], hessian, [unstructured] * 2, [0.5, 0.7], block_size=32)
    alone = [sparsegpt([w], hessian, [unstructured], [s], block_size=32)[0] for w, s in ((a, 0.5), (b, 0.7))]
    for one, two in zip(together, alone, strict=True):
        assert torch.equal(one.mask, two.mask)
        torch.testing.assert_close(one.weight, two.weight, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("pattern", ["unstructured", "row", "constant-fan-in", "2:4", "3:6", "4x4", "8x1"])
def test_exact_counts_and_shape_of_the_zeros(pattern):
    weight, hessian = problem()
    parsed = parse(pattern)
    sparsity = parsed.implied_sparsity or 0.625
    (solution,) = sparsegpt([weight], hessian, [parsed], [sparsity], block_size=32)
    assert int((~solution.mask).sum()) == round(sparsity * weight.numel())
    assert parsed.check(solution.weight)
    assert torch.equal(solution.weight != 0, solution.mask)


def test_error_is_the_output_error_and_beats_masks_alone():
    weight, hessian = problem(tokens=2000)
    (solution,) = sparsegpt([weight], hessian, [parse("unstructured")], [0.5])
    assert solution.error == pytest.approx(relative_error(weight, solution.weight, hessian), rel=1e-3)
    wanda = weight.masked_fill(~parse("row").mask(weight.abs() * hessian.diagonal().sqrt(), 0.5), 0)
    magnitude = weight.masked_fill(~parse("unstructured").mask(weight.abs(), 0.5), 0)
    assert solution.error < relative_error(weight, wanda, hessian) < relative_error(weight, magnitude, hessian)


def test_one_removal_is_solved_exactly():
    """After removing weight j of a row, the columns right of j are the least-squares solution given those left of it."""
    weight, hessian = problem(rows=4, inputs=12, tokens=200)
    h = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(12)
    (solution,) = sparsegpt([weight], hessian, [parse("unstructured")], [1 / 12], block_size=1)
    checked = 0
    for row in range(4):
        removed = (~solution.mask[row]).nonzero().flatten().tolist()
        if len(removed) != 1:
            continue
        j = removed[0]
        free = list(range(j + 1, 12))
        target = weight[row].double()
        expected = target[free] + torch.linalg.solve(h[free][:, free], h[free][:, [j]] * target[j]).flatten()
        torch.testing.assert_close(solution.weight[row, free].double(), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(solution.weight[row, :j], weight[row, :j], atol=0, rtol=0)
        checked += bool(free)
    assert checked


def test_upper_factor():
    hessian = problem()[1]
    upper, ridge = upper_factor(hessian, hessian.diagonal() == 0, 0.01)
    assert ridge.item() == pytest.approx(0.01 * hessian.diagonal().mean().item())
    torch.testing.assert_close(upper.T @ upper @ (hessian + ridge * torch.eye(96)), torch.eye(96), atol=2e-3, rtol=0)
    assert torch.equal(upper, upper.triu())


def test_rank_deficient_hessian_is_damped_until_it_factors():
    weight, _ = problem()
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(3))
    (solution,) = sparsegpt([weight], x.T @ x, [parse("unstructured")], [0.5], damp=0.0)
    assert solution.weight.isfinite().all() and int((~solution.mask).sum()) == weight.numel() // 2


def test_whole_channels_are_refused():
    weight, hessian = problem()
    with pytest.raises(ValueError, match="whole output channels"):
        sparsegpt([weight], hessian, [parse("channel")], [0.5])


def test_inputs_are_not_modified():
    weight, hessian = problem()
    copies = weight.clone(), hessian.clone()
    sparsegpt([weight], hessian, [parse("unstructured")], [0.5])
    assert torch.equal(weight, copies[0]) and torch.equal(hessian, copies[1])
