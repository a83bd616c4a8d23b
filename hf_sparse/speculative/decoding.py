"""Speculative decoding through ``generate``: a small model drafts, the large one verifies, the output is the large one's own.

    model.generate(**inputs, custom_generate=SpeculativeDecoding(draft_model, TapOut()))

One round:

    drafter   proposes d tokens, until its policy says stop                  d forwards of the drafter
    target    looks at all of them at once                                   one forward over d + 1 tokens
    verify    a <= d of them stay, and one token of the target's own         :mod:`.verification`
    both      forget what was rejected

Greedy output equals plain greedy decoding token by token; sampled output has exactly the target's distribution. (In half
precision "equal" has a limit: a forward over d + 1 tokens and d + 1 forwards over one round differently, and where two tokens
are " "almost equally
likely the choice may differ. In float32 it does not.) Logits processors are applied to both models, token by token; every
stopping criterion is asked after every token, as plain decoding does, so that a stop string within a draft ends the text there.

transformers' ``generate`` swallows some arguments on this path. ``streamer=`` belongs into
``SpeculativeDecoding(streamer=...)``, and ``stop_strings=`` needs :func:`hf_sparse.speculative.attach.attach_drafter`, which
takes both as usual.
"""

import time
from typing import Any

import torch
from torch.nn.functional import pad

from hf_sparse.speculative.drafting import Drafter
from hf_sparse.speculative.metrics import Speculation
from hf_sparse.speculative.rules import Round, StaticLength
from hf_sparse.speculative.verification import verify_greedy, verify_matched, verify_sampled

__all__ = ["SpeculativeDecoding"]


