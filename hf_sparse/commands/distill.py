"""``hf-sparse distill``: a dataset whose answers are in the words of the model that is to be pruned.

    hf-sparse distill MODEL train.jsonl --template math --extractor number --output DIR

DIR/train.jsonl goes to TRL's SFTTrainer as it is (``datasets.load_dataset("json", data_files=...)``); every row says where its
response comes from. DIR/self_data_report.json says how many were taken, why others were not, and how fast it went.
"""

import json
import os
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from hf_sparse import commands

__all__ = ["REPORT_FILE", "ROWS_FILE", "run_distill"]

ROWS_FILE = "train.jsonl"
REPORT_FILE = "self_data_report.json"


def run_distill(arguments) -> dict[str, Any]:
    from hf_sparse.atomic import atomic_directory
    from hf_sparse.commands.prune import check_output
    from hf_sparse.distillation.answers import EXTRACTORS, passes_tests
    from hf_sparse.distillation.rows import load_rows, row_reader
    from hf_sparse.distillation.self_data import process_share, self_distill, wait_for_all
    from hf_sparse.distillation.templates import load_template
    from hf_sparse.instruments import device_name, versions

    served = arguments.model.startswith(("http://", "https://"))
    columns = _columns(arguments.columns)
    load_template(arguments.template)
    if arguments.extractor is not None and arguments.extractor not in EXTRACTORS:
        raise ValueError(f"--extractor {arguments.extractor}: known are {', '.join(EXTRACTORS)}")
    _check_numbers(arguments, served)
    output = Path(arguments.output)
    check_output(output, arguments.overwrite)
    commands.check_device(arguments.device)
    share, shares = process_share()
    progress_dir = _progress_dir(arguments, output, shares)
    rows = load_rows(arguments.dataset, arguments.split, arguments.limit)
    row_reader(rows.column_names, columns)
    if arguments.tests is not None and arguments.tests not in rows.column_names:
        raise ValueError(
            f"--tests {arguments.tests}: {arguments.dataset} has the columns {', '.join(rows.column_names)}"
        )

    model, tokenizer = arguments.model, None
    if not served:
        from hf_sparse.loading import load_model, load_tokenizer

        tokenizer = load_tokenizer(arguments.model, arguments.trust_remote_code)
        model = load_model(arguments.model, arguments.dtype, arguments.trust_remote_code)
        model.to(_device(arguments.device))
    check = None if arguments.tests is None else lambda response, row: passes_tests(response, row[arguments.tests])
    server = (
        {"server_model": arguments.server_model, "requests_in_flight": arguments.requests_in_flight} if served else {}
    )
    started = time.perf_counter()
    arguments.progress_dir = progress_dir
    result = self_distill(
        model,
        rows,
        processing_class=tokenizer,
        template=arguments.template,
        extractor=arguments.extractor,
        check=check,
        columns=columns,
        output_dir=progress_dir,
        backend=arguments.backend,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        tokens_per_batch=arguments.tokens_per_batch,
        progress=not arguments.json and share == 0,
        **server,
    )
    seconds = time.perf_counter() - started
    reasons = Counter(row["reason"] or "taken" for row in result)
    facts = {
        "model": result[0]["model"],
        "dataset": Path(arguments.dataset).name if Path(arguments.dataset).exists() else arguments.dataset,
        "command": arguments.command_line,
        "rows": len(result),
        "taken": reasons["taken"],
        "reasons": dict(reasons.most_common()),
        "tokens": sum(result["tokens"]),
        "seconds": seconds,
        "processes": shares,
        "device": "server" if served else device_name(model.device),
        "versions": versions(),
        "example": next((row for row in result if row["source"] == "model"), None),
    }
    if share == 0:
        with atomic_directory(output, overwrite=arguments.overwrite) as staging:
            with open(staging / ROWS_FILE, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in result)
            (staging / REPORT_FILE).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    wait_for_all(shares)  # the last one reads the rows before they go
    if share == 0:
        shutil.rmtree(progress_dir, ignore_errors=True)
        if not arguments.json:
            _show(facts, output)
    return {"output": str(output)} | facts


def _columns(given: list[str] | None) -> dict[str, str] | None:
    if given is None:
        return None
    pairs = dict(entry.partition("=")[::2] for entry in given)
    if set(pairs) != {"prompt", "response"} or not all(pairs.values()):
        raise ValueError(f"--columns takes prompt=COLUMN response=COLUMN, got {' '.join(given)}")
    return pairs


def _check_numbers(arguments, served: bool) -> None:
    for name in ("max_new_tokens", "tokens_per_batch", "requests_in_flight"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is at least 1, got {getattr(arguments, name)}")
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"--limit is a number of rows, at least 1; got {arguments.limit}")
    if arguments.temperature < 0:
        raise ValueError(f"--temperature is 0 (greedy) or more, got {arguments.temperature:g}")
    if not 0 < arguments.top_p <= 1:
        raise ValueError(f"--top-p lies in (0, 1], got {arguments.top_p:g}")
    if served and arguments.device:
        raise ValueError("--device is for a model that runs here; the server at this address has its own")
    if served and arguments.backend not in (None, "server"):
        raise ValueError(
            f"--backend {arguments.backend} runs a model here; {arguments.model} is the address of a server"
        )
    if not served and (arguments.backend == "server" or arguments.server_model):
        raise ValueError(
            f"a server is given by its address as MODEL, e.g. http://localhost:8000/v1; got {arguments.model}"
        )
    if not served and not arguments.model.endswith(".gguf") and Path(arguments.model).is_file():
        raise ValueError(f"{arguments.model} is a file; MODEL comes first, then DATASET")


def _progress_dir(arguments, output: Path, shares: int) -> Path:
    where = Path(os.path.abspath(output))
    progress_dir = where.parent / f".{where.name}.progress"
    begun = any(progress_dir.glob("rows-*.jsonl"))
    if begun and not arguments.resume and shares == 1:
        raise ValueError(
            f"an earlier run to {output} was interrupted; continue it with --resume, or remove {progress_dir} to start anew"
        )
    if arguments.resume and not begun and shares == 1:
        print(f"no interrupted run to {output} is there to resume: starting with the first row", file=sys.stderr)
    return progress_dir


def _device(device: str | None) -> str:
    """Each process of a launcher takes the GPU of its number."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device or "cpu"


def _show(facts: dict[str, Any], output: Path) -> None:
    from rich.table import Table

    out = commands.console()
    table = Table("the response is", "rows", "share")
    for reason, count in facts["reasons"].items():
        what = "the model's" if reason == "taken" else f"the reference: {reason}"
        table.add_row(what, f"{count}", f"{count / facts['rows']:.1%}")
    out.print(table)
    rate = facts["tokens"] / facts["seconds"]
    out.print(f"{facts['tokens']} tokens in {facts['seconds']:.1f} s, {rate:.0f} tokens/s, {facts['device']}")
    out.print(f"saved {output / ROWS_FILE}, with {REPORT_FILE}")
