"""Targets: what is sparse by default in every family, how each layout is seen as a matrix, and the grammar of names."""

import pytest
import torch
from torch import nn

from hf_sparse.targets import Target, find_targets, match_names

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
KINDS = {
    "llama": ATTENTION | {"gate_proj", "up_proj", "down_proj"},
    "mistral": ATTENTION | {"gate_proj", "up_proj", "down_proj"},
    "qwen2": ATTENTION | {"gate_proj", "up_proj", "down_proj"},
    "qwen3": ATTENTION | {"gate_proj", "up_proj", "down_proj"},
    "gemma3_text": ATTENTION | {"gate_proj", "up_proj", "down_proj"},
    "phi": {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"},
    "gpt_neox": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    "qwen3_moe": ATTENTION | {"experts.gate_up_proj", "experts.down_proj"},
    "mixtral": ATTENTION | {"experts.gate_up_proj", "experts.down_proj"},
}


def gpt_oss():
    """A mixture whose experts are stored [experts, in, out]."""
    from transformers import AutoModelForCausalLM, GptOssConfig

    config = GptOssConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=16,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def test_default_targets_of_every_family(any_tiny_model):
    """Everything inside the decoder layers that multiplies activations; no embedding, head, router, norm or bias."""
    targets = find_targets(any_tiny_model)
    assert {t.kind for t in targets.values()} == KINDS[any_tiny_model.config.model_type]
    for name, target in targets.items():
        parameter = any_tiny_model.get_parameter(name)
        assert not any(word in name for word in ("embed", "lm_head", "norm", "bias", "router", ".gate.", "wte", "wpe"))
        assert target.numel == parameter.numel() and parameter.dim() >= 2
        assert target.matrix(parameter).shape == target.shape
    layers = any_tiny_model.config.num_hidden_layers
    assert len(targets) % layers == 0
    every_linear = {f"{n}.weight" for n, m in any_tiny_model.named_modules() if isinstance(m, nn.Linear)}
    assert every_linear - set(targets) <= {"lm_head.weight", "embed_out.weight"}


def test_targets_come_in_the_order_of_the_model(any_tiny_model):
    wanted = list(find_targets(any_tiny_model))
    in_model = [name for name, _ in any_tiny_model.named_parameters()]
    layer = [int(next(part for part in name.split(".") if part.isdigit())) for name in wanted]
    assert layer == sorted(layer) and set(wanted) <= set(in_model)


@pytest.mark.parametrize("family,intermediate", [("qwen3_moe", 32), ("mixtral", 32)])
def test_fused_experts_are_matrices_per_expert(tiny_model, family, intermediate):
    targets = find_targets(tiny_model(family))
    gate_up = targets["model.layers.0.mlp.experts.gate_up_proj"]
    down = targets["model.layers.0.mlp.experts.down_proj"]
    assert (gate_up.shape, down.shape) == ((4, 2 * intermediate, 64), (4, 64, intermediate))
    assert gate_up.layout == down.layout == "matrix" and gate_up.is_experts and down.kind == "experts.down_proj"
    assert gate_up.module == "model.layers.0.mlp.experts" and gate_up.numel == 4 * 2 * intermediate * 64


def test_transposed_experts_are_seen_as_out_in():
    model = gpt_oss()
    targets = find_targets(model)
    gate_up = targets["model.layers.0.mlp.experts.gate_up_proj"]
    down = targets["model.layers.0.mlp.experts.down_proj"]
    assert (gate_up.shape, down.shape) == ((4, 96, 32), (4, 32, 48))
    assert gate_up.layout == down.layout == "transposed"
    stored = model.get_parameter(down.name)
    assert torch.equal(down.matrix(stored)[2], stored[2].T)
    assert torch.equal(down.stored(down.matrix(stored), stored), stored)
    assert not any("router" in name or "bias" in name or "sinks" in name for name in targets)


class _Experts(nn.Module):
    """A fused layout that does not say whether it is transposed."""

    def __init__(self, first: tuple, second: tuple, hidden: int):
        super().__init__()
        self.num_experts, self.hidden_size = first[0], hidden
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.zeros(first)), nn.Parameter(torch.zeros(second))


def test_the_layout_of_unstated_experts_is_read_from_the_shapes():
    as_is = find_targets(nn.Sequential(_Experts((2, 24, 8), (2, 8, 12), hidden=8)))
    assert [(t.shape, t.layout) for t in as_is.values()] == [((2, 24, 8), "matrix"), ((2, 8, 12), "matrix")]
    transposed = find_targets(nn.Sequential(_Experts((2, 8, 24), (2, 12, 8), hidden=8)))
    assert [(t.shape, t.layout) for t in transposed.values()] == [
        ((2, 24, 8), "transposed"),
        ((2, 8, 12), "transposed"),
    ]
    with pytest.raises(ValueError, match=r"cannot tell which dimension .*_Experts.down_proj \(2, 8, 8\) is its input"):
        find_targets(nn.Sequential(_Experts((2, 16, 8), (2, 8, 8), hidden=8)))


