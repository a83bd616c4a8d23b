"""Which of the drafted tokens stay, so that the output is the target's own, token for token or in distribution.

    greedy       the longest prefix that the target would have chosen; then the target's own next token
    sampled      token i stays with probability min(1, p_i(x_i) / q_i(x_i)); after the first that does not, one is drawn from
                 max(0, p - q), normalised; after the last, one from p (arxiv.org/abs/2211.17192, algorithm 1)
    matched      the drawn q is not known (another tokenizer): tokens are drawn from p at every place and the draft stays as far
                 as it agrees with them

All three give exactly what the target gives alone, whatever the drafter does: sampled because the mass that acceptance takes
from p is what max(0, p - q) gives back, matched because every token that is emitted was drawn from p. Everything stays on the
device; the caller copies the result to the host once.
"""

import torch

__all__ = ["verify_greedy", "verify_matched", "verify_sampled"]


def verify_greedy(target: torch.Tensor, draft: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``(tokens [d + 1], how many of the draft stay)``; the first so many tokens are the draft's, the next the target's.

    Args:
        target: logits ``[d + 1, vocabulary]``. draft: ids ``[d]``.
    """
    chosen = target.argmax(-1)
    return chosen, _prefix(chosen[:-1] == draft)


def verify_matched(target: torch.Tensor, draft: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`verify_greedy`, with draws from the target in place of its likeliest tokens."""
    chosen = torch.multinomial(target.softmax(-1), 1)[:, 0]
    return chosen, _prefix(chosen[:-1] == draft)


def verify_sampled(
    target: torch.Tensor, drafter: torch.Tensor, draft: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`verify_greedy`, in distribution.

    Args:
        drafter: logits ``[d, vocabulary]`` that the draft was drawn from.
    """
    p, q = target.softmax(-1), drafter.softmax(-1)
    places = torch.arange(len(draft), device=draft.device)
    drawn = torch.rand(len(draft), device=draft.device)
    stays = _prefix(drawn * q[places, draft] < p[places, draft])
    at = p.index_select(0, stays.view(1))[0]
    against = torch.cat([q, torch.zeros_like(q[:1])]).index_select(0, stays.view(1))[
        0
    ]  # nothing to take off after the last
    rest = (at - against).clamp_min(0)
    rest = torch.where(rest.sum() > 0, rest, at)  # p = q up to rounding
    last = torch.multinomial(rest, 1)
    tokens = torch.cat([draft, draft.new_zeros(1)])
    return tokens.scatter(0, stays.view(1), last), stays


def _prefix(agrees: torch.Tensor) -> torch.Tensor:
    return agrees.long().cumprod(0).sum()
