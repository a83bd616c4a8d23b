"""What brings a pruned model back? Fine-tuning with fixed zeros: alone, with the dense parent as teacher, through adapters.

    python examples/sparse_finetuning.py --model MODEL --data valid.txt --text test.txt --device cuda --output results.json
    python examples/sparse_finetuning.py --model MODEL --data gsm8k_train.jsonl --runs masks masks+squarehead --sparsity 0.7
    python examples/sparse_finetuning.py --tiny --model DIR

The model is pruned once (SparseGPT), then fine-tuned in one way after the other, always from the same pruned weights:

    masks                    every kept weight is trained, zeros stay:  Trainer(..., callbacks=[SparsityCallback()])
    masks+squarehead         also pulled to the dense parent's hidden states, layer by layer (arXiv 2310.06927)
    masks+kl                 also to its predictions; masks+squarehead+kl to both
    masked-lora              LoRA under the mask: small, merges without filling a zero
    shira                    as few single kept weights are trained as LoRA has parameters (arXiv 2406.13175)
    dense                    the dense parent fine-tuned alike, which says what the data itself is worth

Perplexity is exp(mean loss) over the labelled tokens of held-out text: windows of --text; or, where --data holds JSON rows
with "question" and "answer" (or "prompt" and "completion"), the answers of every tenth row, which are not trained on. Only
answers are labelled there. Density is the share of nonzero weights among the layers that were pruned; it must not change.
Results are added to the JSON one by one, so an interrupted table continues where it stopped.
"""

import argparse
import copy
import json
import math
import sys
import tempfile
import time
from pathlib import Path

RUNS = ["masks", "masks+squarehead", "masks+kl", "masks+squarehead+kl", "masked-lora", "shira", "dense"]
METHODS = ("masks", "masked-lora", "shira", "dense")
FIELDS = (("question", "answer", "Question: {}\nAnswer: "), ("prompt", "completion", "{}"))


def parse_run(text: str) -> tuple[str, list[str]]:
    """``masks+squarehead`` -> (masks, [squarehead])."""
    method, *losses = text.split("+")
    if method not in METHODS or set(losses) - {"squarehead", "kl"}:
        raise ValueError(f"a run is one of {', '.join(METHODS)}, then +squarehead, +kl or both; got {text!r}")
    if method == "dense" and losses:
        raise ValueError(f"the dense model is its own teacher; {text!r} would learn nothing from it")
    return method, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(__file__).resolve().parent / "data"
    excerpt, test = str(data / "wikitext2_excerpt.txt"), str(data / "wikitext2_test_excerpt.txt")
    parser.add_argument("--model", required=True, help="Hub id, directory or .gguf file")
    parser.add_argument(
        "--data", default=excerpt, help="text or JSON lines to train on; default: an excerpt of WikiText-2"
    )
    parser.add_argument("--text", default=test, help="held-out text, where --data is text; default: an excerpt")
    parser.add_argument("--calibration", default=excerpt, help="text for pruning; default: an excerpt of WikiText-2")
    parser.add_argument("--runs", nargs="+", default=RUNS, metavar="RUN", help="default: all of the list above")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--saliency", default="sparsegpt")
    parser.add_argument("--samples", type=int, default=64, help="calibration segments")
    parser.add_argument("--length", type=int, default=512, help="tokens of a training example, at most")
    parser.add_argument("--held-out", type=int, default=200, help="examples to evaluate on, at most")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--adapter-learning-rate", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=16, help="of masked LoRA; SHiRA gets as many parameters")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (bf16 autocast); default: cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="sparse_finetuning.json")
    parser.add_argument("--tiny", action="store_true", help="two steps, a few tokens: seconds")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.samples, arguments.length, arguments.held_out = 2, 32, 2
        arguments.steps, arguments.batch_size, arguments.rank = 2, 2, 2
    runs = {run: parse_run(run) for run in arguments.runs}  # bad names are said before any work

    import torch
    import transformers
    from rich.console import Console

    from hf_sparse import SparsityConfig, load_model, load_segments, load_tokenizer, prune
    from hf_sparse.atomic import atomic_write_text
    from hf_sparse.instruments import device_name, peak_memory, reset_peak_memory, versions

    transformers.logging.set_verbosity_error()
    console, device = Console(), torch.device(arguments.device)
    tokenizer = load_tokenizer(arguments.model)
    train, held_out = load_examples(arguments, tokenizer)
    protocol = {
        "model": Path(arguments.model).name,
        "data": Path(arguments.data).name,
        "held_out": f"{len(held_out)} examples, {labelled(held_out)} labelled tokens",
        **{
            name: getattr(arguments, name)
            for name in ("sparsity", "saliency", "samples", "length", "steps", "batch_size")
        },
        **{name: getattr(arguments, name) for name in ("learning_rate", "adapter_learning_rate", "rank", "seed")},
    }
    output = Path(arguments.output)
    content = json.loads(output.read_text()) if output.is_file() else {"protocol": protocol, "results": {}}
    if content["protocol"] != protocol:
        sys.exit(f"{output} holds results of another protocol; give another --output")
    words = ["python", "examples/sparse_finetuning.py", *(Path(word).name for word in sys.argv[1:])]
    content |= {"command": " ".join(words), "hardware": device_name(device), "versions": versions()}

    dense = load_model(arguments.model, dtype="float32").to(device)
    pruned = copy.deepcopy(dense)
    calibration = load_segments(arguments.calibration, tokenizer, arguments.samples, arguments.length)
    prune(pruned, SparsityConfig(sparsity=arguments.sparsity, saliency=arguments.saliency), calibration.ids)

    def keep(run: str, model, **facts) -> None:
        facts |= {"perplexity": perplexity_of(model, held_out, arguments.batch_size), "density": density(model)}
        content["results"][run] = facts
        atomic_write_text(output, json.dumps(content, indent=1) + "\n")
        console.print(f"{run}: perplexity {facts['perplexity']:.3f}, density {facts['density']:.4f}")

    for name, model in (("dense parent", dense), ("one-shot", pruned)):
        if name not in content["results"]:
            keep(name, model)
    for run, (method, losses) in runs.items():
        if run in content["results"]:
            continue
        reset_peak_memory(device)
        started = time.perf_counter()
        model, facts = fine_tune(dense, pruned, method, losses, train, arguments)
        keep(run, model, seconds=time.perf_counter() - started, peak_memory=peak_memory(device), **facts)
        expected = content["results"]["dense parent" if method == "dense" else "one-shot"]["density"]
        if method != "dense" and content["results"][run]["density"] > expected:
            sys.exit(f"{run} filled zeros: density {content['results'][run]['density']} after {expected}")
    console.print(table(content["results"]))
    try:
        plot(content["results"], output.with_suffix(".png"), protocol)
    except ModuleNotFoundError:
        console.print("no plot: matplotlib is not installed")


