"""Folded models compute what they did, and are their stock parents."""

import logging

import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM, ResNetForImageClassification

from hf_sparse.flops import forward_flops, sparse_flops
from hf_sparse.models.fold import fold, why_not_folded
from hf_sparse.models.layers import SparseDoped, SparseFactorized, SparseParallel
from hf_sparse.models.sparse_gpt2 import SparseGPT2Config, SparseGPT2ForCausalLM
from hf_sparse.models.sparse_llama import SparseLlamaConfig, SparseLlamaForCausalLM
from hf_sparse.models.sparse_resnet import SparseResNetConfig, SparseResNetForImageClassification

TOKENS = dict(vocab_size=96, bos_token_id=0, eos_token_id=1)
MODELS = {
    "gpt2": (
        GPT2LMHeadModel,
        lambda **o: SparseGPT2ForCausalLM(
            SparseGPT2Config(n_embd=32, n_head=2, n_layer=2, n_positions=32, **TOKENS, **o)
        ),
    ),
    "llama": (
        LlamaForCausalLM,
        lambda **o: SparseLlamaForCausalLM(
            SparseLlamaConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                attention_bias=True,
                **TOKENS,
                **o,
            )
        ),
    ),
    "resnet": (
        ResNetForImageClassification,
        lambda **o: SparseResNetForImageClassification(
            SparseResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], num_labels=4, **o)
        ),
    ),
}
FAMILIES = ("parallel", "factorized", "doped")


def run(model):
    torch.manual_seed(7)
    if model.main_input_name == "input_ids":
        return model(torch.randint(96, (2, 16))).logits
    return model(torch.randn(2, 3, 32, 32, dtype=model.dtype)).logits


def lively(model):
    """Nothing at a value that hides a mistake: biases and batch norms too."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.dim() == 1 and tensor.is_floating_point() and "inv_freq" not in name:
                tensor.copy_(torch.rand_like(tensor) + 0.5 if "bias" not in name else torch.randn_like(tensor) * 0.1)
    return model.double().eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", MODELS)
def test_a_linear_model_folds_to_its_stock_parent(kind, family, tmp_path):
    parent, make = MODELS[kind]
    for branch_activation in (False, "norm"):
        model = lively(make(family=family, sparsity=0.5, branch_activation=branch_activation))
        before, layers = run(model), [m for m in model.modules() if type(m).__name__.startswith("Sparse")]
        count = sum(isinstance(m, (SparseParallel, SparseFactorized, SparseDoped)) for m in layers)
        assert not why_not_folded(model)
        assert fold(model) == count > 0
        assert torch.allclose(run(model), before, rtol=1e-9, atol=1e-10)
        config = model.config
        assert config.family is None and not config.sparsity and config.folded is None
        if kind == "resnet":
            config.layer_type = "basic"
        stock = parent(config).double().eval()
        stock.load_state_dict(model.state_dict())  # strict: the same names and shapes
        assert torch.allclose(run(stock), before, rtol=1e-9, atol=1e-10)
        model.save_pretrained(tmp_path / str(branch_activation))
        again = type(model).from_pretrained(tmp_path / str(branch_activation), dtype=torch.float64).eval()
        assert torch.equal(run(again), run(model))


def test_float32_within_rounding():
    model = MODELS["gpt2"][1](family="factorized", sparsity=0.75, branch_activation=False).eval()
    before = run(model)
    fold(model)
    assert torch.allclose(run(model), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_layers_with_an_activation_stay(kind, tmp_path, caplog):
    model = lively(MODELS[kind][1](family="parallel", sparsity=0.5))
    before = run(model)
    staying = why_not_folded(model)
    assert len(staying) == 2 and all(name.endswith(("mlp.c_fc", "mlp.gate_proj")) for name in staying)
    with caplog.at_level(logging.WARNING, logger="hf_sparse.models.fold"):
        count = fold(model)
    assert count == {"gpt2": 6, "llama": 12}[kind]
    assert f"folded {count} layers, 2 stay: 2 layers: an activation inside" in caplog.text
    assert torch.allclose(run(model), before, rtol=1e-9, atol=1e-10)
    assert set(why_not_folded(model)) == set(staying) and fold(model) == 0
    model.save_pretrained(tmp_path)  # the config knows which are dense
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert torch.equal(run(again), run(model))
    with pytest.raises(ValueError, match="folded"):
        model.config.sparsity_config()


def test_batch_norms_in_training_mode_stay():
    model = lively(MODELS["resnet"][1](family="doped", sparsity=0.5, branch_activation="norm"))
    reasons = why_not_folded(model.train())
    assert reasons and all("eval()" in reason for reason in reasons.values()) and fold(model) == 0
    assert all("activation" in r for r in why_not_folded(MODELS["resnet"][1](family="doped", sparsity=0.5)).values())


def test_a_convolution_keeps_stride_padding_and_bias():
    torch.manual_seed(0)
    for family in (SparseParallel, SparseFactorized, SparseDoped):
        convolution = nn.Conv2d(6, 10, (3, 5), stride=2, padding=(1, 2), padding_mode="circular")
        model = lively(nn.Sequential(family(convolution, 0.5, norm=True)))
        x = torch.randn(2, 6, 9, 11, dtype=torch.float64)
        before = model(x)
        assert fold(model) == 1 and type(model[0]) is nn.Conv2d
        assert torch.allclose(model(x), before, rtol=1e-10, atol=1e-12)


def test_what_folding_costs():
    """At the sparsity that the ranks are made for both cost the same where zeros are skipped; sparser parts are cheaper."""
    inputs = {"input_ids": (1, 16)}
    for extra, cheaper in ((0.0, False), (0.2, True)):
        model = MODELS["llama"][1](family="factorized", sparsity=0.5, branch_activation=False).eval()
        densities = {n: 0.5 - extra for n, _ in model.named_parameters() if n.endswith((".u.weight", ".v.weight"))}
        of_parts = sparse_flops(forward_flops(model, inputs), densities)
        parameters = sum(p.numel() for p in model.parameters())
        fold(model)
        folded = sum(forward_flops(model, inputs).values())
        assert sum(p.numel() for p in model.parameters()) < parameters
        assert (of_parts < 0.8 * folded) if cheaper else of_parts == pytest.approx(folded, rel=0.03)
