"""Self-data distillation (arXiv 2410.09982): drop layers, let the original rewrite the data, fine-tune on that, merge, compare.

    python examples/self_data_distillation.py --model MODEL                       # minutes on a CPU, with the excerpts here
    python examples/self_data_distillation.py --model MODEL --data DIR --remove 3 6 9 --seeds 0 1 --device cuda --workers 6
    python examples/self_data_distillation.py --model MODEL --tiny                # checks the program, measures nothing
    python examples/self_data_distillation.py --report --output DIR               # the tables and the pictures again

    original -> the span of layers with the least angular distance is dropped ("pruned")
             -> fine-tuned on a set as it is ("SFT <set>") or as the original rewrote it ("self-data <set>"): same rows, same
                steps, same settings; only the words of the answers differ
             -> the models of two sets merged by SLERP ("... merged")

What is left of the original, in percent with standard errors: perplexity of text and of held-out answers, KL to the original,
multiple-choice tasks of the evaluation harness. DIR of --data holds any of gsm8k_train.jsonl, pubmedqa_labeled.json,
e2e_dev.csv, wikitext2_valid.txt, wikitext2_test.txt, humaneval.jsonl; ``_self_data_sets.py`` says what is made of them.

Everything lies in --output and is made once: a run that was ended goes on where it stopped. Models are in output/models;
the report, recovery.json, and the pictures (``_self_data_report.py`` says which) appear at the end.
"""

import argparse
import gc
import json
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
TEMPLATES = {"gsm8k": ("rewrite_math", "number")}  # of the other sets: rewrite, any answer


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="the original: Hub id, directory or .gguf file")
    add("--data", type=Path, metavar="DIR", help="folder of public files; default: the excerpts in examples/data")
    add("--calibration", help="text to choose layers by; default: the text that the general set is made of")
    add("--remove", type=int, nargs="+", default=[3], metavar="N", help="layers to drop; default: %(default)s")
    add("--seeds", type=int, nargs="+", default=[0], help="of fine-tuning; default: %(default)s")
    add("--sets", nargs="+", metavar="SET", help="default: all that --data allows")
    add("--rows", type=int, metavar="N", help="of each set, at most")
    add("--new-tokens", type=int, default=256, help="of a rewritten answer, at most; default: %(default)s")
    add("--lora", action="store_true", help="through LoRA; default: in full")
    add("--epochs", type=float, default=2)
    add("--steps", type=int, help="instead of --epochs")
    add("--batch-size", type=int, default=32)
    add("--accumulation", type=int, default=1)
    add("--learning-rate", type=float, default=1e-4)
    add("--length", type=int, default=512, help="tokens of a row, at most; default: %(default)s")
    add("--window", type=int, default=1024, help="tokens of a window of text; default: %(default)s")
    add("--windows", type=int, default=64, help="of text; default: %(default)s")
    add("--held-out", type=int, default=300, help="held-out rows of each set; default: %(default)s")
    add("--limit", type=int, default=500, help="items of a task; default: %(default)s")
    add("--workers", type=int, default=1, help="jobs at a time; default: %(default)s")
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--stop-after", type=float, metavar="SECONDS", help="begin no further job after this time")
    add("--output", type=Path, default=Path("self_data"), metavar="DIR")
    add("--tiny", action="store_true", help="a few rows and steps")
    add("--report", action="store_true", help="only the tables and pictures of what --output holds")
    arguments = parser.parse_args()
    if arguments.report:
        if not (arguments.output / "options.json").is_file():
            parser.error(f"{arguments.output} holds no run of this program")
        return arguments
    if arguments.model is None:
        parser.error("--model is needed: a Hub id, a directory or a .gguf file")
    if arguments.data and not arguments.data.is_dir():
        parser.error(f"no such folder: {arguments.data}")
    if arguments.tiny:
        small = dict(
            remove=[1], rows=4, new_tokens=8, steps=2, batch_size=2, length=128, window=64, windows=2, held_out=2
        )
        vars(arguments).update(small, limit=4)
    elif arguments.data is None:
        vars(arguments).update(
            held_out=20, windows=min(16, arguments.windows), batch_size=8, rows=arguments.rows or 120
        )
    return arguments


