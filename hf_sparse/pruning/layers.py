"""Depth pruning: which decoder layers a model can do without, and the model without them.

    scores = score_layers(model, batches)
    drop_layers(model, scores.best_span(6))            six layers in a row, chosen by angular distance

Two measures, gathered in one pass over the inputs h_l of every layer (h_L: the last one's output, before the final norm):

    angular distance   d(l, n) = mean over samples of arccos(cos(h_l, h_(l+n))) / pi, at the last token       in [0, 1]
                       how much the n layers from l on turn the stream; the span with the least is dropped
                       (arxiv.org/abs/2403.17887; self-data distillation, arxiv.org/abs/2410.09982)
    block influence    1 - mean over all tokens of cos(h_l, h_(l+1)), of single layers
                       (ShortGPT, arxiv.org/abs/2403.03853); the lowest are dropped, in a row or not

The last layer is kept unless asked for: what follows it expects its output. A shortened model is a stock one: the config says
how many layers there are, per-layer lists in it lose the same entries, and the KV cache is numbered anew.
"""

from dataclasses import asdict, dataclass, field

import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from hf_sparse.capture import as_batches, capture, find_decoder_layers, visiting
from hf_sparse.instruments import progress_bar
from hf_sparse.pruning.checks import check_placement, check_tokens
from hf_sparse.pruning.layer_config import check_same_layers, without_layers

__all__ = ["LAYERS_KEY", "LayerReport", "LayerScores", "drop_layers", "score_layers"]

LAYERS_KEY = "hf_sparse_layers"  # in config.json: which layers stayed of how many

_TOKENS_PER_STEP = {"cuda": 8192, "cpu": 2048}


@dataclass
class LayerScores:
    """What :func:`score_layers` measured.

    Attributes:
        distance: ``[layers + 1, layers + 1]`` float64; entry (l, m), m > l, is the mean angular distance between the inputs of
            layers l and m, which dropping layers l to m - 1 would identify; zero elsewhere.
        influence: block influence of each layer ``[layers]``. samples, tokens: what they are means of.
    """

    distance: torch.Tensor
    influence: torch.Tensor
    samples: int
    tokens: int

    def spans(self, count: int) -> torch.Tensor:
        """The distance ``[layers - count + 1]`` of every span of ``count`` layers, by its first layer."""
        self._check(count)
        return self.distance.diagonal(count).clone()

    def best_span(self, count: int, keep_last: bool = True) -> list[int]:
        """The ``count`` layers in a row whose ends are closest."""
        distances = self.spans(count)
        if keep_last:
            distances = distances[:-1]
        start = int(distances.argmin())
        return list(range(start, start + count))

    def least_influential(self, count: int, keep_last: bool = True) -> list[int]:
        """The ``count`` layers of lowest block influence, in order."""
        self._check(count)
        influence = self.influence[:-1] if keep_last else self.influence
        return sorted(influence.argsort(stable=True)[:count].tolist())

    def _check(self, count: int) -> None:
        layers = len(self.influence)
        if not 1 <= count < layers:
            raise ValueError(
                f"the model has {layers} layers; from 1 to {layers - 1} of them can be dropped, not {count}"
            )

    def to_dict(self) -> dict:
        return {
            "distance": self.distance.tolist(),
            "influence": self.influence.tolist(),
            "samples": self.samples,
            "tokens": self.tokens,
        }


@dataclass
class LayerReport:
    """What :func:`drop_layers` did: indices of the model as it was given."""

    dropped: list[int]
    kept: list[int]
    parameters_before: int
    parameters_after: int
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict:
        return asdict(self)


