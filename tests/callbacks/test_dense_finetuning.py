"""From sparse to dense inside one Trainer, and between two: what is revived, with which moments, at which learning rate."""

import copy

import pytest
import torch
from transformers import TrainerCallback

from hf_sparse.callbacks.dense_finetuning import DenseFinetuningCallback
from hf_sparse.callbacks.sparsity import SparsityCallback
from hf_sparse.config import SparsityConfig
from hf_sparse.masks import Masks
from hf_sparse.training.densify import densify

STATIC = {"method": "static", "sparsity": 0.75}
RIGL = {"method": "rigl", "sparsity": 0.75, "schedule": {"every": 2, "end": 4}}
RATE = 1e-2


def trainer_of(model, folder, *callbacks, **arguments):
    from transformers import Trainer, TrainingArguments

    ids = torch.randint(3, 300, (64, 16), generator=torch.Generator().manual_seed(0))
    defaults = {"max_steps": 10, "per_device_train_batch_size": 2, "save_strategy": "no", "learning_rate": RATE}
    defaults |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
    args = TrainingArguments(output_dir=str(folder), **(defaults | arguments))
    rows = [{"input_ids": row, "labels": row.clone()} for row in ids]
    return Trainer(model, args, train_dataset=rows, callbacks=list(callbacks))


def logged(trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if "loss" in entry]


class Watch(TrainerCallback):
    """What the model and the optimizer look like when a step begins, before its gradient and its update."""

    def __init__(self):
        self.weights, self.masks, self.steps, self.gradients = {}, {}, {}, {}

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        step = state.global_step
        self.weights[step] = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.masks[step] = {name: mask.clone() for name, mask in Masks.attached(model).items()}
        self.steps[step] = [int(s["step"]) for s in optimizer.state.values()]

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        self.gradients[state.global_step] = gradients


@pytest.mark.parametrize("at", [6, 0.6], ids=["step", "share"])
def test_revived_weights_are_zero_at_the_transition_and_learn_from_the_first_step_on(at, tiny_llama, tmp_path):
    watch = Watch()
    trainer = trainer_of(tiny_llama, tmp_path, SparsityCallback(RIGL), DenseFinetuningCallback(at=at), watch)
    trainer.train()
    assert watch.masks[5] and not watch.masks[6]
    for name, mask in watch.masks[5].items():
        revived = ~mask
        assert not watch.weights[6][name][revived].any(), "exactly zero at the transition"
        assert not watch.gradients[5][name][revived].any()
        assert watch.gradients[6][name][revived].count_nonzero() > 0.9 * revived.sum(), "no symmetric trap"
        assert watch.weights[7][name][revived].count_nonzero() > 0.9 * revived.sum()
    assert logged(trainer, "density") == pytest.approx([0.25] * 5 + [1.0] * 5, abs=1e-3)
    spent = logged(trainer, "flops_spent")
    dense = logged(trainer, "flops_dense")
    assert spent[9] - spent[8] == dense[9] - dense[8] and spent[5] - spent[4] < dense[5] - dense[4]
    assert not any("_mask" in name or "_explored" in name for name in tiny_llama.state_dict())
    assert not hasattr(tiny_llama.config, "hf_sparse")


def test_a_fresh_optimizer_and_a_learning_rate_of_its_own(tiny_llama, tmp_path):
    """Warm-up over 2 of the 4 steps left to a peak of 5e-3, then linearly to 0; Adam counts from one again."""
    watch = Watch()
    dense = DenseFinetuningCallback(at=6, learning_rate=5e-3, warmup=2, schedule="linear")
    trainer = trainer_of(tiny_llama, tmp_path, SparsityCallback(STATIC), dense, watch)
    trainer.train()
    falling = [RATE * (1 - step / 10) for step in range(6)]
    assert logged(trainer, "learning_rate") == pytest.approx(falling + [0.0, 2.5e-3, 5e-3, 2.5e-3])
    assert set(watch.steps[5]) == {5} and watch.steps[6] == [] and set(watch.steps[7]) == {1}


@pytest.mark.parametrize(
    ("schedule", "final", "expected"),
    [
        ("cosine", 0.1, [1.0, 0.86819805, 0.55, 0.23180195]),  # 0.1 + 0.9 (1 + cos(pi p)) / 2
        ("constant", 0.0, [1.0] * 4),
        ("linear", 0.5, [1.0, 0.875, 0.75, 0.625]),
    ],
)
def test_the_shapes_of_the_dense_schedule(schedule, final, expected, tiny_llama, tmp_path):
    dense = DenseFinetuningCallback(at=6, schedule=schedule, final_learning_rate=final)
    trainer = trainer_of(tiny_llama, tmp_path, SparsityCallback(STATIC), dense)
    trainer.train()
    assert logged(trainer, "learning_rate")[6:] == pytest.approx([RATE * share for share in expected])