def main() -> None:
    arguments = parse()
    from _self_data_report import report

    if arguments.report:
        report(arguments.output)
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    started = time.monotonic()
    import torch
    from rich.console import Console

    from hf_sparse import load_model, load_tokenizer
    from hf_sparse.atomic import atomic_write_text
    from hf_sparse.instruments import device_name, versions

    console = Console(stderr=True)
    prepare(arguments)
    options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    options["text"] = str(text_of(arguments, "wikitext_test"))
    options["tasks"] = sorted(file.stem for file in (arguments.output / "tasks").glob("*.yaml"))
    sets = sorted(file.parent.name for file in (arguments.output / "sets").glob("*/train.jsonl"))
    facts = {"command": command(), "hardware": device_name(torch.device(arguments.device)), "versions": versions()}
    atomic_write_text(arguments.output / "options.json", json.dumps(options | {"facts": facts}, indent=1) + "\n")

    tokenizer = load_tokenizer(arguments.model)
    prune_all(arguments, tokenizer, load_model)
    for name in sets:
        rewrite(name, arguments, tokenizer, load_model)
    if arguments.device == "cuda":  # what torch keeps for itself the workers cannot have
        gc.collect()
        torch.cuda.empty_cache()
    from _self_data_run import measure

    measure("original", arguments.model, options, reference=False)
    if not work(jobs(arguments, sets), options, arguments.workers, started, console):
        console.print("not all is done: call again with the same arguments to go on")
    report(arguments.output)


def text_of(arguments, name: str) -> Path:
    from _self_data_sets import _EXCERPTS, FILES

    return arguments.data / FILES[name] if arguments.data else HERE / "data" / _EXCERPTS[name]


def command() -> str:
    return " ".join(["python", "examples/self_data_distillation.py", *(Path(w).name for w in sys.argv[1:])])


def prepare(arguments) -> None:
    """The sets and the tasks, written once."""
    from _self_data_sets import make_sets, make_tasks

    if (arguments.output / "tasks").is_dir():
        return
    sets = make_sets(arguments.data)
    if unknown := set(arguments.sets or ()) - set(sets):
        sys.exit(f"no set {', '.join(sorted(unknown))}; there are {', '.join(sets)}")
    for name, parts in sets.items():
        folder = arguments.output / "sets" / name
        folder.mkdir(parents=True, exist_ok=True)
        for part, rows in parts.items():
            if arguments.tiny:  # what the smallest models have room for
                rows = sorted(rows, key=lambda row: len(json.dumps(row)))
            rows = rows[: arguments.rows] if part == "train" else rows
            if part == "train" and arguments.sets and name not in arguments.sets:
                continue
            (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    held_out = {name: parts["held_out"] for name, parts in sets.items()}
    make_tasks(arguments.data, held_out, arguments.output / "tasks", arguments.limit)


def prune_all(arguments, tokenizer, load_model) -> None:
    """The original with fewer layers, one model for each number; all from one scan."""
    from hf_sparse import load_segments
    from hf_sparse.atomic import atomic_directory
    from hf_sparse.pruning.layer_plots import plot_layers
    from hf_sparse.pruning.layers import drop_layers, score_layers

    folders = {count: arguments.output / "models" / f"{count} layers" / "pruned" for count in arguments.remove}
    if all((folder / "config.json").is_file() for folder in folders.values()):
        return
    text = arguments.calibration or str(text_of(arguments, "wikitext"))
    size = dict(samples=8, sequence_length=64) if arguments.tiny else dict(samples=64, sequence_length=512)
    if arguments.device == "cpu" and not arguments.tiny:
        size["samples"] = 16
    model = load_model(arguments.model, dtype="float32").to(arguments.device)
    scores = score_layers(model, load_segments(text, tokenizer, **size).ids, progress=not arguments.tiny)
    for count, folder in folders.items():
        shorter = model if count == arguments.remove[-1] else load_model(arguments.model, dtype="float32")
        dropped = scores.best_span(count)
        outcome = drop_layers(shorter, dropped)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_directory(folder) as staging:
            shorter.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
            facts = {"dropped": dropped, "distance": float(scores.spans(count)[dropped[0]])}
            facts |= {"parameters_before": outcome.parameters_before, "parameters_after": outcome.parameters_after}
            (staging / "made.json").write_text(json.dumps(facts), encoding="utf-8")
        try:
            plot_layers(scores, dropped, folder.parent / "layers.png")
        except ModuleNotFoundError:
            print("no plot: matplotlib is not installed", file=sys.stderr)


def rewrite(name: str, arguments, tokenizer, load_model) -> None:
    """The rows of a set as the original writes them."""
    import datasets
    from _self_data_run import read_rows

    from hf_sparse.atomic import atomic_write_text
    from hf_sparse.distillation.self_data import self_distill

    folder = arguments.output / "sets" / name
    if (folder / "self_data.jsonl").is_file():
        return
    rows = datasets.Dataset.from_list(read_rows(folder / "train.jsonl"))
    template, extractor = TEMPLATES.get(name, ("rewrite", None))
    cuda = arguments.device == "cuda"
    model = load_model(arguments.model, dtype="bfloat16" if cuda else "float32").to(arguments.device)
    started = time.perf_counter()
    result = self_distill(
        model,
        rows,
        processing_class=tokenizer,
        template=template,
        extractor=extractor,
        output_dir=folder / "rows",
        backend="generate",
        max_new_tokens=arguments.new_tokens,
        tokens_per_batch=1_000_000 if cuda else 8192,
    )
    seconds = time.perf_counter() - started
    reasons: dict[str, int] = {}
    for row in result:
        reason = (row["reason"] or "taken").split(" '")[0]
        reasons[reason] = reasons.get(reason, 0) + 1
    facts = {"template": template, "rows": len(result), "reasons": reasons, "seconds": seconds}
    facts |= {"tokens": sum(result["tokens"]), "example": next((r for r in result if r["source"] == "model"), None)}
    (folder / "rewriting.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    atomic_write_text(folder / "self_data.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in result))


