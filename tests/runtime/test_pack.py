"""Packing models and taking them back; loading packed checkpoints into packed layers. The layout is one in plain torch."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hf_sparse import SparsityConfig, pack_for_inference, prune, save_packed, sparsify, unpack
from hf_sparse.formats.unpack import read_header, unpack_tensor
from hf_sparse.integrations import quantizer
from hf_sparse.runtime import choose, load
from hf_sparse.runtime.packed_linear import PackedLinear

pytestmark = pytest.mark.usefixtures("plain_layout")
FAMILIES = [
    "llama",
    "gemma3_text",
    "gpt2",
    "qwen3_moe",
]  # gemma3: tied; gpt2: weights are [in, out]; moe: fused experts


@pytest.fixture
def sparse_model(tiny_model):
    def make(family="llama", sparsity=0.75):
        model = tiny_model(family).eval()
        prune(model, SparsityConfig(sparsity=sparsity), progress=False)
        return model

    return make


def ids():
    return torch.randint(2, 128, (2, 7), generator=torch.Generator().manual_seed(1))


def packed_layers(model):
    return {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_and_back(family, sparse_model):
    model = sparse_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classes = {name: type(module) for name, module in model.named_modules()}
    expected, generated = model(ids()).logits, model.generate(ids(), max_new_tokens=5, do_sample=False)
    report = pack_for_inference(model, "packed")
    attention = {"gpt2": {"attn.c_attn", "attn.c_proj"}}.get(family, {f"self_attn.{letter}_proj" for letter in "qkvo"})
    mlp = {"gpt2": {"mlp.c_fc", "mlp.c_proj"}, "qwen3_moe": set()}.get(
        family, {f"mlp.{kind}_proj" for kind in ("gate", "up", "down")}
    )
    layers = "transformer.h" if family == "gpt2" else "model.layers"
    depth = range(len(model.get_submodule(layers)))
    assert packed_layers(model) == {f"{layers}.{index}.{name}" for index in depth for name in attention | mlp}
    assert {name for name, layer in report.layers.items() if layer.layout == "plain"} == packed_layers(model)
    torch.testing.assert_close(model(ids()).logits, expected)
    assert torch.equal(model.generate(ids(), max_new_tokens=5, do_sample=False), generated)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert unpack(model) is model
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(ids()).logits, expected)
    with pytest.raises(ValueError, match="no layer of this model is packed"):
        unpack(model)


def test_the_report_counts_bytes_and_says_why_a_layer_stays(sparse_model):
    model = sparse_model()
    weight = model.model.layers[0].self_attn.q_proj.weight
    kept = int((weight != 0).sum())
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.fill_(1.0)
    report = pack_for_inference(model, "packed")
    layer = report.layers["model.layers.0.self_attn.q_proj"]
    assert (layer.dense_bytes, layer.bytes, layer.sparsity) == (64 * 64 * 4, 8 * kept, 1 - kept / 4096)
    assert report.layers["model.layers.1.self_attn.q_proj"].why == "too few zeros to save memory"
    assert report.bytes < report.dense_bytes
    assert "13 of 14 linear layers packed (13 plain)" in str(report) and "1 dense: too few zeros" in str(report)


def test_negative_zeros_take_no_space(sparse_model):
    model = sparse_model()
    weight = model.model.layers[0].mlp.up_proj.weight
    kept = int((weight != 0).sum())
    with torch.no_grad():
        weight.masked_fill_(weight == 0, -0.0)  # what weight *= mask leaves of negative weights
    layer = pack_for_inference(model, "packed").layers["model.layers.0.mlp.up_proj"]
    assert layer.bytes == 8 * kept
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, weight)


def test_auto_packs_what_measured_faster_and_remembers(monkeypatch, tmp_path, sparse_model):
    monkeypatch.setenv("HF_SPARSE_CACHE", str(tmp_path))
    monkeypatch.setattr(choose, "COLD_BYTES", {"cpu": 1 << 20})
    model = sparse_model()
    report = pack_for_inference(model, "auto", batch_size=2)
    times = json.loads((tmp_path / "times.json").read_text())
    assert len(times) == 4  # q and o; k and v; gate and up; down (the output head is too small to matter)
    for layer in report.layers.values():
        assert set(layer.microseconds) == {"dense", "plain"} and min(layer.microseconds.values()) > 0
        fastest = min(layer.microseconds, key=layer.microseconds.get)
        assert layer.layout == fastest
    monkeypatch.setattr(choose, "measure", lambda *_: pytest.fail("measured again"))
    pack_for_inference(sparse_model(), "auto", batch_size=2)
    monkeypatch.setattr(choose, "measure", lambda *arguments: {"dense": 1.0, "plain": 2.0})
    report = pack_for_inference(model := sparse_model(), "auto", batch_size=3)
    assert not packed_layers(model) and {layer.why for layer in report.layers.values()} == {"dense is faster here"}
    (tmp_path / "times.json").write_text("{damaged")
    pack_for_inference(sparse_model(), "auto", batch_size=3)
    assert len(json.loads((tmp_path / "times.json").read_text())) == 4


def test_targets_ignore_and_bad_arguments(sparse_model):
    model = sparse_model()
    report = pack_for_inference(model, "packed", targets=["re:.*mlp.*"], ignore=["down_proj"])
    assert {name.rpartition(".")[2] for name in packed_layers(model)} == {"gate_proj", "up_proj"}
    assert set(report.layers) == packed_layers(model)
    with pytest.raises(ValueError, match="one of auto, packed, int8, got 'fast'"):
        pack_for_inference(model, "fast")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        pack_for_inference(model, batch_size=0)
    training = sparse_model()
    sparsify(
        training,
        SparsityConfig(sparsity=0.8, method="static"),
        torch.optim.SGD(training.parameters(), 0.1),
        total_steps=2,
    )
    with pytest.raises(ValueError, match="trained sparse"):
        pack_for_inference(training)


def test_a_saved_packed_model_is_a_stock_checkpoint(tmp_path, sparse_model):
    model = sparse_model("gpt2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pack_for_inference(model, "packed")
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not packed_layers(loaded)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_checkpoint_loads_into_packed_layers(family, tmp_path, monkeypatch, sparse_model):
    model = sparse_model(family)
    expected = model(ids()).logits
    save_packed(model, tmp_path / "packed")
    dense = []  # shapes of the weights that were dense at some moment
    for module in (quantizer, load):
        monkeypatch.setattr(
            module, "unpack_tensor", lambda *a, **k: dense.append(read_header(a[0]).shape) or unpack_tensor(*a, **k)
        )
    for loader in (AutoModelForCausalLM, type(model)):
        loaded = loader.from_pretrained(tmp_path / "packed", sparse_runtime="packed")
        pack_for_inference(reference := sparse_model(family), "packed")
        assert packed_layers(loaded) == packed_layers(reference)
        torch.testing.assert_close(loaded(ids()).logits, expected)
        assert not hasattr(loaded.config, "sparse_runtime") and not hasattr(loaded.config, "quantization_config")
        loaded.save_pretrained(tmp_path / loader.__name__)
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / loader.__name__)
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in stock.state_dict().items())
    # experts have no packed layer, and Conv1D's columns are our rows
    assert {len(shape) for shape in dense} == ({2} if family in ("qwen3_moe", "gpt2") else set())


def test_loading_in_another_dtype_rounds_as_transformers_does(tmp_path, sparse_model):
    model = sparse_model()
    save_packed(model, tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", sparse_runtime="packed", dtype="bfloat16")
    weight = loaded.model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight, model.model.layers[0].mlp.up_proj.weight.bfloat16())
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype="bfloat16")
    torch.testing.assert_close(loaded(ids()).logits, dense(ids()).logits)


def test_without_the_keyword_nothing_changes_and_a_wrong_one_is_said(tmp_path, sparse_model):
    save_packed(sparse_model(), tmp_path / "packed")
    assert not packed_layers(AutoModelForCausalLM.from_pretrained(tmp_path / "packed"))
    with pytest.raises(ValueError, match="sparse runtime is one of auto, packed, int8, got 'yes'"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed", sparse_runtime="yes")


def test_linear_layers_that_share_their_weight_stay():
    model = nn.Module()
    model.first, model.second, model.third = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
    model.second.weight = model.first.weight
    for layer in (model.first, model.third):
        nn.init.zeros_(layer.weight)
    pack_for_inference(model, "packed")
    assert packed_layers(model) == {"third"}
