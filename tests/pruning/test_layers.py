"""Depth pruning against hidden states recorded by hooks, published parameter counts, and models that skip the same layers."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_sparse.pruning.layers import drop_layers, score_layers

SIZES = dict(
    hidden_size=32, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=64,
    intermediate_size=48, pad_token_id=0,
)  # fmt: skip
MIXTURE = dict(num_experts_per_tok=2, moe_intermediate_size=16)
FAMILIES = {
    "llama": {},
    "qwen2": dict(use_sliding_window=True, max_window_layers=3, sliding_window=4),
    "gemma3_text": dict(sliding_window=4),  # layer_types
    "smollm3": {},  # no_rope_layers
    "gpt2": dict(n_layer=6, n_embd=32, n_head=4),
    "qwen3_moe": dict(num_experts=8, mlp_only_layers=[1, 4], **MIXTURE),
    "glm4_moe": dict(n_routed_experts=8, first_k_dense_replace=2, **MIXTURE),
    "llama4_text": dict(
        num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=32, interleave_moe_layer_step=2
    ),
}


def build(family, **more):
    sizes = {"vocab_size": 64} if family == "gpt2" else SIZES
    config = AutoConfig.for_model(family, **{**sizes, **FAMILIES.get(family, {}), **more})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(6)  # far enough from the embeddings that layers matter
    return model


def ids(samples=3, length=10, seed=0):
    return torch.randint(1, 64, (samples, length), generator=torch.Generator().manual_seed(seed))


def layers_of(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def recorded(model, batch, mask=None):
    """The inputs of every layer and the last one's output, by hooks: ``[layers + 1, samples, length, hidden]``."""
    seen = []
    layers = layers_of(model)
    first = [layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach())) for layer in layers]

    def out(_, args, output):
        seen.append((output[0] if isinstance(output, tuple) else output).detach())

    last = layers[-1].register_forward_hook(out)
    model(batch, attention_mask=mask, use_cache=False)
    for handle in [*first, last]:
        handle.remove()
    return torch.stack(seen).double()


def angle(a, b):
    return math.acos(max(-1.0, min(1.0, float(a @ b / (a.norm() * b.norm()))))) / math.pi


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_distances_and_influence_are_those_of_the_recorded_hidden_states(family):
    model, batch = build(family), ids()
    scores, hidden = score_layers(model, batch), recorded(model, batch)
    for start in range(7):
        for end in range(7):
            expected = (
                sum(angle(hidden[start, s, -1], hidden[end, s, -1]) for s in range(3)) / 3 if end > start else 0.0
            )
            assert scores.distance[start, end] == pytest.approx(expected, abs=1e-6)
    for index in range(6):
        cosine = torch.nn.functional.cosine_similarity(hidden[index], hidden[index + 1], dim=-1)
        assert scores.influence[index] == pytest.approx(float(1 - cosine.mean()), abs=1e-6)
    spans = scores.spans(2)
    assert len(spans) == 5 and spans[1] == scores.distance[1, 3]
    assert scores.best_span(2)[0] == int(spans[:-1].argmin())
    assert scores.best_span(2, keep_last=False)[0] == int(spans.argmin())


def test_distances_are_those_of_pruneme():
    """Recorded from PruneMe's own functions. Its first span begins after the first layer, and those that reach the end are
    compared after the final norm, which is left out here: dropping layers does not skip the norm."""
    recorded = json.loads((Path(__file__).parents[1] / "data" / "pruneme.json").read_text())
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    for number, parameter in enumerate(model.parameters()):
        if parameter.dim() > 1:  # no generator: the same on every machine
            waves = torch.arange(parameter.numel(), dtype=torch.float64) * (0.37 + 0.11 * number)
            parameter.data.copy_(waves.sin().mul(0.4).view_as(parameter))
    batch = torch.tensor(recorded["batch"])
    scores = score_layers(model, {"input_ids": batch, "attention_mask": (batch != 0).long()})
    for count, distances in recorded["distances"].items():
        inside = distances[:-1]
        assert scores.spans(int(count))[1 : 1 + len(inside)].tolist() == pytest.approx(inside, abs=2e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out(side):
    model, batch = build("llama"), ids(2, 8)
    padding, mask = torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 12, dtype=torch.long)
    padded = torch.cat([padding, batch] if side == "left" else [batch, padding], 1)
    mask[:, :4] = 0
    mask = mask if side == "left" else mask.flip(1)
    scores = score_layers(model, {"input_ids": padded, "attention_mask": mask})
    plain = score_layers(model, batch)
    assert scores.tokens == plain.tokens == 16
    torch.testing.assert_close(scores.distance, plain.distance, atol=1e-6, rtol=0)
    torch.testing.assert_close(scores.influence, plain.influence, atol=1e-6, rtol=0)


