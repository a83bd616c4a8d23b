"""One training run of the SPDF example: the Trainer, compiled on a GPU, and the loss along training FLOPs."""

import sys
import time
from pathlib import Path

import torch
from transformers import AttentionInterface, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_sparse.flops import FlopCounter
from hf_sparse.instruments import device_name, versions
from hf_sparse.targets import find_targets

__all__ = ["first", "measured_sparsity", "run"]


def run(arguments, model, train, validation, callbacks: list, recipe: dict, what: str) -> dict:
    """One Trainer run; returns losses along training FLOPs, seconds, FLOPs, versions."""
    # An attention function that is not transformers' own gets no mask. Nothing here is padded on the left, so none is
    # needed, and without one (transformers makes it whenever it is traced) compiled attention is the flash kernel.
    AttentionInterface.register("causal_sdpa", sdpa_attention_forward)
    model.set_attn_implementation("causal_sdpa")
    model.config.use_cache = False
    model.loss_type = "ForCausalLM"  # what it falls back to, with a warning that would break the compiled graph in two
    counter = FlopCounter.attach(model)
    curve = []

    class Curve(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            curve.append({"step": state.global_step, "flops": counter.spent, "loss": metrics["eval_loss"]})

    on_gpu = torch.cuda.is_available() and not arguments.cpu
    settings = dict(
        output_dir=str(arguments.output / ".trainer"),
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        max_grad_norm=1.0,
        bf16=on_gpu,
        torch_compile=on_gpu,
        use_cpu=not on_gpu,
        save_strategy="no",
        eval_strategy="steps",
        logging_steps=50,
        report_to="none",
        prediction_loss_only=True,
        logging_nan_inf_filter=False,  # it would wait for the device at every step
        disable_tqdm=not sys.stderr.isatty(),
    )
    print(what, flush=True)
    torch.compiler.reset()  # a new model; kernels compiled for the same shapes are found in the cache on disk
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**settings | recipe),
        train_dataset=train,
        eval_dataset=validation,
        callbacks=[*callbacks, Curve()],
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    if not curve or curve[-1]["step"] != trainer.state.global_step:
        trainer.evaluate()
    FlopCounter.detach(model)
    print(f"{what}: loss {curve[-1]['loss']:.4f} after {seconds:.0f} s and {counter.spent:.3g} FLOPs", flush=True)
    return {
        "loss": curve[-1]["loss"],
        "flops": counter.spent,
        "flops_dense": counter.dense,
        "steps": trainer.state.global_step,
        "seconds": seconds,
        "curve": curve,
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "recipe": {name: str(value) if isinstance(value, Path) else value for name, value in recipe.items()},
        "device": device_name(torch.device("cuda" if on_gpu else "cpu")),
        "versions": versions(),
        "command": " ".join(["python", "examples/spdf.py", *(Path(word).name for word in sys.argv[1:])]),
    }


def measured_sparsity(model) -> float:
    """The share of zeros in all weights that SPDF sparsifies: the four matrices of a block (GPT-2 fuses q, k and v)."""
    weights = [model.get_parameter(name) for name in find_targets(model)]
    return 1.0 - sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)


def first(examples, count: int):
    return torch.utils.data.Subset(examples, range(min(count, len(examples))))
