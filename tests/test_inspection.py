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


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_saved_one_by_one_are_found(tiny_model, family, tmp_path):
    model = tiny_model(family)
    report = prune(model, SparsityConfig(sparsity=0.5, saliency="magnitude", pattern="row"))
    model.save_pretrained(tmp_path)
    seen = inspect_checkpoint(str(tmp_path))
    experts = [p for p in seen.parameters if ".experts." in p.name]
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


def test_patterns_of_overrides_and_of_a_mix_are_those_checked(tiny_model, tmp_path):
    overrides = {"down_proj": 0.0, "q_proj": "unstructured", "up_proj": "1:4"}
    model = tiny_model("llama")
    prune(model, SparsityConfig(pattern="2:4", overrides=overrides))
    model.save_pretrained(tmp_path / "overrides")
    seen = inspect_checkpoint(str(tmp_path / "overrides"))
    patterns = {p.kind: p.pattern for p in seen.parameters}
    assert seen.conforms and patterns["q_proj"] == patterns["down_proj"] == "unstructured"
    assert patterns["up_proj"] == "1:4" and patterns["k_proj"] == "2:4"

    model = tiny_model("llama")
    allocation = {"re:.*mlp": 0.25, "re:.*attn": 0.75}
    report = prune(model, SparsityConfig(pattern="2:4", allocation=allocation))
    model.save_pretrained(tmp_path / "mix")
    seen = inspect_checkpoint(str(tmp_path / "mix"))
    assert seen.conforms and report.conforms
    assert {p.name: p.pattern for p in seen.parameters} == {p.name: p.pattern for p in report.parameters}


def test_a_tied_head_that_was_a_target_is_listed(tiny_model, tmp_path):
    model = tiny_model("llama", tie_word_embeddings=True)
    report = prune(model, SparsityConfig(targets=["lm_head"]))
    model.save_pretrained(tmp_path)
    seen = inspect_checkpoint(str(tmp_path))
    assert {p.name: p.density for p in seen.parameters}["lm_head.weight"] == 0.5
    assert (seen.macs_dense, seen.macs_sparse) == (report.macs_dense, report.macs_sparse)


def test_a_vision_language_model_is_stored_under_other_names(tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM, Gemma3Config

    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
    config = Gemma3Config(
        text_config=tiny_model("gemma3_text").config.to_dict(),
        vision_config=vision | dict(image_size=28, patch_size=14),
        mm_tokens_per_image=4,
        image_token_index=319,
        boi_token_index=318,
        eoi_token_index=317,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    report = prune(model, SparsityConfig(saliency="wanda"), tokens() % 300)
    assert "stay dense" in report.notes[0] and all(".language_model." in p.name for p in report.parameters)
    model.save_pretrained(tmp_path)
    seen = {p.name: p.density for p in inspect_checkpoint(str(tmp_path)).parameters}
    assert {p.name: p.density for p in report.parameters}.items() <= seen.items()
    assert set(seen) == set(find_targets(model))


def test_models_that_are_not_causal(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration, ViTConfig, ViTForImageClassification

    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    T5ForConditionalGeneration(
        T5Config(vocab_size=320, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=2)
    ).save_pretrained(tmp_path / "t5")
    seen = inspect_checkpoint(str(tmp_path / "t5"))
    assert len(seen.parameters) == 32 and {p.kind for p in seen.parameters} == {"q", "k", "v", "o", "wi", "wo"}
    ViTForImageClassification(ViTConfig(**sizes, image_size=28, patch_size=14)).save_pretrained(tmp_path / "vit")
    assert len(inspect_checkpoint(str(tmp_path / "vit")).parameters) >= 12


def test_each_weight_is_counted_once_and_none_is_missing(tiny_model, tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    model.save_pretrained(tmp_path / "twice")
    (tmp_path / "twice" / "consolidated.safetensors").write_bytes((tmp_path / "twice/model.safetensors").read_bytes())
    seen = inspect_checkpoint(str(tmp_path / "twice"))
    assert seen.total_parameters == sum(p.numel() for p in model.parameters())
    assert seen.macs_dense == measure(model, find_targets(model)).macs_dense  # a matrix of zeros was work too
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    sorted((tmp_path / "shards").glob("*.safetensors"))[0].unlink()
    with pytest.raises(FileNotFoundError, match="files that are not there: model-00001"):
        inspect_checkpoint(str(tmp_path / "shards"))
