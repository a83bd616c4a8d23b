"""Tasks of the LM evaluation harness on a model in memory, through its Python API.

    evaluate_tasks(model, tokenizer, ["hellaswag"])                     stock tasks, data from the Hub
    evaluate_tasks(model, tokenizer, ["my_task"], task_path="tasks/")   local task files; nothing is downloaded

Each result carries what it takes to compare it: the harness's version, the task's version, the number of shots and limits.
With ``per_document=True`` it also has every document's score, so that two models can be compared document by document.
"""

from typing import Any

__all__ = ["METRICS", "evaluate_tasks"]

# which number of a task is compared, as on the Open LLM Leaderboard: normalised accuracy before accuracy
METRICS = ("acc_norm", "exact_match", "acc", "mc2", "pass@1", "f1", "em")


def evaluate_tasks(
    model,
    tokenizer,
    tasks: list[str],
    task_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    apply_chat_template: bool = False,
    per_document: bool = False,
) -> dict[str, Any]:
    """Runs tasks and returns ``{"results": {task: {metric: value}}, "protocol": {...}}``.

    Args:
        tasks: task names. task_path: a directory of task files; with it only those are known and the start is fast.
        num_fewshot: overrides the tasks' own. limit: only the first so many documents of each task.
        per_document: adds ``"documents": {task: {"metric", "values": [one per document], "chance"}}``, ``chance`` the accuracy
            of guessing where a task has choices. The metric is the first of :data:`METRICS` that a task has.

    Raises:
        ModuleNotFoundError: lm-eval is not installed. ValueError: an unknown task, with what exists locally.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("tasks need the evaluation harness: pip install 'hf-sparse[eval]'") from error
    manager = TaskManager(include_path=task_path, include_defaults=task_path is None)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        local = f"; {task_path} has {', '.join(manager.all_tasks) or 'no tasks'}" if task_path else ""
        raise ValueError(f"unknown task {', '.join(map(repr, unknown))}{local}")
    device = str(next(model.parameters()).device)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=device)
    output = lm_eval.simple_evaluate(
        model=wrapped,
        tasks=tasks,
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=apply_chat_template,
        log_samples=per_document,
        bootstrap_iters=1000,
    )
    results = {
        task: {key: _plain(value) for key, value in metrics.items() if key != "alias"}
        for task, metrics in output["results"].items()
    }
    documents = {task: _documents(task, samples) for task, samples in output.get("samples", {}).items()}
    return {
        "results": results,
        **({"documents": documents} if per_document else {}),
        "protocol": {
            "harness": f"lm_eval {lm_eval.__version__}",
            "task_versions": {task: _plain(v) for task, v in output.get("versions", {}).items()},
            "num_fewshot": {task: _plain(v) for task, v in output.get("n-shot", {}).items()},
            "limit": limit,
            "apply_chat_template": apply_chat_template,
        },
    }


def _documents(task: str, samples: list[dict]) -> dict[str, Any]:
    """The score of every document, in the order of the documents."""
    # a task with several filters has a document once for each; the first filter is the one the task is known by
    first = samples[0].get("filter", "none")
    samples = sorted((s for s in samples if s.get("filter", "none") == first), key=lambda sample: sample["doc_id"])
    metric = next((name for name in METRICS if isinstance(samples[0].get(name), (int, float))), None)
    if metric is None:
        have = ", ".join(key for key, value in samples[0].items() if isinstance(value, (int, float))) or "none"
        raise ValueError(f"task {task!r} has no score per document that is known here (numbers per document: {have})")
    choices = [len(sample["arguments"]) for sample in samples]
    chance = (
        sum(1 / count for count in choices) / len(choices) if metric.startswith("acc") and min(choices) > 1 else None
    )
    return {"metric": metric, "values": [float(sample[metric]) for sample in samples], "chance": chance}


def _plain(value):
    return value.item() if hasattr(value, "item") else value
