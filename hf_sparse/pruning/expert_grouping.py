"""Which experts of a mixture are alike, on calibration data: the groups in which :mod:`hf_sparse.pruning.expert_merging`
merges them.

    count    [E]      tokens routed to each expert
    logits   [E, E]   inner products over tokens of the experts' router logits          m-smoe,  arxiv.org/abs/2310.01334
    outputs  [E, H]   each expert's mean output over all tokens, routed to it or not    hc-smoe, arxiv.org/abs/2410.08589

One pass over the model gathers them (:func:`observe_experts`), a layer at a time, padding left out. For ``outputs`` every
token goes through every expert, E / k times the work of a forward; ``logits`` cost next to nothing.
"""

import inspect
from dataclasses import dataclass

import torch
from torch import nn

from hf_sparse.capture import Captured, visiting
from hf_sparse.instruments import progress_bar
from hf_sparse.mixtures import Mixture

__all__ = [
    "ExpertStatistics",
    "average_linkage",
    "cluster_by_outputs",
    "dominant_experts",
    "nearest_dominant",
    "observe_experts",
]

_ROWS = 16384  # (token, expert) pairs at once where all experts have to run together


@dataclass
class ExpertStatistics:
    """Sums over the calibration tokens, float64 (``outputs`` are means once :func:`observe_experts` is through)."""

    count: torch.Tensor  # [E] tokens routed
    logits: torch.Tensor  # [E, E] inner products of the experts' router logits (m-smoe)
    outputs: torch.Tensor | None = None  # [E, H] the experts' outputs for all tokens (hc-smoe)
    tokens: int = 0

    @classmethod
    def empty(cls, count: int, device: torch.device) -> "ExpertStatistics":
        options = {"dtype": torch.float64, "device": device}
        return cls(torch.zeros(count, **options), torch.zeros(count, count, **options))

    def finished(self, name: str) -> "ExpertStatistics":
        if not self.tokens:
            raise ValueError("there is no calibration data: attention_mask says that all tokens are padding")
        outputs = None if self.outputs is None else self.outputs.cpu() / self.tokens
        for what, value in (("router logits", self.logits), ("experts' outputs", outputs)):
            if value is not None and not bool(value.isfinite().all()):
                raise ValueError(
                    f"the {what} of {name} are not finite: the model overflows on this calibration data. Check the weights, "
                    "or load the model in bfloat16 or float32"
                )
        return ExpertStatistics(self.count.cpu(), self.logits.cpu(), outputs, self.tokens)


@dataclass
class _Call:
    """What one forward of a mixture saw."""

    hidden: torch.Tensor | None = None  # [T, H] the experts' inputs
    index: torch.Tensor | None = None  # [T, k] the experts chosen
    logits: torch.Tensor | None = None  # [T, E]
    more: tuple = ()  # what the experts are given beside hidden states, indices and gates


def observe_experts(model, mixtures, captured: Captured, method: str, progress: bool) -> dict[str, ExpertStatistics]:
    """``{block: statistics}`` of one pass over the layers as they are; ``captured`` is used up.

    Raises:
        ValueError: nothing but padding, values that are not finite, a router that does not give its logits.
    """
    found: dict[str, ExpertStatistics] = {}
    last = len(captured.layers) - 1
    with progress_bar(progress, "observing experts", last + 1) as step:
        for index, layer in enumerate(captured.layers):
            mine = [name for name in mixtures if name.startswith(f"{captured.name}.{index}.")]
            with visiting(layer, captured.device):
                for batch in range(len(captured.hidden) if mine or index < last else 0):
                    calls = {name: _Call() for name in mine}
                    handles = [handle for name in mine for handle in _listen(model, mixtures[name], calls[name])]
                    try:
                        output = captured.run(index, batch, layer)
                    finally:
                        for handle in handles:
                            handle.remove()
                    if index < last:
                        captured.hidden[batch].copy_(output)
                    for name in mine:
                        one = found.setdefault(name, ExpertStatistics.empty(mixtures[name].count, captured.device))
                        _add(one, model, mixtures[name], calls[name], captured.keep[batch], method)
            for name in mine:
                found[name] = found[name].finished(name)
            step(f"layer {index + 1}/{last + 1}")
    return found


def _listen(model: nn.Module, mixture: Mixture, call: _Call) -> list:
    """Hooks that note what the router and the experts of one mixture see, until they are removed."""
    experts, router = model.get_submodule(mixture.experts), model.get_submodule(mixture.router)
    signature = inspect.signature(experts.forward)

    def routed(module, args, kwargs, output):
        parts = [
            part for part in (output if isinstance(output, tuple) else (output,)) if isinstance(part, torch.Tensor)
        ]
        parts = [p for p in parts if p.is_floating_point() and p.shape[-1] == mixture.count]
        if not parts:
            raise ValueError(f"{mixture.router} ({type(module).__name__}) does not return router logits of its experts")
        call.logits = parts[-1 if mixture.input_scaled else 0].reshape(-1, mixture.count)
        if mixture.input_scaled:
            hidden = args[0] if args else next(iter(kwargs.values()))
            call.hidden, call.index = hidden.reshape(-1, hidden.shape[-1]), call.logits.topk(mixture.top_k).indices

    def entered(module, args, kwargs):
        hidden, index, _, *more = signature.bind(*args, **kwargs).arguments.values()
        call.hidden, call.index, call.more = hidden.reshape(-1, hidden.shape[-1]), index, tuple(more)

    handles = [router.register_forward_hook(routed, with_kwargs=True)]
    if not mixture.input_scaled:
        handles.append(experts.register_forward_pre_hook(entered, with_kwargs=True))
    return handles


