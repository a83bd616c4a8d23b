"""What a first user runs into: the right answer of each is an identity or what the same model does without sparse training.

Amounts that are asked for are reached or refused, masks that are said to move do, and a callback that only watches never
ends a training.
"""

import copy

import pytest
import torch
from torch import nn

from hf_sparse.callbacks.sparsity import SparsityCallback
from hf_sparse.config import SparsityConfig
from hf_sparse.masks import Masks
from hf_sparse.pruning.prune import prune
from hf_sparse.targets import find_targets
from hf_sparse.training.densify import densify
from hf_sparse.training.sparse_training import sparsify


def batch(seed: int) -> dict:
    ids = torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def train(model, optimizer, steps: range) -> None:
    model.train()
    for step in steps:
        model(**batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def zeros(model) -> float:
    """Share of zeros over all default targets, counted in the weights themselves."""
    weights = [model.get_parameter(name) for name in find_targets(model)]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def trainer_of(model, folder, *callbacks, data=None, **changes):
    from transformers import Trainer, TrainingArguments

    data = data or [{k: v[0] for k, v in batch(i).items()} for i in range(32)]
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no"}
    given = {"max_steps": 4, "per_device_train_batch_size": 2}
    args = TrainingArguments(str(folder), **(quiet | given | changes))
    return Trainer(model, args, train_dataset=data, callbacks=list(callbacks))


def test_a_custom_loop_resumes_gradual_pruning(tiny_model):
    """In the order a reader of the module's docstring writes it: sparsify, load, say the step, go on."""
    config = SparsityConfig(sparsity=0.75, method="gmp", schedule={"every": 2, "end": 12})
    model = tiny_model("llama")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    sparsify(model, config, optimizer)
    train(model, optimizer, range(6))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(6, 12))

    other = tiny_model("llama", seed=3)
    optimizer = torch.optim.AdamW(other.parameters(), 1e-3)
    training = sparsify(other, config, optimizer)
    other.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    training.step = 6
    train(other, optimizer, range(6, 12))
    assert training.metrics()["density"] == pytest.approx(0.25, abs=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("method", ["set", "rigl", "granet", "srigl", "chts"])
def test_an_override_with_another_pattern_is_refused_or_the_rest_still_moves(method, tiny_model):
    try:
        config = SparsityConfig(
            sparsity=0.75, method=method, schedule={"every": 2, "end": 1.0}, overrides={"re:.*down_proj": "2:4"}
        )
        model = tiny_model("llama")
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        training = sparsify(model, config, optimizer, total_steps=8)
    except ValueError:
        return
    before = {name: mask.clone() for name, mask in Masks.attached(model).items()}
    train(model, optimizer, range(4))
    assert any(not torch.equal(before[w.name], w.mask) for w in training.weights if "down_proj" not in w.name)
    for weight in training.weights:
        if "down_proj" in weight.name:
            assert weight.pattern.check(weight.target.matrix(weight.values())), "the pattern that was asked for"


def test_pruning_after_a_sparse_training_is_not_undone_by_the_next_one(tiny_model):
    """train at 50%, prune to 70%, fine-tune with the zeros there are: 70% of the weights stay zero."""
    model = tiny_model("llama")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    training = sparsify(model, SparsityConfig(sparsity=0.5, method="static"), optimizer)
    train(model, optimizer, range(1))
    training.finish()
    try:
        prune(model, SparsityConfig(sparsity=0.7))
    except ValueError:  # refusing a model with masks is right too
        return
    again = sparsify(model, None, torch.optim.SGD(model.parameters(), 0.1))
    train(model, torch.optim.SGD(model.parameters(), 0.1), range(0))
    assert again.metrics()["density"] == pytest.approx(0.3, abs=1e-3)


def test_a_model_whose_flops_cannot_be_counted_trains_all_the_same(tmp_path):
    """The Trainer takes any module that returns a loss; counting is an extra."""

    class Regression(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.out = nn.Linear(16, 16), nn.Linear(16, 1)

        def forward(self, x, labels=None):
            return {"loss": (self.out(self.hidden(x).relu()) - labels).square().mean()}

    data = [{"x": torch.full((16,), float(i)), "labels": torch.ones(1)} for i in range(16)]
    trainer_of(Regression(), tmp_path / "dense", data=data).train()
    trainer_of(
        Regression(), tmp_path, SparsityCallback(SparsityConfig(sparsity=0.5, method="static")), data=data
    ).train()


def test_a_tied_head_is_a_target_as_others_are(tiny_model):
    """Its parameter has two names; the mask must be found under either, or the saved model is no stock checkpoint."""
    model = tiny_model("llama", tie_word_embeddings=True)
    keys = set(model.state_dict())
    training = sparsify(model, SparsityConfig(sparsity=0.5, method="static", targets=["lm_head"]))
    assert len(Masks.attached(model)) == 1
    training.finish()
    assert set(model.state_dict()) == keys
    assert densify(model) == pytest.approx(model.lm_head.weight.numel() / 2, abs=1)


def halves(weight, statistics):
    return weight.abs()


halves.needs = "nothing"


@pytest.mark.parametrize("how", ["pruned", "trained"])
def test_zeros_chosen_by_a_callable_are_kept_after_reloading(how, tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_model("llama")
    if how == "pruned":
        prune(model, SparsityConfig(sparsity=0.5, saliency=halves))
    else:
        sparsify(model, SparsityConfig(sparsity=0.5, method="static", saliency=halves)).finish()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sparsify(loaded).metrics()["density"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("fields", "total"),
    [
        ({"method": "gmp", "sparsity": 0.75, "schedule": {"every": 1, "end": 800}}, 8),  # ends after the training
        ({"method": "granet", "sparsity": 0.4, "schedule": {"every": 1}}, 8),  # starts sparser than it is to end
        ({"method": "gmp", "sparsity": 0.3, "schedule": {"every": 1, "initial_sparsity": 0.6}}, 8),
    ],
)
def test_a_ramp_reaches_the_sparsity_or_is_refused(fields, total, tiny_model):
    model = tiny_model("llama")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    try:
        training = sparsify(model, SparsityConfig(**fields), optimizer, total_steps=total)
    except ValueError:
        return
    train(model, optimizer, range(total))
    kept = sum(w.kept for w in training.weights) / sum(t.numel for t in find_targets(model).values())
    assert 1.0 - kept == pytest.approx(fields["sparsity"], abs=1e-3)


def test_a_skipped_step_at_the_end_of_the_ramp_does_not_lose_the_target(tiny_model):
    """The Trainer counts a step that the scaler skipped, so the closing step may never be seen as one."""
    model = tiny_model("llama")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    training = sparsify(model, SparsityConfig(sparsity=0.75, method="gmp", schedule={"every": 3, "end": 6}), optimizer)
    for step in range(8):
        training.step = step  # as SparsityCallback sets it, from the Trainer's global_step
        training.forget_gradients()
        model(**batch(step)).loss.backward()
        if step != 5:
            optimizer.step()
        optimizer.zero_grad()
    assert training.metrics()["density"] == pytest.approx(0.25, abs=1e-3)


def test_an_overflow_is_forgotten_without_set_to_none(tiny_model):
    model = tiny_model("llama").train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    training = sparsify(model, SparsityConfig(sparsity=0.75, method="rigl", schedule={"every": 1, "end": 9}), optimizer)
    (model(**batch(0)).loss * float("inf")).backward()
    optimizer.zero_grad(set_to_none=False)  # a scaler skipped the step
    before = {name: mask.clone() for name, mask in Masks.attached(model).items()}
    for _ in range(2):  # the update of the first step waits for the second
        model(**batch(0)).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert any(not torch.equal(before[weight.name], weight.mask) for weight in training.weights)


def test_the_same_config_goes_on_in_a_model_without_a_config(tiny_model):
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    config = SparsityConfig(sparsity=0.5, method="static")
    before = [w.mask.clone() for w in sparsify(model, config).weights]
    assert all(torch.equal(a, w.mask) for a, w in zip(before, sparsify(model, config).weights, strict=True))


def test_quantized_weights_are_refused_before_they_are_zeroed():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    packed = torch.randint(1, 255, (128, 1), dtype=torch.uint8)
    model[0].weight = nn.Parameter(packed.clone(), requires_grad=False)  # as 4-bit layers hold them
    with pytest.raises(ValueError, match="0.weight"):
        sparsify(model, SparsityConfig(sparsity=0.5, method="static"))
    assert torch.equal(model[0].weight, packed)


def test_the_logged_density_is_that_of_all_targets(tiny_model):
    """ERK leaves small weights dense; they are part of the average that was asked for."""
    model = tiny_model("llama")
    training = sparsify(model, SparsityConfig(sparsity=0.4, method="rigl", saliency="magnitude"))
    assert len(training.weights) < len(find_targets(model))
    assert training.metrics()["density"] == pytest.approx(1.0 - zeros(model), abs=1e-6)


def test_a_checkpoint_of_another_config_is_refused_on_resume(tiny_model, tmp_path):
    """Its masks would be loaded and the saved model would say the new config's sparsity of the old one's zeros."""
    first = SparsityCallback(SparsityConfig(sparsity=0.75, method="static"))
    trainer_of(tiny_model("llama"), tmp_path, first, save_strategy="steps", save_steps=2).train()
    second = SparsityCallback(SparsityConfig(sparsity=0.5, method="static"))
    with pytest.raises(ValueError, match="sparsity"):
        trainer_of(tiny_model("llama"), tmp_path, second).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_one_callback_in_two_trainers_counts_each_by_itself(tiny_model, tmp_path):
    callback, spent = SparsityCallback(SparsityConfig(sparsity=0.5, method="static")), []
    for run in range(2):
        trainer = trainer_of(tiny_model("llama"), tmp_path / str(run), callback)
        trainer.train()
        spent.append([log["flops_spent"] for log in trainer.state.log_history if "flops_spent" in log])
    assert spent[0] == spent[1]


def test_numbers_are_there_after_finish(tiny_model):
    model = tiny_model("llama")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    training = sparsify(model, SparsityConfig(sparsity=0.75, method="rigl", schedule={"every": 2, "end": 4}), optimizer)
    train(model, optimizer, range(3))
    training.finish()
    assert training.metrics()["density"] == pytest.approx(0.25, abs=1e-3)


def test_a_checkpoint_in_the_middle_of_training_is_inspected_and_not_packed(tiny_model, tmp_path):
    from hf_sparse.formats.checkpoint import pack_checkpoint
    from hf_sparse.inspection import inspect_checkpoint

    model = tiny_model("llama")
    training = sparsify(model, SparsityConfig(sparsity=0.75, method="rigl"))
    model.save_pretrained(tmp_path / "middle")
    training.finish()
    model.save_pretrained(tmp_path / "end")
    middle, end = (inspect_checkpoint(str(tmp_path / name)) for name in ("middle", "end"))
    assert middle.total_parameters == end.total_parameters and middle.sparsity == end.sparsity
    assert [entry.name for entry in middle.parameters] == [entry.name for entry in end.parameters]
    assert "in the middle of sparse training" in middle.all_notes()[0] and not end.all_notes()
    with pytest.raises(ValueError, match="in the middle of sparse training: it holds .*_explored"):
        pack_checkpoint(tmp_path / "middle", tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    pack_checkpoint(tmp_path / "end", tmp_path / "packed")


@pytest.mark.parametrize("ramp_end", [0.7, 1.0])
def test_a_ramp_that_also_grows_reaches_the_sparsity_before_the_last_step(ramp_end, tiny_model):
    model = tiny_model("llama").train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = {"every": 10, "ramp_end": ramp_end}  # the updates are due after 10 steps and at the end
    config = SparsityConfig(sparsity=0.75, method="granet", allocation="uniform", schedule=schedule)
    training = sparsify(model, config, optimizer, total_steps=16)
    train(model, optimizer, range(16))
    assert training.metrics()["density"] == pytest.approx(0.25, abs=1e-3)
