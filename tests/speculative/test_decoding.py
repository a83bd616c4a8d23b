"""The output of speculative decoding is the target's own: token by token when greedy, in distribution when it samples."""

import json

import pytest
import torch

from hf_sparse.speculative.attach import attach_drafter, detach_drafter
from hf_sparse.speculative.decoding import SpeculativeDecoding
from hf_sparse.speculative.rules import RULES, MaxConfidence, Rule, StaticLength
from hf_sparse.speculative.tapout import TapOut

POLICIES = {name: (lambda rule=rule: rule(max_draft=7)) for name, rule in RULES.items()}
for bandit in ("UCB1", "UCBTuned", "GaussianThompson", "BetaThompson"):
    POLICIES[f"TapOut {bandit}"] = lambda bandit=bandit: TapOut(bandit=bandit, max_draft=7)
POLICIES["TapOut throughput"] = lambda: TapOut(reward="throughput", full_information=True, max_draft=7)
POLICIES["TapOut token"] = lambda: TapOut(bandit="BetaThompson", level="token", max_draft=7)


def related(make, family="llama", **sizes):
    """A target of four layers and a drafter of its first two, which agree often but not always."""
    deep = dict(num_hidden_layers=4, vocab_size=320, **sizes)
    target = make(family, **deep)
    for parameter in target.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(3)
    for layer in target.model.layers[2:]:
        layer.self_attn.o_proj.weight.data.mul_(0.06)
        layer.mlp.down_proj.weight.data.mul_(0.06)
    shallow = dict(deep, num_hidden_layers=2)
    if target.config.to_dict().get("layer_types"):
        shallow["layer_types"] = target.config.layer_types[:2]
    drafter = make(family, **shallow)
    drafter.load_state_dict({k: v for k, v in target.state_dict().items() if k in drafter.state_dict()})
    for model in (target, drafter):
        model.generation_config.eos_token_id = None
    return target, drafter


def prompts(lengths=(1, 2, 9, 30)):
    return [torch.randint(3, 320, (1, n), generator=torch.Generator().manual_seed(n)) for n in lengths]


@pytest.fixture(scope="module")
def pair(tiny_model):
    return related(tiny_model)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_greedy_is_plain_greedy(pair, policy, static):
    target, drafter = pair
    decoding = SpeculativeDecoding(drafter, POLICIES[policy](), static=static)
    for ids in prompts():
        plain = target.generate(ids, do_sample=False, max_new_tokens=60)
        assert torch.equal(target.generate(ids, do_sample=False, max_new_tokens=60, custom_generate=decoding), plain)
    total = decoding.total
    assert sum(total.emitted) == 240 and total.mean_accepted_length > 1.2  # drafting did something
    assert 0 < total.acceptance < 1


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("mistral", {"sliding_window": 12}),
        ("gemma3_text", {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"] * 2}),
        ("qwen3", {}),
    ],
)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("length", [5, 40])
def test_sliding_windows(tiny_model, family, sizes, length, static):
    """Shorter and longer than the window, and across it while drafting."""
    target, drafter = related(tiny_model, family, **sizes)
    ids = prompts((length,))[0]
    plain = target.generate(ids, do_sample=False, max_new_tokens=50)
    decoding = SpeculativeDecoding(drafter, StaticLength(4), static=static)
    assert torch.equal(target.generate(ids, do_sample=False, max_new_tokens=50, custom_generate=decoding), plain)
    assert decoding.total.acceptance > 0.05


def test_models_of_other_shapes(tiny_model):
    target, drafter = tiny_model("gpt2"), tiny_model("gpt_neox", seed=1)
    for model in (target, drafter):
        model.generation_config.eos_token_id = None
    ids = prompts((7,))[0]
    plain = target.generate(ids, do_sample=False, max_new_tokens=20)
    assert torch.equal(
        target.generate(ids, do_sample=False, max_new_tokens=20, custom_generate=SpeculativeDecoding(drafter)), plain
    )


