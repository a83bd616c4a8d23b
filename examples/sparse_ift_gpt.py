"""Sparse Wide GPT-2 (Sparse-IFT, arXiv 2303.11525): is a wider sparse model better than a dense one of the same FLOPs?

    python examples/sparse_ift_gpt.py --text TRAIN.txt --validation TEST.txt --output sparse_ift_gpt.json    # minutes on a GPU
    python examples/sparse_ift_gpt.py --runs dense wide75-rigl-layer --steps 500 --output sparse_ift_gpt.json
    python examples/sparse_ift_gpt.py --tiny                                                                 # seconds on a CPU

A GPT-2 that reads bytes is trained from scratch by a stock Trainer, dense and in four sparse versions of larger width: 50%
zeros in a fixed random mask, 75% moved by RigL, each under two budgets. ``layer``: every linear layer costs what it did, as
in the paper; attention, head and embeddings grow with the width, so the whole model costs more. ``model``: the sparsity is
raised until the forward pass as a whole costs what the dense one does. Learning rate, schedule, batches and tokens are the
same for all. Widths are rounded up so that heads are multiples of 8 (256 -> 384 and 512), and the sparsity with them: 55.6%
instead of 50%. RigL as in Cerebras' recipe for this model: 30% dropped, cosine, until 80% of training.

The plot shows perplexity (per byte) against training FLOPs. Runs are added to the JSON one by one and skipped if there.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

RUNS = {  # name -> sparsity, method, budget
    "dense": None,
    "wide50-static-layer": (0.5, "static", "layer"),
    "wide50-static-model": (0.5, "static", "model"),
    "wide75-rigl-layer": (0.75, "rigl", "layer"),
    "wide75-rigl-model": (0.75, "rigl", "model"),
}
DATA = Path(__file__).resolve().parent / "data"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="default: all")
    add(
        "--text",
        nargs="+",
        type=Path,
        default=[DATA / "wikitext2_excerpt.txt"],
        help="training text; default: an excerpt",
    )
    add("--validation", type=Path, default=DATA / "wikitext2_test_excerpt.txt")
    add("--width", type=int, default=256, help="of the dense model; default: %(default)s")
    add("--heads", type=int, default=4, help="default: %(default)s")
    add("--layers", type=int, default=6, help="default: %(default)s")
    add("--length", type=int, default=256, help="bytes of a sequence; default: %(default)s")
    add("--batch", type=int, default=64, help="sequences per step; default: %(default)s")
    add("--steps", type=int, default=2000, help="default: %(default)s")
    add("--every", type=int, default=50, help="steps between RigL's updates; default: %(default)s")
    add("--learning-rate", type=float, default=1e-3, help="default: %(default)s")
    add("--seeds", nargs="+", type=int, default=[0])
    add("--output", type=Path, default=Path("sparse_ift_gpt.json"), help="JSON; the plot lies beside it as .png")
    add("--tiny", action="store_true", help="a tiny model and a few steps: checks the program, measures nothing")
    arguments = parser.parse_args()
    if arguments.tiny:
        vars(arguments).update(width=64, heads=2, layers=2, length=32, batch=2, steps=8, every=2)
    for path in (*arguments.text, arguments.validation):
        if not path.is_file():
            parser.error(f"no such text file: {path}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    import torch

    from hf_sparse.atomic import atomic_write_text
    from hf_sparse.instruments import device_name, versions

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    content = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {"runs": []}
    settings = {
        name: value for name, value in vars(arguments).items() if name not in ("runs", "output", "text", "validation")
    }
    settings |= {"text": [path.name for path in arguments.text], "validation": arguments.validation.name}
    before = {name: value for name, value in content.get("settings", settings).items() if name != "seeds"}
    if content["runs"] and before != {name: value for name, value in settings.items() if name != "seeds"}:
        sys.exit(f"{arguments.output} holds runs of other settings; give another --output")
    content |= {"settings": settings, "device": device_name(device), "versions": versions()}
    content["command"] = " ".join(["python", "examples/sparse_ift_gpt.py", *(Path(word).name for word in sys.argv[1:])])
    for seed in arguments.seeds:
        for name in arguments.runs:
            if any((run["name"], run["seed"]) == (name, seed) for run in content["runs"]):
                continue
            run = {"name": name, "seed": seed, **train(RUNS[name], seed, arguments, device)}
            content["runs"].append(run)
            atomic_write_text(arguments.output, json.dumps(content, indent=1) + "\n")
            print(
                f"{name:20} seed {seed}: perplexity {run['perplexity']:.4f} a byte, width {run['width']}, sparsity "
                f"{run['sparsity']:.4f}, {run['flops']:.4g} training FLOPs, {run['seconds']:.0f} s",
                flush=True,
            )
    plot(content["runs"], arguments.output.with_suffix(".png"))


def train(what: tuple | None, seed: int, arguments, device) -> dict:
    """One run: perplexity along training FLOPs."""
    import torch
    from _bytes import ByteWindows
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

    from hf_sparse.callbacks import SparsityCallback
    from hf_sparse.flops import FlopCounter
    from hf_sparse.models.ift import sparse_ift

    set_seed(seed)
    shape = dict(n_embd=arguments.width, n_head=arguments.heads, n_layer=arguments.layers, n_positions=arguments.length)
    plain = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, loss_type="ForCausalLM", **shape, **plain))
    callbacks, report = [], None
    if what is not None:
        sparsity, method, budget = what
        schedule = {} if method == "static" else {"every": arguments.every, "end": 0.8, "drop_fraction": 0.3}
        inputs = {"input_ids": (1, arguments.length)}
        report = sparse_ift(
            model,
            "wide",
            sparsity,
            method=method,
            schedule=schedule,
            budget=budget,
            inputs=inputs,
            head_multiple=8,
            seed=seed,
        )
        print(report, flush=True)
        callbacks = [SparsityCallback(report.config)]
    counter, curve = FlopCounter.attach(model), []

    class Curve(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            perplexity = math.exp(metrics["eval_loss"])
            curve.append({"step": state.global_step, "flops": counter.spent, "perplexity": perplexity})

    on_gpu = device.type == "cuda"
    options = TrainingArguments(
        output_dir="unused",
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch,
        per_device_eval_batch_size=arguments.batch,
        learning_rate=arguments.learning_rate,
        warmup_steps=arguments.steps // 10,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=on_gpu,
        torch_compile=on_gpu,
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        logging_steps=max(1, arguments.steps // 20),
        logging_nan_inf_filter=False,  # it would wait for the device at every step
        eval_strategy="steps",
        eval_steps=max(1, arguments.steps // 10),
        prediction_loss_only=True,
        save_strategy="no",
        report_to=[],
        seed=seed,
        disable_tqdm=not sys.stderr.isatty(),
    )
    texts = b"".join(path.read_bytes() for path in arguments.text), arguments.validation.read_bytes()
    held_out = texts[1][: 4096 if arguments.tiny else None]
    windows = ByteWindows(texts[0], arguments.length), ByteWindows(held_out, arguments.length)
    torch.compiler.reset()
    trainer = Trainer(
        model, options, train_dataset=windows[0], eval_dataset=windows[1], callbacks=[*callbacks, Curve()]
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    return {
        "perplexity": curve[-1]["perplexity"],
        "width": model.config.n_embd,
        "sparsity": report.sparsity if report else 0.0,
        "budget": report.budget if report else None,
        "forward_ratio": report.ratio if report else 1.0,
        "layer_ratio": report.layer_ratio if report else 1.0,
        "flops": curve[-1]["flops"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "nonzero": sum(int(parameter.count_nonzero()) for parameter in model.parameters()),
        "seconds": seconds,
        "curve": curve,
    }


def plot(runs: list[dict], path: Path) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as pyplot
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'hf-sparse[plot]')", file=sys.stderr)
        return
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    colors = dict(zip(RUNS, ("black", "#7ea6d8", "#2f6db5", "#e2a36b", "#c2571a"), strict=True))
    seen = set()
    for run in runs:
        label = None if run["name"] in seen else run["name"]
        seen.add(run["name"])
        style = "--" if run["budget"] == "layer" else "-"
        points = [point for point in run["curve"] if point["step"] > 0]
        axes.plot(
            [point["flops"] for point in points],
            [point["perplexity"] for point in points],
            style,
            color=colors[run["name"]],
            label=label,
        )
    axes.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="perplexity a byte, held-out text")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
