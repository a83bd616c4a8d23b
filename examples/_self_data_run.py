"""The steps of ``self_data_distillation.py``: each writes one folder or file, so that any can be left and gone on with.

    model     a job, "<depth>/<name>", is made of a parent by fine-tuning it, or of siblings by merging them
    measure   a model's values, item by item, as JSON: what the recovery report is made of

Jobs are independent of each other but for what they are made of, so ``work`` runs several at a time, each in a process of its
own; a small model does not fill a GPU.
"""

import json
import math
import os
import time
from pathlib import Path

__all__ = ["do_job", "measure", "read_rows", "response_sets"]


def do_job(job: dict, options: dict) -> dict:
    """Makes one model and measures it; what exists already is left alone.

    Args:
        job: ``label``, and ``parent``, ``rows`` (JSON lines), ``seed`` for a fine-tuning, or ``siblings``, ``method`` and
            ``base`` for a merge, or neither for a model that is there.
        options: the example's arguments, see its help.
    """
    import torch
    import transformers

    from hf_sparse.instruments import peak_memory, reset_peak_memory

    transformers.logging.set_verbosity_error()
    if options["device"] == "cuda":
        torch.set_float32_matmul_precision("high")
    if options["workers"] > 1:  # jobs that each take all cores wait for each other: merges took 100 s instead of 3
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // options["workers"]))
    folder = Path(options["output"]) / "models" / job["label"]
    facts = {}
    if not (folder / "config.json").is_file():
        started = time.perf_counter()
        reset_peak_memory(torch.device(options["device"]))
        if "siblings" in job:
            from hf_sparse.distillation.merging import merge_checkpoints

            report = merge_checkpoints(job["siblings"], folder, method=job["method"], base=job["base"])
            facts = {"tensors": report.tensors, "turned": report.turned}
        else:
            facts = _fine_tune(job, options, folder)
        facts["seconds"] = time.perf_counter() - started
        facts["peak_memory_bytes"] = peak_memory(torch.device(options["device"]))
        (folder / "made.json").write_text(json.dumps(facts), encoding="utf-8")
    measure(job["label"], folder, options)
    return {"label": job["label"], **facts}


def _fine_tune(job: dict, options: dict, folder: Path) -> dict:
    """Plain supervised fine-tuning by TRL, the same for every kind of rows."""
    import datasets
    import torch
    from trl import SFTConfig

    from hf_sparse import load_model, load_tokenizer
    from hf_sparse.atomic import atomic_directory
    from hf_sparse.callbacks import plain_model, sft_trainer

    tokenizer = load_tokenizer(options["model"])
    model = load_model(job["parent"], dtype="float32")
    rows = datasets.Dataset.from_list(read_rows(job["rows"]))
    batch, accumulation = options["batch_size"], options["accumulation"]
    # one budget for all, in rows: a set is seen as often as its size allows
    steps = options["steps"] or math.ceil(options["epochs"] * len(rows) / (batch * accumulation))
    cuda = options["device"] == "cuda"
    settings = SFTConfig(
        str(folder.parent / f".{folder.name}.trainer"),
        max_steps=steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        learning_rate=options["learning_rate"],
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(0.03 * steps),
        max_length=options["length"],
        seed=job["seed"],
        data_seed=job["seed"],
        bf16=cuda,
        tf32=cuda or None,
        use_cpu=not cuda,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=max(1, steps // 20),
        report_to=[],
        disable_tqdm=True,
    )
    adapter = "lora" if options["lora"] else None
    trainer = sft_trainer(model, settings, rows, processing_class=tokenizer, adapter=adapter)
    result = trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    model = plain_model(trainer).to(torch.bfloat16)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_directory(folder) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
    return {
        "steps": steps,
        "rows": len(rows),
        "training_loss": losses,
        "training_seconds": result.metrics["train_runtime"],
    }


def read_rows(file: Path | str) -> list[dict]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


def response_sets(options: dict) -> dict[str, Path]:
    return {file.parent.name: file for file in sorted((Path(options["output"]) / "sets").glob("*/held_out.jsonl"))}


def measure(label: str, folder: Path | str, options: dict, reference: bool = True) -> None:
    """Writes ``measures/<label>.json`` for the model in ``folder`` unless it is there."""
    import torch

    from hf_sparse import load_model, load_tokenizer
    from hf_sparse.atomic import atomic_write_text
    from hf_sparse.data import load_tokens
    from hf_sparse.integrations.assessment import assess, response_rows

    target = Path(options["output"]) / "measures" / f"{label}.json"
    if target.is_file():
        return
    device = options["device"]
    dtype = "bfloat16" if device == "cuda" else "float32"
    tokenizer = load_tokenizer(options["model"])
    model = load_model(str(folder), dtype=dtype).to(device)
    original = load_model(options["model"], dtype=dtype).to(device) if reference else None
    rows = {}
    for name, file in response_sets(options).items():
        lines = read_rows(file)[: options["held_out"]]
        rows[f"{name} answers"] = response_rows(lines, tokenizer, max_length=options["length"])
    with torch.no_grad():
        measures = assess(
            model,
            tokenizer,
            texts={"text": load_tokens(options["text"], tokenizer)},
            sequence_length=options["window"],
            max_windows=options["windows"],
            responses=rows,
            reference=original,
            tasks=options["tasks"],
            task_path=str(Path(options["output"]).absolute() / "tasks"),
            limit=options["limit"],
            batch_size=64 if device == "cuda" else 8,
            tokens_per_batch=16384 if device == "cuda" else 2048,
        )
    content = {name: m.to_dict() | {"values": [round(value, 6) for value in m.values]} for name, m in measures.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(target, json.dumps(content))
