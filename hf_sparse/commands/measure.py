"""``hf-sparse inspect`` and ``hf-sparse eval``: what a checkpoint is, and how good."""

import json
from pathlib import Path
from typing import Any

from hf_sparse import commands

__all__ = ["run_eval", "run_inspect"]


def run_inspect(arguments) -> dict[str, Any]:
    from hf_sparse.inspection import inspect_checkpoint

    commands.check_parent(arguments.plot)
    report = inspect_checkpoint(arguments.path, arguments.trust_remote_code)
    if arguments.plot:
        report.plot(arguments.plot)
    if not arguments.json:
        commands.show_report(report, None)
    path = Path(arguments.path)
    return {"file_bytes": commands.weight_bytes(path) if path.is_dir() else None} | report.to_dict()


def run_eval(arguments) -> dict[str, Any]:
    from hf_sparse.data import check_source, load_tokens

    if not arguments.text and not arguments.tasks:
        raise ValueError("give --text FILE for perplexity, --tasks NAMES for lm-eval tasks, or both")
    if arguments.text:
        check_source(arguments.text)
        if not Path(arguments.text).is_file():
            raise FileNotFoundError(f"no such file: {arguments.text}")
    commands.check_parent(arguments.output)
    commands.check_device(arguments.device)

    from hf_sparse.evaluation import perplexity
    from hf_sparse.instruments import progress_bar, versions
    from hf_sparse.loading import load_model, load_tokenizer

    tokenizer = load_tokenizer(arguments.path, arguments.trust_remote_code)
    model = load_model(arguments.path, arguments.dtype, arguments.trust_remote_code)
    if arguments.device:
        model.to(arguments.device)
    result: dict[str, Any] = {"model": arguments.path}
    if arguments.text:
        tokens = load_tokens(arguments.text, tokenizer)
        windows = max(1, len(tokens) // max(1, arguments.sequence_length))
        windows = windows if arguments.max_windows is None else min(windows, arguments.max_windows)
        with progress_bar(not arguments.json, "perplexity", windows) as step:
            result |= perplexity(
                model,
                tokens,
                arguments.sequence_length,
                arguments.max_windows,
                on_window=lambda done, total: step(""),
            )
        result |= {"text": Path(arguments.text).name, "sequence_length": arguments.sequence_length}
    if arguments.tasks:
        from hf_sparse.integrations.lm_eval import evaluate_tasks

        result["tasks"] = evaluate_tasks(
            model,
            tokenizer,
            arguments.tasks.split(","),
            arguments.task_path,
            arguments.num_fewshot,
            arguments.limit,
            arguments.batch_size,
            arguments.apply_chat_template,
        )
    result["versions"] = versions()
    if arguments.output:
        from hf_sparse.atomic import atomic_write_text

        atomic_write_text(arguments.output, json.dumps(result, indent=1, default=str) + "\n")
    if not arguments.json:
        _show_evaluation(result)
    return result


def _show_evaluation(result: dict[str, Any]) -> None:
    out = commands.console()
    if "perplexity" in result:
        out.print(f"perplexity {result['perplexity']:.4f}  ({result['text']}: {result['protocol']})")
    for task, metrics in result.get("tasks", {}).get("results", {}).items():
        shown = ", ".join(
            f"{key.split(',')[0]} {value:.4f}" for key, value in metrics.items() if isinstance(value, float)
        )
        out.print(f"{task}: {shown}")
