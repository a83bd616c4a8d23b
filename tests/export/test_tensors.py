"""CSR, BSR and COO files: torch itself reads them, counts their indices and multiplies with them."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_sparse.export import export
from hf_sparse.export.tensors import load_sparse_tensors, to_parts

LAYOUTS = {"csr": torch.sparse_csr, "bsr": torch.sparse_bsr, "coo": torch.sparse_coo}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_comes_back(sparse_dir, tmp_path, layout):
    result = export(sparse_dir, layout, tmp_path / "out", **({"block": "4x8"} if layout == "bsr" else {}))
    dense, loaded = load_file(sparse_dir / "model.safetensors"), load_sparse_tensors(tmp_path / "out")
    assert set(loaded) == set(dense) and "14 sparse tensors" in result["verified"]
    for name, tensor in dense.items():
        assert torch.equal(loaded[name].to_dense(), tensor)
        assert loaded[name].layout == (LAYOUTS[layout] if "proj" in name else torch.strided)
    assert f"takes {result['bytes'] / result['dense_bytes']:.0%} of the dense bytes" in result["notes"][0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_parts_are_those_of_torch(layout, dtype):
    """torch's own conversion of the same matrix, empty rows and signs of zero among it."""
    weight = torch.randn(12, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[weight.abs() < 0.9] = 0
    weight[4:8] = 0
    weight[0, 0] = float("nan")
    parts = to_parts(weight, layout, (4, 8) if layout == "bsr" else (1, 1))
    theirs = {
        "csr": lambda: weight.to_sparse_csr(),
        "bsr": lambda: weight.to_sparse_bsr((4, 8)),
        "coo": lambda: weight.to_sparse_coo().coalesce(),
    }[layout]()
    for part, tensor in parts.items():
        assert torch.equal(tensor.nan_to_num(), getattr(theirs, part)().to(tensor.dtype).nan_to_num()), part
        assert tensor.dtype == (dtype if part == "values" else torch.int32)


def test_csr_multiplies(sparse_dir, tmp_path):
    export(sparse_dir, "csr", tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    sparse, dense = load_sparse_tensors(tmp_path / "out")[name], load_file(sparse_dir / "model.safetensors")[name]
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(sparse @ x, dense @ x)


def test_blocks_that_do_not_fit_and_blocks_that_are_not_full(sparse_dir, tmp_path):
    with pytest.raises(ValueError, match=r"blocks of 5x16 do not divide model\.layers.* and 13 more"):
        export(sparse_dir, "bsr", tmp_path / "out", block="5x16")
    with pytest.raises(ValueError, match="16x16, got 'big'"):
        export(sparse_dir, "bsr", tmp_path / "out", block="big")
    assert not list(tmp_path.iterdir())
    notes = export(sparse_dir, "bsr", tmp_path / "out", block="4x4")["notes"]
    assert "40% of those are nonzero" in notes[1] and "far from full" in notes[2]


def test_whole_blocks_are_small(tiny_model, tmp_path):
    """Pruned in blocks, BSR stores each kept block once and says that it is full."""
    model = tiny_model("llama")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight[: weight.shape[0] // 2] = 0
    result = export(model, "bsr", tmp_path / "out", block="16x16")
    assert "50% of the weights lie in stored blocks of 16x16, 100% of those are nonzero" in result["notes"][1]
    assert len(result["notes"]) == 2 and result["bytes"] < 0.7 * result["dense_bytes"]


def test_experts_stay_dense(tiny_model, zeroed, tmp_path):
    """A mixture is stored expert by expert, hence as matrices; a convolution is not."""
    model = zeroed(tiny_model("qwen3_moe"), 0.8)
    result = export(model, "csr", tmp_path / "out", min_sparsity=0.5)
    assert result["tensors"] == 2 * (4 + 3 * 4)


def test_min_sparsity(sparse_dir, tmp_path):
    with pytest.raises(ValueError, match="at least 90%"):
        export(sparse_dir, "coo", tmp_path / "out", min_sparsity=0.9)
    with pytest.raises(ValueError, match=r"in \[0, 1\), got 2"):
        export(sparse_dir, "coo", tmp_path / "out", min_sparsity=2)


def test_damaged_files(sparse_dir, tmp_path):
    """Whatever the indices say, torch's check stops before anything is read with them."""
    export(sparse_dir, "csr", tmp_path / "good")
    tensors, name = load_file(tmp_path / "good"), "model.layers.0.mlp.up_proj.weight"
    with safe_open(tmp_path / "good", "pt") as reader:
        metadata = reader.metadata()

    def changed(part, change):
        tensor = tensors[f"{name}.{part}"].clone()
        change(tensor)
        return tensors | {f"{name}.{part}": tensor}

    for content in (
        changed("col_indices", lambda t: t.__setitem__(3, 10_000)),
        changed("col_indices", lambda t: t.__setitem__(3, -1)),
        changed("crow_indices", lambda t: t.__setitem__(5, 1_000_000)),
        changed("crow_indices", lambda t: t.__setitem__(-1, 7)),
        tensors | {f"{name}.values": tensors[f"{name}.values"][:-1].clone()},
    ):
        save_file(content, tmp_path / "bad", metadata)
        with pytest.raises(ValueError, match=f"damaged: {name} is no CSR matrix"):
            load_sparse_tensors(tmp_path / "bad")
    missing = {key: value for key, value in tensors.items() if key != f"{name}.values"}
    for content, about, message in (
        (missing, metadata, "incomplete"),
        (tensors, metadata | {"layout": "csc"}, "layout 'csc'"),
        (tensors, metadata | {"weights": json.dumps({name: {}})}, "incomplete"),
        (tensors, {k: v for k, v in metadata.items() if k != "weights"}, "metadata cannot be read"),
    ):
        save_file(content, tmp_path / "bad", about)
        with pytest.raises(ValueError, match=message):
            load_sparse_tensors(tmp_path / "bad")
    (tmp_path / "cut").write_bytes((tmp_path / "good").read_bytes()[:-5])
    with pytest.raises(ValueError, match="truncated"):
        load_sparse_tensors(tmp_path / "cut")
