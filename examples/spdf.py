"""Sparse pre-training, dense fine-tuning (SPDF, arXiv 2303.10464), from raw text to BLEU.

Three steps: zero a random half or three quarters of every linear weight at the start; pre-train with the dense model's
own schedule, in fewer FLOPs; fine-tune with the zeros set free. The ablation keeps the zeros in fine-tuning as well.

    python examples/spdf.py --stage data --text FILES... --tokenizer GPT2_DIR --output out     # text -> token files
    python examples/spdf.py --stage all --e2e E2E_DIR --output out                             # every variant, one GPU
    python examples/spdf.py --variant dense static75 --seeds 0 1 --minutes 7 --e2e E2E_DIR --output out
    python examples/spdf.py --tiny                                                             # seconds on a CPU

Variants: a GPT-2 of 12 x 768 from scratch, ``dense``, ``static50`` and ``static75`` (random masks, fixed), ``rigl75``
(RigL at the same uniform sparsity; 100 steps between updates until 75% of training, 30% dropped, cosine, as in Cerebras'
GPT-2 recipe). The same initial weights and the same batches for all. Stages: ``data``, ``pretrain``, ``finetune`` (and
beam search on the test set), ``score`` (BLEU, needs sacrebleu, part of ``hf-sparse[eval]``; JSON and plot, needs
matplotlib), ``all``. A stage leaves its result in ``--output`` and is skipped the next time, so an experiment may be
done in pieces.

``--every 15`` would be the recipe's share of training between RigL's updates (100 of 4,778 steps); it gives a worse
pre-training loss than 100 steps. A grown weight starts at zero and needs steps to grow, or the next update drops it.

The paper's recipe is kept where a smaller budget allows: AdamW(.9, .999), weight decay .1, clipping at 1, 15% warm-up,
cosine to 10% of 6e-4, nothing retuned for sparsity; AdamW with linear decay on E2E, batch and learning rate from the
paper's grid. Smaller here: 46 million tokens in windows of 1,024 rather than 2.5 billion in 2,048, batches of 64
windows rather than 256, two epochs on E2E rather than five with early stopping and a search over the grid.
"""

import argparse
import json
import sys
import time
from pathlib import Path

