"""2:4 for torch: the four bits of torch's own conversion, the product of its kernels on a GPU."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_sparse.export import export
from hf_sparse.export.torch_24 import compress, decompress, load_torch_24, read_torch_24


def two_four(rows, columns, dtype=torch.bfloat16):
    """A random 2:4 matrix with groups of two, one and no nonzeros."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.randn(rows, columns // 4, 4, generator=generator)
    drop = torch.rand(groups.shape, generator=generator).topk(2, dim=-1).indices
    groups.scatter_(-1, drop, 0)
    groups[torch.rand(groups.shape, generator=generator) < 0.2] = 0
    return groups.reshape(rows, columns).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_and_indices_are_torchs(dtype):
    """torch's own dense -> CUTLASS conversion in Python; its metadata is the same bits in another order of 4-bit pieces."""
    from torch.sparse._semi_structured_conversions import (
        sparse_semi_structured_from_dense_cutlass,
        sparse_semi_structured_to_dense_cutlass,
    )

    weight = two_four(64, 128, dtype)
    values, indices = compress(weight)
    theirs, meta = sparse_semi_structured_from_dense_cutlass(weight)
    assert torch.equal(values, theirs)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, meta), weight)
    ours = indices.flatten().contiguous().view(torch.int16)
    assert sorted(ours.tolist()) == sorted(meta.flatten().tolist()), "the same 16-bit words, rows interleaved there"
    assert torch.equal(decompress(values, indices), weight)


def test_every_group_there_is():
    """All eleven ways to have at most two nonzeros in four; indices ascend, as documented."""
    groups = [[bit >> i & 1 for i in range(4)] for bit in range(16) if bin(bit).count("1") <= 2]
    weight = torch.tensor(groups + groups[:1], dtype=torch.float16).reshape(1, -1)
    values, indices = compress(weight)
    assert torch.equal(decompress(values, indices), weight)
    pairs = [(four & 3, four >> 2) for byte in indices[0].tolist() for four in (byte & 15, byte >> 4)]
    for group, (low, high) in zip(groups, pairs, strict=False):
        assert low < high and {i for i, kept in enumerate(group) if kept} <= {low, high}


def test_a_model_comes_back(two_four_dir, tmp_path):
    result = export(two_four_dir, "torch-2:4", tmp_path / "out")
    state, names = read_torch_24(tmp_path / "out")
    dense = load_file(two_four_dir / "model.safetensors")
    assert set(state) == set(dense) and all(torch.equal(state[name], dense[name]) for name in dense)
    assert names == {name for name in dense if "proj" in name}
    stored, name = load_file(tmp_path / "out"), "model.layers.0.mlp.down_proj.weight"
    assert stored[f"{name}.values"].shape == (64, 64) and stored[f"{name}.indices"].shape == (64, 16)
    assert result["tensors"] == 14


def test_a_cast_on_the_way(tiny_model, zeroed, tmp_path):
    model = zeroed(tiny_model("llama"))
    with pytest.raises(ValueError, match=r"torch\.float32, .* give dtype=bfloat16 or float16"):
        export(model, "torch-2:4", tmp_path / "out")
    export(model, "torch-2:4", tmp_path / "out", dtype="float16")
    state, _ = read_torch_24(tmp_path / "out")
    assert all(torch.equal(tensor, model.state_dict()[name].half()) for name, tensor in state.items())


def test_what_it_cannot_represent(sparse_dir, gpt2_dir, tiny_model, zeroed, tmp_path):
    with pytest.raises(ValueError, match=r"14 of 14 sparse weights are not 2:4, such as model\.layers\.0"):
        export(sparse_dir, "torch-2:4", tmp_path / "out")
    with pytest.raises(ValueError, match=r"\[in, out\]"):
        export(gpt2_dir, "torch-2:4", tmp_path / "out")
    with pytest.raises(ValueError, match="sparse enough to be 2:4"):
        export(tiny_model("llama"), "torch-2:4", tmp_path / "out")
    small = zeroed(tiny_model("llama", hidden_size=48, intermediate_size=80, num_key_value_heads=4)).bfloat16()
    with pytest.raises(ValueError, match=r"multiples of 32 x 64: model.* is \(48, 80\)"):
        export(small, "torch-2:4", tmp_path / "out")
    mixed = zeroed(tiny_model("llama", intermediate_size=80)).bfloat16()
    assert any("stay dense" in note for note in export(mixed, "torch-2:4", tmp_path / "out")["notes"])


