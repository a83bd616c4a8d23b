import pytest
import torch

from hf_sparse.patterns import parse, pruned_count
from hf_sparse.pruning.admm import alps
from hf_sparse.pruning.obs import sparsegpt
from hf_sparse.pruning.repair import repair
from hf_sparse.pruning.solution import relative_error

PATTERNS = ["unstructured", "row", "constant-fan-in", "2:4", "1:4", "8x8", "channel"]


def problem(seed=0, out=48, inputs=96, tokens=512):
    """A dense weight and correlated inputs with a few outlier columns."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(inputs, inputs, generator=generator))[0]
    x = torch.randn(tokens, inputs, generator=generator) * torch.logspace(0, -1.5, inputs) @ basis
    x[:, ::17] *= 12
    return torch.randn(out, inputs, generator=generator) * 0.05, x


def solve(weight, hessian, pattern="unstructured", sparsity=0.5, **options):
    pattern = parse(pattern)
    sparsity = sparsity if pattern.implied_sparsity is None else pattern.implied_sparsity
    [solution] = alps([weight], hessian, [pattern], [sparsity], **options)
    return solution


# The relative error of the authors' code (github.com/mazumder-lab/ALPS, alps.py, defaults, on the CPU) on problem(seed=1).
# rho and the ridge of the metric were chosen with problem(seed=0) in view, so that seed would prove nothing.
@pytest.mark.parametrize(
    "pattern, sparsity, official",
    [
        ("unstructured", 0.5, 0.00095),
        ("unstructured", 0.6, 0.00204),
        ("unstructured", 0.7, 0.00443),
        ("2:4", 0.5, 0.00207),
    ],
)
def test_at_least_as_good_as_the_official_code(pattern, sparsity, official):
    weight, x = problem(seed=1)
    assert solve(weight, x.T @ x, pattern, sparsity).error <= official


def test_known_weakness_at_80_percent():
    """Here the authors' code is better, 0.01079; this bounds the gap, which is about 13%."""
    weight, x = problem(seed=1)
    assert solve(weight, x.T @ x, sparsity=0.8).error <= 1.2 * 0.01079


@pytest.mark.parametrize("pattern", PATTERNS)
def test_counts_are_exact_and_zeros_conform(pattern):
    weight, x = problem()
    hessian = x.T @ x
    for sparsity in (0.5, 0.7):
        solution = solve(weight, hessian, pattern, sparsity)
        kind = parse(pattern)
        asked = kind.mask(weight.abs(), kind.implied_sparsity or sparsity)  # the same counts for any scores
        assert solution.mask.sum() == asked.sum()
        assert solution.mask.dtype == torch.bool and solution.weight.dtype == torch.float32
        assert not solution.weight[~solution.mask].any()
        assert kind.check(solution.weight)
        assert solution.error == pytest.approx(relative_error(weight, solution.weight, hessian), rel=1e-4)


@pytest.mark.parametrize("pattern", ["unstructured", "row", "2:4", "8x8"])
def test_better_than_magnitude_wanda_and_sparsegpt_even_repaired(pattern):
    weight, x = problem(seed=1)
    hessian, kind = x.T @ x, parse(pattern)
    ours = solve(weight, hessian, pattern, 0.5).error
    masks = [kind.mask(weight.abs(), 0.5), kind.mask(weight.abs() * x.norm(dim=0), 0.5)]
    masks.append(sparsegpt([weight], hessian, [kind], [0.5])[0].mask)
    for mask in masks:
        assert ours < relative_error(weight, repair([weight], hessian, [mask])[0], hessian)


def test_weights_are_the_least_squares_fit_of_the_mask():
    weight, x = problem()
    solution = solve(weight, x.T @ x, "unstructured", 0.6, tolerance=1e-6)
    [fitted] = repair([weight], x.T @ x, [solution.mask], method="exact")
    assert solution.error == pytest.approx(relative_error(weight, fitted, x.T @ x), rel=2e-3)


def test_weights_that_share_an_input_are_ranked_on_their_own():
    weight, x = problem()
    hessian = x.T @ x
    patterns = [parse("unstructured"), parse("2:4"), parse("row"), parse("channel")]
    together = alps([weight, weight * 9, weight[:7], weight], hessian, patterns, [0.6, 0.5, 0.3, 0.25])
    alone = [
        alps([w], hessian, [p], [s])[0]
        for w, p, s in zip([weight, weight * 9, weight[:7], weight], patterns, [0.6, 0.5, 0.3, 0.25], strict=True)
    ]
    for both, one in zip(together, alone, strict=True):
        assert (both.mask == one.mask).float().mean() > 0.99  # the products round differently
        assert both.error == pytest.approx(one.error, rel=0.02)