DATA = Path(__file__).resolve().parent / "data"
VARIANTS = {
    "dense": ("static", 0.0),
    "static50": ("static", 0.5),
    "static75": ("static", 0.75),
    "rigl75": ("rigl", 0.75),
}
ABLATION = ("static50", "static75", "rigl75")  # fine-tuned with their zeros kept too
STAGES = ("data", "pretrain", "finetune", "score", "all")
SHAPE = {"n_layer": 12, "n_embd": 768, "n_head": 12}  # GPT-2 Small
DECODING = {"beams": 10, "length_penalty": 0.9, "no_repeat": 4, "new_tokens": 64}  # as in the LoRA paper
TINY = {
    **dict(
        steps=8,
        batch=2,
        length=32,
        validation=8,
        finetune_batch=8,
        epochs=1,
        width=192,
        generation_batch=4,
        vocabulary=512,
    ),
    **dict(text=[DATA / "wikitext2_excerpt.txt"], e2e=DATA / "e2e_excerpt", cpu=True),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stage", choices=STAGES, default="all")
    add("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all four")
    add("--output", type=Path, default=Path("spdf-output"), help="where every stage works; default: %(default)s")
    add("--text", nargs="+", type=Path, metavar="FILE", help="UTF-8 text files, for the stage data")
    add("--tokenizer", help="use this one, a directory or Hub id; default: train a byte-level BPE on the text")
    add("--vocabulary", type=int, default=16_384, help="entries of a trained tokenizer; default: %(default)s")
    add("--e2e", type=Path, metavar="DIR", help="the E2E data set: trainset.csv, devset.csv, testset_w_refs.csv")
    add("--steps", type=int, default=700, help="pre-training steps; default: %(default)s")
    add("--batch", type=int, default=64, help="windows per step; default: %(default)s")
    add("--length", type=int, default=1024, help="tokens per window; default: %(default)s")
    add("--validation", type=int, default=128, help="held-out windows; default: %(default)s")
    add("--micro-batch", type=int, help="windows at once, if memory is short; default: the whole batch")
    add("--every", type=int, default=100, help="steps between RigL's updates; default: %(default)s")
    add("--seed", type=int, default=0, help="of weights, masks and batches in pre-training; default: %(default)s")
    add("--epochs", type=float, default=2, help="of fine-tuning; default: %(default)s")
    add("--finetune-batch", type=int, default=32, help="default: %(default)s, of the paper's 8, 16, 32, 64")
    add("--finetune-rate", type=float, default=1e-4, help="default: %(default)s, of the paper's 1e-4, 5e-5, 2.5e-5")
    add("--width", type=int, default=96, help="tokens of a fine-tuning example; default: %(default)s")
    add("--seeds", nargs="+", type=int, default=[0], help="of fine-tuning; default: 0")
    add("--generation-batch", type=int, default=128, help="meanings in one beam search; default: %(default)s")
    add("--minutes", type=float, help="begin nothing new after so many minutes; run the same command again to go on")
    add("--cpu", action="store_true", help="do not use an accelerator")
    add("--tiny", action="store_true", help="a model of two layers, a few steps on excerpts: seconds")
    arguments = parser.parse_args()
    if arguments.tiny:
        vars(arguments).update(TINY)
        SHAPE.update(n_layer=2, n_embd=32, n_head=2)
        DECODING.update(beams=2, new_tokens=8)
    arguments.micro_batch = arguments.micro_batch or arguments.batch
    if arguments.batch % arguments.micro_batch:
        parser.error(f"--batch {arguments.batch} is no multiple of --micro-batch {arguments.micro_batch}")
    return arguments


def main() -> None:
    arguments = parse()
    stages = STAGES[:-1] if arguments.stage == "all" else (arguments.stage,)
    have_text = (arguments.output / "data" / "data.json").is_file()
    if "data" in stages and have_text:
        print(f"the text in {arguments.output / 'data'} is kept")
        stages = tuple(stage for stage in stages if stage != "data")
    if "data" in stages and not arguments.text:
        sys.exit("the stage data needs --text FILE ...: UTF-8 text, some tens of megabytes for GPT-2 Small")
    if {"finetune", "score"} & set(stages) and not arguments.e2e:
        sys.exit("fine-tuning and scoring need --e2e DIR, the E2E data set (github.com/tuetschek/e2e-dataset)")

    import torch
    import transformers
    from _e2e import read_pairs
    from _spdf_report import report

    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    if not (arguments.cpu or torch.cuda.is_available()):
        print("no GPU: this will take a while (--tiny is for trying it out)", file=sys.stderr)
    pairs = {}
    if {"finetune", "score"} & set(stages):
        pairs = {split: read_pairs(arguments.e2e, split) for split in ("train", "development", "test")}
    arguments.output.mkdir(parents=True, exist_ok=True)
    if "data" in stages:
        prepare(arguments)
    if {"pretrain", "finetune"} & set(stages):
        check_protocol(arguments)
    started = time.monotonic()
    for variant, kind, seed in work(arguments, stages):
        if arguments.minutes is not None and time.monotonic() - started > 60 * arguments.minutes:
            print(
                f"{arguments.minutes:g} minutes are over; the same command goes on with {variant}, {kind or 'pretrain'}"
            )
            return
        folder = arguments.output / variant
        if kind is None:
            pretrain(arguments, variant, folder)
        else:
            finetune(arguments, variant, kind, seed, folder, pairs)
    if "score" in stages:
        report(arguments.output, pairs["test"], DECODING)


def work(arguments, stages):
    """What is still to be done: ``(variant, None, None)`` to pre-train, ``(variant, kind, seed)`` to fine-tune."""
    for variant in arguments.variant:
        folder = arguments.output / variant
        kinds = ("dense", "sparse") if variant in ABLATION else ("dense",)
        runs = [(variant, kind, seed) for kind in kinds for seed in arguments.seeds]
        runs = [run for run in runs if "finetune" in stages and not result_path(folder, *run[1:]).is_file()]
        trained = (folder / "pretrain.json").is_file() and ((folder / "model").is_dir() or not runs)
        if "pretrain" in stages and not trained:
            yield variant, None, None
        yield from runs


def result_path(folder: Path, kind: str, seed: int) -> Path:
    return folder / f"finetune-{kind}-{seed}.json"


def prepare(arguments) -> None:
    from _text import prepare_text
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer) if arguments.tokenizer else None
    place = arguments.output / "data"
    facts = prepare_text(arguments.text, place, tokenizer, arguments.vocabulary, arguments.seed)
    print(f"data: {facts['tokens']['train']:,} tokens to train on, {facts['vocabulary']:,} in the vocabulary")


def check_protocol(arguments) -> None:
    """Results of different recipes must not land in one table."""
    from hf_sparse.atomic import atomic_write_text

    names = [
        "steps",
        "every",
        "batch",
        "length",
        "seed",
        "epochs",
        "finetune_batch",
        "finetune_rate",
        "width",
        "validation",
    ]
    protocol = {name: getattr(arguments, name) for name in names} | SHAPE | DECODING
    path = arguments.output / "protocol.json"
    if path.is_file():
        before = json.loads(path.read_text())
        changed = [
            f"{name} ({before.get(name)} -> {protocol[name]})"
            for name in protocol
            if before.get(name) != protocol[name]
        ]
        if changed:
            sys.exit(f"{arguments.output} holds results of another recipe: {', '.join(changed)}; give another --output")
    atomic_write_text(path, json.dumps(protocol, indent=1) + "\n")


