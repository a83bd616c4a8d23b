"""inspect: the same facts from files as from memory, for dense and packed checkpoints and for those others made."""

import pytest
import torch

from hf_sparse import SparsityConfig, inspect_checkpoint, measure, prune, save_packed
from hf_sparse.pruning.measure import find_targets


def tokens():
    return torch.randint(3, 320, (4, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "opt"])
def test_equals_the_report_in_memory(tiny_model, family, tmp_path):
    model = tiny_model(family)
    config = SparsityConfig(pattern="2:4", saliency="wanda")
    report = prune(model, config, tokens())
    model.save_pretrained(tmp_path / "dense", max_shard_size="100KB")
    save_packed(model, tmp_path / "packed")
    for directory in ("dense", "packed"):
        seen = inspect_checkpoint(str(tmp_path / directory))
        assert {(p.kind, tuple(p.shape), p.density) for p in seen.parameters} == {
            (p.kind, tuple(p.shape), p.density) for p in report.parameters
        }
        assert seen.sparsity == report.sparsity == 0.5
        assert seen.conforms and all(p.two_four and p.pattern == "2:4" for p in seen.parameters)
        assert (seen.bytes_dense, seen.bytes_packed) == (report.bytes_dense, report.bytes_packed)
        assert seen.macs_dense == report.macs_dense and seen.macs_sparse == report.macs_sparse
        assert seen.total_parameters == report.total_parameters
        assert seen.config["pattern"] == "2:4"


def test_experts_saved_one_by_one_are_found(tiny_model, tmp_path):
    model = tiny_model("qwen3_moe")
    report = prune(model, SparsityConfig(sparsity=0.5, saliency="magnitude", pattern="row"))
    model.save_pretrained(tmp_path)
    seen = inspect_checkpoint(str(tmp_path))
    experts = [p for p in seen.parameters if "experts" in p.name]
    assert len(experts) == 2 * 4 * 3  # layers, experts, gate/up/down
    assert sum(p.numel for p in seen.parameters) == sum(p.numel for p in report.parameters)
    assert seen.sparsity == pytest.approx(report.sparsity)
    assert seen.macs_sparse == pytest.approx(report.macs_sparse)


def test_a_foreign_checkpoint_without_our_config(tiny_model, tmp_path):
    """Zeros somebody else made, in some layers only; no word of them in config.json."""
    model = tiny_model("llama")
    with torch.no_grad():
        weight = model.model.layers[1].mlp.up_proj.weight
        weight.view(-1, 4)[:, 2:] = 0
    model.save_pretrained(tmp_path)
    seen = {p.name: p for p in inspect_checkpoint(str(tmp_path)).parameters}
    assert set(seen) == set(find_targets(model))
    assert seen["model.layers.1.mlp.up_proj.weight"].density == 0.5
    assert seen["model.layers.1.mlp.up_proj.weight"].two_four
    assert all(p.density == 1.0 and not p.two_four for n, p in seen.items() if n != "model.layers.1.mlp.up_proj.weight")


def test_measure_of_a_dense_model_counts_everything_as_work(tiny_model):
    model = tiny_model("llama")
    report = measure(model, find_targets(model))
    head = model.lm_head.weight.numel()
    assert report.macs_dense == report.macs_sparse == sum(p.numel for p in report.parameters) + head
    assert report.bytes_packed == report.bytes_dense  # packing dense weights does not pay


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda d: d / "absent", FileNotFoundError, "no such directory"),
        (lambda d: d, ValueError, "no .safetensors files"),
        (lambda d: (d / "x.txt", (d / "x.txt").write_text("x"))[0], ValueError, "is a file"),
    ],
)
def test_errors(tmp_path, make, error, message):
    with pytest.raises(error, match=message):
        inspect_checkpoint(str(make(tmp_path)))


def test_a_truncated_file_is_named(tiny_model, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        inspect_checkpoint(str(tmp_path))