def fine_tune(dense, pruned, method: str, losses: list[str], train: list[dict], arguments):
    """A fine-tuned copy of the pruned (or dense) model, adapters merged, and what training said."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from hf_sparse import Masks, find_targets
    from hf_sparse.callbacks.distillation import DistillationLoss, DistillationTrainer
    from hf_sparse.callbacks.sparsity import SparsityCallback

    model = copy.deepcopy(dense if method == "dense" else pruned)
    adapted = method in ("masked-lora", "shira")
    if adapted:
        model = with_adapter(model, method, arguments)
    rate = arguments.adapter_learning_rate if adapted else arguments.learning_rate
    teacher = {}
    if losses:
        weights = DistillationLoss(squarehead=float("squarehead" in losses), kl=float("kl" in losses))
        teacher = {"teacher": dense, "distillation": weights}
    with tempfile.TemporaryDirectory() as scratch:
        settings = TrainingArguments(
            output_dir=scratch,
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch_size,
            learning_rate=rate,
            warmup_steps=min(20, arguments.steps // 10),
            logging_steps=max(1, arguments.steps // 10),
            save_strategy="no",
            report_to="none",
            use_cpu=arguments.device == "cpu",
            bf16=arguments.device != "cpu",
            disable_tqdm=not sys.stderr.isatty(),
            seed=arguments.seed,
        )
        trainer = (DistillationTrainer if losses else Trainer)(
            model,
            settings,
            train_dataset=train,
            data_collator=padded,
            callbacks=[SparsityCallback()] if method == "masks" else [],
            **teacher,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if method == "masks":  # the zeros are parameters that do not move
        masks = Masks.from_zeros(pruned, find_targets(pruned))
        trained -= sum(int((~mask).sum()) for mask in masks.values())
    facts = {"trained_parameters": trained, "learning_rate": rate, "log": trainer.state.log_history}
    if adapted:
        from hf_sparse.integrations.peft import merge_sparse

        model = merge_sparse(model)
    return model, facts


def with_adapter(model, method: str, arguments):
    from peft import LoraConfig, get_peft_model

    from hf_sparse import find_targets
    from hf_sparse.integrations.peft import masked_lora, shira_config

    if method == "shira":
        return get_peft_model(model, shira_config(model, arguments.rank, task_type="CAUSAL_LM"))
    layers = [target.module for target in find_targets(model).values()]
    rank = {"r": arguments.rank, "lora_alpha": 2 * arguments.rank}
    return get_peft_model(model, masked_lora(LoraConfig(**rank, target_modules=layers, task_type="CAUSAL_LM")))


def load_examples(arguments, tokenizer) -> tuple[list[dict], list[dict]]:
    """Training and held-out examples, ``{"input_ids": [tokens], "labels": [tokens]}`` each."""
    from hf_sparse.data import load_tokens

    def windows(source: str) -> list[dict]:
        tokens = load_tokens(source, tokenizer)
        return [{"input_ids": part, "labels": part} for part in tokens.split(arguments.length)[:-1]]

    if Path(arguments.data).suffix in (".jsonl", ".json"):
        with open(arguments.data, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file if line.strip()]
        fields = next((f for f in FIELDS if {f[0], f[1]} <= rows[0].keys()), None)
        if fields is not None:
            examples = [answered(row, fields, tokenizer, arguments.length) for row in rows]
            train = [example for number, example in enumerate(examples) if number % 10]
            held_out = examples[::10][: arguments.held_out]
            if labelled(train) and labelled(held_out):
                return train, held_out
            raise ValueError(f"no answer of {arguments.data} lies within the first {arguments.length} tokens")
    train, held_out = windows(arguments.data), windows(arguments.text)[: arguments.held_out]
    if not train or not held_out:
        raise ValueError(f"--data or --text has fewer than {arguments.length + 1} tokens; lower --length")
    return train, held_out


def answered(row: dict, fields: tuple[str, str, str], tokenizer, length: int) -> dict:
    """One row as tokens; the question is not labelled, the end-of-text token after the answer is."""
    import torch

    question, answer, form = fields
    ids = tokenizer(form.format(row[question])).input_ids
    asked = len(ids)
    ids = ids + tokenizer(row[answer], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    labels = [-100] * asked + ids[asked:]
    return {"input_ids": torch.tensor(ids[:length]), "labels": torch.tensor(labels[:length])}


def padded(examples: list[dict]) -> dict:
    import torch

    def pad(rows, value):
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    ids = [example["input_ids"] for example in examples]
    labels = [example["labels"] for example in examples]
    return {
        "input_ids": pad(ids, 0),
        "labels": pad(labels, -100),
        "attention_mask": pad([torch.ones_like(row) for row in ids], 0),
    }


def labelled(examples: list[dict]) -> int:
    return sum(int((example["labels"][1:] != -100).sum()) for example in examples)


def perplexity_of(model, examples: list[dict], batch_size: int) -> float:
    """exp(mean loss) over the labelled tokens, in float32."""
    import torch

    was_training, total = model.training, 0.0
    model.eval()
    for start in range(0, len(examples), batch_size):
        batch = {name: tensor.to(model.device) for name, tensor in padded(examples[start : start + batch_size]).items()}
        labels = batch.pop("labels")[:, 1:]
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits[:, :-1].transpose(1, 2).float()
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
    model.train(was_training)
    return math.exp(total / labelled(examples))


def density(model) -> float:
    from hf_sparse import Masks, find_targets

    return Masks.from_zeros(model, find_targets(model)).density()


def table(results: dict):
    from rich.table import Table

    shown = Table()
    for column in ("run", "perplexity", "density", "trained parameters", "seconds", "peak memory"):
        shown.add_column(column, justify="left" if column == "run" else "right")
    for run, facts in results.items():
        trained = "trained_parameters" in facts
        shown.add_row(
            run,
            f"{facts['perplexity']:.3f}",
            f"{facts['density']:.4f}",
            f"{facts['trained_parameters']:,}" if trained else "–",
            f"{facts['seconds']:.0f}" if trained else "–",
            f"{facts['peak_memory'] / 1e9:.2f} GB" if trained else "–",
        )
    return shown


def plot(results: dict, path: Path, protocol: dict) -> None:
    """A bar per way to fine-tune; lines where the dense parent and the pruned model stand before."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    bars = {run: facts["perplexity"] for run, facts in results.items() if "trained_parameters" in facts}
    axis.bar_label(axis.bar(list(bars), list(bars.values()), color="tab:blue"), fmt="%.2f")
    for name, style in (("one-shot", "--"), ("dense parent", ":")):
        axis.axhline(results[name]["perplexity"], color="black", linestyle=style, label=name)
    axis.set_ylabel("perplexity on held-out text")
    axis.set_title(f"{protocol['model']} at {protocol['sparsity']:.0%} sparsity, {protocol['steps']} steps")
    axis.tick_params(axis="x", rotation=20)
    axis.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