@torch.no_grad()
def score_layers(
    model: nn.Module,
    batches,
    *,
    device: str | torch.device | None = None,
    storage: str | torch.device | None = None,
    progress: bool = False,
) -> LayerScores:
    """Measures how much each decoder layer, and each span of them, changes what goes through it. The model stays as it is.

    Args:
        model: a decoder-only transformers model, or one with such a language tower.
        batches: token ids, see :func:`hf_sparse.capture.as_batches`; padding is left out on either side.
        device: where a layer is while it runs; default: where the model is. storage: where hidden states wait.

    Raises:
        ValueError: before any work: no decoder layers found, no data, tokens the model does not have.
    """
    check_placement(model)
    device = torch.device(device or next(model.parameters()).device)
    storage = torch.device(storage or device)
    name, layers = find_decoder_layers(model)
    batches = as_batches(batches, _TOKENS_PER_STEP.get(device.type, 2048))
    check_tokens(model, batches)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        captured = capture(model, name, layers, batches, device, storage)
        lasts: list[torch.Tensor] = [_last_tokens(captured)]
        influence = torch.zeros(len(layers), dtype=torch.float64)
        tokens = sum(_tokens(captured, batch) for batch in range(len(captured.hidden)))
        with progress_bar(progress, "scoring layers", len(layers)) as step:
            for index, layer in enumerate(layers):
                with visiting(layer, device):
                    for batch in range(len(captured.hidden)):
                        before = captured.hidden[batch].to(device, torch.float32, copy=True)
                        after = captured.run(index, batch, layer)
                        captured.hidden[batch].copy_(after)
                        cosine = cosine_similarity(before, after.float(), dim=-1).flatten().double()
                        keep = captured.keep[batch]
                        cosine = cosine if keep is None else cosine[keep.to(device)]
                        influence[index] += float((1 - cosine).sum()) / tokens
                lasts.append(_last_tokens(captured))
                step(f"layer {index + 1}/{len(layers)}")
    finally:
        for module, mode in modes:
            module.training = mode
    unit = torch.nn.functional.normalize(torch.stack(lasts).double(), dim=-1)  # [layers + 1, samples, hidden]
    cosines = torch.einsum("lsh,msh->lms", unit, unit).clamp(-1, 1)
    distance = (cosines.arccos() / torch.pi).mean(-1).triu(1)
    return LayerScores(distance.cpu(), influence, unit.shape[1], tokens)


def _tokens(captured, batch: int) -> int:
    keep = captured.keep[batch]
    return captured.hidden[batch].shape[:-1].numel() if keep is None else int(keep.sum())


def _last_tokens(captured) -> torch.Tensor:
    """The hidden state of every sample's last token that is not padding, ``[samples, hidden]`` float32 on the CPU."""
    rows = []
    for hidden, keep in zip(captured.hidden, captured.keep, strict=True):
        samples, length, _ = hidden.shape
        if keep is None:
            last = torch.full((samples,), length - 1)
        else:
            last = (keep.view(samples, length).long() * torch.arange(1, length + 1, device=keep.device)).argmax(1)
        last = last.to(hidden.device)
        rows.append(hidden[torch.arange(samples, device=hidden.device), last].float().cpu())
    return torch.cat(rows)


@torch.no_grad()
def drop_layers(model: nn.Module, layers: list[int]) -> LayerReport:
    """Removes decoder layers, in place; the model saves, loads and generates as a stock model with fewer layers.

    Its config remembers under ``hf_sparse_layers`` which layers of the first model are left, through any number of calls.

    Args:
        layers: indices of the layers to remove, in a row or not.

    Raises:
        ValueError: before any change: indices that are not there, all layers, or a model whose class could not build the
            layers that stay from a config (it tells layers apart by a rule that the shorter model breaks).
    """
    name, stack = find_decoder_layers(model)
    dropped = sorted(int(index) for index in layers)
    if not dropped or len(set(dropped)) != len(dropped) or dropped[0] < 0 or dropped[-1] >= len(stack):
        raise ValueError(f"the model has layers 0 to {len(stack) - 1}; asked to drop {list(layers)}")
    if len(dropped) == len(stack):
        raise ValueError(f"all {len(stack)} layers would be dropped; a model needs at least one")
    kept = [index for index in range(len(stack)) if index not in set(dropped)]
    config = without_layers(model.config, kept, len(stack))
    check_same_layers(model, config, name, kept)

    before = sum(p.numel() for p in model.parameters())
    remaining = [stack[index] for index in kept]
    del stack[:]
    stack.extend(remaining)
    for index, layer in enumerate(remaining):
        for module in layer.modules():
            if isinstance(vars(module).get("layer_idx"), int):
                module.layer_idx = index
    text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    new = config.get_text_config() if hasattr(config, "get_text_config") else config
    text.__dict__.update(new.__dict__)  # the object stays: every module of the model holds it
    for module in model.modules():
        if vars(module).get("num_hidden_layers") == len(kept) + len(dropped):
            module.num_hidden_layers = len(kept)
    earlier = getattr(model.config, LAYERS_KEY, None) or {}
    first = earlier.get("kept", range(len(kept) + len(dropped)))
    record = {"layers_before": earlier.get("layers_before", len(first)), "kept": [first[index] for index in kept]}
    setattr(model.config, LAYERS_KEY, record)
    return LayerReport(dropped, kept, before, sum(p.numel() for p in model.parameters()))
