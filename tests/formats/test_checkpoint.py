"""Packed checkpoints on disk: files, config, index, atomicity and errors. Loading is in tests/integrations."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_sparse.formats import checkpoint, pack_checkpoint, plan_checkpoint, save_packed, unpack_checkpoint
from hf_sparse.formats.checkpoint import remote_code
from hf_sparse.formats.unpack import PackedTensorError


def sparse(*shape, sparsity=0.6, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(dtype)
    weight[torch.rand(shape, generator=generator) < sparsity] = 0
    return weight


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def dense(tmp_path):
    """A directory like a Trainer's: two shards of mixed dtypes, an index, a tokenizer, a checkpoint folder."""
    src = tmp_path / "dense"
    src.mkdir()
    shards = {
        "model-00001-of-00002.safetensors": {
            "a.weight": sparse(64, 48),
            "a.bias": torch.zeros(64),
            "odd": torch.arange(3.0),
            "b.weight": sparse(40, 64, dtype=torch.bfloat16, seed=1),
            "norm.weight": torch.ones(7, dtype=torch.bfloat16),
            "steps": torch.tensor(3),
        },
        "model-00002-of-00002.safetensors": {
            "c.weight": sparse(33, 65, dtype=torch.float16, seed=2),
            "embed.weight": sparse(32, 64, sparsity=0.01, seed=3),
            "flags": torch.ones(5, dtype=torch.bool),
            "experts.gate_up_proj": sparse(3, 16, 32, seed=4),
        },
    }
    for file, tensors in shards.items():
        save_file(tensors, src / file, metadata={"format": "pt"})
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    total = sum(t.numel() * t.element_size() for tensors in shards.values() for t in tensors.values())
    index = {"metadata": {"total_parameters": 7, "total_size": total}, "weight_map": weight_map}
    (src / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    config = {
        "architectures": ["X"],
        "hf_sparse": {"sparsity": 0.6, "pattern": "row"},
        "model_type": "llama",
        "x": 1e-06,
    }
    (src / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (src / "tokenizer.json").write_text("{}")
    (src / "README.md").write_text("# card é")
    for folder in ("reports", "checkpoint-10", ".cache"):
        (src / folder).mkdir()
        (src / folder / "file.txt").write_text(folder)
    return src


def test_round_trip_is_byte_identical(dense, tmp_path):
    before = contents(dense)
    report = pack_checkpoint(dense, tmp_path / "packed")
    assert contents(dense) == before
    assert set(report.tensors) == {"a.weight", "b.weight", "c.weight", "experts.gate_up_proj"}
    assert "4 bitmask tensors packed" in str(report) and 0.4 < report.ratio < 0.7
    unpack_checkpoint(tmp_path / "packed", tmp_path / "back")
    del before[os.path.join("checkpoint-10", "file.txt")], before[os.path.join(".cache", "file.txt")]
    assert contents(tmp_path / "back") == before


def test_packed_files(dense, tmp_path):
    report = pack_checkpoint(dense, tmp_path / "packed")
    packed = tmp_path / "packed"
    assert sorted(contents(packed)) == sorted(
        [
            "README.md",
            "config.json",
            "configuration_hf_sparse.py",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            os.path.join("reports", "file.txt"),
            "tokenizer.json",
        ]
    )
    config = json.loads((packed / "config.json").read_text())
    assert config["model_type"] == "hf_sparse" and config["base_model_type"] == "llama"
    assert config["auto_map"] == {"AutoConfig": "configuration_hf_sparse.HfSparseConfig"}
    assert config["quantization_config"] == {"quant_method": "hf_sparse", "format_version": 1}
    assert config["hf_sparse"] == {"sparsity": 0.6, "pattern": "row"}
    index = json.loads((packed / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_parameters": 7, "total_size": report.packed_bytes}
    assert index["weight_map"] == json.loads((dense / "model.safetensors.index.json").read_text())["weight_map"]
    for file in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        tensors = load_file(packed / file)
        for name, tensor in load_file(dense / file).items():
            assert index["weight_map"][name] == file
            if name in report.tensors:  # a stock loader meets another shape, whatever it does
                assert tensors[name].dtype == torch.uint8 and tensors[name].dim() == 1 != tensor.dim()
            else:
                assert torch.equal(tensors[name], tensor)
        with safe_open(packed / file, "pt") as reader:
            assert reader.metadata() == {"format": "pt"}


def test_plan_says_what_packing_does(dense, tmp_path):
    before = contents(dense)
    plan = plan_checkpoint(dense)
    assert plan == pack_checkpoint(dense, tmp_path / "packed") and contents(dense) == before
    sizes = sum((tmp_path / "packed" / f).stat().st_size for f in os.listdir(tmp_path / "packed") if "-of-" in f)
    assert plan.packed_bytes < sizes < plan.packed_bytes + 4000  # the files' headers


def test_min_saving(dense, tmp_path):
    assert set(plan_checkpoint(dense, min_saving=0.55).tensors) == {"a.weight", "experts.gate_up_proj"}
    report = pack_checkpoint(dense, tmp_path / "packed", min_saving=0.9)
    assert report.tensors == {} and report.ratio == 1 and "no tensors packed" in str(report)
    unpack_checkpoint(tmp_path / "packed", tmp_path / "back")
    assert contents(tmp_path / "back")["config.json"] == contents(dense)["config.json"]
    with pytest.raises(ValueError, match="min_saving"):
        pack_checkpoint(dense, tmp_path / "other", min_saving=1.5)


def test_unusual_pattern_from_the_config(tmp_path):
    src = tmp_path / "dense"
    src.mkdir()
    weight = torch.randn(40, 40).reshape(-1, 5)
    weight[:, 1:4] = 0
    save_file({"w": weight.reshape(40, 40)}, src / "model.safetensors")
    for pattern, kind in (("row", "bitmask"), ("2:5", "2:5")):
        (src / "config.json").write_text(json.dumps({"model_type": "llama", "hf_sparse": {"pattern": pattern}}))
        assert str(plan_checkpoint(src).tensors["w"]) == kind


def test_config_keeps_an_auto_map_of_its_own(dense, tmp_path):
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "a.B"}}, indent=2) + "\n")
    pack_checkpoint(dense, tmp_path / "packed")
    unpack_checkpoint(tmp_path / "packed", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["auto_map"] == {"AutoModel": "a.B"}
    (dense / "config.json").write_text(json.dumps({**config, "model_type": "mine", "auto_map": {"AutoModel": "a.B"}}))
    with pytest.raises(ValueError, match="needs custom code"):
        pack_checkpoint(dense, tmp_path / "other")


def test_refusals(dense, tmp_path):
    pack_checkpoint(dense, tmp_path / "packed")
    with pytest.raises(FileExistsError, match="not empty"):
        pack_checkpoint(dense, tmp_path / "packed")
    with pytest.raises(FileExistsError, match="not empty"):
        unpack_checkpoint(tmp_path / "packed", dense)
    with pytest.raises(ValueError, match="packed already"):
        pack_checkpoint(tmp_path / "packed", tmp_path / "twice")
    with pytest.raises(ValueError, match="not a packed checkpoint"):
        unpack_checkpoint(dense, tmp_path / "back")
    with pytest.raises(ValueError, match="source itself"):
        pack_checkpoint(dense, dense, overwrite=True)
    for inside in (dense / "sub", dense.parent):
        with pytest.raises(ValueError, match="inside one another"):
            pack_checkpoint(dense, inside, overwrite=True)
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        pack_checkpoint(tmp_path, tmp_path / "other")
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match="quantized \\(gptq\\)"):
        pack_checkpoint(dense, tmp_path / "other")
    (dense / "config.json").write_text(json.dumps(config))
    (dense / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
        pack_checkpoint(dense, tmp_path / "other")
    (dense / "model.safetensors.index.json").unlink()
    (dense / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"weights found: .*pytorch_model\.bin"):
        pack_checkpoint(dense, tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "packed"]


def test_newer_format(dense, tmp_path):
    pack_checkpoint(dense, tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    config["quantization_config"]["format_version"] = 2
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="upgrade hf_sparse"):
        unpack_checkpoint(tmp_path / "packed", tmp_path / "back")


def test_damage_names_file_and_tensor(dense, tmp_path):
    pack_checkpoint(dense, tmp_path / "packed")
    file = tmp_path / "packed" / "model-00001-of-00002.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-100])
    with pytest.raises(PackedTensorError, match=r"model-00001-of-00002\.safetensors is truncated or damaged"):
        unpack_checkpoint(tmp_path / "packed", tmp_path / "back")
    at = good.index(b"HFSPARSE") + 100
    file.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
    with pytest.raises(
        PackedTensorError, match=r"model-00001-of-00002\.safetensors: tensor [ab]\.weight: the checksum"
    ):
        unpack_checkpoint(tmp_path / "packed", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    (dense / "model-00002-of-00002.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(PackedTensorError, match="model-00002-of-00002"):
        pack_checkpoint(dense, tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "packed"]


def test_no_room(dense, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 1000))
    with pytest.raises(OSError, match="not enough disk space") as caught:
        pack_checkpoint(dense, tmp_path / "packed")
    assert caught.value.errno == errno.ENOSPC and sorted(p.name for p in tmp_path.iterdir()) == ["dense"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_pack_leaves_nothing(dense, tmp_path, monkeypatch, error):
    pack_checkpoint(dense, tmp_path / "packed")
    before = contents(tmp_path)
    calls = []

    def failing(tensor, header):
        calls.append(header)
        if len(calls) == 3:
            raise error
        return original(tensor, header)

    original = checkpoint.pack_tensor
    monkeypatch.setattr(checkpoint, "pack_tensor", failing)
    for out in ("new", "packed"):
        calls.clear()
        with pytest.raises(type(error)):
            pack_checkpoint(dense, tmp_path / out, overwrite=True)
        assert contents(tmp_path) == before


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limit")
def test_a_really_full_disk(dense, tmp_path):
    """A file size limit in a process of its own stands for the full disk: the write itself fails."""
    code = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
from hf_sparse.formats import pack_checkpoint
try:
    pack_checkpoint({str(dense)!r}, {str(tmp_path / "packed")!r})
except OSError as error:
    print("OSError", error.errno)
"""
    before = contents(tmp_path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["OSError", str(errno.EFBIG)], done.stderr
    assert contents(tmp_path) == before and sorted(p.name for p in tmp_path.iterdir()) == ["dense"]


def test_save_packed(tmp_path, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(torch.rand(64, 64) < 0.25)
    report = save_packed(model, tmp_path / "out", max_shard_size="40KB")
    assert set(report.tensors) == {"model.layers.0.mlp.up_proj.weight"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert len([p for p in (tmp_path / "out").iterdir() if "-of-" in p.name]) > 1
    with pytest.raises(FileExistsError):
        save_packed(model, tmp_path / "out")
    before = contents(tmp_path)
    monkeypatch.setattr(checkpoint, "_rewrite", lambda *a: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        save_packed(model, tmp_path / "out", overwrite=True)
    assert contents(tmp_path) == before


def test_remote_code_stands_alone():
    text = remote_code()
    assert "import hf_sparse" not in text and "from hf_sparse" not in text
    compile(text, "configuration_hf_sparse.py", "exec")
