"""MACs against the published accounting of SD^2 (arxiv.org/abs/2504.08838) and the papers' parameter counts.

Its abstract states -43.87% for a 50% sparse Llama-3.2-3B; the other rows follow from the same count. Models are built on
the meta device: shapes without weights.
"""

import pytest
import torch

from hf_sparse.flops import active_share, macs_per_token
from hf_sparse.targets import find_targets

LLAMA = {"vocab_size": 128256, "max_position_embeddings": 131072}
QWEN = {"vocab_size": 151936, "tie_word_embeddings": True}


def shape(hidden, intermediate, layers, heads, kv_heads, **others):
    return others | {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


TIED = LLAMA | {"tie_word_embeddings": True}
# model: (family, config, parameters, G MACs dense, at 50%, percent saved at 50%, at 75%)
PUBLISHED = {
    "Llama-3.2-1B": ("llama", shape(2048, 8192, 16, 32, 8, **TIED), 1_235_814_400, 1.236, 0.749, 39.37, 59.06),
    "Llama-3.2-3B": ("llama", shape(3072, 8192, 28, 24, 8, **TIED), 3_212_749_824, 3.213, 1.803, 43.87, 65.80),
    "Llama-3.1-8B": ("llama", shape(4096, 14336, 32, 32, 8, **LLAMA), 8_030_261_248, 7.505, 4.015, 46.50, 69.75),
    "Qwen2.5-0.5B": ("qwen2", shape(896, 4864, 24, 14, 2, **QWEN), 494_032_768, 0.494, 0.315, 36.22, 54.33),
    "Qwen2.5-1.5B": ("qwen2", shape(1536, 8960, 28, 12, 2, **QWEN), 1_543_714_304, 1.544, 0.888, 42.44, 63.66),
    "Qwen2.5-3B": ("qwen2", shape(2048, 11008, 36, 16, 2, **QWEN), 3_085_938_688, 3.086, 1.698, 44.96, 67.44),
}


def on_meta(family: str, **config):
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_table(name):
    family, config, parameters, dense, half, saved_half, saved_three_quarters = PUBLISHED[name]
    model = on_meta(family, **config)
    assert sum(p.numel() for p in model.parameters()) == parameters, "not the published model"
    everything, sparse = find_targets(model, ["re:.*"]), find_targets(model)
    macs = macs_per_token(model, everything, {})
    at_half = macs_per_token(model, everything, dict.fromkeys(sparse, 0.5))
    at_quarter = macs_per_token(model, everything, dict.fromkeys(sparse, 0.25))
    assert round(macs / 1e9, 3) == dense and round(at_half / 1e9, 3) == half
    assert round(100 * (1 - at_half / macs), 2) == saved_half
    assert round(100 * (1 - at_quarter / macs), 2) == saved_three_quarters


def test_an_expert_costs_the_share_of_tokens_it_sees(tiny_model):
    model = tiny_model("qwen3_moe", num_experts=8, num_experts_per_tok=2)
    everything = find_targets(model, ["re:.*"])
    experts = {n: t for n, t in everything.items() if t.is_experts}
    assert len(experts) == 4 and {active_share(model, t) for t in experts.values()} == {0.25}
    assert {active_share(model, t) for n, t in everything.items() if n not in experts} == {1.0}
    one_expert = 64 * 64 + 64 * 32  # gate_up and down of one expert
    attention = 64 * 64 + 2 * 32 * 64 + 64 * 64
    assert macs_per_token(model, everything, {}) == 2 * (attention + 2 * one_expert) + 64 * 320
    halved = macs_per_token(model, everything, dict.fromkeys(experts, 0.5))
    assert halved == 2 * (attention + one_expert) + 64 * 320


def test_mixtral_and_gpt_oss_state_their_top_k_as_well(tiny_model):
    mixtral = tiny_model("mixtral")
    target = next(t for t in find_targets(mixtral).values() if t.is_experts)
    assert active_share(mixtral, target) == 0.5
    small = {
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    gpt_oss = on_meta(
        "gpt_oss", vocab_size=64, num_hidden_layers=1, num_local_experts=8, num_experts_per_tok=4, **small
    )
    target = next(t for t in find_targets(gpt_oss).values() if t.is_experts)
    assert active_share(gpt_oss, target) == 0.5


def test_more_experts_a_token_than_there_are_is_all_of_them(tiny_model):
    model = tiny_model("mixtral")
    model.config.num_experts_per_tok = 9
    assert active_share(model, next(t for t in find_targets(model).values() if t.is_experts)) == 1.0
