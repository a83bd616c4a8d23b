"""SD^2, self-distilled sparse drafters (arXiv 2504.08838): prune a model into a drafter, align it with its target, measure
both.

    python examples/sd2_drafter.py --model MODEL                                  # minutes on a CPU, small
    python examples/sd2_drafter.py --model MODEL --data DIR --device cuda --rows 2000 --depths 5 10 20
    python examples/sd2_drafter.py --model MODEL --tiny                           # checks the program, measures nothing

Drafters, all made of the model:

    layers       half of its layers dropped: the dense baseline, of as many MACs as 50% zeros
    sparse50     50% of the linear weights zero, SparseGPT          sparse24     the same in a 2:4 pattern

each as it is pruned ("one-shot"), fine-tuned on a dataset's answers ("SFT"), and on the answers that the target itself gives
("distilled"), same prompts, same steps. The target has the model's function at --depths times its cost (layers that change
nothing, ``_deepened.py``), so acceptance is real and so is the ratio of costs. Prompts to measure on are none of those trained
on: held-out GSM8K, HumanEval and open questions with --data, else held-out restaurant descriptions and open questions.

Reported: mean accepted length, acceptance, MACs, the improvement that follows from MACs at a fixed draft length, and the
measured speed-up of every policy. Everything lies in --output and is made once; sd2_drafter.json and .png appear there at the
end.
"""

import argparse
import copy
import json
import math
import sys
import time
from pathlib import Path

