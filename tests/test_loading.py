"""Loading: directories and GGUF files become plain, trainable models; what is no model is said to be none."""

import importlib.util

import numpy
import pytest
import torch

from hf_sparse.loading import load_model, load_tokenizer


def tokens() -> torch.Tensor:
    return torch.arange(3, 43).unsqueeze(0)


def write_gguf(path, model) -> None:
    """A llama as llama.cpp stores it: its tensor names, and q and k with their rotary halves interleaved."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    names = {"self_attn": "attn", "mlp": "ffn", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    parts = {"o_proj": "output"} | {f"{part}_proj": part for part in ("q", "k", "v", "gate", "up", "down")}
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for name, tensor in model.state_dict().items():
        value = tensor.numpy()
        if name.startswith("model.layers."):
            _, _, layer, *rest = name.split(".")
            name = f"blk.{layer}.{names[rest[0]]}" + ("" if len(rest) == 2 else f"_{parts[rest[1]]}") + ".weight"
            if name.endswith(("attn_q.weight", "attn_k.weight")):
                heads = config.num_attention_heads if "attn_q" in name else config.num_key_value_heads
                value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        else:
            name = top.get(name, "output.weight")
        writer.add_tensor(name, numpy.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def assert_plain_and_survives_saving(model, directory):
    """No trace of GGUF: it saves, loads through stock calls with equal logits, and its weights take gradients."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    assert type(model) is LlamaForCausalLM and not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert getattr(model, "hf_quantizer", None) is None and not hasattr(model.config, "quantization_config")
    assert not getattr(model, "is_quantized", False)
    with torch.no_grad():
        wanted = model(tokens()).logits
    model.save_pretrained(directory)
    reloaded, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.get(key) for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(reloaded(tokens()).logits, wanted)


def test_a_gguf_file_becomes_the_model_it_was_made_from(tiny_llama, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_llama)
    model = load_model(str(tmp_path / "tiny.gguf"))
    for name, parameter in tiny_llama.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    assert_plain_and_survives_saving(model, tmp_path / "saved")
    assert model.config._name_or_path == "tiny"
    model(tokens(), labels=tokens()).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    half = load_model(str(tmp_path / "tiny.gguf"), dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.slow
def test_a_real_gguf_file(smollm2, tmp_path):
    model = load_model(str(smollm2))
    assert sum(p.numel() for p in model.parameters()) == 134_515_008  # SmolLM2-135M, embeddings tied
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokenizer = load_tokenizer(str(smollm2))
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == "Paris"
    assert_plain_and_survives_saving(model, tmp_path)


def test_a_directory_loads_as_stored_and_as_asked(tiny_model_dir, tmp_path):
    model = load_model(str(tiny_model_dir))
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    half = load_model(str(tiny_model_dir), dtype="float16")
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    half.save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).dtype == torch.float16, "auto is the stored type"
    assert load_tokenizer(str(tiny_model_dir))("a").input_ids


def test_an_unknown_dtype(tiny_model_dir):
    with pytest.raises(ValueError, match="dtype is auto, float32, bfloat16, float16, got 'fp8'"):
        load_model(str(tiny_model_dir), dtype="fp8")


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
@pytest.mark.parametrize("source", ["missing.gguf", "dir/missing.gguf"])
def test_a_missing_gguf_file(load, source):
    with pytest.raises(FileNotFoundError, match=f"no such file: {source}"):
        load(source)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
@pytest.mark.parametrize("source", ["./missing", "/no/such/model", "~/model", "a/b/c"])
def test_a_missing_directory(load, source):
    with pytest.raises(FileNotFoundError, match=f"no such directory: {source}"):
        load(source)


def test_a_directory_without_a_config(tmp_path):
    with pytest.raises(ValueError, match="has no config.json and so is not a model directory"):
        load_model(str(tmp_path))


def test_a_file_that_is_no_gguf(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x")
    with pytest.raises(
        ValueError, match="is a file; a model is a Hub id, a directory with config.json, or a .gguf file"
    ):
        load_model(str(path))


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04not a model"])
def test_a_gguf_file_in_name_only(tmp_path, load, content):
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="bad.gguf is not a GGUF file: it does not begin with the letters GGUF"):
        load(str(path))


@pytest.mark.parametrize("share", [0.00005, 0.001, 0.01, 0.5, 0.999])
def test_a_truncated_gguf_file_is_named(tiny_llama, tmp_path, share):
    path = tmp_path / "cut.gguf"
    write_gguf(path, tiny_llama)
    content = path.read_bytes()
    path.write_bytes(content[: max(20, int(share * len(content)))])
    with pytest.raises(ValueError, match="cut.gguf cannot be read as a GGUF file"):
        load_model(str(path))


def test_without_the_gguf_package_it_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'hf-sparse\[gguf\]'"):
        load_model(str(tmp_path / "a.gguf"))
