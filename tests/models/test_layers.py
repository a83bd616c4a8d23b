"""The layers of Sparse-IFT: published ranks and widths, FLOPs, and what they compute."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from hf_sparse.models.layers import (
    SparseDoped,
    SparseFactorized,
    SparseParallel,
    joint_weight_decay,
    masked_weights,
    transform_layers,
)
from hf_sparse.models.ranks import doped_rank, factorized_rank, parallel_branches
from hf_sparse.targets import find_targets

SPARSITIES = (0.5, 0.75, 0.9)
MIXED = [(768, 768), (3072, 768), (768, 3072), (577, 1031), (27, 64), (1, 7), (4096, 11)]


@pytest.mark.parametrize(
    ("fan_in", "out", "factorized", "doped"),
    [
        # 3x3 convolutions and transformer layers at 50, 75, 90%
        (9 * 64, 64, (116, 231, 576), (28, 43, 51)),
        (9 * 512, 512, (922, 1844, 4608), (230, 345, 414)),
        (768, 768, (768, 1536, 3840), (192, 288, 345)),
        (768, 3072, (1229, 2458, 6144), (307, 460, 552)),
    ],
)
def test_published_ranks(fan_in, out, factorized, doped):
    """In floats, as the released code has them, 1 - 0.9 makes 577, 4609, 3841 and 6145 of 576, 4608, 3840 and 6144."""
    assert tuple(factorized_rank(fan_in, out, s) for s in SPARSITIES) == factorized
    assert tuple(doped_rank(fan_in, out, s) for s in SPARSITIES) == doped
    assert tuple(parallel_branches(s) for s in SPARSITIES) == (2, 4, 10)


@pytest.mark.parametrize(("fan_in", "out"), MIXED)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_flops_are_those_of_the_dense_layer_within_one_rank(fan_in, out, sparsity):
    dense, of_rank, density = fan_in * out, fan_in + out, 1 - sparsity
    d = factorized_rank(fan_in, out, sparsity)
    assert 0 <= d * of_rank * density - dense + 1e-6 < of_rank * density + 1e-5
    d = factorized_rank(fan_in, out, sparsity, sparse_u_only=True)
    assert 0 <= d * (fan_in * density + out) - dense + 1e-6 < fan_in * density + out + 1e-5
    d = doped_rank(fan_in, out, sparsity)
    assert -of_rank < dense * density + d * of_rank - dense <= 1e-6
    assert parallel_branches(sparsity) * density * dense == pytest.approx(dense)


def test_sparsities_without_a_whole_number_of_branches():
    assert parallel_branches(0.99) == 100  # as a float, 1 / (1 - 0.99) is below 100
    with pytest.raises(ValueError, match=r"sparsity 0\.7 gives 3\.333\. The nearest that fit are 0\.666667 and 0\.75"):
        parallel_branches(0.7)
    for wrong in (1.0, -0.1, "0.5", True):
        with pytest.raises(ValueError, match="lies in"):
            parallel_branches(wrong)


def kinds():
    yield "linear", nn.Linear(24, 40), torch.randn(2, 5, 24)
    yield "conv1d", Conv1D(40, 24), torch.randn(2, 5, 24)
    yield "conv", nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), torch.randn(2, 6, 9, 9)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("kind", "layer", "x"), kinds(), ids=[kind for kind, _, _ in kinds()])
def test_each_family_computes_its_formula(kind, layer, x, norm):
    """Against the formulas of the paper's figure written out with functional calls."""
    torch.manual_seed(0)
    act = nn.GELU()
    norm = norm and kind == "conv"

    def apply(module, x, stride=True):
        if kind == "conv":
            size = module.weight.shape[-1]
            return F.conv2d(x, module.weight, module.bias, stride=2 if stride else 1, padding=size // 2)
        return x @ (module.weight.t() if kind == "linear" else module.weight) + (
            0 if module.bias is None else module.bias
        )

    def normed(norm, y):
        return y if norm is None else F.batch_norm(y, None, None, norm.weight, norm.bias, training=True)

    parallel = SparseParallel(layer, 0.75, norm, act)
    assert len(parallel.branches) == 4
    norms = parallel.norms or [None] * 4
    expected = sum(act(normed(n, apply(b, x))) for b, n in zip(parallel.branches, norms, strict=True))
    torch.testing.assert_close(parallel(x), expected)
    factorized = SparseFactorized(layer, 0.75, norm, act)
    expected = apply(factorized.v, act(normed(factorized.norm, apply(factorized.u, x))), stride=False)
    torch.testing.assert_close(factorized(x), expected)
    doped = SparseDoped(layer, 0.75, norm, act)
    low_rank = apply(doped.v, apply(doped.u, x), stride=False)
    torch.testing.assert_close(doped(x), low_rank + act(normed(doped.norm, apply(doped.sparse, x))))
    for made in (parallel, factorized, doped):
        assert made(x).shape == layer(x).shape


def test_the_activation_in_the_branches_is_the_one_that_follows_the_layer():
    model = GPT2LMHeadModel(GPT2Config(n_embd=24, n_head=2, n_layer=1, vocab_size=50, n_positions=8))
    block = model.transformer.h[0]
    names = [f"transformer.h.0.{n}" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    assert transform_layers(model, "parallel", 0.5, names) == dict.fromkeys(names, 2)
    kinds = [
        type(m.activation).__name__ for m in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
    ]
    assert kinds == ["NoneType", "NoneType", type(block.mlp.act).__name__, "NoneType"]
    masked = find_targets(model, masked_weights("parallel", names))
    assert len(masked) == 8 and all(".branches." in name for name in masked)


def test_bad_requests_change_nothing():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(2, 2))
    for family, names, message in (
        ("wide", ["0"], "layers of their own"),
        ("parallel", ["0", "1"], "BatchNorm1d is no linear layer"),
        ("doped", ["0", "2"], "2: sparsity 0.5 saves less"),
    ):
        with pytest.raises(ValueError, match=message):
            transform_layers(model, family, 0.5, names)
        assert isinstance(model[0], nn.Linear) and isinstance(model[2], nn.Linear)
    with pytest.raises(ValueError, match="sparse_u_only belongs to"):
        transform_layers(model, "doped", 0.9, ["0"], sparse_u_only=True)


@pytest.mark.parametrize(("kind", "layer", "x"), kinds(), ids=[kind for kind, _, _ in kinds()])
def test_joint_weight_decay_is_the_norm_of_the_product(kind, layer, x):
    model = nn.Sequential(
        SparseFactorized(layer, 0.5), SparseDoped(layer, 0.9), SparseFactorized(layer, 0.5, False, nn.ReLU())
    )
    expected = 0.0
    for made in (model[0], model[1]):
        u, v = ((m.weight.t() if kind == "conv1d" else m.weight.flatten(1)) for m in (made.u, made.v))
        expected += (v @ u).square().sum()
    decay = joint_weight_decay(model)
    torch.testing.assert_close(decay, expected)
    decay.backward()
    assert model[0].u.weight.grad is not None and model[2].u.weight.grad is None
    with pytest.raises(ValueError, match="no factorized or doped layer"):
        joint_weight_decay(nn.Sequential(layer))