def test_both_carried_over(tiny_llama, tmp_path):
    watch = Watch()
    dense = DenseFinetuningCallback(at=6, schedule="carry", optimizer="carry")
    trainer = trainer_of(tiny_llama, tmp_path, SparsityCallback(STATIC), dense, watch)
    trainer.train()
    assert logged(trainer, "learning_rate") == pytest.approx([RATE * (1 - step / 10) for step in range(10)])
    assert set(watch.steps[6]) == {6} and set(watch.steps[7]) == {7}
    assert logged(trainer, "density")[-1] == 1.0


@pytest.mark.parametrize("saved", [4, 6, 8], ids=["before", "at the transition", "after"])
@pytest.mark.parametrize("carry", [False, True], ids=["fresh", "carried"])
def test_resumed_equals_uninterrupted(saved, carry, tiny_model, tmp_path):
    def run(seed, resume=None):
        options = {"schedule": "carry", "optimizer": "carry"} if carry else {"learning_rate": 5e-3, "warmup": 0.5}
        callbacks = [SparsityCallback(RIGL), DenseFinetuningCallback(at=6, **options)]
        arguments = {"save_strategy": "steps", "save_steps": 2, "weight_decay": 0.1, "lr_scheduler_type": "cosine"}
        trainer = trainer_of(tiny_model("llama", seed=seed), tmp_path, *callbacks, **arguments)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(0)
    stored = copy.deepcopy(whole.model.state_dict())
    resumed = run(5, str(tmp_path / f"checkpoint-{saved}"))
    assert stored.keys() == resumed.model.state_dict().keys()
    assert all(torch.equal(value, stored[name]) for name, value in resumed.model.state_dict().items())
    for key in ("learning_rate", "density", "flops_spent", "grad_norm"):
        assert logged(whole, key) == logged(resumed, key), key


def test_densify_between_two_trainers(tiny_llama, tmp_path):
    trainer_of(tiny_llama, tmp_path, SparsityCallback(STATIC), max_steps=3).train()
    masks = {name: mask.clone() for name, mask in Masks.attached(tiny_llama).items()}
    before = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    assert densify(tiny_llama) == sum(int((~mask).sum()) for mask in masks.values())
    assert all(torch.equal(value, before[name]) for name, value in tiny_llama.state_dict().items())
    assert not hasattr(tiny_llama.config, "hf_sparse") and not Masks.attached(tiny_llama)
    second = trainer_of(tiny_llama, tmp_path, max_steps=3)
    second.train()
    for name, mask in masks.items():
        assert tiny_llama.get_parameter(name)[~mask].count_nonzero() > 0.9 * (~mask).sum()
    with pytest.raises(ValueError, match="carries no masks, so all its weights train already"):
        densify(tiny_llama)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"at": 0.5, "schedule": "polynomial"}, "one of linear, cosine, constant or carry, got 'polynomial'"),
        ({"at": 0.5, "optimizer": "new"}, "'fresh' or 'carry', got 'new'"),
        ({"at": -1}, "at is a step .* or a share of training .*, got -1"),
        ({"at": 1.5}, "at is a step .* or a share of training .*, got 1.5"),
        ({"at": 0.5, "warmup": -0.1}, "warmup is a step .*, got -0.1"),
        ({"at": 0.5, "final_learning_rate": 2.0}, r"fraction of the peak in \[0, 1\], got 2.0"),
        ({"at": 0.5, "learning_rate": 0.0}, "learning_rate is positive, got 0.0"),
        ({"at": 0.5, "schedule": "carry", "warmup": 3}, "leave learning_rate and warmup out"),
        ({"at": 0.5, "schedule": "carry", "learning_rate": 1e-3}, "leave learning_rate and warmup out"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        DenseFinetuningCallback(**arguments)


@pytest.mark.parametrize("at", [10, 11, 0, 0.01, 1.0])
def test_a_transition_outside_of_the_training(at, tiny_llama, tmp_path):
    trainer = trainer_of(tiny_llama, tmp_path, SparsityCallback(STATIC), DenseFinetuningCallback(at=at))
    with pytest.raises(ValueError, match="is step .*; the transition lies between the first step and the last, 10"):
        trainer.train()


def test_no_sparse_training_to_end(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match=r"no sparse training to end; put SparsityCallback\(...\) before"):
        trainer_of(tiny_llama, tmp_path, DenseFinetuningCallback(at=5)).train()


def test_a_scheduler_that_cannot_be_given_another_shape(tiny_llama, tmp_path):
    callbacks = [SparsityCallback(SparsityConfig(**STATIC)), DenseFinetuningCallback(at=5)]
    trainer = trainer_of(tiny_llama, tmp_path, *callbacks)
    optimizer = torch.optim.AdamW(tiny_llama.parameters(), lr=RATE)
    trainer.optimizer, trainer.lr_scheduler = optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2)
    with pytest.raises(ValueError, match="StepLR cannot be given; use a schedule of transformers.*or schedule='carry'"):
        trainer.train()
