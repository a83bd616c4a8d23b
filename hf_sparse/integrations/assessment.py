"""What a model can do, item by item: text, responses and lm-eval tasks in one call, to be compared by a recovery report.

original = assess(dense, tokenizer, texts={"wikitext": ids}, tasks=["arc_challenge"])
pruned = assess(model, tokenizer, texts={"wikitext": ids}, tasks=["arc_challenge"], reference=dense)
RecoveryReport("dense", {"pruned": pruned}, original)
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from hf_sparse.distillation.generation import chat_ids
from hf_sparse.distillation.rows import row_reader
from hf_sparse.evaluation import response_losses, window_losses
from hf_sparse.instruments import progress_bar
from hf_sparse.integrations.lm_eval import evaluate_tasks
from hf_sparse.recovery import Measure

__all__ = ["assess", "response_rows"]


def assess(
    model,
    tokenizer,
    *,
    texts: Mapping[str, torch.Tensor] | None = None,
    sequence_length: int = 1024,
    max_windows: int | None = None,
    responses: Mapping[str, Sequence[tuple[list[int], int]]] | None = None,
    reference=None,
    tasks: Sequence[str] = (),
    task_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    tokens_per_batch: int = 4096,
    progress: bool = False,
) -> dict[str, Measure]:
    """Measures a model on the device it is on.

    Args:
        texts: ``{name: token ids [n]}``, for perplexity over windows of ``sequence_length``, the first ``max_windows``.
        responses: ``{name: rows}``, see :func:`response_rows`, for the perplexity of responses and, with a ``reference``, the
            divergence from it, which is named ``KL: <name>``.
        reference: the original model; leave it out when the original itself is measured.
        tasks, task_path, num_fewshot, limit, batch_size: see :func:`hf_sparse.integrations.lm_eval.evaluate_tasks`.

    Returns:
        ``{name: Measure}``: texts, responses, divergences, tasks, in this order.
    """
    texts, responses = texts or {}, responses or {}
    result: dict[str, Measure] = {}
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    for name, tokens in texts.items():
        windows = len(tokens) // max(1, sequence_length)
        windows = windows if max_windows is None else min(windows, max_windows)
        with progress_bar(progress, f"perplexity, {name}", windows) as step:
            losses = window_losses(
                model, tokens, sequence_length, max_windows, on_window=lambda done, all_of_them: step("")
            )
        facts = {"windows": f"{len(losses)} contiguous windows of {sequence_length} tokens", "weights": dtype}
        result[name] = Measure("perplexity", tuple(losses), facts=facts)
    divergences = {}
    for name, rows in responses.items():
        with progress_bar(progress, f"responses, {name}", len(rows)) as step:
            before = 0

            def on_rows(done: int, _: int) -> None:
                nonlocal before
                for _ in range(done - before):
                    step("")
                before = done

            scores = response_losses(model, rows, reference, tokens_per_batch, on_rows)
        facts = {"responses": f"{len(rows)} rows, mean of the rows' mean losses over the response", "weights": dtype}
        result[name] = Measure("perplexity", tuple(scores["loss"]), facts=facts)
        if reference is not None:
            facts = {"divergence": "KL(original || model), mean nats a token of the response, mean of rows"}
            divergences[f"KL: {name}"] = Measure("divergence", tuple(max(0.0, kl) for kl in scores["kl"]), facts=facts)
    result |= divergences
    if tasks:
        output = evaluate_tasks(
            model, tokenizer, list(tasks), task_path, num_fewshot, limit, batch_size, per_document=True
        )
        for name, scores in output["documents"].items():
            facts = {"metric": scores["metric"], "harness": output["protocol"]["harness"], "limit": limit}
            for key in ("num_fewshot", "task_versions"):
                facts[key] = output["protocol"][key].get(name)
            result[name] = Measure("accuracy", tuple(scores["values"]), scores["chance"], facts)
    return result


def response_rows(
    dataset: Iterable[dict[str, Any]], tokenizer, columns: dict[str, str] | None = None, max_length: int | None = None
) -> list[tuple[list[int], int]]:
    """``(token ids of prompt and response, how many are the prompt's)`` of instruction, question-answer or chat rows.

    Args:
        dataset: a ``datasets.Dataset`` or a list of dicts with the same keys.
        columns: see :func:`hf_sparse.distillation.rows.row_reader`.
        max_length: longer rows are cut at the end; a row with no room for a response is left out.
    """
    rows = list(dataset)
    if not rows:
        raise ValueError("the dataset has no rows")
    reader = row_reader(getattr(dataset, "column_names", None) or list(rows[0]), columns)
    result = []
    for row in rows:
        prompt, response = reader(row)
        first = chat_ids(tokenizer, prompt)
        whole = [*first, *tokenizer(response, add_special_tokens=False)["input_ids"]][:max_length]
        if len(whole) > len(first) > 0:
            result.append((whole, len(first)))
    return result
