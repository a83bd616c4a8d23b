"""Drafting across tokenizers: the drafter writes text, the target's tokenizer reads it (universal assisted generation).

The drafter keeps its own tokenization of the text. New text is tokenized together with a little of what stands before it, since
tokenizers join across the seam; where that changes tokens the drafter has already seen, its cache is rolled back to the first
that differs. What it drafts is decoded, tokenized by the target's tokenizer in the same way, and proposed. A draft that ends
within a character (half of an emoji) proposes what comes before.

Verification never needs to know how likely the drafter found its words: the target draws its own tokens and the draft counts as
far as it agrees (:func:`hf_sparse.speculative.verification.verify_matched`), so sampling is exact here as well. Drafts are the
drafter's likeliest tokens, and the target's logits processors, which are made for its vocabulary, do not touch them.
"""

import torch

from hf_sparse.speculative.drafting import Draft, Drafter

__all__ = ["UniversalDrafter"]

_SEAM = 12  # tokens before the new text that are tokenized again with it


class UniversalDrafter:
    """Drafts for a target of another tokenizer; the interface of :class:`hf_sparse.speculative.drafting.Drafter`.

    Args:
        tokenizer, draft_tokenizer: of target and drafter.
        ends: ids of the target that end a text.
    """

    def __init__(self, model, tokenizer, draft_tokenizer, ends: frozenset[int]):
        self.target = getattr(tokenizer, "tokenizer", tokenizer)
        self.own = getattr(draft_tokenizer, "tokenizer", draft_tokenizer)
        own_ends = model.generation_config.eos_token_id
        own_ends = [] if own_ends is None else own_ends if isinstance(own_ends, list) else [own_ends]
        self.own_ends = frozenset(own_ends) | ({self.own.eos_token_id} - {None})
        self.target_end = next(iter(sorted(ends)), None)
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 2**20
        self.room = positions
        self.drafter = Drafter(model, vocabulary, [], False, self.own_ends, min(positions, 2**20))
        self.ids: list[int] = []  # the text so far in the drafter's tokens
        self.seen: list[int] = []  # the same in the target's

    def draft(self, text: torch.Tensor, limit: int, policy) -> Draft:
        """Proposes up to ``limit`` of the target's tokens to follow ``text`` ``[1, n]``."""
        seen = text[0].tolist()
        self._read(seen)
        nothing = Draft(text[:, :0], None, [], "limit")
        room = min(limit, self.room - len(self.ids))
        if not self.ids or room < 1:
            return nothing
        own = self.drafter.draft(torch.tensor([self.ids]), room, policy)
        numbers = own.tokens[0].tolist()
        ended = numbers[-1] in self.own_ends
        words = _text(self.own, self.ids + (numbers[:-1] if ended else numbers))[len(_text(self.own, self.ids)) :]
        tokens = self._after(seen, words)
        if ended and tokens is not None and self.target_end is not None:
            tokens.append(self.target_end)
        if not tokens:
            return nothing
        return Draft(torch.tensor([tokens[:limit]], device=text.device), None, own.signals, own.ended)

    def rollback(self, length: int) -> None:
        """What the target rejected shows when the text is read again."""

    def _read(self, seen: list[int]) -> None:
        """Brings the drafter's tokens up to the target's text."""
        if not self.seen:
            self.ids = self.own(_text(self.target, seen), add_special_tokens=True)["input_ids"]
        else:
            new = _text(self.target, seen)[len(_text(self.target, self.seen)) :]
            tail = _tail(self.own, self.ids)
            before = _text(self.own, tail)
            encode = lambda text: self.own(text, add_special_tokens=False)["input_ids"]  # noqa: E731
            # tokenized as if a text began at the tail; where that alone changes it, only what is new is tokenized
            self.ids = self.ids[: len(self.ids) - len(tail)] + (
                encode(before + new) if encode(before) == tail else tail + encode(new)
            )
        self.seen = seen
        cached = self.drafter.ids[0, : self.drafter.cached].tolist()
        same = next((i for i, (a, b) in enumerate(zip(cached, self.ids, strict=False)) if a != b), len(self.ids))
        self.drafter.rollback(min(same, len(cached), len(self.ids) - 1))

    def _after(self, seen: list[int], words: str) -> list[int] | None:
        """The target's tokens of ``words`` as they follow ``seen``; None where they cannot."""
        if not words:
            return []
        tail = _tail(self.target, seen)
        joined = self.target(_text(self.target, tail) + words, add_special_tokens=False)["input_ids"]
        if joined[: len(tail)] == tail:
            return joined[len(tail) :]
        if self.target.decode(tail[-1:]).endswith("\ufffd"):  # the target is within a character, and it is another one
            return None
        return self.target(words, add_special_tokens=False)["input_ids"]


def _text(tokenizer, ids: list[int]) -> str:
    """The text of ids, without the beginning of a character that is not whole yet."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).rstrip("\ufffd")


def _tail(tokenizer, ids: list[int]) -> list[int]:
    """The last ids, a few more where they would begin within a character."""
    for more in range(4):
        tail = ids[-_SEAM - more :]
        if not tokenizer.decode(tail, skip_special_tokens=True).startswith("\ufffd"):
            break
    return tail
