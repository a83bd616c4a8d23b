"""A model whose layers were replaced saves and loads with the stock calls, trains and folds."""

import logging

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
)

from hf_sparse.models.fold import fold
from hf_sparse.models.ift import sparse_ift
from hf_sparse.training.sparse_training import sparsify

GPT2 = dict(n_embd=24, n_head=2, n_layer=2, vocab_size=64, n_positions=16, bos_token_id=0, eos_token_id=0)
RESNET = dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
MODELS = {
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(**GPT2)), AutoModelForCausalLM, {"input_ids": torch.arange(8)[None]}),
    "resnet": (
        lambda: ResNetForImageClassification(ResNetConfig(**RESNET)),
        AutoModelForImageClassification,
        {"pixel_values": torch.randn(2, 3, 32, 32)},
    ),
}


@pytest.mark.parametrize("family", ["parallel", "factorized", "doped", "wide"])
@pytest.mark.parametrize("kind", MODELS)
def test_saved_and_loaded_with_stock_calls(kind, family, tmp_path, caplog):
    make, auto, inputs = MODELS[kind]
    torch.manual_seed(0)
    model = make()
    shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
    report = sparse_ift(model, family, 0.75, inputs=shapes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training = sparsify(model, report.config, optimizer, total_steps=2)
    for _ in range(2):
        model(**inputs).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    training.finish()
    model.eval()
    expected = model(**inputs).logits
    for place in ("once", "twice"):  # what was loaded can be saved again
        model.save_pretrained(tmp_path / place)
        with caplog.at_level(logging.WARNING):
            model = auto.from_pretrained(tmp_path / place)
        assert torch.equal(model(**inputs).logits, expected)
        assert not getattr(model, "is_quantized", False) and model.training is False
    assert "MISSING" not in caplog.text and "newly initialized" not in caplog.text
    model.train()(**inputs).logits.sum().backward()  # a plain, trainable model


def test_folded_models_are_stock_again(tmp_path):
    model = MODELS["gpt2"][0]()
    sparse_ift(model, "factorized", 0.5, branch_activation=False, inputs={"input_ids": (1, 8)})
    model.eval()
    ids = MODELS["gpt2"][2]
    expected = model(**ids).logits
    assert fold(model) == 8 and not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "folded")
    torch.testing.assert_close(GPT2LMHeadModel.from_pretrained(tmp_path / "folded")(**ids).logits, expected)


def test_layers_are_replaced_once():
    model = MODELS["gpt2"][0]()
    sparse_ift(model, "parallel", 0.5)
    with pytest.raises(ValueError, match="widened already"):
        sparse_ift(model, "doped", 0.75)


def test_loads_with_another_head_or_none(tmp_path):
    model = MODELS["gpt2"][0]().eval()
    sparse_ift(model, "doped", 0.75, inputs={"input_ids": (1, 8)})
    model.save_pretrained(tmp_path / "head")
    ids = MODELS["gpt2"][2]
    base = AutoModel.from_pretrained(tmp_path / "head")
    assert torch.equal(base(**ids).last_hidden_state, model.transformer(**ids).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(again.transformer(**ids).last_hidden_state, base(**ids).last_hidden_state)