def test_a_copy_is_accepted_whole(tiny_model):
    target, drafter = tiny_model("llama"), tiny_model("llama")
    target.generation_config.eos_token_id = None
    decoding = SpeculativeDecoding(drafter, StaticLength(4))
    target.generate(prompts((9,))[0], do_sample=False, max_new_tokens=50, custom_generate=decoding)
    assert decoding.last.acceptance == 1 and decoding.last.mean_accepted_length == 5
    assert decoding.last.emitted == [5] * 10


@pytest.mark.parametrize("new", [1, 2, 5, 6, 7])
def test_the_longest_length_within_a_draft(pair, new):
    target, drafter = pair
    ids = prompts((9,))[0]
    plain = target.generate(ids, do_sample=False, max_new_tokens=new)
    decoding = SpeculativeDecoding(drafter, StaticLength(5))
    assert torch.equal(target.generate(ids, do_sample=False, max_new_tokens=new, custom_generate=decoding), plain)
    assert sum(decoding.last.emitted) == new


def test_an_end_within_a_draft(tiny_model):
    target, drafter = tiny_model("llama"), tiny_model("llama")
    ids = prompts((9,))[0]
    text = target.generate(ids, do_sample=False, max_new_tokens=40, eos_token_id=None)[0, 9:].tolist()
    for place in (0, 1, 3, 4, 5, 11):
        end = text[place]
        plain = target.generate(ids, do_sample=False, max_new_tokens=40, eos_token_id=[end, 319])
        for policy in (StaticLength(5), MaxConfidence(1e-6, max_draft=5)):  # one does not look, the other does
            decoding = SpeculativeDecoding(drafter, policy)
            ours = target.generate(
                ids, do_sample=False, max_new_tokens=40, eos_token_id=[end, 319], custom_generate=decoding
            )
            assert torch.equal(ours, plain), (place, policy)


def test_processors_touch_both_models(pair):
    target, drafter = pair
    options = dict(
        do_sample=False, max_new_tokens=50, repetition_penalty=1.5, no_repeat_ngram_size=2, min_new_tokens=10
    )
    for ids in prompts((2, 9)):
        plain = target.generate(ids, **options)
        for static in (False, True):
            decoding = SpeculativeDecoding(drafter, StaticLength(4), static=static)
            assert torch.equal(target.generate(ids, **options, custom_generate=decoding), plain)
    same = target.__class__(target.config).eval()
    same.load_state_dict(target.state_dict())
    decoding = SpeculativeDecoding(same, StaticLength(4))
    target.generate(prompts((9,))[0], **options, custom_generate=decoding)
    assert decoding.last.acceptance == 1  # a copy that the processors did not touch would stray


def test_static_and_dynamic_draft_alike(pair):
    """The same texts, the same rounds; runners are kept from text to text, and what an earlier text left is not seen."""
    target, drafter = pair
    fixed, usual = (
        SpeculativeDecoding(drafter, MaxConfidence(0.3, max_draft=6), static=static) for static in (True, False)
    )
    for ids in [*prompts(), *prompts((30, 3))]:
        outputs = [
            target.generate(ids, do_sample=False, max_new_tokens=30, custom_generate=one) for one in (fixed, usual)
        ]
        assert (
            torch.equal(*outputs)
            and fixed.last.drafted == usual.last.drafted
            and fixed.last.accepted == usual.last.accepted
        )
    assert len(fixed._runners) == 2 and not usual._runners


def test_static_says_why_it_cannot(pair, tiny_model):
    target, drafter = pair
    ids = prompts((9,))[0]
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    mask = (torch.arange(13) >= 4).long().unsqueeze(0)
    with pytest.raises(ValueError, match="static=True cannot be kept: the text is padded"):
        decoding = SpeculativeDecoding(drafter, static=True)
        target.generate(padded, attention_mask=mask, do_sample=False, max_new_tokens=4, custom_generate=decoding)


