"""Perplexity against transformers' own loss, window by window."""

import math

import pytest
import torch

from hf_sparse import evaluation
from hf_sparse.evaluation import perplexity, response_losses


def tokens(count, seed=0) -> torch.Tensor:
    return torch.randint(3, 320, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_it_is_the_exponential_of_the_mean_loss_of_stock_windows(tiny_model, family):
    model, ids = tiny_model(family), tokens(100)
    with torch.no_grad():
        losses = [float(model(w[None], labels=w[None]).loss) for w in ids[:96].view(4, 24)]
    result = perplexity(model, ids, 24)
    assert result["perplexity"] == pytest.approx(math.exp(sum(losses) / 4), rel=1e-5)
    assert result["loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)
    assert (result["windows"], result["windows_available"], result["tokens_scored"]) == (4, 4, 4 * 23)


@pytest.mark.parametrize("chunk", [1, 5, 23, 24, 1000])
def test_the_size_of_a_chunk_does_not_matter(tiny_llama, monkeypatch, chunk):
    wanted = perplexity(tiny_llama, tokens(72), 24)["perplexity"]
    monkeypatch.setattr(evaluation, "_CHUNK", chunk)
    assert perplexity(tiny_llama, tokens(72), 24)["perplexity"] == pytest.approx(wanted, rel=1e-6)


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large(tiny_llama):
    with torch.no_grad():
        tiny_llama.lm_head.weight.zero_()
    assert perplexity(tiny_llama, tokens(64), 32)["perplexity"] == pytest.approx(320, rel=1e-5)


def test_only_the_first_windows(tiny_llama):
    ids = tokens(100)
    some = perplexity(tiny_llama, ids, 10, max_windows=3)
    assert (some["windows"], some["windows_available"], some["tokens_scored"]) == (3, 10, 27)
    assert some["perplexity"] == pytest.approx(perplexity(tiny_llama, ids[:30], 10)["perplexity"])
    assert "first 3 contiguous windows of 10 tokens" in some["protocol"]
    assert perplexity(tiny_llama, ids, 10, max_windows=99)["windows"] == 10


def test_the_protocol_says_what_the_number_depends_on(tiny_llama):
    protocol = perplexity(tiny_llama, tokens(40), 20)["protocol"]
    for part in ("tokenised in one call", "2 contiguous windows of 20 tokens", "remainder dropped", "float32 weights"):
        assert part in protocol
    assert "first" not in protocol
    assert "bfloat16 weights" in perplexity(tiny_llama.bfloat16(), tokens(40), 20)["protocol"]


def test_windows_are_announced_and_the_mode_is_restored(tiny_llama):
    seen = []
    tiny_llama.train()
    perplexity(tiny_llama, tokens(40), 20, on_window=lambda done, of: seen.append((done, of, tiny_llama.training)))
    assert seen == [(1, 2, False), (2, 2, False)] and tiny_llama.training


def test_the_mode_is_restored_after_an_error(tiny_llama):
    tiny_llama.train()

    def stop(done, of):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        perplexity(tiny_llama, tokens(40), 20, on_window=stop)
    assert tiny_llama.training


def test_no_gradients_are_kept(tiny_llama):
    perplexity(tiny_llama, tokens(20), 20)
    assert all(p.grad is None for p in tiny_llama.parameters())


def test_a_diverged_model_is_infinitely_perplexed(tiny_llama):
    with torch.no_grad():
        tiny_llama.lm_head.weight.mul_(1e6)
    assert perplexity(tiny_llama, tokens(64), 32)["perplexity"] == math.inf


def test_a_broken_model_is_not_a_number(tiny_llama):
    with torch.no_grad():
        tiny_llama.lm_head.weight[0, 0] = float("nan")
    assert math.isnan(perplexity(tiny_llama, tokens(64), 32)["perplexity"])


@pytest.mark.parametrize(
    "count,length,message",
    [
        (10, 20, "the text has 10 tokens, fewer than one window of 20"),
        (0, 20, "the text has 0 tokens"),
        (10, 1, "a window needs at least 2 tokens to predict one, got sequence_length=1"),
        (2000, 1000, "the model has 512 positions; a sequence_length of 1000 is too long"),
    ],
)
def test_what_cannot_be_scored(tiny_llama, count, length, message):
    with pytest.raises(ValueError, match=message):
        perplexity(tiny_llama, tokens(count), length)


def test_no_windows_asked_for(tiny_llama):
    with pytest.raises(ValueError, match="max_windows is at least 1, got 0"):
        perplexity(tiny_llama, tokens(40), 20, max_windows=0)


def test_responses_are_scored_as_alone_and_over_the_response_only(tiny_model):
    """Padding and batching change nothing; the loss is transformers' with the prompt's labels ignored, KL that of torch."""
    from torch.nn.functional import kl_div, log_softmax

    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    generator = torch.Generator().manual_seed(0)
    rows = [
        (torch.randint(3, 300, (size,), generator=generator).tolist(), prompt)
        for size, prompt in ((9, 4), (5, 1), (12, 11))
    ]
    scores = response_losses(model, rows, other, tokens_per_batch=24)
    for place, (row, prompt) in enumerate(rows):
        batch = torch.tensor([row])
        labels = batch.clone()
        labels[:, :prompt] = -100
        with torch.no_grad():
            output, reference = model(batch, labels=labels), other(batch).logits
        assert scores["loss"][place] == pytest.approx(output.loss.item(), rel=1e-4)
        given, wanted = (log_softmax(logits[0, prompt - 1 : -1].float(), -1) for logits in (output.logits, reference))
        expected = kl_div(given, wanted, log_target=True, reduction="sum") / (len(row) - prompt)
        assert scores["kl"][place] == pytest.approx(expected.item(), rel=1e-4)
    assert max(response_losses(model, rows, model)["kl"]) == pytest.approx(0, abs=1e-6)
    assert "kl" not in response_losses(model, rows)


def test_responses_that_cannot_be_scored(tiny_llama):
    with pytest.raises(ValueError, match="no rows to score"):
        response_losses(tiny_llama, [])
    with pytest.raises(ValueError, match="row 1 has 3 tokens of prompt and 3 in all"):
        response_losses(tiny_llama, [([1, 2], 1), ([1, 2, 3], 3)])
