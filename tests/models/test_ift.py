"""sparse_ift on architectures of transformers: widths and FLOPs that were published, and what stays dense."""

import copy
import math

import pytest
import torch
from transformers import (
    FalconConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    Qwen2MoeConfig,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    ViTConfig,
    ViTForImageClassification,
)

from hf_sparse.flops import forward_flops, sparse_flops
from hf_sparse.models.ift import sparse_ift
from hf_sparse.models.layers import transform_layers
from hf_sparse.models.sparse_gpt2 import SparseGPT2Config, SparseGPT2ForCausalLM
from hf_sparse.models.widths import wide_config
from hf_sparse.targets import find_targets
from hf_sparse.training.sparse_training import sparsify

IMAGE = {"pixel_values": (1, 3, 64, 64)}
RESNET = dict(embedding_size=16, hidden_sizes=[16, 32, 64, 128], depths=[2, 2, 2, 2], layer_type="basic", num_labels=10)
TEXT = dict(vocab_size=256, max_position_embeddings=64, num_hidden_layers=2)
TINY = dict(n_embd=24, n_head=2, n_layer=1, vocab_size=64, n_positions=16, bos_token_id=0, eos_token_id=0)
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=48, n_head=4, n_layer=2, vocab_size=256, n_positions=64)),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(hidden_size=64, intermediate_size=176, num_attention_heads=4, num_key_value_heads=2, **TEXT)
    ),
    "resnet": lambda: ResNetForImageClassification(ResNetConfig(**RESNET)),
    "vit": lambda: ViTForImageClassification(
        ViTConfig(
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=64,
            patch_size=8,
        )
    ),
    "mobilenet": lambda: MobileNetV2ForImageClassification(MobileNetV2Config(image_size=64)),
}


def fed(model):
    if model.main_input_name == "input_ids":
        return {"input_ids": torch.randint(256, (2, 12))}
    return {"pixel_values": torch.randn(2, 3, 64, 64)}


def test_published_widths():
    for sparsity, width, inner in ((0.5, 1092, 4368), (0.75, 1536, 6144)):  # the released GPT configs
        wide = wide_config(GPT2Config(n_inner=3072), sparsity)
        assert (wide.n_embd, wide.n_inner, wide.n_head, wide.n_layer) == (width, inner, 12, 12)
    sizes = [64, 128, 256, 512]
    for sparsity, base in ((0.5, 90), (0.75, 128), (0.9, 202)):  # the released CIFAR networks
        wide = wide_config(ResNetConfig(embedding_size=64, hidden_sizes=sizes), sparsity)
        assert wide.embedding_size == base and wide.hidden_sizes == [base, 2 * base, 4 * base, 8 * base]
    llama = wide_config(LlamaConfig(hidden_size=576, intermediate_size=1536, num_attention_heads=9, head_dim=64), 0.5)
    assert llama.head_dim % 2 == 0 and llama.hidden_size == 9 * llama.head_dim >= 576 * math.sqrt(2)
    assert wide_config(GPT2Config(), 0.5, head_multiple=8).n_embd == 12 * 96
    assert wide_config(LlamaConfig(), 0).to_dict() == LlamaConfig().to_dict()
    with pytest.raises(ValueError, match="widths of PreTrainedConfig are not known"):
        from transformers import PreTrainedConfig

        wide_config(PreTrainedConfig(), 0.5)


@pytest.mark.parametrize(("sparsity", "ratio"), [(0.5, 1.2049), (0.75, 1.4721)])
def test_whole_model_flops_of_wide_gpt2_small(sparsity, ratio):
    """1.98e12 -> 2.92e12 per sequence of 2,048 tokens, forward and backward, at 75%."""
    for budget in ("layer", "model"):
        with torch.device("meta"):
            model = GPT2LMHeadModel(GPT2Config(n_positions=2048))
        report = sparse_ift(model, "wide", sparsity, budget=budget, inputs={"input_ids": (1, 2048)})
        assert 3 * report.dense_flops == pytest.approx(1.98e12, rel=5e-3)
        assert report.ratio == pytest.approx(ratio if budget == "layer" else 1.0, abs=1e-4)
    assert report.sparsity > sparsity and next(model.parameters()).is_meta