def _add(total: ExpertStatistics, model: nn.Module, mixture: Mixture, call: _Call, keep, method: str) -> None:
    if call.logits is None or call.index is None:
        raise ValueError(
            f"{mixture.name} does not call its router and its experts as modules; what they see is unknown"
        )
    hidden, index, logits = call.hidden, call.index.reshape(len(call.hidden), -1), call.logits
    if keep is not None:
        hidden, index, logits = hidden[keep], index[keep], logits[keep]
    if len(hidden) == 0:
        return
    total.tokens += len(hidden)
    total.count += torch.bincount(index.flatten(), minlength=mixture.count)[: mixture.count]
    if method == "m-smoe":
        logits = logits.double()
        total.logits += logits.T @ logits
        return
    experts = model.get_submodule(mixture.experts)
    sums = _sum_outputs(experts, mixture, hidden, call.more)
    total.outputs = sums if total.outputs is None else total.outputs + sums


def _sum_outputs(experts: nn.Module, mixture: Mixture, hidden: torch.Tensor, more: tuple) -> torch.Tensor:
    """Every expert's outputs for all of ``hidden`` [T, H], gates of one, summed over the tokens: float64 ``[E, H]``.

    By the module's own forward, past its hooks, so any layout and dispatch works.
    """
    if mixture.input_scaled:  # it runs all its experts at once, each on rows of its own
        rows = hidden.split(max(1, _ROWS // mixture.count))
        outputs = (experts.forward(part.repeat(mixture.count, 1)) for part in rows)
        return sum(part.view(mixture.count, -1, hidden.shape[-1]).sum(1, dtype=torch.float64) for part in outputs)
    ones = torch.ones(len(hidden), 1, dtype=hidden.dtype, device=hidden.device)
    sums = []
    for expert in range(mixture.count):
        index = torch.full((len(hidden), 1), expert, dtype=torch.int64, device=hidden.device)
        sums.append(experts.forward(hidden, index, ones, *more).sum(0, dtype=torch.float64))
    return torch.stack(sums)


def nearest_dominant(logits: torch.Tensor, dominant: list[int]) -> list[list[int]]:
    """Groups around dominant experts: every other expert with the one whose router logits have the largest cosine.

    Args:
        logits: ``[E, E]``, inner products of the experts' router logits over tokens. dominant: expert indices.

    Returns:
        One list per dominant expert, which comes first in it.
    """
    norms = logits.diagonal().clamp_min(torch.finfo(logits.dtype).tiny).sqrt()
    cosine = logits / norms / norms.unsqueeze(1)
    groups = [[expert] for expert in dominant]
    for expert in sorted(set(range(len(logits))) - set(dominant)):
        groups[int(cosine[expert, dominant].argmax())].append(expert)
    return groups


def average_linkage(distances: torch.Tensor, count: int) -> list[list[int]]:
    """Agglomerative clustering: the two clusters with the least mean distance between members become one, again and again.

    Args:
        distances: ``[E, E]``, symmetric. count: of clusters to end with.

    Returns:
        ``count`` sorted lists of indices, by their first member.
    """
    distances = distances.double().cpu().clone().fill_diagonal_(float("inf"))
    clusters = [[index] for index in range(len(distances))]
    for _ in range(len(distances) - count):
        left, right = sorted(divmod(int(distances.argmin()), len(distances)))
        sizes = len(clusters[left]), len(clusters[right])
        mean = (sizes[0] * distances[left] + sizes[1] * distances[right]) / sum(sizes)  # infinite for either itself
        distances[left], distances[:, left] = mean, mean
        distances[right], distances[:, right] = float("inf"), float("inf")
        clusters[left] += clusters[right]
        clusters[right] = []
    return sorted(sorted(cluster) for cluster in clusters if cluster)


def cluster_by_outputs(outputs: torch.Tensor, counts: torch.Tensor, count: int) -> list[list[int]]:
    """HC-SMoE's groups, each with its most frequent expert first."""
    distances = torch.cdist(outputs, outputs, compute_mode="donot_use_mm_for_euclid_dist")  # exact for near-equal ones
    return [sorted(g, key=lambda expert: -counts[expert]) for g in average_linkage(distances, count)]


def dominant_experts(
    mixtures, statistics, counts: dict[str, int], allocation: str, fewest: dict[str, int]
) -> dict[str, list[int]]:
    """The experts that others join, ``{block: indices}``, the most frequent first.

    Args:
        counts: ``{block: how many}``; for ``global`` their sum counts, and the shares of tokens are ranked over all layers.
        fewest: ``{block: how many}`` that ``global`` takes of each layer before it looks at the others.
    """
    order = {name: (-statistics[name].count).argsort(stable=True).tolist() for name in mixtures}
    if allocation == "uniform":
        return {name: order[name][: counts[name]] for name in mixtures}
    taken = dict(fewest)
    share = {name: statistics[name].count / statistics[name].count.sum().clamp_min(1) for name in mixtures}
    rest = [
        (-float(share[name][expert]), place, name)
        for place, name in enumerate(mixtures)
        for expert in order[name][taken[name] :]
    ]
    for _, _, name in sorted(rest)[: sum(counts.values()) - sum(taken.values())]:
        taken[name] += 1
    return {name: order[name][: taken[name]] for name in mixtures}