def test_padding_on_the_left(pair):
    target, drafter = pair
    ids = prompts((9,))[0]
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    mask = (torch.arange(13) >= 4).long().unsqueeze(0)
    plain = target.generate(padded, attention_mask=mask, do_sample=False, max_new_tokens=30)
    decodings = [SpeculativeDecoding(drafter, StaticLength(4)) for _ in range(2)]
    ours = target.generate(
        padded, attention_mask=mask, do_sample=False, max_new_tokens=30, custom_generate=decodings[0]
    )
    assert torch.equal(ours, plain)
    target.generate(ids, do_sample=False, max_new_tokens=30, custom_generate=decodings[1])
    assert decodings[0].last.accepted == decodings[1].last.accepted  # the drafter saw the same text


def test_a_chat_goes_on_from_its_cache(pair):
    from transformers import DynamicCache

    target, drafter = pair
    ids, more = prompts((9,))[0], prompts((3,))[0]
    results = []
    for options in ({}, {"custom_generate": SpeculativeDecoding(drafter, StaticLength(4))}):
        cache = DynamicCache(config=target.config)
        cache.activate_past_recording()
        first = target.generate(ids, do_sample=False, max_new_tokens=10, past_key_values=cache, **options)
        second = torch.cat([first, more], 1)
        results.append(target.generate(second, do_sample=False, max_new_tokens=20, past_key_values=cache, **options))
    assert torch.equal(*results)


