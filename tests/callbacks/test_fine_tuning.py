"""TRL's SFTTrainer put together for pruned models: what trains, what stays zero, what comes out."""

import copy

import pytest
import torch

from hf_sparse import SparsityConfig, prune
from hf_sparse.callbacks import DistillationLoss, SparsityCallback, plain_model, sft_trainer

pytest.importorskip("trl")


@pytest.fixture
def settings(tmp_path):
    from trl import SFTConfig

    return SFTConfig(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True, save_strategy="no",
        report_to=[], bf16=False, disable_tqdm=True, logging_steps=1, gradient_checkpointing=False,
    )  # fmt: skip


@pytest.fixture
def rows():
    import datasets

    return datasets.Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"What is {n} and 1?"}],
                "completion": [{"role": "assistant", "content": f"{n + 1}"}],
                "source": "model",
                "settings": "{}",
            }
            for n in range(6)
        ]
    )


@pytest.fixture
def sparse(tiny_model):
    model = tiny_model("llama")
    prune(model, SparsityConfig(sparsity=0.5, saliency="magnitude"))
    return model


def zeros(model) -> dict[str, torch.Tensor]:
    linears = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in name}
    return {name: module.weight == 0 for name, module in linears.items()}


@pytest.mark.parametrize("adapter", [None, "lora"])
def test_a_pruned_model_learns_and_keeps_its_zeros(sparse, rows, settings, tiny_tokenizer, adapter):
    before, start = zeros(sparse), copy.deepcopy(sparse.state_dict())
    trainer = sft_trainer(sparse, settings, rows, processing_class=tiny_tokenizer, adapter=adapter)
    trainer.train()
    model = plain_model(trainer)
    assert type(model).__name__ == "LlamaForCausalLM" and model.config.use_cache and not model.training
    after = zeros(model)
    assert after.keys() == before.keys() and all(bool((after[name] >= mask).all()) for name, mask in before.items())
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, start[name])]
    assert any("down_proj" in name for name in moved)
    assert (adapter is None) == any("norm" in name for name in moved)


def test_a_dense_model_gets_no_mask(tiny_llama, rows, settings, tiny_tokenizer):
    trainer = sft_trainer(tiny_llama, settings, rows, processing_class=tiny_tokenizer)
    assert not any(isinstance(callback, SparsityCallback) for callback in trainer.callback_handler.callbacks)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0


def test_only_the_completion_is_trained_on(tiny_llama, rows, settings, tiny_tokenizer):
    trainer = sft_trainer(tiny_llama, settings, rows, processing_class=tiny_tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    counted = tiny_tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100])
    assert "What" not in counted and counted.strip()[:1].isdigit()


def test_a_teacher(sparse, tiny_model, rows, settings, tiny_tokenizer):
    loss = DistillationLoss(squarehead=1.0, kl=0.5)
    trainer = sft_trainer(
        sparse, settings, rows, processing_class=tiny_tokenizer, teacher=tiny_model("llama"), distillation=loss
    )
    before = zeros(sparse)
    trainer.train()
    assert {"ce", "squarehead", "kl"} <= set(trainer.state.log_history[0])
    assert all(bool((after >= before[name]).all()) for name, after in zeros(plain_model(trainer)).items())


def test_errors(sparse, rows, settings, tiny_tokenizer):
    with pytest.raises(ValueError, match="distillation needs a teacher"):
        sft_trainer(sparse, settings, rows, processing_class=tiny_tokenizer, distillation=DistillationLoss())
    with pytest.raises(ValueError, match="adapter is None, 'lora' or a peft.LoraConfig; got 'dora'"):
        sft_trainer(sparse, settings, rows, processing_class=tiny_tokenizer, adapter="dora")
    with pytest.raises(ValueError, match="the dataset has the columns source, settings"):
        sft_trainer(sparse, settings, rows.remove_columns(["prompt", "completion"]), processing_class=tiny_tokenizer)
