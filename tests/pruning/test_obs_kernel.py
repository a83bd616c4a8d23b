"""The block loop of SparseGPT (arxiv.org/abs/2301.00774) against a literal transcription, the exact selection against a
stable sort, and both kernels: in Triton's interpreter on the CPU, where Triton is installed, and on a GPU.

Run as a script, this file checks the kernels on the device named by its argument.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_sparse.pruning.obs_kernel import lowest_mask, prune_block

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def problem(rows, cols, seed=0, device="cpu"):
    """A weight and the block on the diagonal of U, H being the covariance of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(cols, cols, generator=generator, dtype=torch.float64)
    inputs = torch.randn(4 * cols, cols, generator=generator, dtype=torch.float64) @ mixing
    hessian = inputs.T @ inputs / len(inputs)
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(cols)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).float()
    return torch.randn(rows, cols, generator=generator).to(device), upper.to(device)


def literal(weight, upper, keep, n, m):
    """The published loop, one column at a time, in float64. keep=None chooses n:m on the way."""
    w, u = weight.double().clone(), upper.double()
    err, new = torch.zeros_like(w), torch.zeros_like(w)
    mask = torch.zeros_like(w, dtype=torch.bool) if keep is None else ~keep.bool()  # True = dropped, as published
    for i in range(w.shape[1]):
        if keep is None and i % m == 0:
            score = w[:, i : i + m] ** 2 / u.diagonal()[i : i + m] ** 2
            mask.scatter_(1, i + score.argsort(dim=1, stable=True)[:, : m - n], True)
        q = w[:, i].clone()
        q[mask[:, i]] = 0
        new[:, i] = q
        err[:, i] = (w[:, i] - q) / u[i, i]
        w[:, i:] -= err[:, i : i + 1] @ u[i : i + 1, i:]
    return new, err, ~mask


def assert_close(got, want):
    """Relative error in the Frobenius norm at the level of float32."""
    assert got.shape == want.shape
    assert bool((got.double() - want.double()).norm() <= 1e-5 * want.double().norm())


CASES = [
    (16, 128, 0, 0),
    (33, 24, 0, 0),
    (5, 1, 0, 0),
    (19, 127, 0, 0),
    (16, 128, 2, 4),
    (17, 126, 1, 3),
    (8, 40, 3, 5),
    (9, 36, 2, 6),
    (8, 64, 5, 16),
    (8, 64, 8, 32),
    (4, 12, 4, 4),
]


@pytest.mark.parametrize(("rows", "cols", "n", "m"), CASES)
def test_the_loop_is_the_published_one(rows, cols, n, m):
    weight, upper = problem(rows, cols)
    keep = None if m else torch.rand(rows, cols) > 0.5
    before = weight.clone()
    new, err, kept = prune_block(weight, upper, keep, n, m, kernel="torch")
    assert torch.equal(weight, before)
    want_new, want_err, want_kept = literal(weight, upper, keep, n, m)
    assert torch.equal(kept, want_kept)
    assert_close(new, want_new)
    assert_close(err, want_err)
    assert bool((new[~kept] == 0).all()) and bool((err[kept] == 0).all())


def test_errors_carry_the_whole_change():
    """new = weight - err @ U on the kept weights: every change is an error that some column handed on."""
    weight, upper = problem(12, 48)
    new, err, keep = prune_block(weight, upper, torch.rand(12, 48) > 0.6)
    assert_close(new, (weight - err @ upper.triu()) * keep)


def test_the_update_is_the_optimal_one_for_a_mask_that_drops_first_columns():
    """Where only the leading columns of a row are dropped, nothing was frozen too early: the kept weights are then the
    least squares solution on the remaining columns, which is what Optimal Brain Surgeon promises."""
    weight, upper = problem(6, 20)
    keep = torch.ones(6, 20, dtype=torch.bool)
    keep[:, :7] = False
    new, _, _ = prune_block(weight, upper, keep)
    hessian = torch.linalg.inv(upper.double().T @ upper.double())
    rest = torch.linalg.solve(hessian[7:, 7:], hessian[7:, :] @ weight.double().T).T
    assert_close(new[:, 7:], rest)


def test_equal_scores_drop_the_lower_column():
    weight, upper = torch.ones(3, 8), torch.eye(8)
    _, _, keep = prune_block(weight, upper, n=1, m=4)
    assert keep.tolist() == [[False, False, False, True] * 2] * 3


def test_views_and_writing_in_place():
    big, upper = problem(10, 64)
    mask = torch.rand(10, 64) > 0.5
    want, _, _ = prune_block(big[:, 16:48].contiguous(), upper[16:48, 16:48].contiguous(), mask[:, 16:48])
    new, _, _ = prune_block(big[:, 16:48], upper[16:48, 16:48], mask[:, 16:48].to(torch.uint8), out=big[:, 16:48])
    assert torch.equal(new, want) and torch.equal(big[:, 16:48], want)


def test_prune_block_refuses():
    weight, upper = problem(4, 12)
    with pytest.raises(ValueError, match="either from keep or from n:m"):
        prune_block(weight, upper)
    with pytest.raises(ValueError, match="either from keep or from n:m"):
        prune_block(weight, upper, torch.ones(4, 12, dtype=torch.bool), 2, 4)
    with pytest.raises(ValueError, match="whole groups"):
        prune_block(weight, upper, n=2, m=5)
    with pytest.raises(ValueError, match="own shape"):
        prune_block(weight, upper[:6, :6], n=2, m=4)
    with pytest.raises(ValueError, match="float32"):
        prune_block(weight.bfloat16(), upper, n=2, m=4)
    with pytest.raises(ValueError, match="'panel', 'rank1' or 'torch'"):
        prune_block(weight, upper, n=2, m=4, kernel="cuda")


