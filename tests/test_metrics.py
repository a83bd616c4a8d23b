"""Metrics loaded by the evaluate library from their files, against the functions they stand for."""

import pytest
import torch

from hf_sparse import SparsityConfig, metrics, perplexity, prune

evaluate = pytest.importorskip("evaluate")


def test_sparsity(tiny_llama):
    prune(tiny_llama, SparsityConfig(sparsity=0.75))
    found = evaluate.load(metrics.path("sparsity")).compute(model=tiny_llama)
    assert found["sparsity"] == pytest.approx(0.75, abs=1e-3) and found["zeros"] / found["weights"] == found["sparsity"]


def test_perplexity(tiny_llama):
    ids = torch.randint(3, 320, (100,), generator=torch.Generator().manual_seed(0))
    metric = evaluate.load(metrics.path("perplexity"))
    found = metric.compute(model=tiny_llama, predictions=[ids[:60].tolist(), ids[60:].tolist()], sequence_length=20)
    assert found["perplexity"] == pytest.approx(perplexity(tiny_llama, ids, 20)["perplexity"])


def test_mean_accepted_length():
    metric = evaluate.load(metrics.path("mean_accepted_length"))
    found = metric.compute(predictions=[4, 0, 5], references=[5, 5, 5])
    assert found == {"mean_accepted_length": pytest.approx(4), "acceptance": pytest.approx(0.6)}
    with pytest.raises(ValueError, match="step 1: 6 accepted of 5 drafted"):
        metric.compute(predictions=[1, 6], references=[5, 5])


def test_unknown():
    with pytest.raises(ValueError, match="unknown metric 'speed'; there are mean_accepted_length"):
        metrics.path("speed")
