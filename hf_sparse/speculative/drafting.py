"""A drafter that proposes tokens one after the other, by raw forward passes over a cache that can be rolled back.

After every token one kernel's worth of arithmetic on q and one copy to the host give the token and the four numbers that the
rules look at (:class:`hf_sparse.speculative.rules.Signals`); a rule that looks at nothing (a fixed length) costs no copy at
all, and the device runs ahead. Nothing of ``generate`` runs per token: nested generate calls are what makes the stock drafter
slow.

The cache holds what the drafter has seen: after a draft of d tokens, the context and the first d - 1 of them. What verification
rejects is cut off again; what it emits beyond, the drafter reads at its next draft.
"""

from dataclasses import dataclass

import torch
from torch import nn

from hf_sparse.speculative.rules import Signals

__all__ = ["Draft", "Drafter", "draw"]


@dataclass
class Draft:
    """Proposed tokens.

    Attributes:
        tokens: ids ``[1, d]`` in the target's vocabulary.
        logits: ``[d, vocabulary]`` float32 that each token was drawn from, or None if that is not known in the target's
        vocabulary. signals: of each token; empty if nobody asked.
        ended: see :class:`hf_sparse.speculative.rules.Round`.
    """

    tokens: torch.Tensor
    logits: torch.Tensor | None
    signals: list[Signals]
    ended: str


def draw(logits: torch.Tensor, sample: bool, look: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A token ``[1, 1]`` of ``logits`` ``[1, vocabulary]``, float32, and ``[token, first, second, entropy, drawn]`` on their
    device."""
    if not look and not sample:
        return logits.argmax(-1, keepdim=True), None
    logp = logits.log_softmax(-1)
    p = logp.exp()
    if not look:
        return torch.multinomial(p, 1), None
    top = p.topk(min(2, p.shape[-1]), dim=-1)
    token = torch.multinomial(p, 1) if sample else top.indices[:, :1]
    entropy = -(p * logp.clamp_min(-1e4)).sum(-1, keepdim=True)  # what a filter has ruled out is 0 * -inf
    values = top.values if top.values.shape[-1] == 2 else torch.cat([top.values, torch.zeros_like(top.values)], -1)
    return token, torch.cat([token.to(p.dtype), values, entropy, p.gather(-1, token)], -1)[0]


class Drafter:
    """Drafts with a model of the target's tokenizer.

    Args:
        model: a decoder-only model; one that has recurrent states cannot be rolled back.
        vocabulary: of the target; the drafter's is padded with impossible tokens or cut to it.
        processors: the target's logits processors, applied to the drafter alike.
        sample: draw from q; otherwise take its likeliest token.
        ends: ids that end a text.
    """

    def __init__(self, model: nn.Module, vocabulary: int, processors, sample: bool, ends: frozenset[int], length: int):
        from transformers import DynamicCache

        self.model, self.vocabulary, self.processors = model, vocabulary, processors
        self.sample, self.ends, self.device = sample, ends, model.device
        config = model.config.get_text_config(decoder=True)
        self.own = config.vocab_size  # a target with more padding can emit an id that the drafter has no embedding for
        self.cache = DynamicCache(config=config)
        self.cache.activate_past_recording()
        self.ids = torch.zeros(1, length, dtype=torch.long, device=self.device)
        self.known = 0  # ids that are in the text for good
        self.cached = 0  # ids the cache has seen

    def draft(self, text: torch.Tensor, limit: int, policy) -> Draft:
        """Proposes up to ``limit`` tokens to follow ``text`` ``[1, n]``; longer than at the last call, which it continues."""
        length = text.shape[1]
        new = text[:, self.known :].to(self.device)
        self.ids[:, self.known : length] = new.clamp_max(self.own - 1) if self.own < self.vocabulary else new
        self._forget(min(self.cached, length - 1))
        self.known = length
        look = getattr(policy, "looks", True)
        keep = self.sample
        policy.begin()
        logits_of, signals, ended = [], [], "limit"
        for drafted in range(1, limit + 1):
            logits = self._forward(length + drafted - 1)
            token, values = draw(logits, self.sample, look)
            self.ids[:, length + drafted - 1 : length + drafted] = token
            if keep:
                logits_of.append(logits)
            if look:
                number, *rest = values.tolist()  # the one wait for the device
                signals.append(Signals(*rest))
                if int(number) in self.ends:
                    ended = "eos"
                    break
                if policy.stop(signals[-1]):
                    ended = "rule"
                    break
            elif policy.stop(None):
                ended = "rule"
                break
        else:
            drafted = limit
        tokens = self.ids[:, length : length + drafted]
        return Draft(tokens, torch.cat(logits_of) if keep else None, signals, ended)

    def rollback(self, length: int) -> None:
        """Of the ids so far, only the first ``length`` stay in the text."""
        self._forget(min(self.cached, length))
        self.known = min(self.known, length)

    def _forget(self, length: int) -> None:
        if self.cached:
            self.cache.crop(length - self.cached)  # also with nothing to remove: sliding windows are cut to size
            self.cached = length

    def _forward(self, length: int) -> torch.Tensor:
        """The logits ``[1, vocabulary]`` that follow the first ``length`` ids."""
        positions = torch.arange(self.cached, length, device=self.device).unsqueeze(0)
        logits = self.model(
            input_ids=self.ids[:, self.cached : length],
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        self.cached = length
        logits = fit(logits.float(), self.vocabulary)
        return self.processors(self.ids[:, :length], logits) if len(self.processors) else logits


def fit(logits: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Logits of a padded vocabulary over the target's: what the target does not have goes, what the drafter lacks is
    impossible."""
    missing = vocabulary - logits.shape[-1]
    if missing > 0:
        return nn.functional.pad(logits, (0, missing), value=-torch.inf)
    return logits[..., :vocabulary]