SELECTIONS = [  # rows, cols, k, segments
    (1, 1, 1, None),
    (10, 13, 0, None),
    (10, 13, 130, None),
    (40, 128, 2560, None),
    (90, 128, [2560, 0, 5504], [40, 7, 43]),
    (130, 100, [1, 12499, 250], [2, 125, 3]),
    (64, 65, [1, 0, 2000], [1, 0, 63]),
]


def score_sets(rows, cols):
    generator = torch.Generator().manual_seed(rows + cols)
    plain = torch.randn(rows, cols, generator=generator)
    yield plain
    yield plain.square()
    tied = plain.square()
    tied[:, ::3] = 0  # dead inputs
    tied[0] = -0.0
    yield tied
    yield (plain * 2).round() / 2
    yield torch.ones(rows, cols)
    odd = plain.clone()
    odd[0, 0], odd[-1, -1] = float("nan"), float("-inf")
    yield odd
    yield plain * 1e-41  # denormal numbers


def by_sorting(scores, k, segments):
    counts = [k] if isinstance(k, int) else k
    keep = []
    for part, count in zip(scores.split(segments or [len(scores)]), counts, strict=True):
        flat = torch.ones(part.numel(), dtype=torch.bool)
        flat[part.reshape(-1).argsort(stable=True)[:count]] = False
        keep.append(flat.view_as(part))
    return torch.cat(keep)


@pytest.mark.parametrize(("rows", "cols", "k", "segments"), SELECTIONS)
def test_lowest_mask_is_a_stable_sort(rows, cols, k, segments):
    for scores in score_sets(rows, cols):
        keep = lowest_mask(scores, k, segments)
        assert torch.equal(keep, by_sorting(scores, k, segments))


def test_lowest_mask_refuses():
    scores = torch.rand(6, 4)
    with pytest.raises(ValueError, match="matrix with 6 rows"):
        lowest_mask(scores, [1, 1], [3, 4])
    with pytest.raises(ValueError, match="matrix with 6 rows"):
        lowest_mask(scores, 1, [3, 3])
    with pytest.raises(ValueError, match="cannot drop 13"):
        lowest_mask(scores, [0, 13], [3, 3])
    with pytest.raises(ValueError, match="'radix' or 'torch'"):
        lowest_mask(scores, 1, kernel="sort")


# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------


def check_kernels(device):
    """Both kernels and the selection against the references above. Called in a process of its own on the CPU, because
    Triton decides at import whether it interprets."""
    for rows, cols, n, m in CASES:
        weight, upper = problem(rows, cols)
        keep = None if m else torch.rand(rows, cols) > 0.5
        want_new, want_err, want_kept = literal(weight, upper, keep, n, m)
        wide = torch.full((rows, cols + 5), float("nan"))  # a strided view, with poison around it
        wide[:, 2 : 2 + cols] = weight
        wide = wide.to(device)
        for kernel in ("panel", "rank1"):
            arguments = (upper.to(device), None if keep is None else keep.to(device), n, m)
            new, err, kept = prune_block(wide[:, 2 : 2 + cols], *arguments, kernel=kernel, rows_per_program=16)
            assert torch.equal(kept.cpu(), want_kept), (kernel, rows, cols, n, m)
            assert_close(new.cpu(), want_new)
            assert_close(err.cpu(), want_err)
            assert bool((new[~kept] == 0).all())
        in_place = wide.clone()
        prune_block(in_place[:, 2 : 2 + cols], *arguments, out=in_place[:, 2 : 2 + cols], kernel="panel")
        assert_close(in_place[:, 2 : 2 + cols].cpu(), want_new)
        assert bool(in_place[:, :2].isnan().all() and in_place[:, 2 + cols :].isnan().all())
    for rows, cols, k, segments in SELECTIONS:
        for scores in score_sets(rows, cols):
            keep = lowest_mask(scores.to(device), k, segments, kernel="radix")
            assert torch.equal(keep.cpu(), by_sorting(scores, k, segments)), (rows, cols, k, segments)
    halves = torch.randn(64, 64).bfloat16()
    assert torch.equal(
        lowest_mask(halves.to(device), 2000, kernel="radix").cpu(), by_sorting(halves.float(), 2000, None)
    )


@needs_triton
@pytest.mark.slow
def test_kernels_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, __file__, "cpu"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@needs_triton
@pytest.mark.gpu
def test_kernels_on_the_gpu():
    check_kernels("cuda")


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize(("n", "m"), [(0, 0), (2, 4)])
def test_a_block_of_a_real_layer_on_the_gpu(n, m):
    weight, upper = problem(4096 + 7, 128, device="cuda")
    keep = None if m else lowest_mask(weight.square() / upper.diagonal().square(), weight.numel() // 2)
    for kernel in ("panel", "rank1"):
        new, err, kept = prune_block(weight, upper, keep, n, m, kernel=kernel)
        assert int(kept.sum()) == weight.numel() - weight.numel() // 2
        want_new, want_err, _ = literal(weight, upper, kept, 0, 0)  # the mask it chose: a near tie may fall either way
        assert_close(new, want_new)
        assert_close(err, want_err)


@needs_triton
@pytest.mark.gpu
def test_nothing_waits_for_the_host_and_a_graph_can_hold_it():
    weight, upper = problem(1000, 128, device="cuda")

    def block():
        keep = lowest_mask((weight / upper.diagonal()).square(), [30_000, 34_000], [400, 600])
        return prune_block(weight, upper, keep)

    want = [tensor.clone() for tensor in block()]  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        block()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = block()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


if __name__ == "__main__":
    check_kernels(sys.argv[1])