@pytest.mark.parametrize("where", [0, 2, 4])
def test_an_identity_layer_is_the_one_chosen(where):
    model = build("llama")
    for weight in (layers_of(model)[where].self_attn.o_proj.weight, layers_of(model)[where].mlp.down_proj.weight):
        weight.data.zero_()  # the layer adds nothing to the stream
    before = model(ids()).logits
    scores = score_layers(model, ids())
    assert scores.best_span(1) == scores.least_influential(1) == [where]
    report = drop_layers(model, scores.best_span(1))
    assert report.dropped == [where] and model.config.num_hidden_layers == 5
    torch.testing.assert_close(model(ids()).logits, before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dropped", [[2, 3], [0, 1], [1, 4]])
def test_the_model_is_that_which_skips_the_layers_and_a_stock_one(family, dropped, tmp_path):
    model = build(family)
    skipping, batch = copy.deepcopy(model), ids()
    for index in dropped:
        layer = layers_of(skipping)[index]
        in_tuple = family == "gpt2" and isinstance(layer(torch.zeros(1, 2, 32)), tuple)
        layer.forward = lambda hidden, *a, _t=in_tuple, **k: (hidden,) if _t else hidden
    drop_layers(model, dropped)
    expected = skipping(batch, use_cache=False).logits
    torch.testing.assert_close(model(batch).logits, expected, atol=1e-5, rtol=1e-5)
    greedy = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(batch, **greedy), model.generate(batch, use_cache=False, **greedy))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(batch).logits, model(batch).logits)
    assert again.config.num_hidden_layers == 4


def test_a_pattern_that_the_config_cannot_say_is_refused():
    model = build("jamba", num_experts=4, num_experts_per_tok=2, mamba_d_state=4, mamba_dt_rank=4, mamba_d_conv=2,
                  use_mamba_kernels=False)  # fmt: skip
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="would be layer .* builds that one otherwise"):
        drop_layers(model, [0, 1])
    assert model.config.num_hidden_layers == 6 and set(before) == set(model.state_dict())


@pytest.mark.parametrize(
    ("removed", "billions"), [(2, 7.59), (4, 7.16), (6, 6.72), (8, 6.29), (10, 5.85)]
)  # arxiv.org/abs/2410.09982
def test_published_sizes_of_llama_3_1_8b(removed, billions):
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    report = drop_layers(model, list(range(20, 20 + removed)))
    assert report.parameters_before == 8_030_261_248
    assert report.parameters_after / 1e9 == pytest.approx(billions, abs=0.0051)


def test_the_language_tower_of_a_vision_language_model():
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    text = dict(model_type="llama", **SIZES)
    vision = dict(model_type="clip_vision_model", hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                  num_attention_heads=2, image_size=8, patch_size=4)  # fmt: skip
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=63)
    model = LlavaForConditionalGeneration(config).eval()
    scores = score_layers(model, ids() % 60)
    drop_layers(model, scores.best_span(2))
    assert model.config.text_config.num_hidden_layers == 4 and len(model.model.language_model.layers) == 4
    assert model.config.vision_config.num_hidden_layers == 2
    assert model(ids() % 60).logits.isfinite().all()


def test_the_config_remembers_the_layers_of_the_first_model(tmp_path):
    model = build("llama")
    drop_layers(model, [1, 4])
    drop_layers(model, [0])
    assert model.config.hf_sparse_layers == {"layers_before": 6, "kept": [2, 3, 5]}
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).hf_sparse_layers["kept"] == [2, 3, 5]


def test_the_plot_marks_what_went(tmp_path):
    pytest.importorskip("matplotlib")
    from hf_sparse.pruning.layer_plots import plot_layers

    scores = score_layers(build("llama"), ids())
    sizes = []
    for name, dropped in (("span", [2, 3]), ("scattered", [0, 4]), ("none", [])):
        plot_layers(scores, dropped, tmp_path / f"{name}.png", title="a model")
        content = (tmp_path / f"{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG")
        sizes.append(hash(content))
    assert len(set(sizes)) == 3


def test_errors():
    model = build("llama")
    scores = score_layers(model, ids())
    for count in (0, 6):
        with pytest.raises(ValueError, match="from 1 to 5 of them can be dropped"):
            scores.best_span(count)
    for wrong in ([], [6], [-1], [1, 1]):
        with pytest.raises(ValueError, match="layers 0 to 5"):
            drop_layers(model, wrong)
    with pytest.raises(ValueError, match="at least one"):
        drop_layers(model, range(6))
    with pytest.raises(ValueError, match="token ids from"):
        score_layers(model, ids() + 100)
