"""Perplexity as the literature computes it.

The whole text is tokenised in one call, cut into contiguous windows of ``sequence_length`` tokens (the remainder is
dropped), and each window is scored on its own: the mean loss of its ``sequence_length - 1`` predictions. Perplexity is
exp(mean of the windows' losses). It depends on the tokenizer and on the window length (Llama-2-7B on WikiText-2: 5.47 at
2,048 and 5.12 at 4,096), so every result carries its protocol and is only comparable under the same one.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["perplexity"]

_CHUNK = 256  # rows of logits turned into float32 at once; a vocabulary of 256k makes full windows large


@torch.no_grad()
def perplexity(
    model: nn.Module,
    tokens: torch.Tensor,
    sequence_length: int,
    max_windows: int | None = None,
    on_window: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Perplexity of ``tokens`` ``[n]`` under ``model``, on the model's device.

    Args:
        max_windows: score only the first windows.
        on_window: called with (windows done, windows in all).

    Returns:
        ``perplexity``, ``loss``, ``windows``, ``windows_available``, ``tokens_scored`` and ``protocol``.

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
    was_training = model.training
    model.eval()
    total = 0.0
    try:
        for number, window in enumerate(windows, start=1):
            ids = window.to(device).unsqueeze(0)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            loss = 0.0
            for start in range(0, len(logits), _CHUNK):
                part = slice(start, start + _CHUNK)
                loss += float(nn.functional.cross_entropy(logits[part].float(), ids[0, 1:][part], reduction="sum"))
            total += loss / len(logits)
            if on_window is not None:
                on_window(number, count)
    finally:
        model.train(was_training)
    mean = total / count
    return {
        "perplexity": math.inf if mean > 700 else math.exp(mean),
        "loss": mean,
        "windows": count,
        "windows_available": available,
        "tokens_scored": count * (sequence_length - 1),
        "protocol": (
            f"text tokenised in one call, {'first ' if count < available else ''}{count} contiguous windows of "
            f"{sequence_length} tokens, remainder dropped, mean of window losses, exponentiated; "
            f"{str(next(model.parameters()).dtype).removeprefix('torch.')} weights"
        ),
    }
