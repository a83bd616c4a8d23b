"""SparsityCallback in the stock Trainer: every method by one more line, resumed bit for bit, saved as a plain checkpoint.

What is compared with is the Trainer itself: an uninterrupted run, a run in one batch instead of eight, in eager mode, without
checkpointing; and a custom loop where the Trainer has no say (a gradient scaler on a CPU).
"""

import copy
import json

import pytest
import torch

from hf_sparse.callbacks.sparsity import SparsityCallback
from hf_sparse.config import SparsityConfig
from hf_sparse.masks import Masks
from hf_sparse.methods import METHODS
from hf_sparse.targets import find_targets
from hf_sparse.training.sparse_training import sparsify


def rows(count: int = 64) -> list[dict]:
    ids = torch.randint(3, 300, (count, 16), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def trainer_of(model, folder, *callbacks, model_init=None, **arguments):
    from transformers import Trainer, TrainingArguments

    defaults = {"max_steps": 8, "per_device_train_batch_size": 2, "save_strategy": "no", "learning_rate": 1e-2}
    defaults |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
    args = TrainingArguments(output_dir=str(folder), **(defaults | arguments))
    rest = {"train_dataset": rows(), "eval_dataset": rows(4), "callbacks": list(callbacks)}
    return Trainer(model, args, model_init=model_init, **rest)


def config_of(method: str, **changes) -> SparsityConfig:
    schedule = {"every": 2, "end": 7} if METHODS[method].is_dynamic else {}
    if method == "granet":
        schedule["ramp_end"] = 6
    fields = {"method": method, "schedule": schedule, "sparsity": None if method == "sr-ste" else 0.75}
    return SparsityConfig(**(fields | changes))


def same_weights(one, other) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def masks_of(model) -> dict[str, torch.Tensor]:
    return {name: mask.clone() for name, mask in Masks.attached(model).items()}


def same_masks(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and len(one) > 0 and all(torch.equal(one[name], other[name]) for name in one)


CASES = [("llama", method) for method in METHODS] + [("gpt2", "rigl"), ("gpt2", "srigl")]


@pytest.mark.parametrize(("family", "method"), CASES)
def test_resumed_equals_uninterrupted_and_what_is_saved_is_stock(family, method, tiny_model, tmp_path):
    """Into a model of another seed, with gradient accumulation; GPT-2 has dropout and transposed weights."""
    from transformers import AutoModelForCausalLM

    arguments = {"save_strategy": "steps", "save_steps": 4, "gradient_accumulation_steps": 2}
    arguments |= {"lr_scheduler_type": "cosine", "weight_decay": 0.1}
    whole = trainer_of(tiny_model(family), tmp_path, SparsityCallback(config_of(method)), **arguments)
    whole.train()
    resumed = trainer_of(tiny_model(family, seed=5), tmp_path, SparsityCallback(config_of(method)), **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same_weights(whole.model, resumed.model)
    assert same_masks(masks_of(whole.model), masks_of(resumed.model))
    entries = [[e for e in t.state.log_history if "loss" in e][-1] for t in (whole, resumed)]
    assert entries[0] == entries[1], "also the metrics and FLOPs"

    whole.save_model(str(tmp_path / "saved"))
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"] and not info["mismatched_keys"]
    assert same_weights(loaded, whole.model)
    assert set(loaded.state_dict()) == set(tiny_model(family).state_dict())
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["hf_sparse"]["method"] == method
    weights = [loaded.get_parameter(name) for name in find_targets(loaded)]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    assert zeros >= (0.5 if method == "sr-ste" else 0.75) - 1e-3
    assert entries[0]["density"] == pytest.approx(1 - zeros, abs=0.02)
    moved = whole.state.log_history[0].get("mask_updates") is not None
    assert moved == METHODS[method].is_dynamic
    if moved:
        assert entries[0]["mask_updates"] == (7 if method == "sr-ste" else 0) or entries[0]["mask_updates"] >= 3


def test_resume_when_the_trainer_makes_the_callbacks_again(tiny_model, tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 4, "restore_callback_states_from_checkpoint": True}
    whole = trainer_of(tiny_model("llama"), tmp_path, SparsityCallback(config_of("rigl")), **arguments)
    whole.train()
    mine = SparsityCallback(config_of("rigl"))
    resumed = trainer_of(tiny_model("llama", seed=5), tmp_path, mine, **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert mine not in resumed.callback_handler.callbacks, "the Trainer replaced it"
    assert same_weights(whole.model, resumed.model)
    assert same_masks(masks_of(whole.model), masks_of(resumed.model))


def test_the_best_checkpoint_comes_back_with_its_own_masks(tiny_llama, tmp_path):
    from safetensors.torch import load_file

    arguments = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    arguments |= {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    arguments |= {"greater_is_better": True, "learning_rate": 1e-3}  # the worst is called the best: it comes first
    trainer = trainer_of(tiny_llama, tmp_path, SparsityCallback(config_of("rigl")), **arguments)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-2")
    stored = load_file(f"{best}/model.safetensors")
    last = load_file(tmp_path / "checkpoint-8" / "model.safetensors")
    for name, mask in Masks.attached(trainer.model).items():
        assert torch.equal(mask, stored[f"{name}_mask"])
        assert torch.equal(trainer.model.get_parameter(name), stored[name])
    assert any(not torch.equal(stored[name], last[name]) for name in stored if name.endswith("_mask"))


@pytest.mark.parametrize("method", METHODS)
def test_train_again_goes_on_with_the_masks(method, tiny_llama, tmp_path):
    ramped = method in ("gmp", "granet")  # which need their whole schedule
    trainer = trainer_of(tiny_llama, tmp_path, SparsityCallback(config_of(method)), max_steps=8 if ramped else 4)
    trainer.train()
    first, density = masks_of(tiny_llama), Masks.attached(tiny_llama).density()
    if not ramped:
        trainer.args.max_steps = 1  # before any update
        trainer.train()
        assert same_masks(first, masks_of(tiny_llama))
    trainer.args.max_steps = 8
    trainer.train()
    assert Masks.attached(tiny_llama).density() == pytest.approx(density, abs=1e-4), "a ramp begun anew revives nothing"
    for name, mask in Masks.attached(tiny_llama).items():
        assert not tiny_llama.get_parameter(name)[~mask].any()
    assert not any("_mask" in name or "_dense" in name for name in tiny_llama.state_dict())


@pytest.mark.parametrize("method", ["static", "rigl"])
def test_fused_experts_train_sparse_and_never_resume_without_what_was_learned(method, tiny_model, tmp_path):
    """transformers 5 saves experts one by one, which the Trainer's own resume does not read back: it warns and goes on."""
    from safetensors.torch import load_file

    arguments = {"save_strategy": "steps", "save_steps": 4}
    trainer = trainer_of(tiny_model("mixtral"), tmp_path, SparsityCallback(config_of(method)), **arguments)
    trainer.train()
    experts = trainer.model.get_parameter("model.layers.0.mlp.experts.down_proj")
    assert (experts == 0).double().mean() > 0.5
    resumed = trainer_of(tiny_model("mixtral", seed=5), tmp_path, SparsityCallback(config_of(method)), **arguments)
    with pytest.raises(ValueError, match="resumes at step 4, but no mask of .*experts.*was loaded"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    trainer.save_model(str(tmp_path / "saved"))
    assert not [name for name in load_file(tmp_path / "saved" / "model.safetensors") if "_mask" in name]


def test_without_a_config_the_zeros_stay(tiny_llama, tmp_path):
    sparse = copy.deepcopy(tiny_llama)
    target = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        sparse.get_parameter(target)[:, ::2] = 0
    before = copy.deepcopy(sparse)
    trainer_of(sparse, tmp_path, SparsityCallback()).train()
    assert list(Masks.attached(sparse)) == [target], "a weight without zeros is none of its business"
    now, then = sparse.get_parameter(target), before.get_parameter(target)
    assert not now[:, ::2].any() and (now[:, 1::2] != then[:, 1::2]).all()


def test_added_after_the_trainer_was_made(tiny_model, tmp_path):
    """A fresh training works and equals the usual one; resuming has nowhere to put the masks, and says so."""
    arguments = {"save_strategy": "steps", "save_steps": 4}
    usual = trainer_of(tiny_model("llama"), tmp_path / "usual", SparsityCallback(config_of("set")), **arguments)
    usual.train()
    late = trainer_of(tiny_model("llama"), tmp_path / "late", **arguments)
    late.add_callback(SparsityCallback(config_of("set")))
    late.train()
    assert same_weights(usual.model, late.model)
    again = trainer_of(tiny_model("llama"), tmp_path / "again", **arguments)
    again.add_callback(SparsityCallback(config_of("set")))
    with pytest.raises(ValueError, match="added after the Trainer was made.*to the Trainer's constructor"):
        again.train(resume_from_checkpoint=str(tmp_path / "late" / "checkpoint-4"))


def test_model_init(tiny_model, tmp_path):
    usual = trainer_of(tiny_model("llama"), tmp_path, SparsityCallback(config_of("rigl")))
    usual.train()
    made = trainer_of(
        None, tmp_path, SparsityCallback(config_of("rigl")), model_init=lambda: tiny_model("llama").train()
    )
    made.train()
    assert same_weights(usual.model, made.model)


@pytest.mark.parametrize("method", ["static", "set", "rigl"])
def test_eight_micro_batches_of_one_equal_one_of_eight(method, tiny_model, tmp_path):
    """RigL grows by the gradient of the whole batch; SGD, whose step does not turn rounding into a sign."""
    arguments = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 6}
    config = config_of(method, schedule={} if method == "static" else {"every": 2, "end": 6})
    one = trainer_of(
        tiny_model("llama"), tmp_path, SparsityCallback(config), per_device_train_batch_size=8, **arguments
    )
    one.train()
    eight = trainer_of(
        tiny_model("llama"),
        tmp_path,
        SparsityCallback(config),
        **({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8} | arguments),
    )
    eight.train()
    assert same_masks(masks_of(one.model), masks_of(eight.model))
    for mine, theirs in zip(one.model.parameters(), eight.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)
    if method == "rigl":
        start = sparsify(tiny_model("llama"), config)
        assert not same_masks(masks_of(start.model), masks_of(one.model)), "masks moved"


def test_gradient_checkpointing_equals_none(tiny_model, tmp_path):
    plain = trainer_of(tiny_model("llama"), tmp_path, SparsityCallback(config_of("rigl")))
    plain.train()
    saving = trainer_of(tiny_model("llama"), tmp_path, SparsityCallback(config_of("rigl")), gradient_checkpointing=True)
    saving.train()
    assert same_masks(masks_of(plain.model), masks_of(saving.model)) and same_weights(plain.model, saving.model)


@pytest.mark.slow
def test_compiled_equals_eager_and_masks_move_without_recompiling(tiny_model, tmp_path):
    import torch._dynamo

    eager = trainer_of(tiny_model("llama"), tmp_path, SparsityCallback(config_of("rigl")))
    eager.train()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    arguments = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    compiled = trainer_of(tiny_model("llama"), tmp_path, SparsityCallback(config_of("rigl")), **arguments)
    graphs = []
    compiled.add_callback(_each_step(lambda: graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])))
    compiled.train()
    assert graphs[0] > 0 and graphs[-1] == graphs[0], f"compiled graphs after each step: {graphs}"
    assert same_masks(masks_of(eager.model), masks_of(compiled.model))
    for mine, theirs in zip(eager.model.parameters(), compiled.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)


def _each_step(act):
    from transformers import TrainerCallback

    class EachStep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            act()

    return EachStep()


@pytest.mark.parametrize("method", ["rigl", "sr-ste"])
def test_bf16(method, tiny_llama, tmp_path):
    trainer = trainer_of(tiny_llama, tmp_path, SparsityCallback(config_of(method)), bf16=True)
    trainer.train()
    assert all(entry["loss"] < 7 for entry in trainer.state.log_history if "loss" in entry)
    for name, mask in Masks.attached(tiny_llama).items():
        assert not tiny_llama.get_parameter(name)[~mask].any()


@pytest.mark.parametrize("method", ["rigl", "set", "gmp", "sr-ste", "top-kast"])
@pytest.mark.parametrize("fused", [False, True], ids=["scaler skips", "fused optimizer skips"])
def test_a_step_skipped_for_overflow_moves_nothing_and_the_next_works(method, fused, tiny_model):
    """The overflow comes on the very step of an update; without it that update happens on the same data one step later."""

    def run(overflow: bool):
        model = tiny_model("llama").train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
        training = sparsify(model, config_of(method, schedule={"every": 2, "end": 6}), optimizer, total_steps=8)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
        for step, batch in enumerate([rows()[2 * i : 2 * i + 2] for i in range(4)]):
            ids = torch.stack([row["input_ids"] for row in batch])
            if overflow and step == 1:
                before, masks = {k: v.clone() for k, v in model.state_dict().items()}, masks_of(model)
                scaler.scale(model(input_ids=ids, labels=ids).loss * float("inf")).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                assert scaler.get_scale() == 4.0, "the scaler saw it"
                assert training.step == 1 and same_masks(masks, masks_of(model))
                assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
            scaler.scale(model(input_ids=ids, labels=ids).loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return training

    usual, skipped = run(False), run(True)
    assert skipped.step == usual.step == 4
    assert usual.metrics()["mask_updates"] == skipped.metrics()["mask_updates"] == 2
    assert same_masks(masks_of(usual.model), masks_of(skipped.model))
    for mine, theirs in zip(usual.model.parameters(), skipped.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)
