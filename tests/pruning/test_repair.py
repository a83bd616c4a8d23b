import pytest
import torch

from hf_sparse.patterns import parse
from hf_sparse.pruning.repair import repair
from hf_sparse.pruning.solution import relative_error


def problem(seed=0, out=48, inputs=96, tokens=512):
    """A dense weight and correlated inputs with a few outlier columns."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(inputs, inputs, generator=generator))[0]
    x = torch.randn(tokens, inputs, generator=generator) * torch.logspace(0, -1.5, inputs) @ basis
    x[:, ::17] *= 12
    return torch.randn(out, inputs, generator=generator) * 0.05, x


def masks_of(weight, x):
    wanda = weight.abs() * x.norm(dim=0)
    return {
        "magnitude": parse("unstructured").mask(weight.abs(), 0.6),
        "wanda": parse("row").mask(wanda, 0.5),
        "2:4": parse("2:4").mask(wanda),
        "block": parse("8x8").mask(wanda, 0.5),
        "channel": parse("channel").mask(wanda, 0.5),
    }


def gradient(weight, fitted, hessian, mask, damp):
    ridge = damp * hessian.diagonal().double()
    lost = (weight - fitted).double()
    return ((lost @ hessian.double() + lost * ridge) * mask).abs().max() / (
        weight.double() @ hessian.double()
    ).abs().max()


@pytest.mark.parametrize("method", ["exact", "cg"])
@pytest.mark.parametrize("kind", ["magnitude", "wanda", "2:4", "block", "channel"])
def test_gradient_vanishes_on_the_support(kind, method):
    weight, x = problem()
    hessian, mask = x.T @ x, masks_of(*problem())[kind]
    [fitted] = repair([weight], hessian, [mask], method=method, tolerance=0.0)
    assert gradient(weight, fitted, hessian, mask, 0.01) < 1e-5
    assert not fitted[~mask].any()
    before = relative_error(weight, weight * mask, hessian)
    after = relative_error(weight, fitted, hessian)
    assert after <= before * (1 + 1e-6)
    if kind != "channel":  # a row that keeps everything has nothing to repair
        assert after < 0.8 * before
    else:
        assert torch.equal(fitted, weight * mask)


@pytest.mark.parametrize("method", ["exact", "cg"])
def test_equals_lstsq_of_each_row(method):
    weight, x = problem(out=16)
    mask = masks_of(weight, x)["magnitude"]
    damp = 0.01
    inputs = torch.cat([x, torch.diag((damp * x.square().sum(dim=0)).sqrt())]).double()
    expected = torch.zeros_like(weight).double()
    for row, kept in enumerate(mask):
        expected[row, kept] = torch.linalg.lstsq(inputs[:, kept], inputs @ weight[row].double()).solution
    [fitted] = repair([weight], x.T @ x, [mask], damp=damp, method=method, tolerance=0.0)
    torch.testing.assert_close(fitted.double(), expected, rtol=1e-3, atol=1e-4)


def test_methods_agree_and_default_tolerance_is_enough():
    weight, x = problem()
    mask = masks_of(weight, x)["wanda"]
    errors = [
        relative_error(weight, repair([weight], x.T @ x, [mask], method=method)[0], x.T @ x)
        for method in ("exact", "cg")
    ]
    assert errors[1] == pytest.approx(errors[0], rel=2e-3)


def test_more_iterations_are_never_worse():
    weight, x = problem()
    hessian, mask = x.T @ x, masks_of(weight, x)["wanda"]
    ridged = hessian + 0.01 * hessian.diagonal().diag()
    errors = [
        relative_error(weight, repair([weight], hessian, [mask], method="cg", tolerance=0.0, iterations=n)[0], ridged)
        for n in (0, 1, 2, 4, 8, 16, 60)
    ]
    assert all(late <= early * (1 + 1e-5) for early, late in zip(errors, errors[1:], strict=False))


def test_idempotent_and_start():
    weight, x = problem()
    hessian, mask = x.T @ x, masks_of(weight, x)["magnitude"]
    for method in ("exact", "cg"):
        [once] = repair([weight], hessian, [mask], method=method, tolerance=0.0)
        [twice] = repair([weight], hessian, [mask], method=method, start=[once], tolerance=0.0)
        torch.testing.assert_close(twice, once, rtol=1e-3, atol=1e-4)


def test_weights_that_share_an_input_are_independent():
    weight, x = problem()
    masks = masks_of(weight, x)
    both = repair([weight, weight[:20]], x.T @ x, [masks["wanda"], masks["2:4"][:20]], method="cg", tolerance=1e-6)
    one = repair([weight[:20]], x.T @ x, [masks["2:4"][:20]], method="cg", tolerance=1e-6)
    assert [tuple(w.shape) for w in both] == [(48, 96), (20, 96)]
    torch.testing.assert_close(both[1], one[0], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("method", ["exact", "cg"])
@pytest.mark.parametrize("damp", [0.0, 0.01])
def test_singular_hessian_and_dead_inputs(method, damp):
    weight, x = problem(tokens=30)
    x[:, [3, 40]] = 0.0
    hessian = x.T @ x
    mask = masks_of(weight, x)["magnitude"]
    mask[:, 3] = True
    copy = hessian.clone()
    [fitted] = repair([weight], hessian, [mask], method=method, damp=damp)
    assert torch.isfinite(fitted).all()
    assert torch.equal(fitted[:, 3], weight[:, 3])
    assert relative_error(weight, fitted, hessian) < 0.5 * relative_error(weight, weight * mask, hessian)
    assert torch.equal(hessian, copy)


def test_nothing_and_everything_kept():
    weight, x = problem()
    full = torch.ones_like(weight, dtype=torch.bool)
    assert torch.equal(repair([weight], x.T @ x, [full])[0], weight)
    assert not repair([weight], x.T @ x, [~full])[0].any()
    assert repair([], x.T @ x, []) == []


def test_scale_of_the_hessian_does_not_matter():
    weight, x = problem()
    mask = masks_of(weight, x)["wanda"]
    [one], [other] = (repair([weight], (x.T @ x) * factor, [mask], method="exact") for factor in (1.0, 2.0**-12))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_errors_say_what_is_wrong():
    weight, x = problem()
    hessian, mask = x.T @ x, torch.ones_like(weight, dtype=torch.bool)
    with pytest.raises(ValueError, match="method"):
        repair([weight], hessian, [mask], method="magic")
    with pytest.raises(ValueError, match="masks"):
        repair([weight], hessian, [mask[:3]])
    with pytest.raises(ValueError, match="does not fit"):
        repair([weight[:, :5]], hessian, [mask[:, :5]])
    with pytest.raises(ValueError, match="NaN"):
        repair([weight * float("nan")], hessian, [mask])
    with pytest.raises(ValueError, match="NaN"):
        repair([weight], hessian / 0.0, [mask])
    with pytest.raises(ValueError, match="damp"):
        repair([weight], hessian, [mask], damp=-1.0)
    bad = torch.eye(96) - 1e9 * (1 - torch.eye(96))
    for method in ("exact", "cg"):
        with pytest.raises(torch.linalg.LinAlgError, match="not X\\^T X"):
            repair([weight], bad, [masks_of(weight, x)["wanda"]], method=method)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_agrees():
    weight, x = problem()
    mask = masks_of(weight, x)["wanda"]
    [here] = repair([weight], x.T @ x, [mask], method="cg")
    [there] = repair([weight.cuda()], (x.T @ x).cuda(), [mask.cuda()], method="cg")
    assert there.is_cuda
    assert relative_error(weight, there.cpu(), x.T @ x) == pytest.approx(
        relative_error(weight, here, x.T @ x), rel=5e-3
    )
