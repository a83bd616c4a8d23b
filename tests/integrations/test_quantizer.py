"""transformers reads packed checkpoints: every family, every way of loading, and then the model is a stock one."""

import json

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import hf_sparse  # noqa: F401  (registers the quantizer)
from hf_sparse.formats import pack_checkpoint, save_packed, unpack_checkpoint

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
EXPERTS = {"head_dim": 16, "num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
QWEN35 = EXPERTS | {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
GPT2 = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 1}

FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),  # Conv1D: [in, out]
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=16)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)),
    "qwen3 moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **EXPERTS)),
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=4, head_dim=16)),  # fused on disk
    "qwen3.5 moe": lambda: Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**SIZES, **QWEN35)),
}


def sparse_model(family="llama", pattern="unstructured"):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() < 2 or any(part in name for part in ("embed", "wte", "wpe", "lm_head", "router")):
                continue
            if pattern == "2:4":
                groups = weight.view(-1, 4)
                groups.scatter_(1, torch.rand(groups.shape).argsort(1)[:, 2:], 0)
            else:
                weight.mul_(torch.rand(weight.shape) > 0.6)
    return model


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def assert_same(a, b):
    states = a.state_dict(), b.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert tensor.dtype == states[1][name].dtype and torch.equal(tensor, states[1][name]), name


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """family -> (dense, packed), made once each."""
    made = {}

    def make(family, **kwargs):
        key = (family, *kwargs.values())
        if key not in made:
            root = tmp_path_factory.mktemp("packed")
            sparse_model(family).save_pretrained(root / "dense", **kwargs)
            pack_checkpoint(root / "dense", root / "packed")
            made[key] = root / "dense", root / "packed"
        return made[key]

    return make


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "60KB"}], ids=["one file", "shards"])
def test_families(directories, tmp_path, family, shards):
    dense, packed = directories(family, **shards)
    reference = AutoModelForCausalLM.from_pretrained(dense)
    model, info = AutoModelForCausalLM.from_pretrained(packed, output_loading_info=True)
    assert type(model) is type(reference) and not any(info.values())
    assert_same(model, reference)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    assert torch.equal(model(ids).logits, reference(ids).logits)

    # nothing of us is left: the next save is byte for byte that of the dense model
    reference.save_pretrained(tmp_path / "a", **shards)
    model.save_pretrained(tmp_path / "b", **shards)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")

    unpack_checkpoint(packed, tmp_path / "c")
    assert contents(tmp_path / "c") == contents(dense)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_class_without_us_refuses(directories, monkeypatch, family):
    """Where nothing knows our quant_method, transformers only warns about it; the shapes must then stop it."""
    from transformers.quantizers import auto

    dense, packed = directories(family)
    kind = type(AutoModelForCausalLM.from_pretrained(dense))
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "hf_sparse")
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "hf_sparse")
    with pytest.raises(RuntimeError):
        kind.from_pretrained(packed)


