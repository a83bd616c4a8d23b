"""SD^2's pipeline from prompts to a drafter: the target's words, fixed zeros, MACs by the paper's count, resumption."""

import copy
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_sparse.recipes.drafters import make_drafter, model_macs
from hf_sparse.speculative.decoding import SpeculativeDecoding
from hf_sparse.speculative.rules import StaticLength

pytest.importorskip("trl")


@pytest.fixture
def rows():
    import datasets

    words = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "left", "for", "good"]
    return datasets.Dataset.from_list(
        [{"question": f"Say {' '.join(words[n % 5 :])} {n}", "answer": f"{words[n % 11]} {n}"} for n in range(12)]
    )


@pytest.fixture
def settings(tmp_path):
    from trl import SFTConfig

    return SFTConfig(
        str(tmp_path / "trainer"), max_steps=4, per_device_train_batch_size=2, learning_rate=5e-3, use_cpu=True,
        save_strategy="no", report_to=[], bf16=False, disable_tqdm=True, logging_steps=1, gradient_checkpointing=False,
    )  # fmt: skip


def make(model, rows, tokenizer, output, **options):
    sizes = dict(samples=4, sequence_length=32, progress=False, max_new_tokens=6)
    return make_drafter(model, rows, output, processing_class=tokenizer, **sizes | options)


@pytest.mark.parametrize(("how", "zeros"), [({"sparsity": 0.5}, 0.5), ({"pattern": "2:4"}, 0.5), ({"remove": 1}, 0.0)])
def test_a_drafter_from_prompts_to_generate(tiny_model, tiny_tokenizer, rows, settings, tmp_path, how, zeros):
    target = tiny_model("llama")
    report = make(copy.deepcopy(target), rows, tiny_tokenizer, tmp_path / "out", target=target, args=settings, **how)
    drafter = AutoModelForCausalLM.from_pretrained(report.path)
    assert report.zeros == pytest.approx(zeros, abs=0.01) and len(report.losses) == 4 and report.rows == 12
    assert report.layers == drafter.config.num_hidden_layers == (1 if "remove" in how else 2)
    assert report.macs == pytest.approx(model_macs(drafter)) and report.macs < report.dense_macs
    data = [json.loads(line) for line in (tmp_path / "out" / "data.jsonl").read_text().splitlines()]
    assert len(data) == 12 and all('"template": "answer"' in row["settings"] for row in data)
    ids = torch.tensor([[5, 6, 7]])
    plain = target.generate(ids, do_sample=False, max_new_tokens=10)
    decoding = SpeculativeDecoding(drafter, StaticLength(3))
    assert torch.equal(target.generate(ids, do_sample=False, max_new_tokens=10, custom_generate=decoding), plain)


def test_a_call_that_was_ended_goes_on(tiny_model, tiny_tokenizer, rows, settings, tmp_path, monkeypatch):
    import hf_sparse.recipes.drafters as drafters

    target, tune = tiny_model("llama"), drafters._tune
    options = dict(target=target, sparsity=0.5, args=settings)
    whole = make(copy.deepcopy(target), rows, tiny_tokenizer, tmp_path / "whole", **options)

    def ended(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(drafters, "_tune", ended)
    with pytest.raises(KeyboardInterrupt):
        make(copy.deepcopy(target), rows, tiny_tokenizer, tmp_path / "out", **options)
    monkeypatch.setattr(drafters, "_tune", tune)
    rest = make(copy.deepcopy(target), rows, tiny_tokenizer, tmp_path / "out", **options)
    one, other = (AutoModelForCausalLM.from_pretrained(report.path).state_dict() for report in (whole, rest))
    assert all(torch.equal(one[name], other[name]) for name in one) and rest.losses == whole.losses
    assert rest == make(
        copy.deepcopy(target), rows, tiny_tokenizer, tmp_path / "out", **options
    )  # done: read, not made


def test_without_tuning(tiny_model, tiny_tokenizer, rows, tmp_path):
    report = make(tiny_model("llama"), rows, tiny_tokenizer, tmp_path / "out", sparsity=0.75, tune=False)
    assert report.zeros == pytest.approx(0.75, abs=0.01) and report.losses == []


def test_words_of_the_dataset(tiny_model, tiny_tokenizer, rows, settings, tmp_path):
    report = make(
        tiny_model("llama"), rows, tiny_tokenizer, tmp_path / "out", sparsity=0.5, words="dataset", args=settings
    )
    data = [json.loads(line) for line in (tmp_path / "out" / "data.jsonl").read_text().splitlines()]
    assert report.taken == 0 and [row["completion"][0]["content"] for row in data] == list(rows["answer"])
    with pytest.raises(ValueError, match="words are the target's or the dataset's, got 'mine'"):
        make(tiny_model("llama"), rows, tiny_tokenizer, tmp_path / "b", sparsity=0.5, words="mine")


def test_macs_of_the_paper():
    """Llama-3.2-3B at 50%: -43.87% MACs, the abstract's number."""
    config = AutoConfig.for_model(
        "llama", hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8,
        head_dim=128, vocab_size=128256, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    from hf_sparse.flops import macs_per_token
    from hf_sparse.targets import find_targets

    targets = find_targets(model, ["re:.*"])
    halved = dict.fromkeys(find_targets(model), 0.5)
    dense, sparse = (macs_per_token(model, targets, densities) for densities in ({}, halved))
    assert dense == pytest.approx(3.213e9, rel=1e-3) and 1 - sparse / dense == pytest.approx(0.4387, abs=1e-4)


def test_errors(tiny_model, tiny_tokenizer, rows, tmp_path):
    for options in ({}, {"sparsity": 0.5, "remove": 1}):
        with pytest.raises(ValueError, match="give exactly one of sparsity=0.5, pattern='2:4' and remove=15"):
            make(tiny_model("llama"), rows, tiny_tokenizer, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
