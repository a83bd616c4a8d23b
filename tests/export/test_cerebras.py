"""Cerebras checkpoints: what cerebras_pytorch 2.10.0 and the Model Zoo expect, recorded as data.

cerebras_pytorch needs torch 2.4 and cannot be imported here. When this was written, with it installed elsewhere: its
``load`` read the file; the Model Zoo's LlamaModel with a RigL algorithm applied had exactly the masks of the file as
buffers, took them for the initial ones (``initialize`` changed none), and gave transformers' logits within 1.5e-7; and the
tensors equalled those of the Model Zoo's own converter (hf -> cs-2.9).
"""

import pytest
import torch
from safetensors.torch import load_file

from hf_sparse.export import export
from hf_sparse.export.cerebras import modelzoo_state_dict

# the names that the Model Zoo's converter gave a Llama of two layers, "model." put before them as its model has them
LAYER = {
    "self_attn.proj_q_dense_layer.weight": (64, 64),
    "self_attn.proj_k_dense_layer.weight": (32, 64),
    "self_attn.proj_v_dense_layer.weight": (32, 64),
    "self_attn.proj_output_dense_layer.weight": (64, 64),
    "ffn.ffn.0.linear_layer_for_glu.weight": (128, 64),
    "ffn.ffn.0.linear_layer.weight": (128, 64),
    "ffn.ffn.1.linear_layer.weight": (64, 128),
    "norm1.weight": (64,),
    "norm3.weight": (64,),
}
MODELZOO = {f"model.transformer_decoder.layers.{i}.{name}": shape for i in (0, 1) for name, shape in LAYER.items()} | {
    "model.embedding_layer.word_embeddings.weight": (320, 64),
    "model.transformer_decoder.norm.weight": (64,),
    "model.ln_f.weight": (64,),
    "model.lm_head.weight": (320, 64),
}


def test_weights_masks_and_state(sparse_dir, tmp_path):
    result = export(sparse_dir, "cerebras", tmp_path / "out.mdl")
    checkpoint = torch.load(tmp_path / "out.mdl", weights_only=True)
    dense = load_file(sparse_dir / "model.safetensors")
    masks = {name: tensor for name, tensor in checkpoint["model"].items() if name.endswith("_mask")}
    assert set(checkpoint["model"]) - set(masks) == set(dense)
    assert set(masks) == {f"{name}_mask" for name in dense if "proj" in name}
    for name, tensor in dense.items():
        assert torch.equal(checkpoint["model"][name], tensor)
        if f"{name}_mask" in masks:
            assert masks[f"{name}_mask"].dtype == torch.bool and torch.equal(masks[f"{name}_mask"], tensor != 0)
    # DynamicSparsityAlgorithm.load_state_dict pops "step"; Static.load_state_dict ignores what it gets
    assert checkpoint["sparsity"]["step"] == 0 and checkpoint["sparsity"]["step"].dtype == torch.int64
    assert "'*.mlp.down_proj.weight'" in result["notes"][0] and "14 masks" in result["verified"]


def test_the_state_of_groups_is_a_list(sparse_dir, tmp_path):
    """Group.load_state_dict refuses a list of another length than it has groups."""
    export(sparse_dir, "cerebras", tmp_path / "out.mdl", groups=3, step="500")
    state = torch.load(tmp_path / "out.mdl", weights_only=True)["sparsity"]
    assert [entry["step"].item() for entry in state] == [500] * 3


def test_the_model_zoos_names_and_rows(sparse_dir, tmp_path):
    export(sparse_dir, "cerebras", tmp_path / "out.mdl", names="modelzoo")
    model = torch.load(tmp_path / "out.mdl", weights_only=True)["model"]
    assert {name: tuple(t.shape) for name, t in model.items() if not name.endswith("_mask")} == MODELZOO
    dense = load_file(sparse_dir / "model.safetensors")
    # heads of 16 rows: rows 0, 8, 1, 9, ... of each; q has 4 heads, k has 2, v is as it was
    order = [head * 16 + half * 8 + i for head in range(4) for i in range(8) for half in (0, 1)]
    for new, old, rows in (("q", "q", order), ("k", "k", order[:32]), ("v", "v", list(range(32)))):
        name = f"model.transformer_decoder.layers.1.self_attn.proj_{new}_dense_layer.weight"
        expected = dense[f"model.layers.1.self_attn.{old}_proj.weight"][rows]
        assert torch.equal(model[name], expected) and torch.equal(model[f"{name}_mask"], expected != 0)
    assert sum(name.endswith("_mask") for name in model) == 14


def test_tied_embeddings_have_both_names(tiny_model, zeroed, tmp_path):
    model = zeroed(tiny_model("llama", tie_word_embeddings=True), 0.5)
    export(model, "cerebras", tmp_path / "out.mdl", names="modelzoo")
    state = torch.load(tmp_path / "out.mdl", weights_only=True)["model"]
    assert torch.equal(state["model.lm_head.weight"], state["model.embedding_layer.word_embeddings.weight"])


def test_what_it_cannot_represent(gpt2_dir, sparse_dir, tiny_model, tmp_path):
    with pytest.raises(ValueError, match="names=modelzoo knows Llama, not gpt2"):
        export(gpt2_dir, "cerebras", tmp_path / "out.mdl", names="modelzoo")
    with pytest.raises(ValueError, match="names is hf or modelzoo"):
        export(sparse_dir, "cerebras", tmp_path / "out.mdl", names="cs")
    with pytest.raises(ValueError, match="at least 1"):
        export(sparse_dir, "cerebras", tmp_path / "out.mdl", groups=0)
    with pytest.raises(ValueError, match="has a zero"):
        export(tiny_model("llama"), "cerebras", tmp_path / "out.mdl")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts has no place"):
        modelzoo_state_dict({"model.layers.0.mlp.experts": torch.ones(1)}, {"num_attention_heads": 1})
    assert not list(tmp_path.iterdir())