def test_tiny_families(any_tiny_model, tmp_path):
    """The families of conftest, with their embeddings sparse too."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in any_tiny_model.parameters():
            if weight.dim() > 1:
                weight.mul_(torch.rand(weight.shape) > 0.6)
    save_packed(any_tiny_model, tmp_path / "packed")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), any_tiny_model)


OTHERS = {
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**TEXT)),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    ),
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**VISION)),  # a 4-D convolution
    "clip": lambda: transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=VISION)),
    "gemma3 multimodal": lambda: transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=TEXT | {"head_dim": 16}, vision_config=VISION, mm_tokens_per_image=4)
    ),
}
TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 8}


@pytest.mark.parametrize("family", OTHERS)
def test_not_only_causal_language_models(tmp_path, family):
    torch.manual_seed(0)
    model = OTHERS[family]().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(torch.rand(weight.shape) > 0.6)
    assert save_packed(model, tmp_path / "packed").tensors
    assert_same(type(model).from_pretrained(tmp_path / "packed"), model)


def test_experts_are_packed_one_by_one_and_fused(directories):
    names = {}
    for family in ("mixtral", "qwen3 moe", "gpt_oss", "qwen3.5 moe"):
        with safe_open(directories(family)[1] / "model.safetensors", "pt") as reader:
            names[family] = [n for n in reader.keys() if reader.get_slice(n).get_dtype() == "U8"]  # noqa: SIM118
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in names["mixtral"]
    assert "model.layers.1.mlp.experts.2.down_proj.weight" in names["qwen3 moe"]
    assert "model.layers.0.mlp.experts.gate_up_proj" in names["gpt_oss"]
    assert any("experts" in name for name in names["qwen3.5 moe"])


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss"])
def test_stock_classes_called_directly(directories, tmp_path, family):
    dense, packed = directories(family)
    kind = type(AutoModelForCausalLM.from_pretrained(dense))
    model = kind.from_pretrained(packed)
    reference = kind.from_pretrained(dense)
    assert_same(model, reference)
    assert {k: v for k, v in model.config.to_dict().items() if k != "_name_or_path"} == {
        k: v for k, v in reference.config.to_dict().items() if k != "_name_or_path"
    }
    model.save_pretrained(tmp_path / "b")
    assert contents(tmp_path / "b") == contents(dense)
    assert_same(AutoModel.from_pretrained(packed), AutoModel.from_pretrained(dense))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"dtype": torch.bfloat16},
        {"dtype": "float16"},
        {"dtype": torch.float32},
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"dtype": torch.bfloat16, "device_map": "auto"},
    ],
    ids=str,
)
def test_ways_of_loading(directories, kwargs):
    dense, packed = directories("llama")
    model = AutoModelForCausalLM.from_pretrained(packed, **kwargs)
    assert_same(model, AutoModelForCausalLM.from_pretrained(dense, **kwargs))


def test_disk_offload(directories, tmp_path):
    dense, packed = directories("mixtral")
    places = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "model.layers.0", "lm_head"], "cpu")
    places["model.layers.1"] = "disk"
    ids = torch.tensor([[3, 1, 4]])
    logits = [
        AutoModelForCausalLM.from_pretrained(d, device_map=places, offload_folder=tmp_path / d.name)(ids).logits
        for d in (dense, packed)
    ]
    assert torch.equal(*logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss"])
def test_patterned_half_precision(tmp_path, dtype, family):
    model = sparse_model(family, "2:4").to(dtype)
    report = save_packed(model, tmp_path / "packed")
    # 2:4 along the last dimension, which for Conv1D is the output: the packing is found whatever the layout means
    kinds = {str(header) for header in report.tensors.values()}
    assert "2:4" in kinds
    model.save_pretrained(tmp_path / "dense")  # gpt_oss keeps some modules in float32 when it loads float16
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), dense)


def test_the_model_is_plain_and_trains(directories):
    _, packed = directories("llama")
    model = AutoModelForCausalLM.from_pretrained(packed)
    assert not getattr(model, "is_quantized", False) and not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config") and model.config.model_type == "llama"
    assert not hasattr(model.config, "base_model_type") and not hasattr(model.config, "auto_map")
    assert model._weight_conversions == []
    assert model.float().dtype == torch.float32 and model.half().dtype == torch.float16
    model = model.float().train()
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)


def test_trainer_accepts_the_model(directories, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(directories("llama")[1])
    rows = [{"input_ids": [3, 1, 4, 1], "labels": [3, 1, 4, 1]}] * 2
    args = TrainingArguments(tmp_path, max_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True)
    assert Trainer(model, args, train_dataset=rows).train().global_step == 1


def test_config_key_survives(tmp_path):
    model = sparse_model()
    model.config.hf_sparse = {"sparsity": 0.6, "pattern": "unstructured"}
    model.save_pretrained(tmp_path / "dense")
    pack_checkpoint(tmp_path / "dense", tmp_path / "packed")
    unpack_checkpoint(tmp_path / "packed", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert loaded.config.hf_sparse == model.config.hf_sparse
    config, unused = AutoConfig.from_pretrained(tmp_path / "packed", return_unused_kwargs=True, use_cache=False, foo=1)
    assert type(config) is LlamaConfig and config.use_cache is False and unused == {"foo": 1}


def test_pipeline(directories, tiny_tokenizer, tmp_path):
    dense, packed = directories("llama")
    out = []
    for directory in (dense, packed):
        pipe = transformers.pipeline("text-generation", model=str(directory), tokenizer=tiny_tokenizer)
        assert type(pipe.model) is LlamaForCausalLM
        ids = torch.tensor([[3, 1, 4]])
        out.append(pipe.model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0))
    assert torch.equal(*out)


def test_lm_eval(directories, tiny_tokenizer):
    lm = pytest.importorskip("lm_eval.models.huggingface")
    model = lm.HFLM(pretrained=str(directories("llama")[1]), tokenizer=tiny_tokenizer, device="cpu", batch_size=1)
    assert_same(model.model, AutoModelForCausalLM.from_pretrained(directories("llama")[0], dtype=model.model.dtype))


@pytest.fixture
def copy(directories, tmp_path):
    import shutil

    return shutil.copytree(directories("llama", max_shard_size="60KB")[1], tmp_path / "copy")


def edit_config(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


def test_newer_format_is_refused(copy):
    edit_config(copy, quantization_config={"quant_method": "hf_sparse", "format_version": 2})
    for kind in (AutoModelForCausalLM, LlamaForCausalLM, AutoConfig):
        if kind is LlamaForCausalLM:
            edit_config(copy, model_type="llama")
        with pytest.raises(ValueError, match="format 2, the code at hand reads up to 1: upgrade hf_sparse"):
            edit_config(copy, model_type="llama" if kind is LlamaForCausalLM else "hf_sparse")
            kind.from_pretrained(copy)


def test_unknown_architecture_is_refused(copy):
    edit_config(copy, base_model_type="from_the_future")
    with pytest.raises(ValueError, match="'from_the_future' model, which this transformers does not know"):
        AutoModelForCausalLM.from_pretrained(copy)


@pytest.mark.parametrize("damage", ["flip", "cut", "header"])
def test_damage_names_file_and_tensor(copy, damage):
    file = next(p for p in sorted(copy.glob("*.safetensors")) if b"HFSPARSE" in p.read_bytes())
    data = bytearray(file.read_bytes())
    at = data.index(b"HFSPARSE")
    if damage == "flip":
        data[at + 150] ^= 1
    elif damage == "header":
        data[at + 16] ^= 1  # the number of values
    else:
        del data[-40:]
    file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{file.name}(: tensor model\.|.* truncated or damaged)"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_a_lost_header_is_an_error(copy):
    file = next(p for p in sorted(copy.glob("*.safetensors")) if b"HFSPARSE" in p.read_bytes())
    file.write_bytes(file.read_bytes().replace(b"HFSPARSE", b"hFSPARSE", 1))
    with pytest.raises(RuntimeError):  # transformers' load report has our message
        AutoModelForCausalLM.from_pretrained(copy)


def test_packing_is_not_a_loading_option(directories):
    from transformers.quantizers import AutoQuantizationConfig

    config = AutoQuantizationConfig.from_dict({"quant_method": "hf_sparse"})
    with pytest.raises(ValueError, match="save_packed"):
        AutoModelForCausalLM.from_pretrained(directories("llama")[0], quantization_config=config)
