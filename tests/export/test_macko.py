"""MACKO files: its own compressor's bytes, and damage that must not reach its kernel.

The recorded bytes are what ``compress_rows_cpu`` of macko_spmv 0.2.0 (commit afa7033) gives; 336 random matrices of 1x1 to
7x1000 at 0 to 100 % zeros were compared with it byte for byte when this was written.
"""

import pytest
import torch
from safetensors.torch import load_file

from hf_sparse.export import export
from hf_sparse.export.macko import compress, decompress, load_macko


def sequential(weight):
    """The format as a loop over columns: a gap counts up, at 15 a zero is stored, a row's last zeros are taken back."""
    values, gaps, rows = [], [], [0]
    for row in weight.tolist():
        gap, end = 0, len(values)
        for value in row:
            if value != 0 or gap == 15:
                values.append(value)
                gaps.append(gap)
                gap = 0
                end = len(values) if value != 0 else end
            else:
                gap += 1
        del values[end:], gaps[end:]
        rows.append(end)
    padding = -len(values) % 8
    values, gaps = values + [0.0] * padding, gaps + [0] * padding
    return values, [low | high << 4 for low, high in zip(gaps[::2], gaps[1::2], strict=True)], rows


def random_matrix(rows, columns, sparsity, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).half()
    weight[torch.rand(rows, columns, generator=generator) < sparsity] = 0
    return weight


def test_the_bytes_of_its_own_compressor():
    weight = torch.zeros(3, 40, dtype=torch.float16)
    weight[0, 0], weight[0, 17], weight[0, 39], weight[2, 33], weight[2, 35] = 1, 2, 3, -4, 5
    values, deltas, rows, *shape = compress(weight)
    assert values.tolist() == [1, 0, 2, 0, 3, 0, 0, -4, 5, *[0] * 7]
    assert deltas.tolist() == [240, 240, 245, 31, 1, 0, 0, 0]
    assert rows.tolist() == [0, 5, 5, 9] and shape == [3, 40]
    assert (values.dtype, deltas.dtype, rows.dtype) == (torch.float16, torch.uint8, torch.int32)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (5, 16), (4, 17), (7, 300)])
def test_random_matrices(shape, sparsity):
    weight = random_matrix(*shape, sparsity, seed=sum(shape))
    parts = compress(weight)
    assert [part.tolist() for part in parts[:3]] == list(sequential(weight))
    assert torch.equal(decompress(*parts), weight)


def test_a_model_comes_back_under_its_scripts_names(sparse_dir, tmp_path):
    result = export(sparse_dir, "macko", tmp_path / "out.pt")
    stored = torch.load(tmp_path / "out.pt", weights_only=True)
    module = "model.layers.0.self_attn.q_proj"
    assert [type(stored[f"{module}.c_{i}"]) for i in range(5)] == [torch.Tensor] * 3 + [int] * 2
    assert f"{module}.weight" not in stored and stored["model.embed_tokens.weight"].dtype == torch.float16
    dense, loaded = load_file(sparse_dir / "model.safetensors"), load_macko(tmp_path / "out.pt")
    assert set(loaded) == set(dense) and all(torch.equal(loaded[name], dense[name].half()) for name in dense)
    assert result["tensors"] == 14 and any("rounded to float16" in note for note in result["notes"])


def test_what_float16_cannot_hold(tiny_model, zeroed, tmp_path):
    model = zeroed(tiny_model("llama"), 0.5)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e-9
        notes = export(model, "macko", tmp_path / "out.pt")["notes"]
        assert "1 weights are too small for float16 and became zero" in notes
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight has values that float16"):
        export(model, "macko", tmp_path / "big.pt")


def test_what_it_cannot_represent(gpt2_dir, tmp_path):
    with pytest.raises(ValueError, match=r"GPT-2 stores its weights \[in, out\]"):
        export(gpt2_dir, "macko", tmp_path / "out.pt")
    with pytest.raises(ValueError, match="float16 matrices"):
        compress(torch.zeros(2, 2))


def test_damaged_files(sparse_dir, tmp_path):
    export(sparse_dir, "macko", tmp_path / "good.pt")
    stored, module = torch.load(tmp_path / "good.pt", weights_only=True), "model.layers.0.self_attn.q_proj"
    values, deltas, rows, *_ = (stored[f"{module}.c_{i}"] for i in range(5))
    falling, beyond = rows.clone(), rows.clone()
    falling[5], beyond[-1] = 0, 10**6
    for part, change in (
        (0, values[:-8]),
        (0, values.float()),
        (1, deltas[:-4]),
        (1, torch.full_like(deltas, 255)),  # steps beyond the last column
        (2, falling),
        (2, beyond),
        (2, rows[:-1]),
        (3, 65),
        (3, "64"),
        (4, 8),
        (4, -64),
    ):
        torch.save(stored | {f"{module}.c_{part}": change}, tmp_path / "bad.pt")
        with pytest.raises(ValueError, match=f"damaged: {module}"):
            load_macko(tmp_path / "bad.pt")
    torch.save({key: value for key, value in stored.items() if key != f"{module}.c_1"}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="c_1"):
        load_macko(tmp_path / "bad.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:-500])
    with pytest.raises(ValueError, match="truncated or damaged"):
        load_macko(tmp_path / "cut.pt")
    with pytest.raises(FileNotFoundError):
        load_macko(tmp_path / "nowhere.pt")
