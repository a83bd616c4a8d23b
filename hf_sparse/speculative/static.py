"""Forward passes over a cache of fixed size, so that a GPU replays them as one CUDA graph instead of being told every kernel.

A drafter's step is a hundred small kernels; launched one by one from Python they take ten times as long as the GPU needs for
them, and that is what makes drafting slow on a GPU, not the arithmetic. Here keys and values lie in buffers of ``size``
positions; a step writes at the positions it is given and masks what lies behind them. Nothing has to be removed when a draft is
rejected: the next step goes on from an earlier position and writes over what was there.

    StaticRunner    logits of the next few tokens; a graph for every number of tokens, captured when it first comes up
    DraftStep       one token of a drafter: forward, draw, the four signals, and the drawn token put where the next step reads
        it

Graphs belong to a model and a size, and are kept from text to text. On a CPU the same code runs without graphs; there it gains
nothing and is for the tests.
"""

import torch
from torch import nn
from transformers import Cache

from hf_sparse.speculative.drafting import Draft, draw, fit
from hf_sparse.speculative.rules import Signals

__all__ = ["StaticDrafter", "StaticRunner", "why_not_static"]

_STEP = 256  # sizes are multiples of it, so that texts of about one length share their graphs


def why_not_static(model) -> str | None:
    """Why a model cannot run over a cache of fixed size, or None if it can."""
    config = model.config.get_text_config(decoder=True)
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"its attention is {config._attn_implementation}, not sdpa or eager"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds - {"full_attention", "sliding_attention"}:
        return f"it has layers of the kinds {', '.join(sorted(kinds))}"
    if getattr(config, "num_kv_shared_layers", 0):
        return "its layers share keys and values"
    rope = getattr(config, "rope_parameters", None) or {}
    types = {str(rope.get("rope_type"))} | {str(r.get("rope_type")) for r in rope.values() if isinstance(r, dict)}
    if types & {"dynamic", "longrope"}:
        return "its positions are rescaled with the length of the text"
    if hasattr(model, "hf_device_map") and len(set(model.hf_device_map.values())) > 1:
        return "it lies on several devices"
    return None


class _Slots(Cache):
    """Keys and values of ``size`` positions; a forward pass writes at ``where`` ``[new tokens]``."""

    def __init__(self, size: int):
        super().__init__(layers=[])
        self.size, self.where = size, torch.zeros(1, dtype=torch.long)
        self.kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        if layer_idx not in self.kept:
            self.kept[layer_idx] = tuple(
                states.new_zeros(*states.shape[:2], self.size, states.shape[-1])
                for states in (key_states, value_states)
            )
        keys, values = self.kept[layer_idx]
        keys.index_copy_(2, self.where, key_states)
        values.index_copy_(2, self.where, value_states)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # positions are always given; nobody may count

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.size, 0


class StaticRunner:
    """A causal language model over a cache of fixed size, on the device it is on.

    Args:
        length: tokens a text may have; the size is the next multiple of 256 with room for padded drafts.
    """

    def __init__(self, model: nn.Module, length: int):
        self.model, self.device = model, model.device
        self.size = static_size(length)
        self.cache = _Slots(self.size)
        self.config = model.config.get_text_config(decoder=True)
        self.places = torch.arange(self.size, device=self.device)
        self.graphs: dict[int, tuple] = {}
        self.cuda = self.device.type == "cuda"

    def masks(self, where: torch.Tensor):
        """What each of the new tokens at ``where`` sees: itself and what is before it; in a window, the last of that."""
        ahead = self.places[None, :] <= where[:, None]
        window = getattr(self.config, "sliding_window", None)
        kinds = getattr(self.config, "layer_types", None)
        near = ahead if not window else ahead & (self.places[None, :] > where[:, None] - window)
        shape = lambda mask: self._mask(mask)[None, None]  # noqa: E731
        if kinds and len(set(kinds)) > 1:
            return {"full_attention": shape(ahead), "sliding_attention": shape(near)}
        sliding = (
            set(kinds) == {"sliding_attention"}
            if kinds
            else bool(window) and getattr(self.config, "use_sliding_window", True)
        )
        return shape(near if sliding else ahead)

    def _mask(self, mask: torch.Tensor) -> torch.Tensor:
        if self.config._attn_implementation == "sdpa":
            return mask
        least = torch.finfo(self.model.dtype).min
        return torch.zeros_like(mask, dtype=self.model.dtype).masked_fill(~mask, least)

    def forward(self, ids: torch.Tensor, where: torch.Tensor, keep: int) -> torch.Tensor:
        """Logits ``[keep, vocabulary]`` of the last of ``ids`` ``[1, n]``, which stand at ``where`` ``[n]``."""
        self.cache.where = where
        return self.model(
            input_ids=ids,
            position_ids=where[None],
            attention_mask=self.masks(where),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
        ).logits[0, -keep:]

    def run(self, ids: torch.Tensor, start: int) -> torch.Tensor:
        """Logits ``[n, vocabulary]`` of ``ids`` ``[1, n]`` that stand from ``start`` on; few tokens, as verification has
        them."""
        count = ids.shape[1]
        padded = _bucket(count)
        if not self.cuda:
            return self.forward(ids, torch.arange(start, start + count, device=self.device), count)
        if padded not in self.graphs:
            self.graphs[padded] = self._capture(padded)
        graph, tokens, where, logits = self.graphs[padded]
        tokens[:, :count] = ids
        where.copy_(self.places[start : start + padded])
        graph.replay()
        return logits[:count]

    def _capture(self, count: int):
        tokens = torch.zeros(1, count, dtype=torch.long, device=self.device)
        where = self.places[-count:].clone()  # the last places: what the rehearsal writes there is read by nobody
        found: list[torch.Tensor] = []

        def body():
            out = self.forward(tokens, where, count)
            if not found:
                found.append(torch.empty_like(out))
            found[0].copy_(out)

        return capture(body, self.device), tokens, where, found[0]