def jobs(arguments, sets: list[str]) -> list[dict]:
    """What to make; merges come after what they merge, and a run that is ended early has all depths with one seed."""
    models, folder = arguments.output / "models", arguments.output / "sets"
    made = [{"label": f"{count} layers/pruned"} for count in arguments.remove]
    for seed in arguments.seeds:
        for count in arguments.remove:
            depth = f"{count} layers"
            parent, merges = str(models / depth / "pruned"), []
            for method, rows in (("SFT", "train"), ("self-data", "self_data")):
                siblings = []
                for name in sets:
                    label = f"{depth}/{method} {name}, seed {seed}"
                    siblings.append(str(models / label))
                    file = str(folder / name / f"{rows}.jsonl")
                    made.append({"label": label, "parent": parent, "rows": file, "seed": seed})
                if len(siblings) > 1:
                    for way, base in (("slerp", None), ("task-slerp", parent)):
                        label = f"{depth}/{method} merged by {way}, seed {seed}"
                        merges.append({"label": label, "siblings": siblings, "method": way, "base": base})
            made += merges
    return made


def work(waiting: list[dict], options: dict, workers: int, started: float, console) -> bool:
    """Does the jobs, some at a time; False if not all were done."""
    from _self_data_run import do_job

    waiting = [j for j in waiting if not (Path(options["output"]) / "measures" / f"{j['label']}.json").is_file()]
    limit, total = options["stop_after"], len(waiting)
    late = lambda: limit is not None and time.monotonic() - started > limit  # noqa: E731
    if workers == 1:
        while waiting and not late():
            console.print(f"{waiting[0]['label']} ({total - len(waiting) + 1} of {total})")
            do_job(waiting.pop(0), options)
        return not waiting
    import multiprocessing
    from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait

    def ready(job: dict) -> bool:
        return all((Path(sibling) / "made.json").is_file() for sibling in job.get("siblings", ()))

    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        running: set = set()
        done_jobs, failed = 0, 0
        while True:
            for job in [j for j in waiting if ready(j)][: workers - len(running)]:
                if not late():
                    waiting.remove(job)
                    running.add(pool.submit(do_job, job, options))
            if not running:
                return not waiting and not failed
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for one in done:
                if error := one.exception():  # the other jobs are not lost; the same command tries this one again
                    console.print(f"failed: {type(error).__name__}: {str(error)[:200]}")
                    failed += 1
                else:
                    done_jobs += 1
                    seconds = time.monotonic() - started
                    console.print(f"{one.result()['label']} ({done_jobs} of {total}, {seconds:.0f} s)")


if __name__ == "__main__":
    main()
