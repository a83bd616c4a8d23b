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
    if arguments.record and not (Path(arguments.path) / "config.json").is_file():
        raise ValueError(f"--record keeps the result beside the model, and {arguments.path} is no model directory here")
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
    if arguments.record:
        _record(Path(arguments.path), result | {"command": arguments.command_line})
    if arguments.output:
        from hf_sparse.atomic import atomic_write_text

        atomic_write_text(arguments.output, json.dumps(result, indent=1, default=str) + "\n")
    if not arguments.json:
        _show_evaluation(result)
    return result


def _record(directory: Path, result: dict[str, Any]) -> None:
    """Into evaluation.json beside the model, over what was measured alike before; the card is written anew if it is ours."""
    from hf_sparse.atomic import atomic_write_text
    from hf_sparse.hub_cards.sparsity_card import renew_card

    file = directory / "evaluation.json"
    earlier = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    merged = earlier | {key: value for key, value in result.items() if key != "model"}
    if "tasks" in earlier and "tasks" in result:
        old, new = earlier["tasks"], result["tasks"]
        protocol = old["protocol"] | new["protocol"]
        for key in ("task_versions", "num_fewshot"):
            protocol[key] = old["protocol"].get(key, {}) | new["protocol"].get(key, {})
        merged["tasks"] = {"results": old["results"] | new["results"], "protocol": protocol}
    atomic_write_text(file, json.dumps(merged, indent=1, default=str) + "\n")
    renew_card(directory)


def _show_evaluation(result: dict[str, Any]) -> None:
    out = commands.console()
    if "perplexity" in result:
        out.print(f"perplexity {result['perplexity']:.4f}  ({result['text']}: {result['protocol']})")
    for task, metrics in result.get("tasks", {}).get("results", {}).items():
        shown = ", ".join(
            f"{key.split(',')[0]} {value:.4f}" for key, value in metrics.items() if isinstance(value, float)
        )
        out.print(f"{task}: {shown}")
