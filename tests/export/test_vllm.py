"""vLLM: the directory holds what vLLM 0.33 reads and nothing that it rejects; stock transformers loads it in its place."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_sparse.config import CONFIG_KEY
from hf_sparse.export import export
from hf_sparse.export.source import open_source
from hf_sparse.export.vllm import verify_vllm
from hf_sparse.formats import pack_checkpoint

# What vLLM 0.33.0 asks a config for and then refuses or misreads: `quantization_config` and, where that is missing,
# `compression_config`, at the top and in text_config (transformers_utils/model_arch_config_convertor.py,
# model_executor/model_loader/weight_utils.py); `sparsity_config` inside of them raises (compressed_tensors.py).
REJECTED = {"quantization_config", "compression_config", "sparsity_config"}


@pytest.fixture
def exported(sparse_dir, tmp_path):
    config = json.loads((sparse_dir / "config.json").read_text())
    config |= {
        CONFIG_KEY: {"sparsity": 0.6},
        "compression_config": {"sparsity_config": {"format": "sparse-bitmask", "targets": ["Linear"]}},
        "quantization_config": None,
        "text_config": {"vocab_size": 320, "compression_config": {}},
    }
    model = tmp_path / "model"
    model.mkdir()
    for file in sparse_dir.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    (model / "config.json").write_text(json.dumps(config))
    (model / "hf_quant_config.json").write_text("{}")
    return model, export(model, "vllm", tmp_path / "out", verify=False), tmp_path / "out"


def test_nothing_that_vllm_rejects(exported):
    model, report, out = exported
    config = json.loads((out / "config.json").read_text())
    assert not REJECTED & (config.keys() | config["text_config"].keys())
    assert config[CONFIG_KEY] == {"sparsity": 0.6} and config["model_type"] == "llama"
    assert not (out / "hf_quant_config.json").exists()
    assert report["notes"] == [
        "left out of config.json: quantization_config",
        "left out of config.json: compression_config",
    ]
    assert (out / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert "same speed" in report["zeros"] and "0.33.0" in report["checked"]


def test_stock_transformers_loads_it(sparse_dir, tmp_path):
    report = export(sparse_dir, "vllm", tmp_path / "out", verify=True)
    count = len(load_file(sparse_dir / "model.safetensors"))
    assert f"{count} of {count} tensors compared value by value; vLLM itself was not run" in report["verified"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(report["files"])


def test_a_packed_checkpoint_becomes_stock(sparse_dir, tmp_path):
    pack_checkpoint(sparse_dir, tmp_path / "packed")
    export(tmp_path / "packed", "vllm", tmp_path / "out", verify=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama" and not REJECTED & config.keys() and "auto_map" not in config
    assert not list((tmp_path / "out").glob("*.py"))
    dense, out = load_file(sparse_dir / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert dense.keys() == out.keys() and all(torch.equal(dense[name], out[name]) for name in dense)


def test_a_missing_tensor_is_not_verified(sparse_dir, tmp_path):
    export(sparse_dir, "vllm", tmp_path / "out", verify=False)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with open_source(sparse_dir, tmp_path) as source, pytest.raises(RuntimeError, match="mlp.up_proj"):
        verify_vllm(source, tmp_path / "out")


def test_dtypes_that_vllm_does_not_load(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="float64; vLLM loads bfloat16"):
        export(tiny_model("llama", num_hidden_layers=1).double(), "vllm", tmp_path / "out")
    assert not (tmp_path / "out").exists()
