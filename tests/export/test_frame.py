"""The frame of exports: sources, options, outputs that appear whole or not at all; with the smallest formats as examples."""

import dataclasses
import inspect
import json

import pytest
import torch
from safetensors.torch import load_file

import hf_sparse.export as frame
from hf_sparse.export import TARGETS, export, exporter
from hf_sparse.export.source import open_source


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_states_what_it_is(target):
    chosen = exporter(target)
    assert chosen.what.endswith(".") and chosen.zeros.endswith(".") and "2026" in chosen.checked or target == "masks"
    assert chosen.output in ("file", "directory")
    for function in (chosen.write, chosen.check, chosen.verify):
        if function is not None and "options" not in str(inspect.signature(function)):
            assert not set(chosen.options) - set(inspect.signature(chosen.write).parameters), function
    defaults = [p.name for p in inspect.signature(chosen.write).parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert sorted(defaults) == sorted(chosen.options), "an option is explained that is none, or one is not explained"


@pytest.mark.parametrize(("wrong", "near"), [("ggml", "gguf"), ("torch-24", "torch-2:4"), ("CSR", "csr")])
def test_an_unknown_target_names_a_near_one(sparse_dir, tmp_path, wrong, near):
    with pytest.raises(ValueError, match=f"did you mean .*{near}"):
        export(sparse_dir, wrong, tmp_path / "out")


def test_options_are_checked_and_read_before_any_work(sparse_dir, tmp_path):
    with pytest.raises(ValueError, match="no option 'min_sparsty'; did you mean min_sparsity"):
        export(sparse_dir, "csr", tmp_path / "new" / "out", min_sparsty=0.5)
    with pytest.raises(ValueError, match="min_sparsity is a number such as 0.0, got 'half'"):
        export(sparse_dir, "csr", tmp_path / "new" / "out", min_sparsity="half")
    assert not (tmp_path / "new").exists()
    assert export(sparse_dir, "csr", tmp_path / "out", min_sparsity="0.5")["tensors"] == 14


def test_the_result(sparse_dir, tmp_path):
    result = export(sparse_dir, "masks", tmp_path / "deep" / "masks.safetensors")
    file = tmp_path / "deep" / "masks.safetensors"
    assert [result[key] for key in ("target", "output", "files")] == ["masks", str(file), [file.name]]
    assert result["bytes"] == file.stat().st_size
    assert result["dense_bytes"] == sum(t.numel() * 4 for t in load_file(sparse_dir / "model.safetensors").values())
    assert result["sparsity"] == pytest.approx(0.6, abs=0.02) and result["verified"].startswith("read back")
    assert json.dumps(result) and [f.name for f in file.parent.iterdir()] == [file.name], "nothing else is left there"


def test_all_sources_give_the_same_file(sparse_dir, tmp_path):
    """A dense directory, the same packed, split into shards, and the model in memory, which stays as it was."""
    from transformers import AutoModelForCausalLM

    from hf_sparse.formats import pack_checkpoint

    pack_checkpoint(sparse_dir, tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(sparse_dir)
    model.save_pretrained(tmp_path / "shards", max_shard_size="150KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    model.train()
    sources = {"dense": sparse_dir, "packed": tmp_path / "packed", "shards": tmp_path / "shards", "model": model}
    for name, source in sources.items():
        export(source, "csr", tmp_path / f"{name}.out")
    assert model.training
    expected = load_file(tmp_path / "dense.out")
    for name in ("packed", "shards", "model"):
        found = load_file(tmp_path / f"{name}.out")
        assert set(found) == set(expected) and all(torch.equal(found[key], expected[key]) for key in expected)
    assert not list(tmp_path.glob(".*")), "temporary files are gone"


def test_an_output_in_the_way(sparse_dir, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="--overwrite"):
        export(sparse_dir, "masks", tmp_path / "file")
    with pytest.raises(FileExistsError, match="not a directory"):
        export(sparse_dir, "bitmask", tmp_path / "file")
    with pytest.raises(FileExistsError, match="is a directory"):
        export(sparse_dir, "masks", tmp_path)
    assert (tmp_path / "file").read_text() == "mine"
    assert export(sparse_dir, "masks", tmp_path / "file", overwrite=True)["bytes"] > 1000


def test_the_source_survives(tiny_model, zeroed, tmp_path):
    zeroed(tiny_model("llama"), 0.5).save_pretrained(tmp_path / "model")
    with pytest.raises(FileExistsError, match="file of the source"):
        export(tmp_path / "model", "masks", tmp_path / "model" / "model.safetensors", overwrite=True)
    for output in (tmp_path / "model", tmp_path, tmp_path / "model" / "out"):
        with pytest.raises(ValueError, match="inside one another"):
            export(tmp_path / "model", "bitmask", output, overwrite=True)
    assert load_file(tmp_path / "model" / "model.safetensors")


def test_nothing_is_left_of_an_export_that_fails(sparse_dir, tmp_path, monkeypatch):
    """Neither an error while writing nor an output that does not verify replaces what was there."""
    (tmp_path / "old").write_text("mine")

    def broken(source, output, **options):
        output.write_text("half")
        raise OSError("disk full")

    def unequal(source, output, **options):
        raise RuntimeError("differs")

    masks = exporter("masks")
    for change, error in (({"write": broken}, OSError), ({"verify": unequal}, RuntimeError)):
        monkeypatch.setattr(frame, "exporter", lambda target, change=change: dataclasses.replace(masks, **change))
        with pytest.raises(error):
            export(sparse_dir, "masks", tmp_path / "old", overwrite=True)
        assert [f.name for f in tmp_path.iterdir()] == ["old"] and (tmp_path / "old").read_text() == "mine"


def test_verification_is_said(sparse_dir, tmp_path, monkeypatch):
    missing = dataclasses.replace(exporter("masks"), consumer="no_such_runtime")
    monkeypatch.setattr(frame, "exporter", lambda target: missing)
    assert export(sparse_dir, "masks", tmp_path / "a")["verified"] == "no: no_such_runtime is not installed here"
    assert export(sparse_dir, "masks", tmp_path / "b", verify=False)["verified"] == "no: switched off"
    with pytest.raises(ModuleNotFoundError, match="no_such_runtime"):
        export(sparse_dir, "masks", tmp_path / "c", verify=True)
    assert not (tmp_path / "c").exists()


def test_sources_that_are_refused(sparse_dir, tmp_path, tiny_model):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        export(tmp_path / "nowhere", "masks", tmp_path / "new" / "out")
    with pytest.raises(ValueError, match="is a file"):
        export(sparse_dir / "config.json", "masks", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        export(tmp_path, "masks", tmp_path / "out")
    with pytest.raises(ValueError, match="transformers model"):
        export(torch.nn.Linear(2, 2), "masks", tmp_path / "out")
    quantized = tmp_path / "quantized"
    quantized.mkdir()
    config = json.loads((sparse_dir / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match=r"quantized \(gptq\)"):
        export(quantized, "masks", tmp_path / "out")
    (quantized / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        export(quantized, "masks", tmp_path / "out")
    (quantized / "model.safetensors").write_bytes((sparse_dir / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated or damaged"):
        export(quantized, "masks", tmp_path / "out")
    with pytest.raises(ValueError, match="has a zero"):
        export(tiny_model("llama"), "masks", tmp_path / "out")
    assert [f.name for f in tmp_path.iterdir()] == ["quantized"]


def test_a_model_in_training_is_refused(tiny_model, zeroed, tmp_path):
    from hf_sparse.masks import Masks
    from hf_sparse.targets import find_targets

    model = zeroed(tiny_model("llama"), 0.5)
    Masks.from_zeros(model, find_targets(model)).attach(model)
    with pytest.raises(ValueError, match="middle of sparse training"):
        export(model, "masks", tmp_path / "out")
    model.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="middle of sparse training"):
        export(tmp_path / "checkpoint", "masks", tmp_path / "out")


def test_the_source_reads_what_is_stored(sparse_dir, tmp_path):
    stored = load_file(sparse_dir / "model.safetensors")
    with open_source(sparse_dir, tmp_path) as source:
        assert {name: (source.dtype(name), source.shape(name)) for name in source.names} == {
            name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()
        }
        assert all(torch.equal(tensor, stored[name]) for name, tensor in source.tensors())
        weights = {name for name in stored if "proj" in name}
        assert set(source.sparse()) == weights and source.sparse(0.9) == []
        zeros = sum(int((stored[name] == 0).sum()) for name in weights)
        assert source.sparsity == pytest.approx(zeros / sum(stored[name].numel() for name in weights))
        assert {file.name for file in source.other_files()} >= {"config.json", "tokenizer.json"}
