"""Masks alone: exact there and back, and refused where they would prune another model wrongly."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_sparse.export import export
from hf_sparse.export.masks import apply_masks, read_masks
from hf_sparse.targets import find_targets


@pytest.fixture(scope="module")
def masks_file(sparse_dir, tmp_path_factory):
    file = tmp_path_factory.mktemp("masks") / "masks.safetensors"
    export(sparse_dir, "masks", file)
    return file


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "gemma3_text"])
def test_a_dense_model_gets_the_same_zeros(tiny_model, zeroed, tmp_path, family):
    """Also GPT-2's transposed and a mixture's fused weights: names and layout are those of the model."""
    sparse, dense = zeroed(tiny_model(family, seed=1), 0.7), tiny_model(family, seed=2)
    export(sparse, "masks", tmp_path / "masks")
    before = {name: parameter.clone() for name, parameter in dense.named_parameters()}
    masks = apply_masks(dense, tmp_path / "masks")
    assert set(masks) == set(find_targets(sparse))
    for name, parameter in dense.named_parameters():
        expected = before[name] * (sparse.get_parameter(name) != 0) if name in masks else before[name]
        assert torch.equal(parameter, expected), name


def test_the_bits_are_as_documented(masks_file, sparse_dir):
    """Read without hf_sparse: bit k of byte j is entry 8j + k of the stored weight."""
    weights, name = load_file(sparse_dir / "model.safetensors"), "model.layers.1.mlp.down_proj.weight"
    with safe_open(masks_file, "pt") as reader:
        packed, entry = reader.get_tensor(name), json.loads(reader.metadata()["masks"])[name]
    bits = [bool(packed[i // 8] >> (i % 8) & 1) for i in range(weights[name].numel())]
    assert bits == (weights[name] != 0).flatten().tolist()
    assert entry == {"shape": [64, 128], "kept": sum(bits), "pattern": "unstructured", "tied": []}


def test_the_pattern_is_what_holds(two_four_dir, sparse_dir, tmp_path):
    """A config that claims 2:4 is believed where the zeros are 2:4."""
    for source, pattern in ((two_four_dir, "2:4"), (sparse_dir, "unstructured")):
        claimed = tmp_path / f"claimed-{pattern.replace(':', '')}"
        claimed.mkdir()
        config = json.loads((source / "config.json").read_text()) | {"hf_sparse": {"pattern": "2:4"}}
        (claimed / "config.json").write_text(json.dumps(config))
        (claimed / "model.safetensors").symlink_to(source / "model.safetensors")
        export(claimed, "masks", tmp_path / "masks", overwrite=True)
        with safe_open(tmp_path / "masks", "pt") as reader:
            assert {e["pattern"] for e in json.loads(reader.metadata()["masks"]).values()} == {pattern}


def test_another_model_is_refused_and_untouched(masks_file, tiny_model):
    for other, message in (
        (tiny_model("gpt2"), "14 of 14 masks .* GPT2LMHeadModel does not have"),
        (tiny_model("llama", intermediate_size=192), "has shape"),
        (tiny_model("llama", num_hidden_layers=1), r"7 of 14 masks .*near match: model\.layers\.0"),
    ):
        before = {name: parameter.clone() for name, parameter in other.named_parameters()}
        with pytest.raises(ValueError, match=message):
            apply_masks(other, masks_file)
        assert all(torch.equal(parameter, before[name]) for name, parameter in other.named_parameters())


def test_tied_weights_must_be_tied_alike(tiny_model, tmp_path):
    """The masks of an output head would prune the embeddings of a model that ties them."""
    untied = tiny_model("llama")
    with torch.no_grad():
        untied.lm_head.weight[::2] = 0
    untied.config.hf_sparse = {"targets": ["lm_head"]}
    export(untied, "masks", tmp_path / "masks")
    assert set(read_masks(tmp_path / "masks")) == {"lm_head.weight"}
    with pytest.raises(ValueError, match=r"lm_head\.weight is tied to model\.embed_tokens\.weight in this model"):
        apply_masks(tiny_model("llama", tie_word_embeddings=True), tmp_path / "masks")
    apply_masks(tiny_model("llama", seed=3), tmp_path / "masks")


def test_damaged_files(masks_file, sparse_dir, tmp_path):
    tensors = load_file(masks_file)
    with safe_open(masks_file, "pt") as reader:
        metadata = reader.metadata()
    name = min(tensors)
    flipped = tensors | {name: tensors[name].clone()}
    flipped[name][5] ^= 4
    short = tensors | {name: tensors[name][:-1].clone()}
    entries = json.loads(metadata["masks"])
    huge = metadata | {"masks": json.dumps(entries | {name: entries[name] | {"shape": [2**40, 2**20]}})}
    for content, about, message in (
        (flipped, metadata, f"damaged: the mask of {name} keeps"),
        (short, metadata, "bytes, its mask takes"),
        ({key: value for key, value in tensors.items() if key != name}, metadata, "only in its metadata"),
        (tensors, huge, "bytes, its mask takes"),
        (tensors, metadata | {"masks": "{"}, "metadata cannot be read"),
        (tensors, metadata | {"version": "99"}, "upgrade"),
        (tensors, {"format": "pt"}, "no hf_sparse.masks file"),
    ):
        save_file(content, tmp_path / "bad", about)
        with pytest.raises(ValueError, match=message):
            read_masks(tmp_path / "bad")
    (tmp_path / "cut").write_bytes(masks_file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="truncated or damaged"):
        read_masks(tmp_path / "cut")
    with pytest.raises(FileNotFoundError):
        read_masks(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no hf_sparse.masks file"):
        read_masks(sparse_dir / "model.safetensors")