def test_same_pattern_together():
    weight, x = problem()
    pair = alps([weight, weight[:16] * 100], x.T @ x, [parse("unstructured")] * 2, [0.5, 0.7])
    assert [int((~s.mask).sum()) for s in pair] == [pruned_count(0.5, 48 * 96), pruned_count(0.7, 16 * 96)]


def test_deterministic_and_arguments_untouched():
    weight, x = problem()
    hessian = x.T @ x
    copies = weight.clone(), hessian.clone()
    one, two = solve(weight, hessian), solve(weight, hessian)
    assert torch.equal(one.weight, two.weight) and torch.equal(one.mask, two.mask)
    assert torch.equal(weight, copies[0]) and torch.equal(hessian, copies[1])


def test_sparsity_zero_and_one():
    weight, x = problem()
    everything, nothing = solve(weight, x.T @ x, sparsity=0.0), solve(weight, x.T @ x, sparsity=1.0)
    assert torch.equal(everything.weight, weight) and everything.mask.all() and everything.error == 0.0
    assert not nothing.weight.any() and not nothing.mask.any() and nothing.error == pytest.approx(1.0)


def test_scale_of_inputs_and_hessian_does_not_matter():
    weight, x = problem()
    one = solve(weight, x.T @ x)
    stretch = 2.0 ** torch.arange(-4.0, 4.0).repeat(12)  # W diag(a) on X diag(1/a) is the same layer
    other = solve(weight * stretch, (x / stretch).T @ (x / stretch) * 2.0**-10)
    assert (one.mask == other.mask).float().mean() > 0.99
    assert other.error == pytest.approx(one.error, rel=0.02)


def test_dead_inputs_go_first():
    weight, x = problem()
    x[:, 10:30] = 0.0
    solution = solve(weight, x.T @ x, sparsity=0.4)
    assert not solution.mask[:, 10:30].any()
    forced = solve(weight, x.T @ x, "2:4")  # the groups 12..15 and others consist of dead inputs only
    assert torch.equal(forced.weight[:, 12:16], weight[:, 12:16] * forced.mask[:, 12:16])
    nothing = solve(weight, torch.zeros(96, 96))
    assert nothing.error == 0.0 and int((~nothing.mask).sum()) == weight.numel() // 2


@pytest.mark.parametrize("damp", [0.0, 0.01])
def test_singular_hessian(damp):
    weight, x = problem(tokens=20)
    hessian = x.T @ x
    solution = solve(weight, hessian, sparsity=0.5, damp=damp)
    mask = parse("unstructured").mask(weight.abs() * x.norm(dim=0), 0.5)
    assert torch.isfinite(solution.weight).all()
    assert solution.error < relative_error(weight, weight * mask, hessian)


def test_bfloat16_products_find_masks_as_good(monkeypatch):
    """What a GPU does, here on the CPU."""
    weight, x = problem()
    full = solve(weight, x.T @ x, sparsity=0.6).error
    monkeypatch.setattr("hf_sparse.pruning.admm.fast", lambda matrix: matrix.bfloat16())
    assert solve(weight, x.T @ x, sparsity=0.6).error == pytest.approx(full, rel=0.03)


def test_low_precision_weights():
    weight, x = problem()
    solution = solve(weight.bfloat16(), x.T @ x)
    assert solution.weight.dtype == torch.float32
    assert solution.error == pytest.approx(solve(weight.bfloat16().float(), x.T @ x).error)


def test_errors_say_what_is_wrong():
    weight, x = problem()
    hessian, pattern = x.T @ x, parse("unstructured")
    with pytest.raises(ValueError, match="weight 0 has NaN"):
        solve(weight * float("inf"), hessian)
    with pytest.raises(ValueError, match="Hessian has NaN"):
        solve(weight, hessian * float("nan"))
    with pytest.raises(ValueError, match="does not fit"):
        solve(weight[:, :9], hessian)
    with pytest.raises(ValueError, match="does not fit"):
        solve(weight, hessian, "7x7")
    with pytest.raises(ValueError, match="sparsity is the fraction"):
        solve(weight, hessian, sparsity=1.5)
    with pytest.raises(ValueError, match="2 patterns"):
        alps([weight], hessian, [pattern] * 2, [0.5])
    with pytest.raises(ValueError, match="rho"):
        solve(weight, hessian, rho=(1.0, 0.5))
    with pytest.raises(torch.linalg.LinAlgError, match="not X\\^T X"):
        solve(weight, torch.eye(96) - 1e9 * (1 - torch.eye(96)))
    assert alps([], hessian, [], []) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("pattern", ["unstructured", "row", "2:4"])
def test_gpu_agrees(pattern):
    weight, x = problem()
    here = solve(weight, x.T @ x, pattern, 0.5)
    there = solve(weight.cuda(), (x.T @ x).cuda(), pattern, 0.5)
    assert there.weight.is_cuda and there.mask.is_cuda
    assert there.error == pytest.approx(here.error, rel=0.03)