def capture(body, device) -> torch.cuda.CUDAGraph:
    """``body`` as a graph, after two rehearsals on a stream of their own."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            body()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        body()
    return graph


def static_size(length: int) -> int:
    """Positions for texts of up to ``length`` tokens and what a padded draft writes beyond."""
    return -(-(length + 40) // _STEP) * _STEP


def _bucket(count: int) -> int:
    """Graphs exist for 1 to 8 tokens and multiples of 4 above; what is added is written over by the next step."""
    return count if count <= 8 else -(-count // 4) * 4


class StaticDrafter:
    """The interface of :class:`hf_sparse.speculative.drafting.Drafter`, over a :class:`StaticRunner`.

    Args:
        runner: of the drafter; kept from text to text. vocabulary, processors, sample, ends: as for ``Drafter``.
        steps: what was captured before, a dict that this class fills.
    """

    def __init__(
        self, runner: StaticRunner, vocabulary: int, processors, sample: bool, ends: frozenset[int], steps: dict
    ):
        self.runner, self.vocabulary, self.processors = runner, vocabulary, processors
        self.sample, self.ends, self.steps = sample, ends, steps
        self.own = runner.config.vocab_size
        self.ids = torch.zeros(1, runner.size, dtype=torch.long, device=runner.device)
        self.known = self.cached = 0

    def draft(self, text: torch.Tensor, limit: int, policy) -> Draft:
        """Proposes up to ``limit`` tokens to follow ``text`` ``[1, n]``; longer than at the last call, which it continues."""
        length = text.shape[1]
        new = text[:, self.known :].to(self.runner.device)
        self.ids[:, self.known : length] = new.clamp_max(self.own - 1) if self.own < self.vocabulary else new
        self.cached = min(self.cached, length - 1)
        self.known = length
        self._read(length - 1)
        look = getattr(policy, "looks", True)
        step = self._step(look)
        step.place(self.ids[:, length - 1 : length], length - 1)
        policy.begin()
        logits_of, signals, ended, drafted = [], [], "limit", 0
        while drafted < limit:
            logits = step.next(self.ids[:, : length + drafted], self.processors)
            self.cached = length + drafted
            self.ids[:, length + drafted : length + drafted + 1] = step.token
            drafted += 1
            if self.sample:
                logits_of.append(logits.clone())
            if look:
                number, *rest = step.values.tolist()  # the one wait for the device
                signals.append(Signals(*rest))
                if int(number) in self.ends:
                    ended = "eos"
                    break
            if policy.stop(signals[-1] if look else None):
                ended = "rule"
                break
        tokens = self.ids[:, length : length + drafted]
        return Draft(tokens, torch.cat(logits_of) if self.sample else None, signals, ended)

    def rollback(self, length: int) -> None:
        """Of the ids so far, only the first ``length`` stay in the text."""
        self.cached, self.known = min(self.cached, length), min(self.known, length)

    def _read(self, until: int) -> None:
        """Brings the cache up to the first ``until`` ids: a prompt at once, the one token that a whole draft leaves by a
        step."""
        count = until - self.cached
        if count == 0:
            return
        if count <= 2:
            self.runner.run(self.ids[:, self.cached : until], self.cached)
        else:
            where = torch.arange(self.cached, until, device=self.runner.device)
            self.runner.forward(self.ids[:, self.cached : until], where, 1)
        self.cached = until

    def _step(self, look: bool) -> "_DraftStep":
        key = (look, self.sample, bool(len(self.processors)), self.vocabulary)
        if key not in self.steps:
            self.steps[key] = _DraftStep(self.runner, self.vocabulary, self.sample, look, bool(len(self.processors)))
        return self.steps[key]


class _DraftStep:
    """One token: read the last one, forward, draw the next, put it where the next step reads."""

    def __init__(self, runner: StaticRunner, vocabulary: int, sample: bool, look: bool, processed: bool):
        self.runner, self.vocabulary, self.sample, self.look, self.processed = (
            runner,
            vocabulary,
            sample,
            look,
            processed,
        )
        self.token = torch.zeros(1, 1, dtype=torch.long, device=runner.device)
        self.where = torch.zeros(1, dtype=torch.long, device=runner.device)
        self.values = torch.zeros(5, device=runner.device)
        self.logits = torch.zeros(1, vocabulary, device=runner.device)
        self.graph = None

    def place(self, token: torch.Tensor, position: int) -> None:
        """The token to read first, and where it stands."""
        self.token.copy_(token)
        self.where.fill_(position)

    def next(self, ids: torch.Tensor, processors) -> torch.Tensor:
        """Draws the token that follows ``ids``, of which the last is in place; its logits ``[1, vocabulary]``."""
        if not self.runner.cuda:
            self._body()
        else:
            if self.graph is None:
                token, where = self.token.clone(), self.where.clone()
                self.graph = capture(self._body, self.runner.device)
                self.token.copy_(token)  # the rehearsals went on from here
                self.where.copy_(where)
            self.graph.replay()
        if self.processed:
            self.logits.copy_(processors(ids, self.logits))
            self._draw()
        return self.logits

    def _body(self) -> None:
        read = self.token.clamp_max(self.runner.config.vocab_size - 1)
        logits = self.runner.forward(read, self.where, 1)
        self.logits.copy_(fit(logits.float(), self.vocabulary))
        self.where.add_(1)
        if not self.processed:
            self._draw()

    def _draw(self) -> None:
        token, values = draw(self.logits, self.sample, self.look)
        self.token.copy_(token)
        if values is not None:
            self.values.copy_(values)
