"""FlopsCallback in a real Trainer: the budget in steps of known cost, alone, with masks, resumed, and over two processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_sparse.callbacks.flops import FlopsCallback
from hf_sparse.callbacks.sparsity import SparsityCallback
from hf_sparse.config import SparsityConfig
from hf_sparse.flops import FlopCounter, forward_flops, training_flops
from hf_sparse.targets import find_targets

BATCH, LENGTH = 2, 16


def rows(count: int = 64) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 300, (count, LENGTH), generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def trainer_of(model, folder, *callbacks, **arguments):
    from transformers import Trainer, TrainingArguments

    defaults = {"max_steps": 20, "per_device_train_batch_size": BATCH, "use_cpu": True, "save_strategy": "no"}
    defaults |= {"report_to": "none", "disable_tqdm": True, "logging_steps": 1, "learning_rate": 1e-3}
    args = TrainingArguments(output_dir=str(folder), **(defaults | arguments))
    return Trainer(model, args, train_dataset=rows(), eval_dataset=rows(4), callbacks=list(callbacks))


def step_cost(model, **densities) -> float:
    """One dense micro-batch."""
    return training_flops(forward_flops(model, {"input_ids": (BATCH, LENGTH)}), densities)


def logged(trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry and "loss" in entry]


def test_training_stops_at_the_first_step_that_reaches_the_budget(tiny_llama, tmp_path):
    cost = step_cost(tiny_llama)
    trainer = trainer_of(tiny_llama, tmp_path, FlopsCallback(4.5 * cost))
    trainer.train()
    assert trainer.state.global_step == 5
    assert logged(trainer, "flops") == pytest.approx([k * cost for k in range(1, 6)])
    assert logged(trainer, "flops_budget_left") == pytest.approx([1 - k / 4.5 for k in range(1, 5)] + [0.0])
    assert (tmp_path / "checkpoint-5").is_dir(), "it saves, also where the arguments save nothing"
    assert FlopCounter.attached(tiny_llama) is None and not tiny_llama._forward_pre_hooks


def test_the_budget_counts_every_micro_batch_and_no_evaluation(tiny_llama, tmp_path):
    cost = step_cost(tiny_llama)
    arguments = {"gradient_accumulation_steps": 3, "eval_strategy": "steps", "eval_steps": 1}
    trainer = trainer_of(tiny_llama, tmp_path, FlopsCallback(6 * cost), **arguments)
    trainer.train()
    assert trainer.state.global_step == 2 and logged(trainer, "flops") == pytest.approx([3 * cost, 6 * cost])


def test_a_large_budget_changes_nothing(tiny_llama, tmp_path):
    trainer = trainer_of(tiny_llama, tmp_path, FlopsCallback("1e30"), max_steps=3)
    trainer.train()
    assert trainer.state.global_step == 3 and not list(tmp_path.glob("checkpoint-*"))
    assert trainer.state.log_history[-1]["flops"] == pytest.approx(3 * step_cost(tiny_llama))


@pytest.mark.parametrize("flops_first", [True, False])
def test_a_sparse_model_takes_more_steps_for_the_same_budget(tiny_llama, tmp_path, flops_first):
    """At 75% static sparsity the pass costs 3 f_S, whichever callback comes first."""
    densities = dict.fromkeys(find_targets(tiny_llama), 0.25)
    dense, sparse = step_cost(tiny_llama), step_cost(tiny_llama, **densities)
    assert sparse < 0.6 * dense
    sparsity, flops = SparsityCallback(SparsityConfig(sparsity=0.75, method="static")), FlopsCallback(5 * dense)
    trainer = trainer_of(tiny_llama, tmp_path, *((flops, sparsity) if flops_first else (sparsity, flops)))
    trainer.train()
    assert trainer.state.global_step == int(5 * dense / sparse) + 1
    assert logged(trainer, "flops") == pytest.approx([k * sparse for k in range(1, trainer.state.global_step + 1)])
    assert logged(trainer, "flops_spent") == pytest.approx(logged(trainer, "flops"))


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_resumed_run_goes_on_counting(tiny_model, tmp_path, restore, sparse):
    """Three steps, then the rest in a new process's stead: as many as in one go, however the Trainer rebuilds callbacks."""

    def callbacks():
        masked = [SparsityCallback(SparsityConfig(sparsity=0.75, method="static"))] if sparse else []
        return [*masked, FlopsCallback(budget)]

    def one(folder, **arguments):
        arguments |= {"restore_callback_states_from_checkpoint": restore}
        return trainer_of(tiny_model("llama"), folder, *callbacks(), **arguments)

    budget = 6.5 * step_cost(tiny_model("llama")) * (0.5 if sparse else 1)
    whole = one(tmp_path / "whole")
    whole.train()
    one(tmp_path / "parts", max_steps=3, save_strategy="steps", save_steps=3).train()
    resumed = one(tmp_path / "parts")
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert resumed.state.global_step == whole.state.global_step > 5
    assert resumed.state.log_history[-1]["flops"] == pytest.approx(whole.state.log_history[-1]["flops"])


