"""CUDA graphs draft and verify what plain decoding writes; run on a machine with a GPU."""

import pytest
import torch

from hf_sparse.speculative.decoding import SpeculativeDecoding
from hf_sparse.speculative.rules import MaxConfidence, StaticLength
from hf_sparse.speculative.tapout import TapOut

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def pair(tiny_model):
    target = tiny_model("llama", num_hidden_layers=4)
    for layer in target.model.layers[2:]:
        layer.self_attn.o_proj.weight.data.mul_(0.1)
        layer.mlp.down_proj.weight.data.mul_(0.1)
    drafter = tiny_model("llama", num_hidden_layers=2)
    drafter.load_state_dict({k: v for k, v in target.state_dict().items() if k in drafter.state_dict()})
    for model in (target, drafter):
        model.generation_config.eos_token_id = None
        model.to("cuda")
    return target, drafter


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("policy", ["fixed", "looks", "tapout"])
def test_greedy_is_plain_greedy(pair, policy, static):
    target, drafter = pair
    made = {"fixed": StaticLength(5), "looks": MaxConfidence(0.02, max_draft=9), "tapout": TapOut(max_draft=9)}[policy]
    decoding = SpeculativeDecoding(drafter, made, static=static)
    for length in (1, 2, 9, 40, 9):
        ids = torch.randint(3, 320, (1, length), generator=torch.Generator().manual_seed(length)).cuda()
        plain = target.generate(ids, do_sample=False, max_new_tokens=60)
        assert torch.equal(target.generate(ids, do_sample=False, max_new_tokens=60, custom_generate=decoding), plain)
    assert decoding.total.acceptance > 0.1


def test_graphs_draw_anew_each_time(pair):
    target, drafter = pair
    decoding = SpeculativeDecoding(drafter, StaticLength(3), static=True)
    ids = torch.tensor([[5, 6, 7]]).cuda()
    texts = {
        tuple(target.generate(ids, do_sample=True, top_k=0, max_new_tokens=8, custom_generate=decoding)[0].tolist())
        for _ in range(8)
    }
    assert len(texts) == 8


def test_the_distribution_through_graphs(tiny_model):
    sizes = dict(vocab_size=5, bos_token_id=0, eos_token_id=None, pad_token_id=0)
    target, drafter = (tiny_model("llama", seed=seed, **sizes).cuda() for seed in (1, 2))
    for model in (target, drafter):
        model.lm_head.weight.data.mul_(20)
        model.generation_config.eos_token_id = None
    ids = torch.tensor([[1, 3, 2]]).cuda()
    with torch.no_grad():
        expected = target(ids).logits[0, -1].softmax(-1).cpu()
    decoding = SpeculativeDecoding(drafter, StaticLength(2), static=True)
    found = torch.zeros(5)
    for _ in range(1500):
        found[target.generate(ids, do_sample=True, top_k=0, max_new_tokens=3, custom_generate=decoding)[0, 3]] += 1
    chi = float(((found - 1500 * expected) ** 2 / (1500 * expected)).sum())
    assert chi < 4 + 4 * 8**0.5


def test_a_window_through_graphs(tiny_model):
    target = tiny_model("mistral", num_hidden_layers=3, sliding_window=12).cuda()
    drafter = tiny_model("mistral", num_hidden_layers=3, sliding_window=12).cuda()
    target.generation_config.eos_token_id = None
    ids = torch.randint(3, 320, (1, 30), generator=torch.Generator().manual_seed(0)).cuda()
    plain = target.generate(ids, do_sample=False, max_new_tokens=40)
    decoding = SpeculativeDecoding(drafter, StaticLength(4), static=True)
    assert torch.equal(target.generate(ids, do_sample=False, max_new_tokens=40, custom_generate=decoding), plain)
    assert decoding.last.acceptance == 1