class SpeculativeDecoding:
    """What ``generate(custom_generate=...)`` takes.

    Args:
        draft_model: a smaller causal language model, on any device.
        policy: when to stop drafting: a rule of :mod:`hf_sparse.speculative.rules` or a
            :class:`hf_sparse.speculative.tapout.TapOut`; default: five tokens. It is used by one text at a time.
        tokenizer, draft_tokenizer: of the two models, where they differ (universal assisted generation), or where their
            embeddings are padded to different sizes; not needed for models of one vocabulary.
        static: run both models over caches of fixed size, on a GPU as CUDA graphs (:mod:`.static`), which takes the launching
            of kernels out of every step; graphs are captured in the first texts and kept. None: on a GPU, for models that can.
            Not with ``return_dict_in_generate``'s cache, nor with padding or a cache that is given.
        streamer: gets the tokens as they are emitted; one of transformers'.

    Attributes:
        last: the :class:`hf_sparse.speculative.metrics.Speculation` of the last text. total: of all texts so far.
    """

    def __init__(self, draft_model, policy=None, *, tokenizer=None, draft_tokenizer=None, static=None, streamer=None):
        self.draft_model = draft_model
        self.policy = StaticLength() if policy is None else policy
        if (tokenizer is None) != (draft_tokenizer is None):
            raise ValueError(
                "give both tokenizers, tokenizer= of the target and draft_tokenizer= of the drafter, or none"
            )
        self.tokenizer, self.draft_tokenizer, self.streamer = tokenizer, draft_tokenizer, streamer
        self.static = static
        self.last, self.total = Speculation(), Speculation()
        self._runners: dict[tuple[int, int], Any] = {}  # (id of the model, size) -> StaticRunner
        self._steps: dict[tuple[int, int], dict] = {}

    @torch.no_grad()
    def __call__(self, model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        """The decoding loop; called by ``generate`` with what it has prepared."""
        cache = self._check(model, input_ids, generation_config, model_kwargs)
        cache.activate_past_recording()
        device, length, limit = model.device, input_ids.shape[1], generation_config.max_length
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        sample = bool(generation_config.do_sample)
        ends = _ends(generation_config)
        runners = self._static_runners(model, cache, model_kwargs, limit)
        drafter = self._drafter(model, logits_processor, sample, ends, limit, runners)
        text = torch.zeros(1, max(limit, length), dtype=torch.long, device=device)
        text[:, :length] = input_ids.to(device)
        inputs = _StaticInputs(runners[0]) if runners else _Inputs(model, model_kwargs, length, cache)
        skip = inputs.padding  # the drafter never sees padding
        extra = [
            one for one in stopping_criteria if type(one).__name__ not in ("MaxLengthCriteria", "EosTokenCriteria")
        ]
        scores = [] if generation_config.return_dict_in_generate and generation_config.output_scores else None
        raw = [] if generation_config.return_dict_in_generate and generation_config.output_logits else None
        self.last = Speculation()
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())

        finished = length >= limit
        while not finished:
            started = time.perf_counter()
            room = min(self.policy.max_draft, limit - length - 1)
            draft = drafter.draft(text[:, skip:length], room, self.policy) if room > 0 else None
            count = draft.tokens.shape[1] if draft else 0
            if count:
                text[:, length : length + count] = draft.tokens.to(device)
            drafted_at = time.perf_counter()

            logits = inputs.forward(text[:, : length + count], count)[:, :vocabulary]
            if raw is not None:
                untouched = logits.clone()
            if len(logits_processor):
                places = range(length, length + count + 1)
                logits = torch.cat([logits_processor(text[:, :n], logits[n - length :][:1]) for n in places])
            proposed = text[0, length : length + count]
            if not sample:
                tokens, stays = verify_greedy(logits, proposed)
            elif count and draft.logits is not None:
                tokens, stays = verify_sampled(logits, draft.logits.to(device), proposed)
            else:
                tokens, stays = verify_matched(logits, proposed)
            accepted, *numbers = torch.cat([stays.view(1), tokens]).tolist()  # the one wait for the device

            emitted, finished = _until_end(numbers[: accepted + 1], ends, limit - length)
            text[0, length : length + len(emitted)] = tokens[: len(emitted)]
            if extra:
                kept = _until_criterion(text, length, len(emitted), extra)
                finished |= kept is not None
                emitted = emitted[:kept]
            stays_in = min(accepted, len(emitted) - 1)  # of the draft, in the caches; the last token is new to them
            inputs.forget(count - stays_in)
            drafter.rollback(length - skip + stays_in)
            if scores is not None:
                scores += [logits[i : i + 1] for i in range(len(emitted))]
            if raw is not None:
                raw += [untouched[i : i + 1] for i in range(len(emitted))]
            if self.streamer is not None:
                self.streamer.put(torch.tensor([emitted]))
            first = self.last.rounds == 0
            ended = draft.ended if draft else "length"
            if draft and ended == "limit" and room < self.policy.max_draft:
                ended = "length"
            result = Round(
                drafted=count,
                accepted=accepted,
                ended=ended,
                signals=draft.signals if draft else [],
                draft_seconds=0.0 if first else drafted_at - started,
                verify_seconds=0.0 if first else time.perf_counter() - drafted_at,
                emitted=len(emitted),
            )
            if draft:
                self.policy.end(result)
            self.last.add(result)
            length += len(emitted)

        self.total = self.total + self.last
        if self.streamer is not None:
            self.streamer.end()
        sequences = text[:, :length].to(input_ids.device)
        if not generation_config.return_dict_in_generate:
            return sequences
        from transformers.generation import GenerateDecoderOnlyOutput

        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=None if scores is None else tuple(scores),
            logits=None if raw is None else tuple(raw),
            past_key_values=None if runners else cache,
        )

    def _check(self, model, input_ids, generation_config, model_kwargs: dict[str, Any]):
        """The target's cache; raises where the loop would not give the target's output."""
        from transformers import StaticCache

        if generation_config.num_beams not in (None, 1):
            raise ValueError(
                f"speculative decoding is greedy or samples; num_beams={generation_config.num_beams} is neither"
            )
        if input_ids.shape[0] > 1:
            raise ValueError(
                f"speculative decoding takes one text at a time, got a batch of {input_ids.shape[0]}: texts accept different "
                f"numbers "
                "of tokens. Call generate once per text (lm-eval: batch_size=1), or leave the drafter out for large batches, "
                "where it gains nothing"
            )
        if input_ids.shape[1] == 0:
            raise ValueError("speculative decoding needs input_ids; inputs_embeds alone tell the drafter nothing")
        for one, what in ((model, "the target"), (self.draft_model, "the drafter")):
            if getattr(one, "_is_stateful", False):
                raise ValueError(f"{what}, {type(one).__name__}, has recurrent states, which cannot be rolled back")
            if one.config.is_encoder_decoder:
                raise ValueError(
                    f"{what}, {type(one).__name__}, is an encoder-decoder; speculative decoding is for decoder-only models"
                )
        if self.draft_model is model:
            raise ValueError("the drafter is the target itself; give a smaller model")
        for flag in ("output_attentions", "output_hidden_states"):
            if getattr(generation_config, flag, False):
                raise ValueError(
                    f"{flag}=True is not supported by speculative decoding; run the text through the model afterwards"
                )
        cache = model_kwargs.get("past_key_values")
        if cache is None or model_kwargs.get("use_cache") is False:
            raise ValueError("speculative decoding needs use_cache=True")
        if isinstance(cache, StaticCache):
            raise ValueError("a static cache cannot be rolled back; leave out cache_implementation")
        return cache

    def _static_runners(self, model, cache, kwargs: dict[str, Any], length: int):
        """Runners of target and drafter over caches of fixed size, or None where they run as they are."""
        from hf_sparse.speculative.static import StaticRunner, static_size, why_not_static

        if self.static is False or (self.static is None and model.device.type != "cuda"):
            return None
        models = (model, self.draft_model)
        reasons = [f"{type(one).__name__}: {reason}" for one in models if (reason := why_not_static(one))]
        if self.static is None and len({one.device.type for one in models}) > 1:
            reasons.append("target and drafter lie on different kinds of devices")
        if kwargs.get("attention_mask") is not None:
            reasons.append("the text is padded")
        if cache.get_seq_length():
            reasons.append("a cache was given")
        if any(kwargs.get(name) is not None for name in ("inputs_embeds", "mm_encoder_outputs", "pixel_values")):
            reasons.append("the text comes with other inputs")
        if reasons:
            if self.static:
                raise ValueError(f"static=True cannot be kept: {'; '.join(reasons)}")
            return None
        found = []
        for one in models:
            key = (id(one), static_size(length))
            if key not in self._runners or self._runners[key].model is not one:
                self._runners[key] = StaticRunner(one, length)
                self._steps[key] = {}
            found.append(self._runners[key])
        return found

    def _drafter(self, model, processors, sample: bool, ends: frozenset[int], length: int, runners=None):
        """A drafter of one tokenizer with the target, or one that goes through text."""
        ours = model.config.get_text_config(decoder=True).vocab_size
        theirs = self.draft_model.config.get_text_config(decoder=True).vocab_size
        if self.tokenizer is not None and _vocabulary(self.tokenizer) != _vocabulary(self.draft_tokenizer):
            from hf_sparse.speculative.universal import UniversalDrafter

            return UniversalDrafter(self.draft_model, self.tokenizer, self.draft_tokenizer, ends)
        if self.tokenizer is None and ours != theirs:
            raise ValueError(
                f"the target {type(model).__name__} has {ours} tokens, the drafter {type(self.draft_model).__name__} {theirs}: "
                f"give "
                "tokenizer= and draft_tokenizer=, which tell a padded vocabulary from a different one"
            )
        if runners:
            from hf_sparse.speculative.static import StaticDrafter

            steps = self._steps[id(self.draft_model), runners[1].size]
            return StaticDrafter(runners[1], ours, processors, sample, ends, steps)
        return Drafter(self.draft_model, ours, processors, sample, ends, length)


