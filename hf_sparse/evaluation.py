"""Perplexity as the literature computes it, and how well responses are predicted.

The whole text is tokenised in one call, cut into contiguous windows of ``sequence_length`` tokens (the remainder is
dropped), and each window is scored on its own: the mean loss of its ``sequence_length - 1`` predictions. Perplexity is
exp(mean of the windows' losses). It depends on the tokenizer and on the window length (Llama-2-7B on WikiText-2: 5.47 at
2,048 and 5.12 at 4,096), so every result carries its protocol and is only comparable under the same one.

Of responses to prompts, :func:`response_losses` gives each row's mean loss over its response, and how far the predictions
there are from those of a reference model, the original of a pruned one: KL(reference || model), mean nats a token.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["perplexity", "response_losses", "window_losses"]

_CHUNK = 256  # rows of logits turned into float32 at once; a vocabulary of 256k makes full windows large


def perplexity(
    model: nn.Module,
    tokens: torch.Tensor,
    sequence_length: int,
    max_windows: int | None = None,
    on_window: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Perplexity of ``tokens`` ``[n]`` under ``model``, on the model's device.

    Args, Raises: see :func:`window_losses`.

    Returns:
        ``perplexity``, ``loss`` and its standard error over the windows ``loss_stderr`` (None for one window), ``windows``,
        ``windows_available``, ``tokens_scored`` and ``protocol``.
    """
    losses = window_losses(model, tokens, sequence_length, max_windows, on_window)
    count, available = len(losses), len(tokens) // sequence_length
    mean = sum(losses) / count
    spread = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / (count - 1) / count) if count > 1 else None
    return {
        "perplexity": math.inf if mean > 700 else math.exp(mean),
        "loss": mean,
        "loss_stderr": spread,
        "windows": count,
        "windows_available": available,
        "tokens_scored": count * (sequence_length - 1),
        "protocol": (
            f"text tokenised in one call, {'first ' if count < available else ''}{count} contiguous windows of "
            f"{sequence_length} tokens, remainder dropped, mean of window losses, exponentiated; "
            f"{str(next(model.parameters()).dtype).removeprefix('torch.')} weights"
        ),
    }


@torch.no_grad()
def window_losses(
    model: nn.Module,
    tokens: torch.Tensor,
    sequence_length: int,
    max_windows: int | None = None,
    on_window: Callable[[int, int], None] | None = None,
) -> list[float]:
    """The mean loss of each window of ``tokens`` ``[n]``, in nats.

    Args:
        max_windows: score only the first windows.
        on_window: called with (windows done, windows in all).

    Raises:
        ValueError: fewer tokens than one window, a window of fewer than two tokens or longer than the model's positions,
            or no windows asked for.
    """
    if sequence_length < 2:
        raise ValueError(f"a window needs at least 2 tokens to predict one, got sequence_length={sequence_length}")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and sequence_length > positions:
        raise ValueError(f"the model has {positions} positions; a sequence_length of {sequence_length} is too long")
    available = len(tokens) // sequence_length
    if available == 0:
        raise ValueError(f"the text has {len(tokens)} tokens, fewer than one window of {sequence_length}")
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"max_windows is at least 1, got {max_windows}")
    count = available if max_windows is None else min(available, max_windows)
    windows = tokens[: available * sequence_length].view(available, sequence_length)[:count]
    device = next(model.parameters()).device
    losses = []
    with _evaluating(model):
        for number, window in enumerate(windows, start=1):
            ids = window.to(device).unsqueeze(0)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            loss = 0.0
            for start in range(0, len(logits), _CHUNK):
                part = slice(start, start + _CHUNK)
                loss += float(nn.functional.cross_entropy(logits[part].float(), ids[0, 1:][part], reduction="sum"))
            losses.append(loss / len(logits))
            if on_window is not None:
                on_window(number, count)
    return losses


@torch.no_grad()
def response_losses(
    model: nn.Module,
    rows: Sequence[tuple[Sequence[int], int]],
    reference: nn.Module | None = None,
    tokens_per_batch: int = 4096,
    on_rows: Callable[[int, int], None] | None = None,
) -> dict[str, list[float]]:
    """Each row's mean loss over its response, and with a ``reference`` the mean KL(reference || model) there; nats a token.

    Args:
        rows: ``(token ids of prompt and response, how many of them are the prompt's)``; both have at least one token.
        reference: a model of the same vocabulary, on any device.
        tokens_per_batch: of rows padded to one length.
        on_rows: called with (rows done, rows in all).

    Returns:
        ``{"loss": [rows], "kl": [rows]}``, the latter only with a reference.

    Raises:
        ValueError: no rows, or a row without a prompt or a response.
    """
    if not rows:
        raise ValueError("no rows to score")
    for number, (ids, prompt) in enumerate(rows):
        if not 0 < prompt < len(ids):
            raise ValueError(f"row {number} has {prompt} tokens of prompt and {len(ids)} in all; both parts need one")
    models = [model] if reference is None else [model, reference]
    result = {name: [0.0] * len(rows) for name in ("loss", "kl")[: len(models)]}
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index][0]))
    done = 0
    with contextlib.ExitStack() as stack:
        for one in models:
            stack.enter_context(_evaluating(one))
        while order:
            width = len(rows[order[0]][0])
            size = max(1, tokens_per_batch // width)
            batch, order = order[:size], order[size:]
            ids, mask = torch.zeros(2, len(batch), width, dtype=torch.long)
            for place, index in enumerate(batch):
                ids[place, : len(rows[index][0])] = torch.tensor(rows[index][0])
                mask[place, : len(rows[index][0])] = 1
            logits = []
            for one in models:
                device = next(one.parameters()).device
                logits.append(one(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits)
            for place, index in enumerate(batch):
                whole, prompt = rows[index]
                part = slice(prompt - 1, len(whole) - 1)  # the positions that predict the response
                scores = nn.functional.log_softmax(logits[0][place, part].float(), -1)
                target = torch.tensor(whole[prompt:], device=scores.device)
                result["loss"][index] = float(nn.functional.nll_loss(scores, target))
                if reference is not None:
                    wanted = nn.functional.log_softmax(logits[1][place, part].float(), -1).to(scores.device)
                    result["kl"][index] = float((wanted.exp() * (wanted - scores)).sum(-1).mean())
            done += len(batch)
            if on_rows is not None:
                on_rows(done, len(rows))
    return result


@contextlib.contextmanager
def _evaluating(model: nn.Module):
    """The model in evaluation mode, and back."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
