"""Tiny sparse models on disk, shared by the tests of exports: read them, never write into them."""

import pytest


def _zeroed(model, fraction=None):
    """Random zeros in every target: a fraction of them, or 2:4."""
    import torch

    from hf_sparse.targets import find_targets

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in find_targets(model):
            weight = model.get_parameter(name)
            scores = torch.rand(weight.shape, generator=generator)
            if fraction is None:
                drop = torch.zeros(weight.shape, dtype=torch.bool).reshape(-1, 4)
                drop.scatter_(1, scores.reshape(-1, 4).topk(2, dim=1).indices, True)
                weight.masked_fill_(drop.reshape(weight.shape), 0)
            else:
                weight.masked_fill_(scores < fraction, 0)
    return model


@pytest.fixture(scope="session")
def zeroed():
    """``zeroed(model, fraction)``: random zeros in every target; without a fraction, 2:4."""
    return _zeroed


@pytest.fixture(scope="session")
def sparse_dir(tiny_model, tiny_tokenizer, tmp_path_factory):
    """A float32 llama with 60 % zeros and its tokenizer."""
    directory = tmp_path_factory.mktemp("models") / "sparse-llama"
    _zeroed(tiny_model("llama"), 0.6).save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def two_four_dir(tiny_model, tmp_path_factory):
    """A bfloat16 llama whose weights are 2:4, one row with fewer."""
    import torch

    model = _zeroed(tiny_model("llama")).to(torch.bfloat16)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, :40] = 0
    directory = tmp_path_factory.mktemp("models") / "two-four-llama"
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def gpt2_dir(tiny_model, tiny_tokenizer, tmp_path_factory):
    """A float32 GPT-2 (weights stored [in, out]) with 50 % zeros and its tokenizer."""
    directory = tmp_path_factory.mktemp("models") / "sparse-gpt2"
    _zeroed(tiny_model("gpt2", n_positions=1024), 0.5).save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory
