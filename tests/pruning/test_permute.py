"""Channel permutation: the function stays, the groups get better."""

import itertools

import pytest
import torch

from hf_sparse import SparsityConfig, find_targets, prune
from hf_sparse.patterns import NM
from hf_sparse.pruning.permute import choose_permutation, permute_hidden_units, producers_of


def kept(scores, order, pattern):
    mask = pattern.mask(scores[:, order])
    return float((scores[:, order] * mask).sum())


def test_finds_the_best_of_all_orders_on_a_small_matrix():
    scores = torch.rand(3, 6, generator=torch.Generator().manual_seed(0)) ** 4
    pattern = NM(1, 3)
    best = max(kept(scores, torch.tensor(order), pattern) for order in itertools.permutations(range(6)))
    assert kept(scores, choose_permutation(scores, pattern), pattern) == pytest.approx(best)


def test_important_neighbours_are_parted():
    scores = torch.ones(4, 8)
    scores[:, :4] = 10.0  # 2:4 in this order drops two important inputs a row
    order = choose_permutation(scores, NM(2, 4))
    assert sorted(order.tolist()) == list(range(8))
    assert kept(scores, order, NM(2, 4)) == 4 * 40.0 > kept(scores, torch.arange(8), NM(2, 4))


@pytest.mark.parametrize(
    ("family", "consumer", "count"), [("llama", "down_proj", 2), ("opt", "fc2", 1), ("gpt2", "mlp.c_proj", 1)]
)
def test_permuting_hidden_units_keeps_the_function(tiny_model, family, consumer, count):
    model = tiny_model(family)
    ids = torch.randint(3, 320, (2, 16), generator=torch.Generator().manual_seed(0))
    before = model(ids).logits
    targets = find_targets(model)
    target = next(t for t in targets.values() if t.module.endswith(consumer))
    producers = producers_of(target, targets, 64)
    assert len(producers) == count
    order = torch.randperm(target.shape[1], generator=torch.Generator().manual_seed(1))
    permute_hidden_units(model, target, producers, order)
    torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=1e-5)
    assert not torch.equal(order, torch.arange(len(order)))


def test_attention_has_no_free_order(tiny_model):
    targets = find_targets(tiny_model("llama"))
    assert producers_of(targets["model.layers.0.self_attn.o_proj.weight"], targets, 64) == []
    assert producers_of(targets["model.layers.0.mlp.gate_proj.weight"], targets, 64) == []


@pytest.mark.parametrize("saliency", ["wanda", "sparsegpt"])
def test_permutation_lowers_the_error_of_two_four(tiny_model, saliency):
    ids = torch.randint(3, 320, (32, 32), generator=torch.Generator().manual_seed(0))
    errors = []
    for permute in (False, True):
        model = tiny_model("llama")
        with torch.no_grad():  # neighbours of very different importance, as real models have
            for layer in model.model.layers:
                layer.mlp.up_proj.weight.mul_(torch.linspace(4, 0.1, 128)[:, None])
        config = SparsityConfig(pattern="2:4", saliency=saliency, permute=permute, repair=saliency == "wanda")
        report = prune(model, config, ids)
        assert report.conforms and not [p.note for p in report.parameters if p.note]
        errors.append(next(p.error for p in report.parameters if p.name == "model.layers.0.mlp.down_proj.weight"))
    assert errors[1] < 0.8 * errors[0]