def test_what_is_asked_for_comes_with_the_text(pair):
    target, drafter = pair
    options = dict(
        do_sample=False,
        max_new_tokens=20,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        repetition_penalty=1.3,
    )
    ids = prompts((9,))[0]
    plain = target.generate(ids, **options)
    ours = target.generate(ids, **options, custom_generate=SpeculativeDecoding(drafter, StaticLength(4)))
    assert torch.equal(ours.sequences, plain.sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(
            torch.cat(getattr(ours, name)), torch.cat(getattr(plain, name)), atol=1e-3, rtol=1e-4
        )
    assert ours.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length()


def test_stop_strings_streams_and_criteria(pair, tiny_tokenizer):
    from transformers import MaxTimeCriteria, StoppingCriteria, StoppingCriteriaList, TextStreamer

    target, drafter = pair
    ids = prompts((9,))[0]
    text = tiny_tokenizer.decode(target.generate(ids, do_sample=False, max_new_tokens=40)[0, 9:])
    stop = text[17:19]
    plain = target.generate(ids, do_sample=False, max_new_tokens=40, stop_strings=[stop], tokenizer=tiny_tokenizer)

    class Collect(TextStreamer):
        seen = ""

        def on_finalized_text(self, text, stream_end=False):
            self.seen += text

    decoding = attach_drafter(target, drafter, StaticLength(6))
    try:
        streamer = Collect(tiny_tokenizer, skip_prompt=True)
        ours = target.generate(
            ids, do_sample=False, max_new_tokens=40, stop_strings=stop, tokenizer=tiny_tokenizer, streamer=streamer
        )
        assert torch.equal(ours, plain) and plain.shape[1] < 49
        assert streamer.seen == tiny_tokenizer.decode(ours[0, 9:]) and decoding.total.rounds > 0

        class Seventeen(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                return torch.tensor([input_ids.shape[1] == 26])

        criteria = StoppingCriteriaList([Seventeen(), MaxTimeCriteria(60)])
        assert target.generate(ids, do_sample=False, max_new_tokens=40, stopping_criteria=criteria).shape[1] == 26
        with pytest.raises(ValueError, match="stop_strings need tokenizer="):
            target.generate(ids, stop_strings="x", max_new_tokens=4)
        with pytest.raises(ValueError, match="replaced already"):
            attach_drafter(target, drafter)
    finally:
        detach_drafter(target)
    assert target.generate(ids, do_sample=False, max_new_tokens=40).shape[1] == 49


def test_errors(pair, tiny_model):
    target, drafter = pair
    ids = prompts((9,))[0]

    def run(ids=ids, draft=drafter, model=target, **options):
        decoding = SpeculativeDecoding(draft)
        return model.generate(ids, do_sample=False, max_new_tokens=4, custom_generate=decoding, **options)

    with pytest.raises(ValueError, match="one text at a time, got a batch of 2"):
        run(ids.expand(2, -1))
    with pytest.raises(ValueError, match="num_beams=2 is neither"):
        run(num_beams=2)
    with pytest.raises(ValueError, match="the drafter is the target itself"):
        run(draft=target)
    with pytest.raises(ValueError, match="needs use_cache=True"):
        run(use_cache=False)
    with pytest.raises(ValueError, match="static cache cannot be rolled back"):
        run(cache_implementation="static")
    with pytest.raises(ValueError, match="output_hidden_states=True is not supported"):
        run(output_hidden_states=True, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="has 320 tokens, the drafter LlamaForCausalLM 300: give tokenizer="):
        run(draft=tiny_model("llama", vocab_size=300))
    with pytest.raises(ValueError, match="give both tokenizers"):
        SpeculativeDecoding(drafter, tokenizer=object())


@pytest.mark.parametrize("sizes", [(320, 352), (352, 320)])
def test_padded_vocabularies_of_one_tokenizer(tiny_model, tiny_tokenizer, sizes):
    target, drafter = (tiny_model("llama", vocab_size=size, seed=i) for i, size in enumerate(sizes))
    for model in (target, drafter):
        model.generation_config.eos_token_id = None
    ids = prompts((9,))[0]
    plain = target.generate(ids, do_sample=False, max_new_tokens=30)
    decoding = SpeculativeDecoding(drafter, StaticLength(4), tokenizer=tiny_tokenizer, draft_tokenizer=tiny_tokenizer)
    assert torch.equal(target.generate(ids, do_sample=False, max_new_tokens=30, custom_generate=decoding), plain)
    torch.manual_seed(0)
    sampled = target.generate(ids, do_sample=True, max_new_tokens=30, custom_generate=decoding)
    assert sampled.shape == (1, 39) and int(sampled.max()) < sizes[0]


# --------------------------------------------------------------------------------------------------------- distribution


def law(target, ids, width, **warp):
    """The exact probabilities of the first two tokens, ``[width * width]``."""

    def probabilities(rows):
        logits = target(rows).logits[:, -1].float()
        if "temperature" in warp:
            logits = logits / warp["temperature"]
        if "top_k" in warp:
            logits = logits.masked_fill(logits < logits.topk(warp["top_k"]).values[:, -1:], -torch.inf)
        return logits.softmax(-1)

    with torch.no_grad():
        first = probabilities(ids)[0]
        rows = torch.cat([ids.expand(width, -1), torch.arange(width)[:, None]], 1)
        return (first[:, None] * probabilities(rows)).flatten()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["rule", "tapout", "warped", "static"])
def test_sampling_has_exactly_the_targets_distribution(tiny_model, how):
    """A chi-squared test of the first two tokens' joint law with a drafter that has nothing to do with the target."""
    width, count = 5, 2500
    sizes = dict(vocab_size=width, bos_token_id=0, eos_token_id=None, pad_token_id=0)
    target, drafter = (tiny_model("llama", seed=seed, **sizes) for seed in (1, 2))
    for model in (target, drafter):
        model.lm_head.weight.data.mul_(12 if how == "warped" else 20)
        model.generation_config.eos_token_id = None
    ids = torch.tensor([[1, 3, 2]])
    warp = {"temperature": 0.7, "top_k": 3} if how == "warped" else {}
    expected, other = law(target, ids, width, **warp), law(drafter, ids, width, **warp)
    assert float((expected - other).abs().sum() / 2) > 0.3  # a drafter like the target would prove nothing
    policy = (
        TapOut([StaticLength(3), MaxConfidence(0.5)], "BetaThompson", max_draft=4)
        if how == "tapout"
        else StaticLength(2)
    )
    decoding = SpeculativeDecoding(drafter, policy, static=how == "static")
    torch.manual_seed(5)
    found = torch.zeros(width * width)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 4} | warp
    for _ in range(count):
        a, b = target.generate(ids, custom_generate=decoding, **options)[0, 3:5].tolist()
        found[a * width + b] += 1
    possible = expected > 1e-9
    assert found[~possible].sum() == 0
    likely = possible & (expected * count >= 5)
    chi = float(((found - count * expected) ** 2 / (count * expected).clamp_min(1e-9))[likely].sum())
    freedom = int(likely.sum()) - 1
    assert freedom >= 5  # a law that knows one outcome only would prove nothing
    assert chi < freedom + 4 * (2 * freedom) ** 0.5, (chi, freedom)
    assert 0.05 < decoding.total.acceptance < 0.95


