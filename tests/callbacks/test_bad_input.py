"""What cannot work is refused with the reason and the remedy, before a weight of the model has changed."""

import contextlib
import json

import pytest
import torch

from hf_sparse.callbacks.sparsity import SparsityCallback
from hf_sparse.config import SparsityConfig
from hf_sparse.masks import Masks
from hf_sparse.training.sparse_training import sparsify

RIGL = {"method": "rigl", "sparsity": 0.75, "schedule": {"every": 2, "end": 7}}


def trainer_of(model, folder, *callbacks, **arguments):
    from transformers import Trainer, TrainingArguments

    ids = torch.randint(3, 300, (64, 16), generator=torch.Generator().manual_seed(0))
    defaults = {"max_steps": 8, "per_device_train_batch_size": 2, "save_strategy": "no", "learning_rate": 1e-2}
    defaults |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
    optimizers = {"optimizers": arguments.pop("optimizers")} if "optimizers" in arguments else {}
    args = TrainingArguments(output_dir=str(folder), **(defaults | arguments))
    rows = [{"input_ids": row, "labels": row.clone()} for row in ids]
    return Trainer(model, args, train_dataset=rows, callbacks=list(callbacks), **optimizers)


@contextlib.contextmanager
def refused(model, *words: str):
    """A ValueError whose message has the words, in order; the parameters are what they were."""
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    with pytest.raises(ValueError, match=r"(?s)" + ".*".join(words)):
        yield
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]), f"{name} changed"


def test_a_config_without_a_method(tiny_llama, tmp_path):
    with refused(tiny_llama, "no training method; choose one of static, set, rigl", "no config at all keeps the zeros"):
        trainer_of(tiny_llama, tmp_path, SparsityCallback(SparsityConfig(sparsity=0.5)))
    assert not Masks.attached(tiny_llama)


def test_a_dense_model_without_a_config(tiny_llama, tmp_path):
    with refused(
        tiny_llama, "no zeros to keep: every target is dense", "Prune it first", "give SparsityCallback a config"
    ):
        trainer_of(tiny_llama, tmp_path, SparsityCallback())


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"begin": 10, "end": 5}, r"the schedule ends \(5\) before it begins \(10\)"),
        ({"begin": 0.5, "end": 0.25}, r"the schedule ends \(0.25\) before it begins \(0.5\)"),
        ({"begin": 10, "end": 10}, r"ends \(10\) before it begins \(10\), or at once: no mask would change"),
        ({"every": 0}, "every is a whole number of optimizer steps, at least 1, got 0"),
        ({"intervall": 5}, "method 'rigl' has no schedule option 'intervall'; it has every, begin, end"),
    ],
)
def test_a_schedule_that_is_wrong_as_written(schedule, message):
    with pytest.raises(ValueError, match=message):
        SparsityConfig(method="rigl", sparsity=0.5, schedule=schedule)


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ({"begin": 6, "end": 0.5}, ("'rigl' ends at step 4, before it begins at step 6",)),
        ({"every": 5, "end": 0.5}, ("no mask would ever be updated", "from step 0 to 4, and every=5 is longer")),
    ],
)
def test_a_schedule_that_is_wrong_for_this_many_steps(schedule, words, tiny_model, tmp_path):
    """Masks are chosen when the Trainer is made; when its steps are known, nothing more may happen."""
    trainer = trainer_of(tiny_model("llama"), tmp_path, SparsityCallback(RIGL | {"schedule": schedule}))
    with refused(trainer.model, *words):
        trainer.train()
    model = tiny_model("llama")
    optimizer = torch.optim.AdamW(model.parameters())
    config = SparsityConfig(method="rigl", sparsity=0.75, schedule={"every": 2, "end": 0.5})
    with pytest.raises(ValueError, match="end=0.5 is a share of training.*give total_steps, or a step"):
        sparsify(model, config, optimizer)


