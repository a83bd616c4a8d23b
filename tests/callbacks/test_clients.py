"""Real clients: TRL's SFTTrainer with and without LoRA, and scripts of others that gain one line and nothing else.

The scripts are not in this repository. TRL's ``sft.py`` comes with the package; ``run_clm.py`` of transformers' examples is
not in any package, so its test runs where ``RUN_CLM`` names a copy.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_sparse.callbacks.sparsity import SparsityCallback
from hf_sparse.config import SparsityConfig
from hf_sparse.masks import Masks
from hf_sparse.pruning.prune import prune
from hf_sparse.targets import find_targets

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [f"The number {n} comes before the number {n + 1}." for n in range(64)]
ONE_LINE = (
    "callbacks=[__import__('hf_sparse.callbacks').callbacks.SparsityCallback("
    "{'method': 'rigl', 'sparsity': 0.75, 'schedule': {'every': 2}})],"
)


def sft_trainer(model, tokenizer, folder, *callbacks, peft_config=None, **arguments):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    defaults = {"max_steps": 6, "per_device_train_batch_size": 2, "save_strategy": "no", "learning_rate": 1e-2}
    defaults |= {"use_cpu": True, "bf16": False, "report_to": "none", "logging_steps": 1, "max_length": 64}
    args = trl.SFTConfig(output_dir=str(folder), disable_tqdm=True, **(defaults | arguments))
    given = {"train_dataset": Dataset.from_dict({"text": TEXTS}), "processing_class": tokenizer}
    return trl.SFTTrainer(model, args, callbacks=list(callbacks), peft_config=peft_config, **given)


def losses(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_lora_on_a_pruned_model_keeps_its_zeros(tiny_llama, tiny_tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    prune(tiny_llama, SparsityConfig(sparsity=0.5, saliency="magnitude"))
    frozen = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    arguments = {"save_strategy": "steps", "save_steps": 3}
    trainer = sft_trainer(
        tiny_llama, tiny_tokenizer, tmp_path, SparsityCallback(), peft_config=lora, seed=0, **arguments
    )
    adapters = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_" in n}
    trainer.train()
    assert len(Masks.attached(trainer.model)) == len(find_targets(trainer.model)) == 14
    base = trainer.model.get_base_model()
    for name, target in find_targets(base).items():
        assert torch.equal(base.get_parameter(name), frozen[target.plain[0]]), "frozen, zeros and all"
    assert all(not torch.equal(trainer.model.get_parameter(name), value) for name, value in adapters.items())
    assert all(entry["density"] == pytest.approx(0.5, abs=1e-3) for entry in losses(trainer))
    assert losses(trainer)[-1]["loss"] < losses(trainer)[0]["loss"]
    assert losses(trainer)[-1]["flops_spent"] > 0

    second = trainer_again(tiny_llama, frozen, tiny_tokenizer, tmp_path, lora, **arguments)
    for name, value in second.model.named_parameters():
        assert torch.equal(value, trainer.model.get_parameter(name)), f"{name}: resumed is not uninterrupted"


def trainer_again(model, frozen, tokenizer, folder, lora, **arguments):
    """Resumes where the adapters alone were saved; the zeros come with the base model."""
    from transformers import LlamaForCausalLM

    fresh = LlamaForCausalLM(model.config)
    fresh.load_state_dict(frozen)
    trainer = sft_trainer(fresh, tokenizer, folder, SparsityCallback(), peft_config=lora, seed=0, **arguments)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    return trainer


def test_rigl_in_sft(tiny_llama, tiny_tokenizer, tmp_path):
    config = SparsityConfig(method="rigl", sparsity=0.75, schedule={"every": 2, "end": 6})
    trainer = sft_trainer(tiny_llama, tiny_tokenizer, tmp_path, SparsityCallback(config))
    trainer.train()
    logged = losses(trainer)
    assert [entry["mask_updates"] for entry in logged] == [0, 1, 1, 2, 2, 2]  # none after the last step
    assert {"mean_token_accuracy", "density", "ever_active"} <= logged[-1].keys(), "TRL's own metrics and ours"
    assert logged[-1]["loss"] < logged[0]["loss"]
    for name, mask in Masks.attached(tiny_llama).items():
        assert not tiny_llama.get_parameter(name)[~mask].any()
    assert Masks.attached(tiny_llama).density() == pytest.approx(0.25, abs=1e-3)


def run_with_one_line(script: Path, after: str, folder: Path, *arguments: str) -> list[dict]:
    """Inserts the line behind the one that begins with ``after``, runs the script and returns its log."""
    lines = script.read_text(encoding="utf-8").splitlines(keepends=True)
    (position,) = [number for number, line in enumerate(lines) if line.strip() == after]
    indent = lines[position][: len(lines[position]) - len(lines[position].lstrip())]
    copy = folder / script.name
    copy.write_text(
        "".join([*lines[: position + 1], f"{indent}{ONE_LINE}\n", *lines[position + 1 :]]), encoding="utf-8"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(copy), *arguments, "--output_dir", str(folder / "out")]
    shared = ["--max_steps", "6", "--per_device_train_batch_size", "2", "--learning_rate", "1e-2", "--use_cpu"]
    shared += ["--logging_steps", "1", "--report_to", "none", "--save_steps", "6"]
    done = subprocess.run([*command, *shared], env=environment, capture_output=True, text=True, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    history = json.loads((folder / "out" / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def check_outcome(history: list[dict], folder: Path, dense: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    assert [entry["mask_updates"] for entry in history] == [0, 1, 1, 2, 2, 2]
    assert all(entry["density"] == pytest.approx(0.25, abs=1e-3) for entry in history)
    saved = load_file(folder / "out" / "model.safetensors")
    assert saved.keys() == load_file(dense / "model.safetensors").keys(), "a stock checkpoint"
    model = AutoModelForCausalLM.from_pretrained(folder / "out")
    weights = [model.get_parameter(name) for name in find_targets(model)]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros / sum(weight.numel() for weight in weights) == pytest.approx(0.75, abs=1e-3)
    assert json.loads((folder / "out" / "config.json").read_text())["hf_sparse"]["method"] == "rigl"


@pytest.mark.slow
def test_the_sft_script_of_trl_trains_sparse_by_one_more_line(tiny_model_dir, tmp_path):
    trl = pytest.importorskip("trl")
    script = Path(trl.__file__).parent / "scripts" / "sft.py"
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    arguments = ["--model_name_or_path", str(tiny_model_dir), "--dataset_name", str(data), "--bf16", "false"]
    arguments += ["--max_length", "64", "--dtype", "float32"]
    history = run_with_one_line(script, "args=training_args,", tmp_path, *arguments)
    check_outcome(history, tmp_path, tiny_model_dir)


@pytest.mark.slow
def test_run_clm_of_transformers_trains_sparse_by_one_more_line(
    tiny_model_dir, calibration_file, evaluation_file, tmp_path
):
    if "RUN_CLM" not in os.environ:
        pytest.skip("RUN_CLM names no copy of transformers' examples/pytorch/language-modeling/run_clm.py")
    pytest.importorskip("evaluate")
    arguments = ["--model_name_or_path", str(tiny_model_dir), "--train_file", str(calibration_file)]
    arguments += ["--validation_file", str(evaluation_file), "--block_size", "64", "--do_train"]
    history = run_with_one_line(Path(os.environ["RUN_CLM"]), "args=training_args,", tmp_path, *arguments)
    check_outcome(history, tmp_path, tiny_model_dir)
