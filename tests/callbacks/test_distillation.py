"""Distillation inside the real Trainer and TRL's SFTTrainer, on a CPU."""

import copy
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_sparse.callbacks.distillation import DistillationLoss, DistillationMixin, DistillationTrainer
from hf_sparse.config import SparsityConfig
from hf_sparse.distillation.losses import kl_divergence, predicts_label, squarehead
from hf_sparse.pruning.prune import prune

ROOT = Path(__file__).resolve().parents[2]


def rows(count: int = 16, lengths: tuple[int, ...] = (12,)) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(count):
        ids = torch.randint(3, 320, (lengths[number % len(lengths)],), generator=generator)
        made.append({"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)})
    return made


def padded(features: list[dict]) -> dict:
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {
        name: torch.nn.utils.rnn.pad_sequence([f[name] for f in features], batch_first=True, padding_value=value)
        for name, value in fill.items()
    }


def arguments(path, **changes) -> TrainingArguments:
    settings = {
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.0,
        "logging_steps": 1,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    return TrainingArguments(output_dir=str(path), **(settings | changes))


def gradients_of(trainer) -> dict[str, torch.Tensor]:
    """The gradient of one optimizer step, as the Trainer makes it."""
    seen = {}

    class Keep(torch.optim.SGD):
        def step(self, closure=None):
            seen.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})

    trainer.optimizer = Keep(trainer.model.parameters(), lr=0.0)
    trainer.train()
    return seen


def test_the_loss_is_the_sum_of_its_parts_and_they_are_logged(tiny_model, tmp_path):
    student, teacher = tiny_model("llama"), tiny_model("llama", seed=1)
    weights = DistillationLoss(ce=0.5, squarehead=2.0, kl=3.0, temperature=2.0)
    data = rows(4)
    trainer = DistillationTrainer(
        student, arguments(tmp_path), train_dataset=data, data_collator=padded, teacher=teacher, distillation=weights
    )
    trainer.train()
    batch = padded(data)
    with torch.no_grad():
        ours = student(**batch, output_hidden_states=True)
        theirs = teacher(**batch, output_hidden_states=True)
    expected = {
        "ce": ours.loss,
        "squarehead": squarehead(ours.hidden_states, theirs.hidden_states, batch["attention_mask"]),
        "kl": kl_divergence(ours.logits, theirs.logits, predicts_label(batch["labels"]), temperature=2.0),
    }
    logged = trainer.state.log_history[0]
    for name, value in expected.items():
        assert logged[name] == pytest.approx(value.item(), rel=1e-4), name
    assert logged["loss"] == pytest.approx(0.5 * logged["ce"] + 2 * logged["squarehead"] + 3 * logged["kl"], rel=1e-4)


def test_reporters_see_the_parts(tiny_llama, tmp_path):
    from transformers import TrainerCallback

    reported = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            reported.append(dict(logs))

    trainer = DistillationTrainer(
        tiny_llama,
        arguments(tmp_path, max_steps=4, logging_steps=2),
        train_dataset=rows(),
        data_collator=padded,
        callbacks=[Reporter()],
        teacher=copy.deepcopy(tiny_llama),
    )
    trainer.train()
    assert [{"ce", "squarehead"} <= set(logs) for logs in reported] == [
        True,
        True,
        False,
    ]  # the last is the run's summary
    assert reported[0]["loss"] == pytest.approx(reported[0]["ce"], rel=1e-4) and reported[0]["squarehead"] == 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_equal_models_add_no_gradient(tiny_model, tmp_path, checkpointing):
    settings = arguments(tmp_path, gradient_checkpointing=checkpointing, max_grad_norm=0)
    plain, distilled = tiny_model("llama"), tiny_model("llama")
    data = rows(4)
    expected = gradients_of(Trainer(plain, settings, train_dataset=data, data_collator=padded))
    trainer = DistillationTrainer(
        distilled,
        settings,
        train_dataset=data,
        data_collator=padded,
        teacher=copy.deepcopy(distilled),
        distillation=DistillationLoss(kl=1.0),
    )
    got = gradients_of(trainer)
    assert expected.keys() == got.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in trainer.teacher.parameters())
    assert not trainer.teacher.training