def test_a_model_that_another_config_has_masked(tiny_llama, tmp_path):
    trainer_of(tiny_llama, tmp_path, SparsityCallback(RIGL), max_steps=3).train()
    other = SparsityCallback(RIGL | {"sparsity": 0.5})
    with refused(tiny_llama, r"already masked by another config \(they differ in sparsity\)", r"densify\(model\)"):
        trainer_of(tiny_llama, tmp_path, other)
    trainer_of(tiny_llama, tmp_path, SparsityCallback(RIGL))  # its own is welcome
    trainer_of(tiny_llama, tmp_path, SparsityCallback())  # and none goes on with them


@pytest.mark.parametrize("method", ["static", "rigl", "sr-ste"])
def test_a_checkpoint_without_the_masks_it_should_have(method, tiny_model, tmp_path):
    from safetensors.torch import load_file, save_file

    fields = {"method": method, "schedule": {} if method == "static" else {"every": 2, "end": 7}}
    fields["sparsity"] = None if method == "sr-ste" else 0.75
    arguments = {"save_strategy": "steps", "save_steps": 4}
    trainer_of(tiny_model("llama"), tmp_path, SparsityCallback(fields), **arguments).train()
    file = tmp_path / "checkpoint-4" / "model.safetensors"
    tensors = load_file(file)
    assert any(name.endswith("_mask") for name in tensors)
    stripped = {name: value for name, value in tensors.items() if not name.endswith("_mask")}
    save_file(stripped, file, metadata={"format": "pt"})
    resumed = trainer_of(tiny_model("llama", seed=3), tmp_path, SparsityCallback(fields), **arguments)
    with pytest.raises(ValueError, match="resumes at step 4, but no mask of .*q_proj.weight was loaded.*_mask"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_the_dense_checkpoint_of_another_run(tiny_model, tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 4}
    trainer_of(tiny_model("llama"), tmp_path, **arguments).train()
    sparse = trainer_of(tiny_model("llama"), tmp_path, SparsityCallback(RIGL), **arguments)
    with pytest.raises(
        ValueError, match="no mask of .* was loaded. Resume from a checkpoint that the sparse training wrote"
    ):
        sparse.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_resuming_in_a_trainer_whose_training_has_ended(tiny_llama, tmp_path):
    """Its model is plain again, so the checkpoint's masks had no place to be loaded into."""
    trainer = trainer_of(tiny_llama, tmp_path, SparsityCallback(RIGL), save_strategy="steps", save_steps=4)
    trainer.train()
    with pytest.raises(ValueError, match="no mask of .* was loaded.*in a new Trainer"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_frozen_weights(tiny_llama, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    tiny_llama.get_parameter(name).requires_grad_(False)
    with refused(tiny_llama, "'rigl' trains the masked weights, but", name, "is frozen", "use 'static' or 'gmp'"):
        trainer_of(tiny_llama, tmp_path, SparsityCallback(RIGL))
    trainer_of(tiny_llama, tmp_path, SparsityCallback({"method": "static", "sparsity": 0.5}), max_steps=1).train()
    assert int((tiny_llama.get_parameter(name) == 0).sum()) == 64 * 128 // 2


@pytest.mark.parametrize("sparsity", [75, -0.1, 1.0, "half"])
def test_sparsity_out_of_range(sparsity):
    with pytest.raises(ValueError, match="sparsity is (the fraction of zeros|a number)"):
        SparsityConfig(method="static", sparsity=sparsity)


def test_targets_that_peft_has_moved_or_that_do_not_exist(tiny_llama, tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(tiny_llama, lora)
    adapter = {"method": "static", "sparsity": 0.5, "targets": ["lora_A"]}
    with refused(wrapped, "'lora_A' matches no parameter of this model; (near matches|kinds in this model)"):
        trainer_of(wrapped, tmp_path, SparsityCallback(adapter))
    misspelt = {"method": "static", "sparsity": 0.5, "targets": ["qproj"]}
    with refused(wrapped, "'qproj' matches no parameter", "near matches: q_proj"):
        trainer_of(wrapped, tmp_path, SparsityCallback(misspelt))
    with refused(wrapped, "'rigl' trains the masked weights", r"is frozen \(PEFT froze it\)"):
        trainer_of(wrapped, tmp_path, SparsityCallback(RIGL))
    old_name = {"method": "static", "sparsity": 0.5, "targets": ["model.layers.0.self_attn.q_proj.weight"]}
    trainer_of(wrapped, tmp_path, SparsityCallback(old_name), max_steps=1).train()
    base = wrapped.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight")
    assert int((base == 0).sum()) == base.numel() // 2, "named as before PEFT, found where it is now"


def test_a_module_replaced_after_the_trainer_was_made(tiny_llama, tmp_path):
    trainer = trainer_of(tiny_llama, tmp_path, SparsityCallback({"method": "static", "sparsity": 0.5}), max_steps=2)
    layer = tiny_llama.model.layers[0].mlp
    layer.up_proj = torch.nn.Linear(64, 128, bias=False)
    with refused(tiny_llama, "model.layers.0.mlp.up_proj.weight"):
        trainer.train()


class EightBit(torch.optim.SGD):
    """SGD with momentum kept as bytes, as 8-bit optimizers do."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state.setdefault("state1", torch.zeros(parameter.shape, dtype=torch.uint8))
                    parameter.add_(parameter.grad, alpha=-group["lr"])


@pytest.mark.parametrize("method", ["rigl", "static", "gmp"])
def test_an_optimizer_whose_moments_cannot_be_reset(method, tiny_llama, tmp_path):
    """At the first step, not hours later at the first update."""
    optimizer = EightBit(tiny_llama.parameters(), lr=0.1)
    schedule = {} if method == "static" else {"every": 4, "end": 8}
    callback = SparsityCallback({"method": method, "sparsity": 0.75, "schedule": schedule})
    trainer = trainer_of(tiny_llama, tmp_path, callback, optimizers=(optimizer, None))
    if method != "rigl":
        trainer.train()
        assert Masks.attached(tiny_llama).density() == pytest.approx(0.25, abs=1e-3)
        return
    with pytest.raises(ValueError, match=r"EightBit keeps 'state1' of .* as torch.uint8 Tensor.*AdamW.*static, gmp"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_an_optimizer_that_does_not_hold_the_weights(tiny_model):
    model, other = tiny_model("llama"), tiny_model("llama")
    config = SparsityConfig(method="static", sparsity=0.5)
    with pytest.raises(ValueError, match="the optimizer does not hold .*; make it after the model is wrapped"):
        sparsify(model, config, torch.optim.AdamW(other.parameters()))
    with pytest.raises(ValueError, match="object is no torch.optim.Optimizer|is no torch.optim.Optimizer"):
        sparsify(tiny_model("llama"), config, object())


@pytest.mark.parametrize(
    ("changes", "environment", "message"),
    [
        ({"deepspeed": "zero3.json"}, {}, "DeepSpeed steps the optimizer inside backward.*use DDP or FSDP2"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, {}, "FSDP1 flattens weights.*fsdp_config={'version': 2}"),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "FSDP1 flattens weights.*fsdp_version: 2 in the accelerate config"),
        (
            {"fsdp": True, "fsdp_config": {"version": 2}},
            {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
            "cpu_ram_efficient_loading.*turn it off",
        ),
    ],
)
def test_what_hides_the_weights(changes, environment, message, tiny_llama, tmp_path, monkeypatch):
    """Said from the arguments, before anything is wrapped; the Trainer would start processes to make these for real."""
    args = trainer_of(tiny_llama, tmp_path).args
    for name, value in changes.items():
        monkeypatch.setattr(args, name, value)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with refused(tiny_llama, message):
        SparsityCallback(RIGL).on_init_end(args, None, None, model=tiny_llama)
    assert not Masks.attached(tiny_llama)


def test_a_callback_comes_back_from_json():
    """What the Trainer writes into trainer_state.json makes an equal callback."""
    callback = SparsityCallback(SparsityConfig(**RIGL))
    written = json.loads(json.dumps(callback.state()))
    assert SparsityCallback(**written["args"]).config == callback.config
    with pytest.raises(ValueError, match="unknown field 'spartsity'.*did you mean 'sparsity'"):
        SparsityCallback({"method": "rigl", "spartsity": 0.5})