def test_a_run_that_has_spent_its_budget_does_not_resume(tiny_llama, tmp_path):
    cost = step_cost(tiny_llama)
    trainer_of(tiny_llama, tmp_path, FlopsCallback(2 * cost)).train()
    again = trainer_of(tiny_llama, tmp_path, FlopsCallback(2 * cost))
    with pytest.raises(ValueError, match=r"already spent: the run that resumes at step 2 .* give a larger budget"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    more = trainer_of(tiny_llama, tmp_path, FlopsCallback(4 * cost))
    more.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert more.state.global_step == 4


def test_a_checkpoint_without_the_callback_counts_by_the_trainers_estimate(tiny_llama, tmp_path, caplog):
    first = trainer_of(tiny_llama, tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    first.train()
    resumed = trainer_of(tiny_llama, tmp_path, FlopsCallback(1e30), max_steps=3, save_strategy="steps", save_steps=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "has no FlopsCallback" in caplog.text
    expected = first.state.total_flos + step_cost(tiny_llama)
    assert resumed.state.log_history[-1]["flops"] == pytest.approx(expected)
    saved = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["FlopsCallback"]["attributes"]["spent"] == pytest.approx(expected)


def test_the_counter_can_correct_the_trainers_total(tiny_llama, tmp_path):
    """``Trainer.floating_point_ops`` is the method to override; given the counter, ``total_flos`` is what was spent."""
    trainer = trainer_of(tiny_llama, tmp_path, FlopsCallback("1e30"), max_steps=2)
    trainer.floating_point_ops = FlopCounter.attached(tiny_llama)
    trainer.train()
    assert trainer.state.total_flos == pytest.approx(2 * step_cost(tiny_llama))


@pytest.mark.parametrize("budget", [0, -1e9, "many", None, float("nan"), "inf", True, [1e9]])
def test_a_budget_is_a_positive_number(budget):
    with pytest.raises(ValueError, match="budget is a positive number of FLOPs, such as 1.5e18"):
        FlopsCallback(budget)


def test_it_is_rebuilt_from_json():
    callback = FlopsCallback("1.5e18")
    callback.spent = 3e17
    again = FlopsCallback.from_state(json.loads(json.dumps(callback.state())))
    assert again.budget == 1.5e18 and again.spent == 3e17


def test_a_model_that_is_not_called_is_an_error(tiny_llama, tmp_path):
    """Some losses call the decoder and the head by themselves; counting zero would never end."""
    trainer = trainer_of(tiny_llama, tmp_path, FlopsCallback(1e12))
    trainer.compute_loss = lambda model, inputs, **kwargs: model.lm_head(model.model(inputs["input_ids"])[0]).sum()
    with pytest.raises(ValueError, match="no training step has called the model"):
        trainer.train()


def test_a_model_that_cannot_be_counted_fails_when_the_trainer_is_made(tiny_llama, tmp_path):
    tiny_llama.config.layer_types = ["indexed_attention"] * 2
    with pytest.raises(ValueError, match="LlamaForCausalLM: it has indexed_attention layers"):
        trainer_of(tiny_llama, tmp_path, FlopsCallback(1e12))


def test_trl_with_an_adapter(tiny_llama, tiny_tokenizer, tmp_path):
    """The budget in TRL's own trainer, which wraps the model for PEFT and has a loss of its own; rows of equal length."""
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
    args = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=9,
        per_device_train_batch_size=BATCH,
        use_cpu=True,
        bf16=False,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
    )
    trainer = trl.SFTTrainer(
        tiny_llama,
        args,
        train_dataset=datasets_of(rows()),
        processing_class=tiny_tokenizer,
        peft_config=peft.LoraConfig(r=4, target_modules=["q_proj"]),
        callbacks=[FlopsCallback("1e30")],
    )
    cost = FlopCounter.attached(trainer.model)({"input_ids": (BATCH, LENGTH)})
    frozen = FlopCounter.attached(trainer.model).frozen
    assert len(frozen) == 2 * 7 + 1 and cost < training_flops(forward_flops(trainer.model, {"input_ids": (2, 16)}), {})
    trainer.train()
    assert logged(trainer, "flops") == pytest.approx([k * cost for k in range(1, 10)])


def datasets_of(rows):
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows])


@pytest.mark.slow
def test_two_processes_share_one_budget(tmp_path):
    """DDP: every step costs both processes' batches, and both stop at the same step."""
    script = tmp_path / "train.py"
    here = Path(__file__)
    script.write_text(
        f"import os, pathlib, sys; sys.path[:0] = [{str(here.parents[1])!r}, {str(here.parents[2])!r}, {str(here.parent)!r}]\n"
        "from conftest import build_tiny_model\n"
        "from test_flops_callback import FlopsCallback, step_cost, trainer_of\n"
        "model = build_tiny_model('llama')\n"
        "cost = step_cost(model)\n"
        f"trainer = trainer_of(model, {str(tmp_path / 'out')!r}, FlopsCallback(13 * cost), ddp_backend='gloo', "
        "logging_steps=4)\n"
        "trainer.train()\n"
        "result = f\"{trainer.state.global_step} {trainer.state.log_history[-1]['flops'] / cost}\"\n"
        f"pathlib.Path({str(tmp_path)!r}, 'rank' + os.environ['RANK']).write_text(result)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    results = [path.read_text().split() for path in tmp_path.glob("rank*")]  # two ranks share one standard output
    assert len(results) == 2, done.stderr[-3000:]
    assert all(int(steps) == 7 and float(spent) == pytest.approx(14) for steps, spent in results)