class _StaticInputs:
    """The interface of ``_Inputs`` over a cache of fixed size."""

    padding = 0

    def __init__(self, runner):
        self.runner, self.cached = runner, 0

    def forward(self, ids: torch.Tensor, drafted: int) -> torch.Tensor:
        """Logits ``[drafted + 1, vocabulary]`` float32 after the last of ``ids`` and each place before."""
        length, keep = ids.shape[1], drafted + 1
        new = ids[:, self.cached :]
        if self.cached:
            logits = self.runner.run(new, self.cached)[-keep:]
        else:  # the prompt
            logits = self.runner.forward(new, torch.arange(length, device=ids.device), keep)
        self.cached = length
        return logits.float()

    def forget(self, count: int) -> None:
        """The last ``count`` ids were rejected."""
        self.cached -= count


class _Inputs:
    """The target's forward passes over the last tokens of a text."""

    def __init__(self, model, kwargs: dict[str, Any], length: int, cache):
        self.model, self.cache, self.prompt = model, cache, length
        self.kwargs = dict(kwargs)
        self.mask = self.kwargs.pop("attention_mask", None)
        self.positions = self.kwargs.pop("position_ids", None)
        self.types = {
            name: self.kwargs.pop(name) for name in ("token_type_ids", "mm_token_type_ids") if name in self.kwargs
        }
        self.first = True
        # how many ids of padding stand before the text
        self.padding = 0 if self.mask is None else int((self.mask[0] == 0).long().cumprod(0).sum())

    def forward(self, ids: torch.Tensor, drafted: int) -> torch.Tensor:
        """Logits ``[drafted + 1, vocabulary]`` float32 after the last of ``ids`` and each place before."""
        length, kwargs = ids.shape[1], dict(self.kwargs)
        new = length - self.cache.get_seq_length() if self.first else drafted + 1
        if self.mask is not None:
            kwargs["attention_mask"] = pad(self.mask, (0, length - self.mask.shape[1]), value=1)
        if self.positions is not None:
            kwargs["position_ids"] = self._positions(length)
        for name, types in self.types.items():
            if types is not None:
                last = types[:, -1:] if name == "token_type_ids" else torch.zeros_like(types[:, -1:])
                kwargs[name] = torch.cat([types, last.expand(-1, length - types.shape[1])], -1)
        prepared = self.model.prepare_inputs_for_generation(
            ids, next_sequence_length=None if new == length else new, is_first_iteration=self.first, **kwargs
        )
        if "logits_to_keep" in prepared:
            prepared["logits_to_keep"] = drafted + 1
        self.first = False
        return self.model(**prepared, return_dict=True).logits[0, -drafted - 1 :].float()

    def _positions(self, length: int) -> torch.Tensor:
        """The prompt's, and those that follow its last; of any number of dimensions (M-RoPE has one more)."""
        more = length - self.positions.shape[-1]
        steps = torch.arange(1, more + 1, dtype=self.positions.dtype, device=self.positions.device)
        return torch.cat([self.positions, self.positions[..., -1:] + steps], -1)

    def forget(self, count: int) -> None:
        """The last ``count`` ids were rejected."""
        self.cache.crop(-count)  # also with none: what a sliding window no longer needs goes


def _ends(generation_config) -> frozenset[int]:
    ends = generation_config.eos_token_id
    return frozenset() if ends is None else frozenset(ends if isinstance(ends, list) else [ends])


def _until_end(numbers: list[int], ends: frozenset[int], room: int) -> tuple[list[int], bool]:
    """What of the tokens comes before the end of the text, and whether that is reached."""
    for place, number in enumerate(numbers[:room]):
        if number in ends:
            return numbers[: place + 1], True
    return numbers[:room], len(numbers) >= room


def _until_criterion(text: torch.Tensor, length: int, count: int, criteria) -> int | None:
    """The number of new tokens at which a criterion first says stop."""
    for new in range(1, count + 1):
        if any(bool(torch.as_tensor(one(text[:, : length + new], None)).all()) for one in criteria):
            return new
    return None


def _vocabulary(tokenizer) -> dict[str, int]:
    return getattr(tokenizer, "tokenizer", tokenizer).get_vocab()