def test_conv1d_is_transposed(tiny_model):
    model = tiny_model("gpt2")
    target = find_targets(model)["transformer.h.1.mlp.c_fc.weight"]
    stored = model.get_parameter(target.name)
    assert stored.shape == (64, 256) and target.shape == (256, 64) and target.layout == "transposed"
    view = target.matrix(stored)
    assert torch.equal(view, stored.T) and view.data_ptr() == stored.data_ptr()
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    module = model.get_submodule(target.module)
    assert torch.allclose(module(x), x @ view.T + module.bias, atol=1e-6)


def test_convolutions_are_flattened_per_output_channel():
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    model = ResNetForImageClassification(config)
    targets = find_targets(model)
    first = targets["resnet.embedder.embedder.convolution.weight"]
    stored = model.get_parameter(first.name)
    assert (first.shape, first.layout) == ((8, 3 * 7 * 7), "conv")
    assert torch.equal(first.matrix(stored), stored.reshape(8, -1))
    assert torch.equal(first.stored(first.matrix(stored), stored), stored)
    assert all(t.layout == "conv" for t in targets.values()), "the classifier is an output head"
    assert list(find_targets(model, ["classifier.1"])) == ["classifier.1.weight"]


def test_a_vision_transformer_leaves_its_classifier_dense():
    from transformers import ViTConfig, ViTForImageClassification

    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    model = ViTForImageClassification(ViTConfig(**size, image_size=16, patch_size=8, num_labels=3))
    targets = find_targets(model)
    assert len(targets) == 1 + 2 * 6 and "classifier.weight" not in targets
    assert [t.layout for t in targets.values()].count("conv") == 1
    assert "classifier.weight" in find_targets(model, ["re:.*"])


def test_the_head_of_a_sequence_classifier_stays_dense(tiny_model):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_config(tiny_model("llama").config)
    assert "score.weight" not in find_targets(model) and "score.weight" in find_targets(model, ["score"])


def test_tied_weights_are_one_parameter(tiny_model):
    tied = tiny_model("llama", tie_word_embeddings=True)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert [n for n in find_targets(tied, ["re:.*"]) if "lm_head" in n or "embed" in n] == ["lm_head.weight"]
    inner = tied.model.layers
    inner[1].mlp.up_proj.weight = inner[0].mlp.up_proj.weight
    assert [n for n in find_targets(tied) if "up_proj" in n] == ["model.layers.0.mlp.up_proj.weight"]


def test_a_class_name_does_not_select_the_head_but_its_name_does(tiny_llama):
    by_class = find_targets(tiny_llama, ["Linear"])
    assert list(by_class) == list(find_targets(tiny_llama)) and "lm_head.weight" not in by_class
    for entry in ("lm_head", "lm_head.weight", "re:lm_head"):
        assert list(find_targets(tiny_llama, [entry])) == ["lm_head.weight"]
    assert "lm_head.weight" in find_targets(tiny_llama, ["Linear", "lm_head"])


@pytest.mark.parametrize(
    "entry,wanted",
    [
        ("model.layers.0.mlp.up_proj.weight", ["model.layers.0.mlp.up_proj.weight"]),  # a parameter
        ("model.layers.0.mlp.up_proj", ["model.layers.0.mlp.up_proj.weight"]),  # a module
        ("mlp.up_proj", ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]),  # the end of one
        ("up_proj", ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]),
        (
            r"re:.*\.1\..*[vk]_proj",
            ["model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.v_proj.weight"],
        ),
    ],
)
def test_the_grammar_of_entries(tiny_llama, entry, wanted):
    assert list(find_targets(tiny_llama, [entry])) == wanted


def test_experts_by_name(tiny_model):
    model = tiny_model("qwen3_moe")
    assert {t.kind for t in find_targets(model, ["experts"]).values()} == {"experts.gate_up_proj", "experts.down_proj"}
    assert {t.kind for t in find_targets(model, ["experts.down_proj"]).values()} == {"experts.down_proj"}
    assert {t.kind for t in find_targets(model, ["down_proj"]).values()} == {"experts.down_proj"}


