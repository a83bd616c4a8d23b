"""Which way of training with zeros learns most? Every method on the same small language model, text and schedule.

    python examples/sparse_training.py --sparsity 0.9 --output sparse_training.json                # an hour on two cores
    python examples/sparse_training.py --methods static rigl --steps 300 --output sparse_training.json
    python examples/sparse_training.py --tiny

A GPT-2 that reads bytes (no tokenizer) is trained from scratch by a stock Trainer; the only line that differs from dense
training is ``callbacks=[SparsityCallback(config)]``. Initial weights and batches are the same for all methods of a seed,
the learning rate is not tuned for any. A method's masks are those of its defaults (hf_sparse/methods.py) at uniform
allocation, updated every ``--every`` steps; ``sr-ste`` trains 2:4, so 50%, whatever ``--sparsity`` says. What a method costs
is counted as the papers do, forward and backward; the plot shows validation loss against it.

Results are added to the JSON run by run, so an interrupted table goes on where it stopped.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

METHODS = ("dense", "static", "set", "rigl", "gmp", "granet", "srigl", "chts", "top-kast", "sr-ste")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    data = Path(__file__).resolve().parent / "data"
    add("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="default: all")
    add("--sparsity", type=float, default=0.9)
    add(
        "--text",
        nargs="+",
        type=Path,
        default=[data / "wikitext2_excerpt.txt"],
        help="training text; default: an excerpt",
    )
    add("--validation", type=Path, default=data / "wikitext2_test_excerpt.txt")
    add("--seeds", nargs="+", type=int, default=[0])
    add("--steps", type=int, default=1500)
    add("--every", type=int, default=50, help="optimizer steps between mask updates")
    add("--batch-size", type=int, default=32)
    add("--length", type=int, default=256, help="bytes of a sequence")
    add("--width", type=int, default=256)
    add("--layers", type=int, default=4)
    add("--learning-rate", type=float, default=1e-3)
    add("--compile", action="store_true", help="torch.compile, worth it for long runs on a GPU")
    add("--output", default="sparse_training.json")
    add("--tiny", action="store_true", help="a tiny model and a few steps: checks the program, measures nothing")
    arguments = parser.parse_args()
    for path in (*arguments.text, arguments.validation):
        if not path.is_file():
            parser.error(f"no such text file: {path}")
    if arguments.tiny:
        small = dict(steps=6, every=2, batch_size=2, length=32, width=32, layers=2, methods=["dense", "static", "rigl"])
        vars(arguments).update(small)

    from hf_sparse.atomic import atomic_write_text
    from hf_sparse.instruments import device_name, versions

    path = Path(arguments.output)
    content = json.loads(path.read_text()) if path.is_file() else {"runs": []}
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    settings["text"] = [path.name for path in arguments.text]
    settings["validation"] = arguments.validation.name
    content |= {"settings": settings, "device": device_name(device), "versions": versions()}
    content["command"] = " ".join(["python", "examples/sparse_training.py", *(Path(a).name for a in sys.argv[1:])])
    for seed in arguments.seeds:
        for method in arguments.methods:
            if any(run["method"] == method and run["seed"] == seed for run in content["runs"]):
                continue
            run = {"method": method, "seed": seed, **train(method, seed, arguments, device)}
            content["runs"].append(run)
            atomic_write_text(path, json.dumps(content, indent=1) + "\n")
            print(
                f"{method:9} seed {seed}: validation loss {run['loss']:.4f}, density {run['density']:.3f}, "
                f"FLOPs {run['flops_share']:.3f} of dense, {run['seconds']:.0f} s",
                flush=True,
            )
    print(table(content["runs"]))
    plot(content["runs"], path.with_suffix(".png"))


def train(method: str, seed: int, arguments, device) -> dict:
    """One training run: losses on held-out text, FLOPs, what the masks did."""
    from _bytes import ByteWindows
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

    from hf_sparse.callbacks import SparsityCallback

    set_seed(seed)
    shape = dict(n_layer=arguments.layers, n_embd=arguments.width, n_head=max(1, arguments.width // 64))
    dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    rest = dict(vocab_size=256, n_positions=arguments.length, bos_token_id=0, eos_token_id=0, use_cache=False)
    model = GPT2LMHeadModel(GPT2Config(**shape, **dropout, **rest, loss_type="ForCausalLM"))
    callbacks = [] if method == "dense" else [SparsityCallback(config_of(method, arguments, seed))]
    options = TrainingArguments(
        output_dir="unused",
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        warmup_steps=arguments.steps // 10,
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        adam_beta2=0.95,
        bf16=device.type == "cuda",
        torch_compile=arguments.compile,
        logging_steps=max(1, arguments.steps // 50),
        eval_strategy="steps",
        eval_steps=max(1, arguments.steps // 10),
        save_strategy="no",
        report_to=[],
        seed=seed,
        disable_tqdm=not sys.stderr.isatty(),
    )
    train_bytes = b"".join(path.read_bytes() for path in arguments.text)
    held_out = arguments.validation.read_bytes()[: 2000 if arguments.tiny else None]
    windows = ByteWindows(train_bytes, arguments.length), ByteWindows(held_out, arguments.length)
    trainer = Trainer(model, options, train_dataset=windows[0], eval_dataset=windows[1], callbacks=callbacks)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    loss = trainer.evaluate()["eval_loss"]
    logs = trainer.state.log_history
    last = [log for log in logs if "loss" in log][-1]
    spent = {log["step"]: log.get("flops_spent") for log in logs if "loss" in log}
    return {
        "loss": loss,
        "density": last.get("density", 1.0),
        "ever_active": last.get("ever_active"),
        "flops": last.get("flops_spent"),
        "flops_share": last["flops_spent"] / last["flops_dense"] if "flops_spent" in last else 1.0,
        "seconds": seconds,
        "curve": list(  # one entry a step: the last one is evaluated twice
            {
                log["step"]: {"step": log["step"], "loss": log["eval_loss"], "flops": spent.get(log["step"])}
                for log in logs
                if "eval_loss" in log
            }.values()
        ),
    }


def config_of(method: str, arguments, seed: int):
    from hf_sparse import SparsityConfig

    schedule = {} if method == "static" else {"every": 1 if method == "sr-ste" else arguments.every}
    sparsity = None if method == "sr-ste" else arguments.sparsity
    if method == "top-kast":  # gradients for twice as many weights as the forward pass uses
        schedule["backward_sparsity"] = max(0.0, 1.0 - 2.0 * (1.0 - arguments.sparsity))
    return SparsityConfig(method=method, sparsity=sparsity, schedule=schedule, allocation="uniform", seed=seed)


def table(runs: list[dict]) -> str:
    """Mean over seeds, best first."""
    lines = [f"{'method':10} {'loss':>8} {'spread':>8} {'density':>8} {'FLOPs':>7} {'ever active':>12}"]
    grouped = {}
    for run in runs:
        grouped.setdefault(run["method"], []).append(run)
    for method, same in sorted(grouped.items(), key=lambda item: statistics.mean(r["loss"] for r in item[1])):
        losses = [run["loss"] for run in same]
        ever = same[0]["ever_active"]
        lines.append(
            f"{method:10} {statistics.mean(losses):8.4f} {max(losses) - min(losses):8.4f} {same[0]['density']:8.3f} "
            f"{same[0]['flops_share']:7.3f} {'' if ever is None else f'{ever:.3f}':>12}"
        )
    return "\n".join(lines)


def plot(runs: list[dict], path: Path) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as pyplot
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'hf-sparse[plot]')", file=sys.stderr)
        return
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for place, run in enumerate(sorted(runs, key=lambda run: run["loss"])):
        axes.scatter(run["flops_share"], run["loss"], s=40, marker="os^Dv"[place % 5])
        axes.annotate(
            run["method"], (run["flops_share"], run["loss"]), xytext=(5, 4), textcoords="offset points", fontsize=8
        )
    axes.set(xlabel="training FLOPs as a share of dense", ylabel="validation loss (nats per byte)")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
