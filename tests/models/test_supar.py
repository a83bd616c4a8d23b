"""SuPar keeps activations and their first updates the same size over widths and densities; standard scaling does not."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

from hf_sparse.config import SparsityConfig
from hf_sparse.models.ift import sparse_ift
from hf_sparse.models.supar import supar_parameters
from hf_sparse.training.sparse_training import sparsify

BASE = 64


def network(width):
    torch.manual_seed(0)
    config = GPT2Config(n_embd=width, n_head=4, n_layer=1, vocab_size=64, n_positions=16, initializer_range=0.1)
    return GPT2LMHeadModel(config)


def hidden_sizes(width, sparsity, supar):
    """(size of what the first MLP layer computes at the start, size of its change after one Adam step)."""
    model, config = network(width), SparsityConfig(sparsity=sparsity, method="static")
    layer = model.transformer.h[0].mlp.c_fc
    groups = model.parameters()
    if supar:
        groups = supar_parameters(model, config, learning_rate=1e-3, base_width=BASE)
    training = sparsify(model, config) if sparsity else None
    optimizer = torch.optim.Adam(groups, lr=1e-3)
    if training:
        training.start(optimizer, 1)
    x = torch.randn(256, width, generator=torch.Generator().manual_seed(1))
    y = layer(x) - layer.bias
    layer(x).square().mean().backward()  # a gradient that is correlated with the inputs, as real ones are
    optimizer.step()
    with torch.no_grad():
        return y.std().item(), (layer(x) - layer.bias - y).std().item()


@pytest.mark.parametrize(("width", "sparsity"), [(64, 0.75), (256, 0.0), (256, 0.75), (256, 0.9)])
def test_activations_and_updates_keep_their_size(width, sparsity):
    start, change = hidden_sizes(BASE, 0.0, supar=True)
    ours, standard = hidden_sizes(width, sparsity, True), hidden_sizes(width, sparsity, False)
    assert ours[0] == pytest.approx(start, rel=0.05)
    assert 0.5 < ours[1] / change < 2
    multiple = width / BASE * (1 - sparsity)
    if multiple != 1:
        assert standard[0] / start == pytest.approx(multiple**0.5, rel=0.05)


def test_iso_weights_per_neuron_needs_no_correction():
    """Width 4 times, density a quarter: as many weights per output as before, so nothing changes for sparse matrices."""
    model, config = network(4 * BASE), SparsityConfig(sparsity=0.75, method="static")
    before = model.transformer.h[0].mlp.c_fc.weight.clone()
    groups = supar_parameters(model, config, learning_rate=1e-3, base_width=BASE, weight_decay=0.1)
    assert torch.equal(model.transformer.h[0].mlp.c_fc.weight, before)
    assert {group["lr"] for group in groups} == {1e-3} and {group["weight_decay"] for group in groups} == {0.0, 0.1}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_it_says_what_it_is_for():
    model = network(BASE)
    before = model.transformer.h[0].mlp.c_fc.weight.clone()
    for config, arguments, message in (
        (SparsityConfig(method="rigl"), {}, "masks that stay"),
        (SparsityConfig(method="static"), {"base_width": 0}, "positive"),
        (SparsityConfig(method="static"), {"learning_rate": -1.0}, "positive"),
    ):
        with pytest.raises(ValueError, match=message):
            supar_parameters(model, config, **({"learning_rate": 1e-3, "base_width": BASE} | arguments))
    with pytest.raises(ValueError, match="hidden_size"):
        supar_parameters(torch.nn.Linear(2, 2), SparsityConfig(method="static"), learning_rate=1e-3, base_width=BASE)
    assert torch.equal(model.transformer.h[0].mlp.c_fc.weight, before)


def test_layers_on_the_input_keep_their_start():
    """The inputs of a patch embedding do not grow with the width."""
    config = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2)
    model = ViTForImageClassification(ViTConfig(**config, image_size=16, patch_size=8))
    patches = model.vit.embeddings.patch_embeddings.projection.weight
    before = patches.clone()
    groups = supar_parameters(model, SparsityConfig(sparsity=0.75, method="static"), learning_rate=1e-3, base_width=32)
    assert torch.equal(patches, before)
    assert next(group["lr"] for group in groups if any(p is patches for p in group["params"])) == 1e-3
    sparse_ift(model, "parallel", 0.5)
    with pytest.raises(ValueError, match="only wide models"):
        supar_parameters(model, SparsityConfig(method="static"), learning_rate=1e-3, base_width=32)