def test_micro_batches_of_different_sizes_add_up(tiny_model, tmp_path):
    """Cross entropy and KL are sums over the step's labels: one batch of 4, or 2 of 2 with other lengths, is the same."""
    data, got = rows(4, lengths=(5, 12, 9, 20)), []
    for size, accumulated in ((4, 1), (2, 2)):
        settings = arguments(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
            max_grad_norm=0,
            train_sampling_strategy="sequential",
        )
        trainer = DistillationTrainer(
            tiny_model("llama"),
            settings,
            train_dataset=data,
            data_collator=padded,
            teacher=tiny_model("llama", seed=1),
            distillation=DistillationLoss(squarehead=0, kl=1.0),
        )
        got.append((gradients_of(trainer), trainer.state.log_history[0]))
    (whole, first), (parts, second) = got
    assert second["kl"] == pytest.approx(first["kl"], rel=1e-5)
    assert second["ce"] == pytest.approx(first["ce"], rel=1e-5)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-6)


def test_squarehead_is_averaged_over_micro_batches(tiny_model, tmp_path):
    data, logged = rows(4), []
    for size, accumulated in ((2, 2), (2, 1)):
        trainer = DistillationTrainer(
            tiny_model("llama"),
            arguments(
                tmp_path,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulated,
                max_steps=1 if accumulated == 2 else 2,
                logging_steps=1 if accumulated == 2 else 2,
                train_sampling_strategy="sequential",
            ),
            train_dataset=data,
            data_collator=padded,
            teacher=tiny_model("llama", seed=1),
        )
        trainer.train()
        logged.append(trainer.state.log_history[0])
    for name in ("squarehead", "ce", "loss"):
        assert logged[0][name] == pytest.approx(logged[1][name], rel=1e-5)


def test_a_pruned_model_comes_closer_to_its_parent(tiny_model, tmp_path):
    dense = tiny_model("llama")
    student = copy.deepcopy(dense)
    prune(student, SparsityConfig(sparsity=0.5, saliency="magnitude"))
    trainer = DistillationTrainer(
        student,
        arguments(tmp_path, max_steps=30, learning_rate=3e-3, logging_steps=10),
        train_dataset=rows(),
        data_collator=padded,
        teacher=dense,
        distillation=DistillationLoss(ce=0, kl=1.0),
    )
    trainer.train()
    history = [logs for logs in trainer.state.log_history if "squarehead" in logs]
    assert history[-1]["squarehead"] < 0.7 * history[0]["squarehead"]
    assert history[-1]["kl"] < 0.7 * history[0]["kl"]


def test_with_fixed_zeros(tiny_model, tmp_path):
    """The paper's recipe: the pruned model keeps its zeros while it learns from its dense parent."""
    from hf_sparse.callbacks.sparsity import SparsityCallback

    dense = tiny_model("llama")
    student = copy.deepcopy(dense)
    prune(student, SparsityConfig(sparsity=0.5, saliency="magnitude"))
    before = {name: parameter.clone() for name, parameter in student.named_parameters()}
    parent = {name: parameter.clone() for name, parameter in dense.named_parameters()}
    trainer = DistillationTrainer(
        student,
        arguments(tmp_path, max_steps=6, learning_rate=3e-3, logging_steps=3),
        train_dataset=rows(),
        data_collator=padded,
        callbacks=[SparsityCallback()],
        teacher=dense,
        distillation=DistillationLoss(kl=1.0),
    )
    trainer.train()
    for name, parameter in student.named_parameters():
        assert not parameter[before[name] == 0].any(), name
        assert not torch.equal(parameter, before[name]), name
    assert all(torch.equal(parameter, parent[name]) for name, parameter in dense.named_parameters())
    assert {"ce", "squarehead", "kl", "density"} <= set(trainer.state.log_history[0])
    assert set(student.state_dict()) == set(dense.state_dict())


