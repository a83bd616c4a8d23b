"""The dense layer with our kernel is ``nn.Linear`` in every respect but speed."""

import copy

import pytest
import torch
from torch import nn

from hf_sparse import pack_for_inference, unpack
from hf_sparse.runtime import choose, pack
from hf_sparse.runtime.dense_linear import DenseLinear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5, 8, 9])
def test_it_computes_what_the_layer_computes(dtype, tokens):
    torch.manual_seed(0)
    stock = nn.Linear(96, 70, dtype=dtype)
    ours = DenseLinear(stock)
    x = torch.randn(tokens, 96, dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), stock(x), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)
        torch.testing.assert_close(ours(x[None]), stock(x[None]), rtol=1e-2, atol=1e-2)
        stock.weight.mul_(2)  # changed in place, then replaced: the next call sees both
        torch.testing.assert_close(ours(x), stock(x), rtol=1e-2, atol=2e-2)
        ours.weight = nn.Parameter(torch.zeros_like(stock.weight))
        torch.testing.assert_close(ours(x), stock.bias.expand(tokens, 70))
        ours.bias.zero_()
        assert not ours(x).any()
    assert copy.deepcopy(ours)(x).shape == (tokens, 70)


def test_gradients_and_compilation_take_the_stock_path():
    stock = nn.Linear(32, 16)
    ours = DenseLinear(stock)
    x = torch.randn(2, 32, requires_grad=True)
    ours(x).sum().backward()
    assert x.grad is not None and stock.weight.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(ours, fullgraph=True, backend="eager")(x), stock(x))


def test_a_tied_head_stays_tied_and_comes_back(tiny_model, monkeypatch):
    monkeypatch.setattr(pack, "MIN_STREAMED_BYTES", 0)
    monkeypatch.setattr(choose, "measure", lambda *a: {name: 1.0 if name == "rows" else 2.0 for name in a[-1]})
    monkeypatch.setenv("HF_SPARSE_CACHE", "/nonexistent")
    model = tiny_model("gemma3_text").eval()
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        expected = model(ids).logits
    report = pack_for_inference(model)
    assert report.layers["lm_head"].layout == "rows" and isinstance(model.lm_head, DenseLinear)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    unpack(model)
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.get_input_embeddings().weight
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