KINDS = {"layers": None, "sparse50": {"sparsity": 0.5}, "sparse24": {"pattern": "2:4"}}
WAYS = ("one-shot", "SFT", "distilled")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="Hub id, directory or .gguf file")
    add("--data", type=Path, metavar="DIR", help="folder of public files; default: the excerpts in examples/data")
    add("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), help="default: all")
    add("--ways", nargs="+", default=list(WAYS), choices=WAYS, help="default: all")
    add(
        "--depths",
        type=float,
        nargs="+",
        default=[4.0],
        metavar="X",
        help="of targets, in models; default: %(default)s",
    )
    add("--rows", type=int, default=64, help="to train on; default: %(default)s")
    add("--epochs", type=float, default=1)
    add("--batch-size", type=int, default=8)
    add("--learning-rate", type=float, default=1e-4)
    add("--answer-tokens", type=int, default=192, help="of an answer to learn from, at most; default: %(default)s")
    add("--texts", type=int, default=4, help="prompts of each kind to measure on; default: %(default)s")
    add("--new-tokens", type=int, default=96, help="of a measured answer; default: %(default)s")
    add("--policies", nargs="+", default=["static:3", "static:5", "confidence", "tapout"], help="default: %(default)s")
    add("--max-draft", type=int, default=16, help="default: %(default)s")
    add("--dtype", default="float32", help="of target and drafter when measured; default: %(default)s")
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add(
        "--stop-after",
        type=float,
        metavar="SECONDS",
        help="begin no further drafter after this time, measure what there is",
    )
    add("--output", type=Path, default=Path("sd2"), metavar="DIR")
    add("--tiny", action="store_true", help="a few rows, steps and tokens")
    arguments = parser.parse_args()
    if arguments.data and not arguments.data.is_dir():
        parser.error(f"no such folder: {arguments.data}")
    if arguments.tiny:
        small = dict(
            kinds=["layers", "sparse50"], ways=["one-shot", "distilled"], rows=4, texts=1, new_tokens=8, answer_tokens=8
        )
        vars(arguments).update(small, batch_size=2, depths=[2.0], policies=["static:2", "tapout"], max_draft=4)
    return arguments


def main() -> None:
    arguments = parse()
    started = time.monotonic()
    import torch
    import transformers
    from _deepened import deepen
    from rich.console import Console

    from hf_sparse import load_model, load_tokenizer
    from hf_sparse.atomic import atomic_write_text
    from hf_sparse.recipes.drafters import model_macs
    from hf_sparse.speculative.bench import benchmark
    from hf_sparse.speculative.policies import parse_policies

    transformers.logging.set_verbosity_error()
    policies = parse_policies(arguments.policies, arguments.max_draft)
    console, tokenizer = Console(), load_tokenizer(arguments.model)
    rows, texts = prompts(arguments)
    model = load_model(arguments.model, dtype="float32")
    if arguments.device == "cuda":
        torch.set_float32_matmul_precision("high")
    drafters = {}
    for kind in arguments.kinds:
        for way in arguments.ways:
            if arguments.stop_after is not None and time.monotonic() - started > arguments.stop_after:
                console.print(f"no time for {kind}, {way}")
                continue
            drafters[f"{kind}, {way}"] = make(kind, way, model, rows, tokenizer, arguments)
            console.print(
                f"{kind}, {way}: {drafters[f'{kind}, {way}'].macs / 1e6:.1f} M MACs, {time.monotonic() - started:.0f} s"
            )

    load = lambda report: load_model(report.path, dtype=arguments.dtype).to(arguments.device)  # noqa: E731
    models = {name: load(report) for name, report in drafters.items()}
    questions = [ids(question, tokenizer) for _, question in texts]
    content = {"command": " ".join(["python", "examples/sd2_drafter.py", *(Path(w).name for w in sys.argv[1:])])}
    content |= {"model": Path(arguments.model).name, "rows": len(rows), "drafters": {}, "targets": {}}
    base = load_model(arguments.model, dtype=arguments.dtype).to(arguments.device)
    for name, report in drafters.items():
        content["drafters"][name] = {k: v for k, v in vars(report).items() if k != "path"}
    for depth in arguments.depths:
        target = deepen(base, round(depth * base.config.num_hidden_layers))
        report = benchmark(
            target,
            models,
            policies,
            questions,
            groups=[group for group, _ in texts],
            max_new_tokens=arguments.new_tokens,
            progress=not arguments.tiny,
        )
        key = f"{depth:g} times the layers"
        content["targets"][key] = report.to_dict() | {"macs": macs(model_macs, base, depth)}
        report.plot(arguments.output / f"sd2_drafter_{depth:g}.png")
        console.print(key, *report.tables(console.width), sep="\n")
        atomic_write_text(arguments.output / "sd2_drafter.json", json.dumps(content, indent=1) + "\n")
        del target
    show(content, console)
    console.print(f"saved {arguments.output / 'sd2_drafter.json'}", markup=False)


def macs(count, base, depth: float) -> float:
    """MACs of the deepened target, as if its silent layers were not zero: what a real one of its size would cost."""
    layers = base.config.num_hidden_layers
    head = base.get_output_embeddings().weight.numel()
    return (count(base) - head) / layers * round(depth * layers) + head


def make(kind: str, way: str, model, rows, tokenizer, arguments):
    """The report of a drafter; made, or read where it lies."""
    import datasets
    from trl import SFTConfig

    from hf_sparse.recipes.drafters import make_drafter

    output = arguments.output / "drafters" / f"{kind}-{way}".replace(" ", "-")
    data = rows
    if way != "SFT":  # the target's answers, written once
        data = datasets.Dataset.from_list(answers(model, rows, tokenizer, arguments))
    cuda = arguments.device == "cuda"
    steps = 2 if arguments.tiny else math.ceil(arguments.epochs * len(rows) / arguments.batch_size)
    settings = SFTConfig(
        str(output / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(0.03 * steps),
        max_length=512,
        bf16=cuda,
        use_cpu=not cuda,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=max(1, steps // 10),
        report_to=[],
        disable_tqdm=True,
    )
    how = KINDS[kind] or {"remove": model.config.num_hidden_layers // 2}
    size = dict(samples=2, sequence_length=64) if arguments.tiny else dict(samples=32, sequence_length=512)
    return make_drafter(
        copy.deepcopy(model),
        data,
        output,
        processing_class=tokenizer,
        words="dataset",
        tune=way != "one-shot",
        args=settings,
        device=arguments.device,
        progress=False,
        **how,
        **size,
    )


def answers(model, rows, tokenizer, arguments) -> list[dict]:
    import torch

    from hf_sparse.distillation.self_data import self_distill

    file = arguments.output / "answers.jsonl"
    if not file.is_file():
        cuda = arguments.device == "cuda"
        writer = copy.deepcopy(model).to(arguments.device, torch.bfloat16 if cuda else torch.float32)
        found = self_distill(
            writer,
            rows,
            processing_class=tokenizer,
            template=None,
            output_dir=arguments.output / "answers",
            max_new_tokens=arguments.answer_tokens,
            tokens_per_batch=500_000 if cuda else 8192,
            progress=not arguments.tiny,
        )
        file.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def prompts(arguments):
    """``(rows to train on, [(group, question)] to measure on)``."""
    import random

    import datasets
    from _self_data_sets import make_sets
    from tapout_generate import QUESTIONS

    sets, chooser = make_sets(arguments.data), random.Random(0)
    train = [row for parts in sets.values() for row in parts["train"]]
    train = [row for row in train if not row["prompt"][0]["content"].startswith("Complete this Python function")]
    if arguments.tiny:
        train.sort(key=lambda row: len(json.dumps(row)))
    else:
        chooser.shuffle(train)
    texts = [("open", question) for question in QUESTIONS[: arguments.texts]]
    if "gsm8k" in sets:
        texts += [("GSM8K", row["prompt"][0]["content"]) for row in sets["gsm8k"]["held_out"][: arguments.texts]]
    else:
        texts += [("held out", row["prompt"][0]["content"]) for row in sets["general"]["held_out"][: arguments.texts]]
    file = arguments.data and arguments.data / "humaneval.jsonl"
    if file and file.is_file():
        lines = file.read_text(encoding="utf-8").splitlines()[: arguments.texts]
        ask = "Complete this Python function:\n\n```python\n{}\n```"
        texts += [("HumanEval", ask.format(json.loads(line)["prompt"].strip())) for line in lines]
    return datasets.Dataset.from_list(train[: arguments.rows]), texts


def ids(question: str, tokenizer) -> list[int]:
    chat = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]


def show(content: dict, console) -> None:
    """What the paper compares: accepted length and MACs of the drafters, and the improvement they promise."""
    from hf_sparse.instruments import tables_side_by_side
    from hf_sparse.speculative.metrics import improvement_factor

    for key, target in content["targets"].items():
        statics = sorted({run.rpartition(", ")[2] for run in target["runs"] if "static:" in run})
        policy = statics[-1] if statics else None
        columns = {}
        for name, drafter in content["drafters"].items():
            runs = {run: row for run, row in target["runs"].items() if run.startswith(f"{name}, ")}
            best = max(runs, key=lambda run: runs[run]["speed_up"])
            ratio = drafter["macs"] / target["macs"]
            cells = [f"{drafter['macs'] / 1e6:.1f}", f"{ratio:.4f}"]
            if policy:
                row = runs[f"{name}, {policy}"]
                factor = improvement_factor(row["mean_accepted_length"], int(policy[7:]), ratio)
                cells += [f"{row['mean_accepted_length']:.2f}", f"{row['acceptance']:.0%}", f"{factor:.2f}"]
            else:
                cells += ["–"] * 3
            columns[name] = [*cells, f"{runs[best]['speed_up']:.2f}", best.rpartition(", ")[2]]
        rows = ["M MACs", "c by MACs", f"MAL, {policy}", "accepted", "improvement", "measured", "with"]
        console.print(key, *tables_side_by_side(rows, columns, console.width), sep="\n")


if __name__ == "__main__":
    main()