def test_evaluation_is_the_plain_loss(tiny_model, tmp_path):
    model, data = tiny_model("llama"), rows(4)
    plain = Trainer(model, arguments(tmp_path), eval_dataset=data, data_collator=padded).evaluate()["eval_loss"]
    trainer = DistillationTrainer(
        model,
        arguments(tmp_path, eval_strategy="steps", eval_steps=1),
        train_dataset=data,
        eval_dataset=data,
        data_collator=padded,
        teacher=tiny_model("llama", seed=1),
    )
    trainer.train()
    evaluated = next(logs for logs in trainer.state.log_history if "eval_loss" in logs)
    assert evaluated["eval_loss"] == pytest.approx(plain, rel=1e-5) and "squarehead" not in evaluated


def test_bf16_autocast(tiny_model, tmp_path):
    trainer = DistillationTrainer(
        tiny_model("llama"),
        arguments(tmp_path, bf16=True),
        train_dataset=rows(4),
        data_collator=padded,
        teacher=tiny_model("llama").bfloat16(),
        distillation=DistillationLoss(kl=1.0),
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["squarehead"] < 1e-3 and abs(logged["kl"]) < 1e-3


def test_the_teacher_by_name(tiny_model_dir, tiny_llama, tmp_path):
    trainer = DistillationTrainer(
        tiny_llama, arguments(tmp_path), train_dataset=rows(4), data_collator=padded, teacher=str(tiny_model_dir)
    )
    trainer.train()
    assert trainer.state.log_history[0]["squarehead"] == 0  # tiny_model_dir holds the same weights


def test_what_cannot_work_is_said_at_once(tiny_model, tmp_path):
    model, settings = tiny_model("llama"), arguments(tmp_path)

    def build(teacher, **loss):
        distillation = DistillationLoss(**loss)
        return DistillationTrainer(model, settings, data_collator=padded, teacher=teacher, distillation=distillation)

    with pytest.raises(ValueError, match="the teacher is the model in training"):
        build(model)
    with pytest.raises(ValueError, match="has 2 layers, teacher LlamaForCausalLM has 3; say which"):
        build(tiny_model("llama", num_hidden_layers=3))
    build(tiny_model("llama", num_hidden_layers=3), layers=((1, 1), (2, 3)))
    with pytest.raises(ValueError, match="has width 64, teacher LlamaForCausalLM has 32"):
        build(tiny_model("llama", hidden_size=32))
    build(tiny_model("llama", hidden_size=32), squarehead=0, kl=1.0)
    with pytest.raises(ValueError, match="320 tokens, the teacher LlamaForCausalLM has 300.*padded to different sizes"):
        build(tiny_model("llama", vocab_size=300), kl=1.0)
    with pytest.raises(ValueError, match="vocabulary=301, but student LlamaForCausalLM has 320 tokens and teacher"):
        build(tiny_model("llama", vocab_size=300), kl=1.0, vocabulary=301)
    build(tiny_model("llama", vocab_size=300), kl=1.0, vocabulary=290)
    with pytest.raises(ValueError, match="nothing is distilled"):
        DistillationLoss(squarehead=0)
    with pytest.raises(ValueError, match="weight kl is not negative, got -1"):
        DistillationLoss(kl=-1)


@pytest.mark.parametrize("how", ["reentrant", "non-reentrant", "compiled"])
def test_gradients_under_checkpointing_and_compile(tiny_model, tmp_path, how):
    """Where activations are recomputed or the model is compiled, SquareHead still trains every layer."""
    changes = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    if how != "compiled":
        use_reentrant = {"use_reentrant": how == "reentrant"}
        changes = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": use_reentrant}
    got = []
    for more in ({}, changes):
        trainer = DistillationTrainer(
            tiny_model("llama", num_hidden_layers=4),
            arguments(tmp_path, max_grad_norm=0, train_sampling_strategy="sequential", **more),
            train_dataset=rows(4),
            data_collator=padded,
            teacher=tiny_model("llama", num_hidden_layers=4, seed=1),
            distillation=DistillationLoss(ce=0, kl=1.0),
        )
        got.append(gradients_of(trainer))
    assert got[0].keys() == got[1].keys()
    for name in got[0]:
        torch.testing.assert_close(got[1][name], got[0][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("peft", [False, True])
def test_sft_trainer(tiny_model, tiny_tokenizer, tmp_path, peft):
    """TRL builds no logits; the parts are the same as those of the full logits."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")

    class DistillationSFTTrainer(DistillationMixin, trl.SFTTrainer):
        pass

    pairs = [{"prompt": f"Number {n}?", "completion": f" It is {n * n}."} for n in range(4)]
    settings = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        learning_rate=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    student, teacher = tiny_model("llama"), tiny_model("llama", seed=1)
    extra = {}
    if peft:
        from peft import LoraConfig

        extra["peft_config"] = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = DistillationSFTTrainer(
        student,
        settings,
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=tiny_tokenizer,
        teacher=teacher,
        distillation=DistillationLoss(kl=1.0),
        **extra,
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    with torch.no_grad():
        ours = student(**batch, output_hidden_states=True)
        theirs = teacher(**batch, output_hidden_states=True)
    error = squarehead(ours.hidden_states, theirs.hidden_states, batch["attention_mask"])
    divergence = kl_divergence(ours.logits, theirs.logits, predicts_label(batch["labels"]))
    assert logged["ce"] == pytest.approx(ours.loss.item(), rel=1e-4)
    assert logged["squarehead"] == pytest.approx(error.item(), rel=1e-4)
    assert logged["kl"] == pytest.approx(divergence.item(), rel=1e-4)
    assert logged["loss"] == pytest.approx(logged["ce"] + logged["squarehead"] + logged["kl"], rel=1e-4)
    assert "mean_token_accuracy" in logged  # TRL's own are still there


@pytest.mark.slow
def test_two_ranks_are_one_with_both_batches(tmp_path):
    """DDP: gradients of cross entropy and KL on two ranks equal those of one process with the whole batch."""
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, torch
            sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests", sys.argv[1] + "/tests/callbacks"]
            from conftest import build_tiny_model
            from test_distillation import arguments, padded, rows
            from hf_sparse.callbacks.distillation import DistillationLoss, DistillationTrainer

            size, out = int(sys.argv[2]), sys.argv[3]
            settings = arguments(out, per_device_train_batch_size=size, train_sampling_strategy="sequential", max_steps=2,
                                 learning_rate=0.1, optim="sgd", ddp_backend="gloo" if size == 2 else None)
            trainer = DistillationTrainer(
                build_tiny_model("llama"), settings, train_dataset=rows(8, (5, 12, 9, 20)), data_collator=padded,
                teacher=build_tiny_model("llama", seed=1), distillation=DistillationLoss(squarehead=0, kl=1.0))
            trainer.train()
            if trainer.is_world_process_zero():
                weights = trainer.accelerator.unwrap_model(trainer.model).state_dict()
                torch.save((weights, trainer.state.log_history), sys.argv[4])
            """
        )
    )
    results = []
    for ranks, size in ((1, 4), (2, 2)):
        saved = tmp_path / f"ranks{ranks}.pt"
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if ranks == 2 else []
        command = [sys.executable, *launch, str(script), str(ROOT), str(size), str(tmp_path / "out"), str(saved)]
        done = subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(torch.load(saved, weights_only=False))
    (one, history), (two, other) = results
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6)
    assert other[0]["kl"] == pytest.approx(history[0]["kl"], rel=1e-4)
    assert other[0]["loss"] == pytest.approx(other[0]["ce"] + other[0]["kl"], rel=1e-4)