def test_damaged_files(two_four_dir, tmp_path):
    export(two_four_dir, "torch-2:4", tmp_path / "good")
    good, name = load_file(tmp_path / "good"), "model.layers.0.mlp.down_proj.weight"
    with safe_open(tmp_path / "good", "pt") as reader:
        metadata = reader.metadata()
    for part, change in (
        ("indices", torch.zeros_like(good[f"{name}.indices"])),  # the same place twice
        ("indices", good[f"{name}.indices"][:, :-1].contiguous()),
        ("indices", good[f"{name}.indices"].int()),
        ("values", good[f"{name}.values"][:-1].clone()),
    ):
        save_file(good | {f"{name}.{part}": change}, tmp_path / "bad", metadata)
        with pytest.raises(ValueError, match=f"damaged: {name}"):
            read_torch_24(tmp_path / "bad")
    save_file({key: tensor for key, tensor in good.items() if key != f"{name}.indices"}, tmp_path / "bad", metadata)
    with pytest.raises(ValueError, match="damaged"):
        read_torch_24(tmp_path / "bad")
    (tmp_path / "cut").write_bytes((tmp_path / "good").read_bytes()[:-5])
    with pytest.raises(ValueError, match="truncated"):
        read_torch_24(tmp_path / "cut")
    with pytest.raises(ValueError, match=r"no hf_sparse\.torch-2:4 file"):
        read_torch_24(two_four_dir / "model.safetensors")


def test_the_loader_wants_a_gpu(two_four_dir, tmp_path, tiny_model):
    export(two_four_dir, "torch-2:4", tmp_path / "out")
    with pytest.raises(RuntimeError, match="NVIDIA GPUs only, the model is on cpu"):
        load_torch_24(tiny_model("llama"), tmp_path / "out")


@pytest.mark.gpu
@pytest.mark.parametrize("cutlass", [False, True])
def test_on_a_gpu(two_four_dir, tmp_path, tiny_model, monkeypatch, cutlass):
    """Both layouts of torch: the weights are sparse tensors, the logits those of the dense model in bfloat16."""
    monkeypatch.setattr(torch.sparse.SparseSemiStructuredTensor, "_FORCE_CUTLASS", cutlass)
    if not cutlass and not torch.backends.cusparselt.is_available():
        pytest.skip("torch has no cuSPARSELt here")
    if cutlass and torch.cuda.get_device_capability()[0] != 8:
        pytest.skip("torch's CUTLASS kernels for 2:4 run on compute capability 8.x only")
    result = export(two_four_dir, "torch-2:4", tmp_path / "out", verify=True)
    assert "is off by" in result["verified"]
    dense = tiny_model("llama").bfloat16()
    dense.load_state_dict(load_file(two_four_dir / "model.safetensors"))
    sparse = tiny_model("llama", seed=5).bfloat16().cuda()
    names = load_torch_24(sparse, tmp_path / "out")
    weights = [sparse.get_parameter(name) for name in names]
    assert len(names) == 14 and all(isinstance(w, torch.sparse.SparseSemiStructuredTensor) for w in weights)
    ids = torch.arange(128, device="cuda").reshape(1, 128)
    with torch.no_grad():
        found, expected = sparse(ids).logits.float(), dense.cuda()(ids).logits.float()
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)
    wrong = tiny_model("llama").cuda()
    with pytest.raises(ValueError, match=r"torch\.bfloat16 in .*torch\.float32 in the model"):
        load_torch_24(wrong, tmp_path / "out")
