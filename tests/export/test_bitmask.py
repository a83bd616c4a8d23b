"""compressed-tensors' bitmask layouts: its documented bytes everywhere, its own compressor where it is installed.

With compressed-tensors 0.14.0.1 and transformers 4.57.6 every tensor of both layouts equalled its compressor's, its
decompressor read both directories, and ``from_pretrained`` loaded the 24 layout, when this was written. It asks for
transformers 4 but its compressors run beside 5; the last test runs after
``pip install --no-deps compressed-tensors==0.14.0.1 loguru``.
"""

import json

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_sparse.export import export
from hf_sparse.export.bitmask import compress, decompress, load_bitmask


def random_matrix(rows, columns, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows + columns)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    weight[torch.rand(rows, columns, generator=generator) < 0.6] = 0
    return weight


@pytest.mark.parametrize("shape", [(1, 1), (5, 8), (3, 13), (16, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_documented_layout(shape, dtype):
    weight = random_matrix(*shape, dtype)
    parts = compress(weight)
    rows = [row[row != 0] for row in weight]
    assert torch.equal(parts["compressed"], torch.cat(rows))
    assert parts["row_offsets"].tolist() == numpy.cumsum([0, *(len(row) for row in rows[:-1])]).tolist()
    packed = numpy.packbits((weight != 0).numpy(), axis=-1, bitorder="little")
    assert parts["bitmask"].numpy().tolist() == packed.tolist() and parts["shape"].tolist() == list(shape)
    assert {name: part.dtype for name, part in parts.items()} == {
        "shape": torch.int64,
        "compressed": dtype,
        "bitmask": torch.uint8,
        "row_offsets": torch.int64,
    }
    assert torch.equal(decompress(parts), weight)


def test_the_24_layout():
    """Two values a group even where the group has fewer, row after row."""
    weight = torch.tensor([[0, 3.0, 0, -1, 5, 0, 6, 0], [0, 0, 0, 7, 0, 0, 0, 0]], dtype=torch.bfloat16)
    parts = compress(weight, "24")
    assert parts["shape"].tolist() == [[2], [8]] and "row_offsets" not in parts
    assert parts["compressed"].shape == (2, 4) and parts["compressed"][0].tolist() == [3, -1, 5, 6]
    assert parts["compressed"][1].sum() == 7 and parts["bitmask"].shape == (2, 1)
    assert [bin(byte).count("1") for byte in parts["bitmask"].flatten().tolist()] == [4, 4]
    assert parts["bitmask"][0, 0] == 0b01011010
    assert torch.equal(decompress(parts), weight)
    for wrong in (torch.ones(2, 8), torch.zeros(2, 6), torch.zeros(8)):
        with pytest.raises(ValueError, match="not 2:4"):
            compress(wrong, "24")


@pytest.mark.parametrize("layout", ["bitmask", "24"])
def test_a_model_comes_back(two_four_dir, tmp_path, layout):
    result = export(two_four_dir, "bitmask", tmp_path / "out", layout=layout)
    dense, loaded = load_file(two_four_dir / "model.safetensors"), load_bitmask(tmp_path / "out")
    assert set(loaded) == set(dense) and all(torch.equal(loaded[name], dense[name]) for name in dense)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    sparsity = config["quantization_config"]["sparsity_config"]
    assert sparsity.pop("global_sparsity") == pytest.approx(0.5, abs=0.01)
    assert sparsity == {
        "format": "sparse-bitmask" if layout == "bitmask" else "sparse-24-bitmask",
        "ignore": ["lm_head"],
        "registry_requires_subclass": False,
        "sparsity_structure": "unstructured" if layout == "bitmask" else "2:4",
        "targets": ["Linear"],
    }
    assert result["bytes"] < 0.85 * result["dense_bytes"] and "tensors equal the model's" in result["verified"]


def test_shards_and_other_files_are_kept(tiny_model, zeroed, tmp_path, tiny_tokenizer):
    zeroed(tiny_model("llama"), 0.7).save_pretrained(tmp_path / "model", max_shard_size="150KB")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", "bitmask", tmp_path / "out")
    assert {f.name for f in (tmp_path / "out").iterdir()} == {f.name for f in (tmp_path / "model").iterdir()}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for file in {*index["weight_map"].values()}:
        assert set(load_file(tmp_path / "out" / file)) == {
            k for k, where in index["weight_map"].items() if where == file
        }
    assert (
        set(load_bitmask(tmp_path / "out")) == set(load_bitmask(tmp_path / "out"))
        and len(index["weight_map"]) == 14 * 4 + 7
    )


def test_the_head_that_is_tied_is_left_out(tiny_model, zeroed, tmp_path):
    export(zeroed(tiny_model("llama", tie_word_embeddings=True), 0.7), "bitmask", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["sparsity_config"]["ignore"] == ["lm_head"]


def test_what_it_cannot_represent(sparse_dir, gpt2_dir, tmp_path):
    with pytest.raises(ValueError, match=r"14 of 14 sparse weights are not, such as model\.layers\.0.*--pattern 2:4"):
        export(sparse_dir, "bitmask", tmp_path / "out", layout="24")
    with pytest.raises(ValueError, match=r"no weight of an nn\.Linear"):
        export(gpt2_dir, "bitmask", tmp_path / "out")
    with pytest.raises(ValueError, match="layout is bitmask or 24, got '2:4'"):
        export(sparse_dir, "bitmask", tmp_path / "out", layout="2:4")
    assert not list(tmp_path.iterdir())


def test_damaged_files(sparse_dir, tmp_path):
    export(sparse_dir, "bitmask", tmp_path / "out")
    file, module = tmp_path / "out" / "model.safetensors", "model.layers.1.mlp.up_proj"
    good = load_file(file)
    for part, change in (
        ("bitmask", lambda t: t ^ torch.eye(*t.shape, dtype=torch.uint8)),
        ("bitmask", lambda t: t[:-1]),
        ("compressed", lambda t: t[:-1]),
        ("shape", lambda t: t * 2),
        ("shape", lambda t: t[:1]),
        ("row_offsets", lambda t: t + 1),
    ):
        save_file(good | {f"{module}.{part}": change(good[f"{module}.{part}"]).contiguous()}, file)
        with pytest.raises(ValueError, match=f"damaged: {module}"):
            load_bitmask(tmp_path / "out")
    save_file({name: tensor for name, tensor in good.items() if name != f"{module}.bitmask"}, file)
    with pytest.raises(ValueError, match="bitmask"):
        load_bitmask(tmp_path / "out")
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match="truncated"):
        load_bitmask(tmp_path / "out")
    with pytest.raises(ValueError, match="sparsity format None"):
        load_bitmask(sparse_dir)


@pytest.mark.parametrize("layout", ["bitmask", "24"])
def test_the_packages_own_compressor(two_four_dir, tmp_path, layout):
    compressors = pytest.importorskip("compressed_tensors.compressors")
    name = "sparse-bitmask" if layout == "bitmask" else "sparse-24-bitmask"
    from compressed_tensors.config import SparsityCompressionConfig

    try:
        config = SparsityCompressionConfig.load_from_registry(name)
        theirs = compressors.BaseCompressor.load_from_registry(name, config=config)
    except KeyError:
        pytest.skip("a version of compressed-tensors without sparse layouts")
    export(two_four_dir, "bitmask", tmp_path / "out", layout=layout)
    ours, dense = load_file(tmp_path / "out" / "model.safetensors"), load_file(two_four_dir / "model.safetensors")
    modules = {key.removesuffix(".compressed") for key in ours if key.endswith(".compressed")}
    expected = theirs.compress(dense, compression_targets=modules)
    assert set(ours) == set(expected) and all(torch.equal(ours[key], expected[key]) for key in ours)
    assert all(torch.equal(tensor, dense[key]) for key, tensor in theirs.decompress(str(tmp_path / "out")))