@pytest.mark.parametrize("budget", ["layer", "model"])
@pytest.mark.parametrize("family", ["wide", "parallel", "factorized", "doped"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_family_on_every_architecture(kind, family, budget):
    """The report's FLOPs are what a model with real masks costs, which is what the dense model did."""
    torch.manual_seed(0)
    model = MODELS[kind]()
    inputs = {name: (1, *tensor.shape[1:]) for name, tensor in fed(model).items()}
    dense = sum(forward_flops(model, inputs).values())
    report = sparse_ift(model, family, 0.75, budget=budget, inputs=inputs)
    assert report.dense_flops == dense
    if budget == "model":
        assert report.ratio == pytest.approx(1.0, abs=1e-9)
    else:
        assert report.sparsity == 0.75
        rounding = {"wide": 0.04 if kind == "mobilenet" else 1e-9, "parallel": 1e-9}.get(family, 0.05)
        assert report.layer_ratio == pytest.approx(1.0, abs=rounding)
    training = sparsify(model, report.config)
    assert sparse_flops(forward_flops(model, inputs), training.densities()) == pytest.approx(
        report.sparse_flops, rel=2e-3
    )
    loss = model(**fed(model)).logits.square().mean()
    loss.backward()
    assert loss.isfinite() and all(w.parameter.grad is not None for w in training.weights)
    assert f"sparse {family}" in str(report) and f"budget: {budget}" in str(report)


def test_rounded_widths_have_more_zeros():
    model = MODELS["gpt2"]()  # 48 wide, 4 heads of 12
    report = sparse_ift(model, "wide", 0.5, head_multiple=8, inputs={"input_ids": (1, 64)})
    assert model.config.n_embd == 96 and report.sparsity == 0.75 and report.layer_ratio == pytest.approx(1.0)
    with pytest.raises(ValueError, match="belong to the wide family"):
        sparse_ift(MODELS["gpt2"](), "doped", 0.5, head_multiple=8)


def test_widths_that_are_given_are_paid_for():
    report = sparse_ift(MODELS["gpt2"](), "wide", 0.5, widths={"n_embd": 96}, inputs={"input_ids": (1, 64)})
    assert report.sparsity == 0.75 and report.layer_ratio == pytest.approx(1.0)
    with pytest.raises(ValueError, match="not all of its widths are known"):
        sparse_ift(MODELS["gpt2"](), "wide", 0.5, widths={"n_embd": 32}, inputs={"input_ids": (1, 64)})


def test_widths_of_other_architectures():
    wide = wide_config(T5Config(), 0.75)
    assert (wide.d_model, wide.d_ff, wide.d_kv) == (1024, 4096, 128)
    assert wide_config(FalconConfig(), 0.75).hidden_size == 2 * FalconConfig().hidden_size
    moe = Qwen2MoeConfig(), wide_config(Qwen2MoeConfig(), 0.75)
    assert moe[1].moe_intermediate_size == 2 * moe[0].moe_intermediate_size


def test_only_once():
    for make in (
        MODELS["gpt2"],
        lambda: SparseGPT2ForCausalLM(SparseGPT2Config(**TINY, family="parallel", sparsity=0.5)),
    ):
        model = make()
        if not model.config.to_dict().get("family"):
            sparse_ift(model, "wide", 0.75, inputs={"input_ids": (1, 8)})
        with pytest.raises(ValueError, match="replaced or widened already"):
            sparse_ift(model, "wide", 0.75, inputs={"input_ids": (1, 8)})


def test_a_layer_under_two_names():
    model = torch.nn.Module()
    model.a = model.b = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match="under several names, a and b"):
        transform_layers(model, "parallel", 0.5, ["a"])


def test_what_stays_dense():
    for kind, dense in (("resnet", "embedder"), ("vit", "patch_embeddings"), ("mobilenet", "conv_stem.first_conv")):
        model = MODELS[kind]()
        report = sparse_ift(model, "parallel", 0.5, inputs=IMAGE)
        assert any(dense in name for name in find_targets(model)) and not any(dense in name for name in report.layers)
        assert not any("classifier" in name for name in report.layers)
    assert not any("conv_3x3" in name for name in report.layers)  # depthwise
    model = MODELS["resnet"]()
    report = sparse_ift(model, "doped", 0.75, inputs=IMAGE, ignore=["re:.*shortcut"])
    assert len(report.layers) == 16
    masked = find_targets(model, report.config.targets, report.config.ignore)
    assert len(masked) == 16 and all(name.endswith("convolution.sparse.weight") for name in masked)
    report = sparse_ift(MODELS["gpt2"](), "wide", 0.75, method="rigl", schedule={"every": 7}, seed=3)
    assert (report.config.method, report.config.allocation, report.config.seed) == ("rigl", "uniform", 3)


def test_new_layers_start_as_the_class_starts_its_own():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(n_embd=192, n_head=4, n_layer=1, vocab_size=64, n_positions=8, initializer_range=0.11)
    )
    sparse_ift(model, "factorized", 0.5)
    for weight in (model.transformer.h[0].mlp.c_fc.u.weight, model.transformer.h[0].mlp.c_fc.v.weight):
        assert weight.std().item() == pytest.approx(0.11, rel=0.05)


def test_errors_change_nothing():
    model = MODELS["gpt2"]()
    state = copy.deepcopy(model.state_dict())
    for arguments, message in (
        (("thick", 0.5), "family is one of"),
        (("wide", 1.0), "lies in"),
        (("parallel", 0.7), "whole number of branches"),
        (("wide", 0.5, "flops"), "budget is"),
    ):
        budget = arguments[2] if len(arguments) > 2 else "layer"
        with pytest.raises(ValueError, match=message):
            sparse_ift(model, *arguments[:2], budget=budget)
    with pytest.raises(ValueError, match="what stays dense costs"):
        sparse_ift(model, "wide", 0.98, budget="model", inputs={"input_ids": (1, 64)})
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert sparse_ift(model, "wide", 0).config is None
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_same_object_is_wider():
    """Whoever holds the model, a Trainer or an optimizer not yet made, holds the wide one."""
    model = MODELS["gpt2"]()
    held = model
    sparse_ift(model, "wide", 0.75)
    assert held is model and held.config.n_embd == held.transformer.wte.embedding_dim == 96
    assert held.lm_head.weight is held.transformer.wte.weight
