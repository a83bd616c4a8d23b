"""Where the numbers of a sparse training appear, and that the Trainer's own gradient norm is that of the weights that train."""

import copy

import pytest
import torch
from transformers import TrainerCallback

from hf_sparse.callbacks.metrics import stand_before_reporters
from hf_sparse.callbacks.sparsity import SparsityCallback
from hf_sparse.config import SparsityConfig
from hf_sparse.masks import Masks

RIGL = {"method": "rigl", "sparsity": 0.75, "schedule": {"every": 2, "end": 8}}
KEYS = {"density", "mask_updates", "mask_change", "ever_active", "flops_spent", "flops_dense"}


def trainer_of(model, folder, *callbacks, **arguments):
    from transformers import Trainer, TrainingArguments

    ids = torch.randint(3, 300, (16,), generator=torch.Generator().manual_seed(0))
    same = [{"input_ids": ids, "labels": ids} for _ in range(32)]  # every batch is known in advance
    defaults = {"max_steps": 6, "per_device_train_batch_size": 2, "save_strategy": "no", "learning_rate": 1e-2}
    defaults |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
    args = TrainingArguments(output_dir=str(folder), **(defaults | arguments))
    return Trainer(model, args, train_dataset=same, eval_dataset=same[:2], callbacks=list(callbacks))


class Seen(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def test_history_reporters_callbacks_and_printer_all_see_them(tiny_llama, tmp_path, monkeypatch, capsys):
    """A reporter named in report_to stands before everything the user adds; it must see the numbers nevertheless."""
    import transformers.trainer

    reporter, user = Seen(), Seen()
    monkeypatch.setattr(transformers.trainer, "get_reporting_integration_callbacks", lambda names: [reporter])
    trainer = trainer_of(tiny_llama, tmp_path, user, SparsityCallback(RIGL))
    callbacks = trainer.callback_handler.callbacks
    assert callbacks.index(reporter) < callbacks.index(user), "as the Trainer orders them"
    trainer.train()
    for logs in (trainer.state.log_history, user.logs, reporter.logs):
        losses = [entry for entry in logs if "loss" in entry]
        assert len(losses) == 6 and all(KEYS - {"mask_change"} <= entry.keys() for entry in losses)
        assert [entry["mask_updates"] for entry in losses] == [0, 1, 1, 2, 2, 2]
        assert all(entry["density"] == pytest.approx(0.25, abs=1e-3) for entry in losses)
        assert "mask_change" not in losses[0] and losses[1]["mask_change"] > 0
        explored = [entry["ever_active"] for entry in losses]
        assert explored == sorted(explored) and explored[0] >= 0.249 and explored[-1] > 0.3
        assert all(0 < entry["flops_spent"] < entry["flops_dense"] for entry in losses)
    assert "'density': " in capsys.readouterr().out


def test_tensorboard_receives_them(tiny_llama, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    trainer = trainer_of(tiny_llama, tmp_path, SparsityCallback(RIGL), report_to="tensorboard")
    trainer.train()
    folder = next(path.parent for path in tmp_path.rglob("events.out.tfevents.*"))
    events = EventAccumulator(str(folder))
    events.Reload()
    assert {f"train/{key}" for key in KEYS} <= set(events.Tags()["scalars"])
    assert [event.value for event in events.Scalars("train/mask_updates")] == [0, 1, 1, 2, 2, 2]


def test_an_evaluation_is_logged_without_them(tiny_llama, tmp_path):
    arguments = {"eval_strategy": "steps", "eval_steps": 3}
    trainer = trainer_of(tiny_llama, tmp_path, SparsityCallback(RIGL), **arguments)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(entries) == 2 and not any(KEYS & entry.keys() for entry in entries)


def test_a_callback_without_a_trainer_stands_before_nobody():
    callback = Seen()
    assert stand_before_reporters(callback) is False
    neighbours = [callback]
    assert stand_before_reporters(callback) is False and neighbours == [callback]


@pytest.mark.parametrize("method", ["static", "rigl", "top-kast"])
def test_the_gradient_norm_is_that_of_the_weights_that_train(method, tiny_llama, tmp_path):
    """By a dense twin with the same weights and the same batch; for RigL also on the steps before an update (2, 4, 6)."""
    schedule = {} if method == "static" else {"every": 2, "end": 6}
    config = SparsityConfig(method=method, sparsity=0.75, schedule=schedule)
    twin, expected = copy.deepcopy(tiny_llama), []

    class Measure(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            twin.load_state_dict({n: p.detach() for n, p in model.named_parameters()}, strict=False)
            twin.zero_grad()
            batch = torch.stack([trainer.train_dataset[0]["input_ids"]] * 2)
            twin.train()(input_ids=batch, labels=batch).loss.backward()
            every, total, active = Masks.attached(model), 0.0, 0.0
            for name, parameter in twin.named_parameters():
                keep = every.get(name, torch.ones((), dtype=torch.bool))
                if method == "top-kast" and name in every:
                    keep = model.get_buffer(name + "_trained")
                total += float(parameter.grad.double().square().sum())
                active += float((parameter.grad * keep).double().square().sum())
            expected.append((active**0.5, total**0.5))

    trainer = trainer_of(tiny_llama, tmp_path, SparsityCallback(config), Measure(), max_grad_norm=0.1)
    trainer.train()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert logged == pytest.approx([active for active, _ in expected], rel=1e-4)
    assert all(active < 0.99 * total for active, total in expected), "the dense norm would be another number"