# ------------------------------------------------------------------------------------------------------- other tokenizers


@pytest.fixture(scope="module")
def other_tokenizer(tiny_tokenizer):
    """Bytes as well, but merged by another text, and with the same words under other numbers."""
    from pathlib import Path

    source = Path(__file__).read_text(encoding="utf-8")
    return tiny_tokenizer.train_new_from_iterator([source], 330)


TEXT = "The cat sat on the mat – naïve, 3 × 4 = 12.\n\n  Then it left; 😀 again."


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("policy", ["StaticLength", "MaxConfidence", "TapOut UCB1"])
def test_universal(tiny_model, tiny_tokenizer, other_tokenizer, policy, sample):
    target, drafter = tiny_model("llama"), tiny_model("llama", seed=1, vocab_size=len(other_tokenizer))
    target.generation_config.eos_token_id = None
    ids = tiny_tokenizer(TEXT, return_tensors="pt")["input_ids"]
    decoding = SpeculativeDecoding(
        drafter, POLICIES[policy](), tokenizer=tiny_tokenizer, draft_tokenizer=other_tokenizer
    )
    if sample:
        torch.manual_seed(0)
        ours = target.generate(ids, do_sample=True, max_new_tokens=40, custom_generate=decoding)
        assert ours.shape[1] == ids.shape[1] + 40
        return
    plain = target.generate(ids, do_sample=False, max_new_tokens=60)
    assert torch.equal(target.generate(ids, do_sample=False, max_new_tokens=60, custom_generate=decoding), plain)
    assert decoding.last.rounds > 0


def test_a_drafter_of_other_tokens_that_knows_the_text_is_accepted(tiny_model, tiny_tokenizer, other_tokenizer):
    """Both models recite: the next token of a text they have learned by heart."""
    import copy

    text = TEXT * 3
    models = []
    for tokenizer in (tiny_tokenizer, other_tokenizer):
        model = tiny_model("llama", vocab_size=len(tokenizer), tie_word_embeddings=False)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        model.train()
        for _ in range(150):
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()
        model.eval().generation_config.eos_token_id = None
        models.append(copy.deepcopy(model))
    target, drafter = models
    prompt = tiny_tokenizer(TEXT, return_tensors="pt")["input_ids"]
    plain = target.generate(prompt, do_sample=False, max_new_tokens=60)
    decoding = SpeculativeDecoding(drafter, StaticLength(6), tokenizer=tiny_tokenizer, draft_tokenizer=other_tokenizer)
    ours = target.generate(prompt, do_sample=False, max_new_tokens=60, custom_generate=decoding)
    assert torch.equal(ours, plain)
    assert decoding.last.acceptance > 0.7, (
        decoding.last.to_dict()
    )  # a text that ends within a word misleads the drafter


def test_rules_see_what_the_drafter_was_drawn_from(pair):
    """Signals against the drafter's own logits, computed apart."""
    target, drafter = pair

    class Spy(Rule):
        rounds: list = []

        def stop(self, signals):
            return False

        def end(self, result):
            self.rounds.append(result)

    spy = Spy(max_draft=4)
    ids = prompts((9,))[0]
    target.generate(ids, do_sample=False, max_new_tokens=6, custom_generate=SpeculativeDecoding(drafter, spy))
    one = spy.rounds[0]
    assert one.drafted == 4 and len(one.signals) == 4 and one.ended == "limit"
    with torch.no_grad():
        p = drafter(ids).logits[0, -1].softmax(-1)
    top = p.topk(2).values
    entropy = float(-(p * p.log()).sum())
    assert one.signals[0] == pytest.approx((float(top[0]), float(top[1]), entropy, float(top[0])), rel=1e-4)
    assert json.dumps(one.signals[0])
