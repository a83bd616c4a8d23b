"""SR-STE and Top-KAST against autograd of the written-out loss and against sparsimony and torch_topkast.

``tests/data/official_straight_through.json`` was recorded from runs of their code, which its ``source`` names.
"""

import base64
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_sparse.config import SparsityConfig
from hf_sparse.patterns import parse
from hf_sparse.training.sparse_training import sparsify
from hf_sparse.training.straight_through import sr_ste_decay_, top_kast_penalty_

RECORD = json.loads((Path(__file__).parents[1] / "data" / "official_straight_through.json").read_text(encoding="utf-8"))


def floats(text: str, shape) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f4").reshape(shape).copy())


def bits(text: str, shape) -> torch.Tensor:
    packed = np.frombuffer(bytes.fromhex(text), dtype=np.uint8)
    return torch.from_numpy(np.unpackbits(packed, count=math.prod(shape)).reshape(shape).astype(bool))


@pytest.fixture
def dense():
    return torch.randn(12, 16, generator=torch.Generator().manual_seed(0))


def test_sr_ste_is_the_gradient_of_the_decay_of_masked_weights(dense):
    """The gradient of the loss through the sparse weight plus that of λ/2 |(1 - m) ⊙ θ|²."""
    mask = parse("2:4").mask(dense.abs())
    inputs = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    sparse = (dense * mask).requires_grad_()
    (inputs @ sparse.T).square().sum().backward()
    theta = dense.clone().requires_grad_()
    (0.5 * 3e-2 * (theta * ~mask).square().sum()).backward()
    ours = sparse.grad.clone()
    assert sr_ste_decay_(ours, dense, mask, decay=3e-2) is ours
    torch.testing.assert_close(ours, sparse.grad + theta.grad)
    assert torch.equal(ours[mask], sparse.grad[mask])


def test_sr_ste_equals_sparsimony():
    case = RECORD["sr_ste"]
    gradient, dense, mask = floats(case["upstream"], case["shape"]), floats(case["dense"], case["shape"]), case["mask"]
    ours = sr_ste_decay_(gradient, dense, bits(mask, case["shape"]))  # its default decay, 2e-4
    torch.testing.assert_close(ours, floats(case["gradient"], case["shape"]), rtol=0, atol=1e-7)
    assert not torch.equal(ours, floats(case["upstream"], case["shape"]))


def test_sr_ste_settles_a_mask(dense):
    """A masked weight with no gradient decays by (1 - lr λ) a step; a kept one stays."""
    theta, mask = dense.clone(), parse("2:4").mask(dense.abs())
    for _ in range(10):
        theta -= 0.5 * sr_ste_decay_(torch.zeros_like(theta), theta, mask, decay=0.2)
    torch.testing.assert_close(theta[~mask], dense[~mask] * 0.9**10)
    assert torch.equal(theta[mask], dense[mask])


def top_kast_masks(dense: torch.Tensor, forward: float, backward: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The sets A and B that a training chooses for one weight."""
    model = torch.nn.Linear(dense.shape[1], dense.shape[0], bias=False, device=dense.device, dtype=dense.dtype)
    model.weight.data.copy_(dense)
    schedule = {"backward_sparsity": 1 - backward}
    training = sparsify(model, SparsityConfig(method="top-kast", sparsity=1 - forward, schedule=schedule))
    return training.weights[0].mask, training.weights[0].companion("trained")


@pytest.mark.parametrize(("forward", "backward"), [(0.1, 0.5), (0.2, 0.2), (0.55, 0.9)])
def test_top_kast_sets_are_the_largest_weights(dense, forward, backward):
    a, b = top_kast_masks(dense, forward, backward)
    order = dense.abs().flatten().argsort(descending=True).tolist()
    for mask, density in ((a, forward), (b, backward)):
        count = dense.numel() - round((1 - density) * dense.numel())
        assert set(mask.flatten().nonzero().flatten().tolist()) == set(order[:count])
    assert not (a & ~b).any()


def test_top_kast_sets_nest_also_among_equal_weights():
    a, b = top_kast_masks(torch.ones(4, 8), 0.25, 0.5)
    assert (int(a.sum()), int(b.sum())) == (8, 16) and not (a & ~b).any()


def test_top_kast_sets_are_those_of_torch_topkast():
    case = RECORD["top_kast"]
    a, b = top_kast_masks(floats(case["dense"], case["shape"]), case["forward_density"], case["backward_density"])
    assert torch.equal(a, bits(case["forward"], case["shape"]))
    assert torch.equal(b, bits(case["backward"], case["shape"]))


def test_top_kast_penalty_is_autograd_of_the_written_out_loss(dense):
    a, b = top_kast_masks(dense, 0.2, 0.6)
    theta = dense.clone().requires_grad_()
    (0.5 * 1e-3 * (theta[a].square().sum() + theta[b & ~a].square().sum() / 0.2)).backward()
    gradient = torch.randn(12, 16, generator=torch.Generator().manual_seed(2)) * b
    ours = gradient.clone()
    assert top_kast_penalty_(ours, dense, a, b, 0.2, 1e-3) is ours
    torch.testing.assert_close(ours, gradient + theta.grad)
    assert (ours[~b] == 0).all()  # weights outside B wait unchanged


def test_top_kast_penalty_differs_from_torch_topkast_by_the_two_norms():
    """Norms there, half their squares here: with the norms multiplied back the gradients are equal, 1/D included."""
    case = RECORD["top_kast"]
    dense, official = floats(case["dense"], case["shape"]), floats(case["gradient"], case["shape"])
    a, b = bits(case["forward"], case["shape"]), bits(case["backward"], case["shape"])
    explore = b & ~a
    density = case["forward_density"]
    assert case["penalty"] == pytest.approx(float(dense[a].norm() + dense[explore].norm() / density), rel=1e-6)
    ours = top_kast_penalty_(torch.zeros_like(dense), dense, a, b, density, 1.0)
    official = official * (a * dense[a].norm() + explore * dense[explore].norm())
    torch.testing.assert_close(ours, official, rtol=1e-5, atol=1e-7)


def test_gradients_keep_their_precision(dense):
    a, b = top_kast_masks(dense.bfloat16(), 0.2, 0.6)
    gradient = torch.zeros(12, 16, dtype=torch.bfloat16)
    assert sr_ste_decay_(gradient, dense, a).dtype == torch.bfloat16
    assert top_kast_penalty_(gradient.float(), dense.bfloat16(), a, b, 0.2, 1e-3).dtype == torch.float32


def test_errors_name_what_was_wrong(dense):
    with pytest.raises(ValueError, match=r"mask \(3, 4\)"):
        sr_ste_decay_(dense.clone(), dense, torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="forward density"):
        top_kast_penalty_(dense.clone(), dense, dense > 0, dense > 0, 0.0, 1e-3)


@pytest.mark.gpu
def test_gpu_gives_the_same_sets(dense):
    for here, there in zip(top_kast_masks(dense, 0.2, 0.6), top_kast_masks(dense.cuda(), 0.2, 0.6), strict=True):
        assert torch.equal(here, there.cpu())