def test_ignore(tiny_llama):
    everything = find_targets(tiny_llama)
    rest = find_targets(tiny_llama, None, ["q_proj", r"re:model\.layers\.0\."])
    assert list(rest) == [n for n in everything if "q_proj" not in n and not n.startswith("model.layers.0.")]
    with pytest.raises(ValueError, match=r"no target is left: targets=\['q_proj'\] ignore=\['re:\.\*'\]"):
        find_targets(tiny_llama, ["q_proj"], ["re:.*"])


@pytest.mark.parametrize(
    "entry,near",
    [
        ("q_prj", "near matches: q_proj"),
        ("qproj", "near matches: .*q_proj"),
        ("linear", "near matches: Linear"),
        ("layers.0.mlp.up_proj.weigth", "near matches: .*up_proj.weight"),
        ("re:.*upp_projj", "up_proj"),
        ("xyzzyxyzzy", "kinds in this model: down_proj, gate_proj"),
    ],
)
def test_an_entry_that_matches_nothing_is_an_error_with_near_matches(tiny_llama, entry, near):
    with pytest.raises(ValueError, match="matches no parameter of this model; .*" + near) as caught:
        find_targets(tiny_llama, [entry])
    assert repr(entry) in str(caught.value)
    with pytest.raises(ValueError, match="matches no parameter"):
        find_targets(tiny_llama, None, [entry])


def test_regular_expressions_match_from_the_start(tiny_llama):
    with pytest.raises(ValueError, match="matches no parameter"):
        find_targets(tiny_llama, ["re:q_proj"])


def test_a_model_without_weights_to_prune_says_what_it_has():
    with pytest.raises(
        ValueError, match="Sequential has no linear, convolution or fused expert weights; it has LayerNorm"
    ):
        find_targets(nn.Sequential(nn.LayerNorm(4)))


def test_a_plain_module_works_without_a_config():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    assert list(find_targets(model)) == ["0.weight", "2.weight"]
    assert find_targets(nn.Linear(3, 2))["weight"].shape == (2, 3)


def test_a_router_made_of_a_linear_beside_its_experts_is_dense():
    block = nn.Module()
    block.gate, block.experts = nn.Linear(8, 2), _Experts((2, 24, 8), (2, 8, 12), hidden=8)
    block.shared = nn.Linear(8, 8)
    model = nn.Module()
    model.block = block
    assert set(find_targets(model)) == {"block.shared.weight", "block.experts.gate_up_proj", "block.experts.down_proj"}
    assert list(find_targets(model, ["gate"])) == ["block.gate.weight"]


def test_the_gate_of_a_shared_expert_is_dense(tiny_model):
    from transformers import AutoModelForCausalLM, Qwen2MoeConfig

    base = {k: v for k, v in tiny_model("llama").config.to_dict().items() if k in ("vocab_size", "hidden_size")}
    size = dict(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, intermediate_size=64)
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)
    model = AutoModelForCausalLM.from_config(Qwen2MoeConfig(**base, **size, **experts))
    assert model.model.layers[0].mlp.shared_expert_gate.weight.shape == (1, 64)
    kinds = {t.kind for t in find_targets(model).values()}
    assert "shared_expert_gate" not in kinds and {"gate_proj", "experts.down_proj"} <= kinds
    assert len(find_targets(model, ["shared_expert_gate"])) == 1


def test_depthwise_convolutions_are_dense_unless_named():
    model = nn.Sequential(
        nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(1, 4, 3)
    )
    assert list(find_targets(model)) == ["1.weight", "2.weight", "3.weight"]
    assert list(find_targets(model, ["0"])) == ["0.weight"]


def test_match_names_keeps_the_order_of_the_targets():
    targets = {n: Target(n, n.removesuffix(".weight"), "Linear", (2, 2), "matrix") for n in ("b.weight", "a.weight")}
    assert match_names("Linear", targets) == ["b.weight", "a.weight"]


def test_peft_models_have_the_targets_of_their_base(tiny_model):
    peft = pytest.importorskip("peft")
    for family, modules in (("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_attn"])):
        model = tiny_model(family)
        before = find_targets(model)
        picked = list(find_targets(model, [modules[0]]))
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=modules))
        after = find_targets(wrapped)
        assert [target.plain[0] for target in after.values()] == list(before)
        assert not any("lora" in name for name in after)
        assert [target.kind for target in after.values()] == [target.kind for target in before.values()]
        for name in after:
            wrapped.get_parameter(name)
        for entry in (modules[0], f"re:.*{modules[0]}", picked[0], picked[0].removesuffix(".weight")):
            found = [target.plain[0] for target in find_targets(wrapped, [entry]).values()]
            assert found == (picked[:1] if "." in entry and not entry.startswith("re:") else picked)
        with pytest.raises(ValueError, match="'lora_A' matches no parameter"):
            find_targets(wrapped, ["lora_A"])