def pretrain(arguments, variant: str, folder: Path) -> None:
    """Steps 1 and 2: zeros at the start, then the dense model's schedule. Leaves ``model/`` and ``pretrain.json``."""
    from _spdf_run import first, measured_sparsity, run
    from _text import load_text
    from transformers import GPT2Config, GPT2LMHeadModel, set_seed

    from hf_sparse import SparsityConfig
    from hf_sparse.atomic import atomic_directory
    from hf_sparse.callbacks import SparsityCallback

    tokenizer, train, validation, facts = load_text(arguments.output / "data", arguments.length)
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,  # an even width is faster; the extra entries are never a label
        n_positions=max(arguments.length, 2 * arguments.width),  # room for a meaning and its words
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end),
        **SHAPE,
    )
    set_seed(arguments.seed)
    model = GPT2LMHeadModel(config)
    method, sparsity = VARIANTS[variant]
    callbacks = []
    if sparsity:
        moves = (
            {"every": min(arguments.every, max(1, arguments.steps // 4)), "end": 0.75, "drop_fraction": 0.3}
            if method == "rigl"
            else {}
        )
        fields = dict(method=method, sparsity=sparsity, allocation="uniform", schedule=moves, seed=arguments.seed)
        callbacks = [SparsityCallback(SparsityConfig(**fields))]
    recipe = dict(
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.micro_batch,
        gradient_accumulation_steps=arguments.batch // arguments.micro_batch,
        per_device_eval_batch_size=arguments.micro_batch,
        learning_rate=6e-4,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=round(0.15 * arguments.steps),
        weight_decay=0.1,
        eval_steps=max(1, arguments.steps // 14),
        seed=arguments.seed,
    )
    validation = first(validation, arguments.validation)
    result = run(arguments, model, train, validation, callbacks, recipe, f"{variant}: pre-training")
    with atomic_directory(folder / "model", overwrite=True) as staging:
        model.save_pretrained(staging)
    keep(folder / "pretrain.json", result | {"data": facts, "sparsity": measured_sparsity(model)})


def finetune(arguments, variant: str, kind: str, seed: int, folder: Path, pairs: dict) -> None:
    """Step 3 and the test set's words. Leaves a JSON and a .jsonl, a line for every meaning."""
    import torch
    from _e2e import FinetuneExamples, generate, grouped
    from _spdf_run import first, measured_sparsity, run
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_sparse.atomic import atomic_write_text
    from hf_sparse.callbacks import SparsityCallback
    from hf_sparse.instruments import progress_bar

    if not (folder / "model").is_dir():
        sys.exit(f"{folder} has no pre-trained model; run --stage pretrain --variant {variant} first")
    tokenizer = AutoTokenizer.from_pretrained(arguments.output / "data" / "tokenizer")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    before = measured_sparsity(model)
    train, validation = (FinetuneExamples(pairs[s], tokenizer, arguments.width) for s in ("train", "development"))
    callbacks = [SparsityCallback()] if kind == "sparse" else []  # without it the zeros are weights like all others
    whole = len(train) - len(train) % arguments.finetune_batch  # one shape, one compiled graph
    recipe = dict(
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=arguments.finetune_batch,
        per_device_eval_batch_size=256,
        learning_rate=arguments.finetune_rate,
        lr_scheduler_type="linear",
        eval_strategy="epoch",
        seed=seed,
    )
    what = f"{variant}: {kind} fine-tuning, seed {seed}"
    result = run(arguments, model, first(train, whole), validation, callbacks, recipe, what)
    result |= {
        "sparsity_before": before,
        "sparsity": measured_sparsity(model),
        "left_out": train.left_out + len(train) - whole,
    }

    model.set_attn_implementation("sdpa")  # prompts are padded on the left, which needs a mask
    if model.device.type == "cuda":
        model.to(torch.bfloat16)
    meanings = [meaning for meaning, _ in grouped(pairs["test"])]
    started, batch = time.perf_counter(), arguments.generation_batch
    with progress_bar(sys.stderr.isatty(), f"{what}: beam search", -(-len(meanings) // batch)) as advance:
        words = generate(model, tokenizer, meanings, **DECODING, batch=batch, on_batch=lambda done: advance(f"{done}"))
    result["generation_seconds"] = time.perf_counter() - started
    rows = [
        json.dumps({"mr": mr, "output": text}, ensure_ascii=False) for mr, text in zip(meanings, words, strict=True)
    ]
    path = result_path(folder, kind, seed)
    atomic_write_text(path.with_suffix(".jsonl"), "\n".join(rows) + "\n")
    keep(path, result)


def keep(path: Path, facts: dict) -> None:
    from hf_sparse.atomic import atomic_write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
