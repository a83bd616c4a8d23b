"""Adapters that keep zeros: masked LoRA and SHiRA under the real PEFT, merged, saved, loaded, trained."""

import copy
import math

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402

from hf_sparse.config import SparsityConfig  # noqa: E402
from hf_sparse.integrations.peft import (  # noqa: E402
    MaskedLoraLinear,
    load_masked_lora,
    masked_lora,
    merge_sparse,
    shira_config,
)
from hf_sparse.masks import Masks  # noqa: E402
from hf_sparse.pruning.prune import prune  # noqa: E402
from hf_sparse.targets import find_targets  # noqa: E402

TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}
IDS = torch.arange(3, 23).view(2, 10)


def pruned(tiny_model, family="llama", sparsity=0.5):
    model = tiny_model(family)
    prune(model, SparsityConfig(sparsity=sparsity, saliency="magnitude"))
    return model


def masks_of(model) -> dict[str, torch.Tensor]:
    return dict(Masks.from_zeros(model, find_targets(model)))


def randomized(model, what="lora_", scale=0.05):
    """Adapters start as zero; give them values as if they had been trained."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if what in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def lora(family="llama", **changes) -> LoraConfig:
    return LoraConfig(**({"r": 4, "target_modules": TARGETS[family], "task_type": "CAUSAL_LM"} | changes))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_layer_is_its_formula(tiny_model, family, use_rslora):
    base = pruned(tiny_model, family)
    model = randomized(get_peft_model(base, masked_lora(lora(family, lora_alpha=6, use_rslora=use_rslora)))).eval()
    name, layer = next((n, m) for n, m in model.named_modules() if isinstance(m, MaskedLoraLinear))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    scale = 6 / (math.sqrt(4) if use_rslora else 4)
    product = scale * b.double() @ a.double()
    if family == "gpt2":  # stored [in, out]
        product = product.T
    effective = weight.double() + (weight != 0) * product
    x = torch.randn(3, a.shape[1], dtype=torch.float64)
    expected = x @ (effective if family == "gpt2" else effective.T) + (0 if bias is None else bias.double())
    torch.testing.assert_close(layer(x.float()).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_is_unmerged_and_no_zero_is_filled(tiny_model, family):
    base = pruned(tiny_model, family)
    before, untouched = masks_of(base), logits(base)
    model = randomized(get_peft_model(base, masked_lora(lora(family)))).eval()
    expected = logits(model)
    assert (expected - untouched).abs().max() > 0.01  # the adapter does something
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), untouched)
    merged = merge_sparse(model)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    after = masks_of(merged)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)  # not one filled, not one lost


def test_gradients_are_those_of_the_dense_formula(tiny_model):
    """The update is made again in the backward pass; autograd on the formula, without that, agrees."""
    base = pruned(tiny_model)
    model = randomized(get_peft_model(base, masked_lora(lora())))
    layer = next(m for m in model.modules() if isinstance(m, MaskedLoraLinear))
    x = torch.randn(2, 5, 64, requires_grad=True)
    weights = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    got = torch.autograd.grad(layer(x).square().sum(), (x, *weights))
    base_weight = layer.base_layer.weight
    effective = base_weight + (base_weight != 0) * (weights[1] @ weights[0] * layer.scaling["default"])
    expected = torch.autograd.grad((x @ effective.T).square().sum(), (x, *weights))
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_dense_update_is_not_kept_for_the_backward_pass(tiny_model):
    layer = next(
        m
        for m in randomized(get_peft_model(pruned(tiny_model), masked_lora(lora()))).modules()
        if isinstance(m, MaskedLoraLinear)
    )
    kept = []
    x = torch.randn(2, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        result = layer(x).sum()
    own = {layer.base_layer.weight.data_ptr()}
    assert not [t for t in kept if t.numel() >= layer.base_layer.weight.numel() and t.data_ptr() not in own]
    result.backward()
    assert layer.lora_B["default"].weight.grad.any()


def test_dropout_acts_on_the_added_term_only(tiny_model):
    base = pruned(tiny_model)
    untouched = logits(base)
    model = get_peft_model(base, masked_lora(lora(lora_dropout=0.5))).train()
    torch.testing.assert_close(logits(model), untouched)  # B is zero: whatever dropout does, the base path is whole
    randomized(model)
    first, second = logits(model), logits(model)
    assert not torch.equal(first, second)
    expected = logits(model.eval())
    torch.testing.assert_close(logits(merge_sparse(model)), expected, rtol=1e-4, atol=1e-5)


def test_bf16_base_with_float32_adapter(tiny_model):
    base = pruned(tiny_model).bfloat16()
    before = masks_of(base)
    model = randomized(get_peft_model(base, masked_lora(lora()))).eval()
    assert next(p for n, p in model.named_parameters() if "lora_A" in n).dtype == torch.float32
    expected = logits(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    merged = merge_sparse(model)
    assert (logits(merged) - expected).abs().max() < 0.05 * expected.abs().max()
    assert all(torch.equal(mask, masks_of(merged)[name]) for name, mask in before.items())


def test_two_adapters(tiny_model):
    base = pruned(tiny_model)
    before = masks_of(base)
    model = get_peft_model(base, masked_lora(lora()))
    model.add_adapter("second", masked_lora(lora(r=2, lora_alpha=16)))
    randomized(model).eval()
    one = logits(model)
    model.set_adapter("second")
    two = logits(model)
    assert not torch.allclose(one, two)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    merged = merge_sparse(model)
    torch.testing.assert_close(logits(merged), both, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(mask, masks_of(merged)[name]) for name, mask in before.items())
    with pytest.raises(ValueError, match="pass masked_lora"):
        get_peft_model(pruned(tiny_model), masked_lora(lora())).add_adapter("plain", lora())


def test_merging_and_unmerging_returns(tiny_model):
    model = randomized(get_peft_model(pruned(tiny_model), masked_lora(lora()))).eval()
    # an entry that cancels: without the mask of before the merge it would stay zero
    layer = next(m for m in model.modules() if isinstance(m, MaskedLoraLinear))
    place = tuple((layer.base_layer.weight != 0).nonzero()[0])
    with torch.no_grad():
        layer.base_layer.weight[place] = -layer.get_delta_weight("default")[place]
    before = {name: p.clone() for name, p in model.named_parameters()}
    expected = logits(model)
    model.merge_adapter()
    assert layer.base_layer.weight[place] == 0
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name])
        assert torch.equal(parameter == 0, before[name] == 0)


def test_the_attached_mask_decides(tiny_model):
    """A kept weight that is exactly zero, as after a regrowth, is trained: the mask beside it says so."""
    base = pruned(tiny_model)
    masks = Masks.from_zeros(base, find_targets(base))
    masks["model.layers.0.self_attn.q_proj.weight"][:] = True
    masks.attach(base)
    model = randomized(get_peft_model(base, masked_lora(lora())))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert (layer.get_delta_weight("default") != 0).all()
    merged = merge_sparse(model)
    assert (merged.model.layers[0].self_attn.q_proj.weight != 0).all()
    assert not merged.model.layers[1].self_attn.q_proj.weight[~masks["model.layers.1.self_attn.q_proj.weight"]].any()


def test_saved_and_loaded(tiny_model, tmp_path):
    base = pruned(tiny_model)
    clean = copy.deepcopy(base)
    model = randomized(get_peft_model(base, masked_lora(lora(init_lora_weights="gaussian")))).eval()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = load_masked_lora(copy.deepcopy(clean), tmp_path)
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=0)
    torch.testing.assert_close(logits(merge_sparse(loaded)), expected, rtol=1e-4, atol=1e-5)
    further = load_masked_lora(copy.deepcopy(clean), tmp_path, is_trainable=True)
    assert any(p.requires_grad for p in further.parameters())
    # plain PEFT would compute something else, so it stops, and its error says what to call
    with pytest.raises(ValueError, match="load_masked_lora"):
        PeftModel.from_pretrained(copy.deepcopy(clean), tmp_path)
    with pytest.raises(ValueError, match="has a zero in this base model"):
        load_masked_lora(tiny_model("llama"), tmp_path)
    plain = tmp_path / "plain"
    get_peft_model(clean, lora()).save_pretrained(plain)
    with pytest.raises(ValueError, match="not an adapter of masked LoRA"):
        load_masked_lora(pruned(tiny_model), plain)


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_trains_in_the_trainer_and_resumes(tiny_model, tmp_path, checkpointing):
    from transformers import Trainer, TrainingArguments

    def trainer(model, steps):
        more = {}
        if checkpointing is not None:
            more = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": checkpointing}}
            model.enable_input_require_grads()
        settings = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            save_steps=5,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            **more,
        )
        data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 320, (4, 12), generator=generator())]
        return Trainer(model, settings, train_dataset=data)

    generator = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    base = pruned(tiny_model)
    before = masks_of(base)
    model = get_peft_model(copy.deepcopy(base), masked_lora(lora()))
    done = trainer(model, 10)
    done.train()
    losses = [logs["loss"] for logs in done.state.log_history if "loss" in logs] or [
        done.state.log_history[-1]["train_loss"]
    ]
    assert all(math.isfinite(loss) for loss in losses)
    resumed = get_peft_model(copy.deepcopy(base), masked_lora(lora()))
    trainer(resumed, 10).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    for (name, one), (_, two) in zip(model.named_parameters(), resumed.named_parameters(), strict=True):
        torch.testing.assert_close(one, two, msg=name)
    merged = merge_sparse(model)
    assert all(torch.equal(mask, masks_of(merged)[name]) for name, mask in before.items())


@pytest.mark.parametrize("kind", ["masked", "shira"])
def test_sft_trainer_takes_the_config(tiny_model, tiny_tokenizer, tmp_path, kind):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    base = pruned(tiny_model)
    before = masks_of(base)
    config = masked_lora(lora()) if kind == "masked" else shira_config(base, 2, task_type="CAUSAL_LM")
    trainer = trl.SFTTrainer(
        base,
        trl.SFTConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=datasets.Dataset.from_list([{"text": f"The number {n} is {n}."} for n in range(8)]),
        processing_class=tiny_tokenizer,
        peft_config=config,
    )
    trainer.train()
    expected = logits(trainer.model.eval())
    merged = merge_sparse(trainer.model)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(mask, masks_of(merged)[name]) for name, mask in before.items())


def test_what_is_not_exact_is_refused(tiny_model):
    for changes, message in (
        ({"use_dora": True}, "use_dora=True"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"init_lora_weights": "pissa"}, "'pissa' rewrites the base weights"),
        ({"init_lora_weights": "olora"}, "'olora' rewrites the base weights"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters"),
    ):
        with pytest.raises(ValueError, match=message):
            masked_lora(lora(**changes))
    with pytest.raises(TypeError, match="takes a peft.LoraConfig, got dict"):
        masked_lora({"r": 4})
    with pytest.raises(TypeError, match="embed_tokens is Embedding"):
        get_peft_model(pruned(tiny_model), masked_lora(lora(target_modules=["embed_tokens"])))
    model = get_peft_model(pruned(tiny_model), masked_lora(lora())).eval()
    with pytest.raises(NotImplementedError, match="one batch per adapter"):
        model(input_ids=IDS, adapter_names=["default", "default"])
    config = lora()
    masked_lora(config)
    assert config.init_lora_weights is True and config._custom_modules is None  # the argument is left as it was


def test_merging_plain_lora_is_stopped_before_it_happens(tiny_model):
    base = pruned(tiny_model)
    model = randomized(get_peft_model(base, lora()))
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(
        ValueError, match=r"would fill \d+ of the \d+ zeros of base_model.model.model.layers.0.self_attn.q_proj"
    ):
        merge_sparse(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged already"):
        merge_sparse(model)


def test_merging_a_fully_trained_module_is_stopped(tiny_model):
    base = tiny_model("llama")
    prune(base, SparsityConfig(sparsity=0.5, saliency="magnitude", targets=["lm_head", "q_proj"]))
    config = lora(target_modules=["q_proj"], modules_to_save=["lm_head"])
    merge_sparse(get_peft_model(copy.deepcopy(base), masked_lora(config)))
    model = get_peft_model(base, masked_lora(config))
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight += 0.1
    with pytest.raises(ValueError, match="zeros of base_model.model.lm_head"):
        merge_sparse(model)


def shira_entries(model, name="default"):
    return {n: m.shira_indices[name].long() for n, m in model.named_modules() if hasattr(m, "shira_indices")}


@pytest.mark.parametrize("entries", ["magnitude", "random"])
def test_shira_stays_among_the_kept(tiny_model, tmp_path, entries):
    base = pruned(tiny_model)
    before, clean = masks_of(base), copy.deepcopy(base)
    model = get_peft_model(base, shira_config(base, 2, entries=entries, seed=5, task_type="CAUSAL_LM"))
    again = get_peft_model(copy.deepcopy(clean), shira_config(clean, 2, entries=entries, seed=5, task_type="CAUSAL_LM"))
    chosen, repeated = shira_entries(model), shira_entries(again)
    assert len(chosen) == 14 and all(torch.equal(chosen[name], repeated[name]) for name in chosen)
    for name, (rows, columns) in chosen.items():
        weight = clean.get_submodule(name.removeprefix("base_model.model.")).weight.detach()
        assert len(rows) == 2 * sum(weight.shape)
        assert (weight[rows, columns] != 0).all()
        if entries == "magnitude":
            assert weight[rows, columns].abs().min() >= weight.abs().flatten().sort().values[-len(rows)]
    randomized(model, "shira_").eval()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(clean), tmp_path)  # stock PEFT: the positions are in the file
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=0)
    merged = merge_sparse(loaded)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(mask, masks_of(merged)[name]) for name, mask in before.items())


def test_shira_says_what_does_not_fit(tiny_model):
    sparse = pruned(tiny_model, sparsity=0.9)  # k_proj keeps 205 of 32 * 64 weights: twice 96, not three times
    with pytest.raises(ValueError, match=r"k_proj keeps 20\d weights, .*r=3 trains 3 \* \(32 \+ 64\) = 288.*at most 2"):
        shira_config(sparse, 3)
    assert shira_config(sparse).r == 2
    with pytest.raises(TypeError, match="c_attn is Conv1D; .*masked_lora"):
        shira_config(pruned(tiny_model, "gpt2"), 2)
    with pytest.raises(ValueError, match="names no module"):
        shira_config(sparse, 2, target_modules=["query"])
    with pytest.raises(ValueError, match="'magnitude' or 'random', got 'best'"):
        shira_config(sparse, 2, entries="best")


def test_plain_shira_is_not_enough(tiny_model):
    """Why there is a mask function: PEFT's own chooses anywhere, and merging it is stopped."""
    base = pruned(tiny_model)
    model = get_peft_model(base, peft.ShiraConfig(r=2, target_modules=["q_proj"], random_seed=0))
    with pytest.raises(ValueError, match="would fill"):
        merge_sparse(randomized(model, "shira_"))


def test_dense_layers_are_plain_lora(tiny_model):
    model, plain = tiny_model("llama"), tiny_model("llama")
    masked = randomized(get_peft_model(model, masked_lora(lora()))).eval()
    usual = randomized(get_peft_model(plain, lora())).eval()
    torch.testing.assert_close(logits(masked), logits(usual), rtol=1e-4, atol=1e-5)
    assert isinstance(merge_sparse(masked).model.layers[0].mlp.up_proj, nn.Linear)
