"""Merging experts of a mixture: what pruning them (REAP) is compared with.

    m-smoe    arxiv.org/abs/2310.01334. The experts that most tokens are routed to are dominant. Each other one joins the
              dominant one whose router logits over the calibration tokens are most alike (cosine), with its hidden units in
              that one's order (:mod:`hf_sparse.pruning.expert_alignment`).
    hc-smoe   arxiv.org/abs/2410.08589. Agglomerative clustering, average linkage, of the experts' mean outputs by Euclidean
              distance: all calibration tokens through every expert, whatever the router says. Nothing is reordered.

    merged weight = sum over the group of  frequency_e * weight_e  /  sum of frequencies

What becomes of the router is a choice.

    keep       Its rows stay. An expert's logit now leads to its group's weights, so a group gets the sum of its members'
               gates, and a token that chose two members computes the same expert twice. This is what the released code of
               both papers does (members bound to one module) and what REAP was compared with. A stock checkpoint needs one
               set of weights per logit, so the group's weights are copied: the model gets worse, not smaller.
    dominant   One row per group, that of its most frequent expert; the others are removed. Really smaller, but the router
               no longer knows the tokens of the merged ones: they go where their dominant's row sends them.

All statistics are of the model as it was given. REAP's own code (CerebrasResearch/reap, 1970473) differs in three details:
there two experts are alike if their rows of similarities are, not their logits; the costs of an alignment are float16; and a
group that no token was routed to becomes zero, where here it is averaged equally.
"""

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from hf_sparse.atomic import atomic_write_text
from hf_sparse.capture import as_batches, capture, find_decoder_layers, visiting
from hf_sparse.instruments import progress_bar
from hf_sparse.mixtures import Mixture, find_mixtures
from hf_sparse.pruning.checks import check_placement, check_tokens
from hf_sparse.pruning.expert_alignment import align_expert, check_alignable
from hf_sparse.pruning.expert_grouping import cluster_by_outputs, dominant_experts, nearest_dominant, observe_experts
from hf_sparse.pruning.experts import EXPERTS_KEY, prune_experts

__all__ = ["MergeReport", "merge_experts"]

_ALLOCATIONS = {"m-smoe": "global", "hc-smoe": "uniform"}  # each paper's own
_TOKENS_PER_STEP = {"cuda": 8192, "cpu": 2048}


@dataclass
class MergeReport:
    """What :func:`merge_experts` did.

    Attributes:
        groups: ``{block: [[dominant expert, others ...], ...]}``, indices of the model as it was given.
        experts_before: ``{block: experts}``. tokens: of the calibration data, padding excluded.
        parameters_before, parameters_after: of the whole model; equal for ``router="keep"``, whose copies are counted.
        notes: anything out of the ordinary. seconds: in all.
    """

    method: str
    router: str
    allocation: str
    groups: dict[str, list[list[int]]]
    experts_before: dict[str, int]
    tokens: int
    parameters_before: int
    parameters_after: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def distinct(self) -> dict[str, int]:
        """``{block: experts with weights of their own}``."""
        return {name: len(groups) for name, groups in self.groups.items()}

    @property
    def sparsity(self) -> float:
        """The fraction of experts that have no weights of their own any more."""
        return 1 - sum(self.distinct.values()) / sum(self.experts_before.values())

    def to_dict(self) -> dict:
        return asdict(self) | {"distinct": self.distinct, "sparsity": self.sparsity}

    def save(self, path: str | Path) -> None:
        """Writes the report as JSON."""
        atomic_write_text(Path(path), json.dumps(self.to_dict(), indent=1) + "\n")


@torch.no_grad()
def merge_experts(
    model: nn.Module,
    batches: Iterable,
    sparsity: float,
    *,
    method: str = "m-smoe",
    router: str = "keep",
    allocation: str | None = None,
    device: str | torch.device | None = None,
    storage: str | torch.device | None = None,
    progress: bool = False,
) -> MergeReport:
    """Merges the experts of every mixture into fewer, in place.

    Args:
        model: a decoder-only transformers model with mixtures of experts.
        batches: calibration token ids, see :func:`hf_sparse.capture.as_batches`.
        sparsity: the fraction of experts that lose their own weights, in [0, 1), rounded down to whole experts of a layer.
        method: ``m-smoe`` or ``hc-smoe``.
        router: ``keep`` or ``dominant``, see above.
        allocation: ``uniform`` (as many groups in every layer) or ``global`` (m-smoe only: as many in all, the dominant
            experts being the most frequent of all layers, at least one in each); default: the paper's own, global for m-smoe
            and uniform for hc-smoe. With ``router="dominant"`` layers of different counts need ``import hf_sparse`` to load.
        device: where a layer is while it is worked on; default: where the model is.
        storage: where hidden states wait between layers; default: ``device``.
        progress: show a bar.

    Returns:
        The report. ``model.config.hf_sparse_experts`` records the groups.

    Raises:
        ValueError: before any change: an unknown method, router or allocation, no mixture of experts, a layout whose hidden
            units are unknown (m-smoe), quantized experts, no data, tokens the model does not have, logits or outputs that are
            not finite, groups with which a router cannot work.
    """
    started = time.perf_counter()
    allocation = _check_arguments(method, router, allocation, sparsity)
    mixtures = find_mixtures(model)
    _check_experts(model, mixtures, method)
    check_placement(model)
    counts = {name: m.count - int(m.count * sparsity + 1e-9) for name, m in mixtures.items()}
    if router == "dominant":
        for name, mixture in mixtures.items():
            mixture.check_count(counts[name])
    name, layers = find_decoder_layers(model)
    for mixture in mixtures.values():
        if not mixture.name.startswith(f"{name}."):
            raise ValueError(f"{mixture.name} lies outside the decoder layers ({name}); its experts cannot be merged")
    device = torch.device(device or next(model.parameters()).device)
    batches = as_batches(batches, _TOKENS_PER_STEP.get(device.type, 2048))
    check_tokens(model, batches)

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        captured = capture(model, name, layers, batches, device, torch.device(storage or device))
        statistics = observe_experts(model, mixtures, captured, method, progress)
    finally:
        for module, mode in modes:
            module.training = mode
    if method == "m-smoe":
        fewest = {n: m.fewest if router == "dominant" else 1 for n, m in mixtures.items()}
        dominant = dominant_experts(mixtures, statistics, counts, allocation, fewest)
        groups = {n: nearest_dominant(statistics[n].logits, dominant[n]) for n in mixtures}
    else:
        groups = {n: cluster_by_outputs(statistics[n].outputs, statistics[n].count, counts[n]) for n in mixtures}
    kept = {n: sorted(group[0] for group in groups[n]) for n in mixtures}
    if router == "dominant":
        _check_router(mixtures, kept)

    tokens = next(iter(statistics.values())).tokens
    size = sum(p.numel() for p in model.parameters())
    before = {n: m.count for n, m in mixtures.items()}
    report = MergeReport(method, router, allocation, groups, before, tokens, size)
    idle = sum(float(statistics[n].count[group].sum()) == 0 for n in mixtures for group in groups[n] if len(group) > 1)
    if idle:
        report.notes.append(f"{idle} groups of experts were sent no token of the calibration data: averaged equally")
    del captured
    with progress_bar(progress, "merging experts", len(layers)) as step:
        for index, layer in enumerate(layers):
            with visiting(layer, device):
                for n in (n for n in mixtures if n.startswith(f"{name}.{index}.")):
                    _merge(model, mixtures[n], groups[n], statistics[n].count, align=method == "m-smoe")
            step(f"layer {index + 1}/{len(layers)}")
    if router == "dominant":
        prune_experts(model, None, keep=kept)
    earlier = getattr(model.config, EXPERTS_KEY, None) or {"experts_before": before}
    setattr(model.config, EXPERTS_KEY, earlier | {"merged": {"method": method, "router": router, "groups": groups}})
    report.parameters_after = sum(p.numel() for p in model.parameters())
    report.seconds = time.perf_counter() - started
    return report


# -------------------------------------------------------------------------------------------------------------- merging


def _merge(model: nn.Module, mixture: Mixture, groups: list[list[int]], counts: torch.Tensor, align: bool) -> None:
    """Gives all experts of a group the average of their weights, the first one's hidden units setting the order."""
    experts = model.get_submodule(mixture.experts)
    prefix = mixture.experts + "."
    tensors = [model.get_parameter(name).data for name, _ in mixture.tensors if name.startswith(prefix)]  # all [E, ...]
    for group in groups:
        if len(group) == 1:
            continue
        for expert in group[1:] if align else ():
            align_expert(experts, expert, group[0])
        share = counts[group] if float(counts[group].sum()) > 0 else torch.ones(len(group), dtype=torch.float64)
        for tensor in tensors:
            weights = (share / share.sum()).tolist()
            # float64: the average of equal weights is then those weights, to the last bit
            merged = sum(tensor[expert].double() * weight for expert, weight in zip(group, weights, strict=True))
            tensor[group] = merged.to(tensor.dtype)


# --------------------------------------------------------------------------------------------------------------- checks


def _check_arguments(method: str, router: str, allocation: str | None, sparsity: float) -> str:
    """The allocation; raises ValueError for an argument that is not known or does not go with another."""
    for what, value, known in (
        ("method of merging experts", method, tuple(_ALLOCATIONS)),
        ("router", router, ("keep", "dominant")),
        ("allocation of merged experts", allocation or "uniform", ("uniform", "global")),
    ):
        if value not in known:
            raise ValueError(f"unknown {what} {value!r}; known are {' and '.join(known)}")
    if allocation == "global" and method == "hc-smoe":
        raise ValueError("hc-smoe clusters layer by layer and knows allocation='uniform' only; m-smoe knows 'global'")
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is the fraction of experts that lose their own weights, in [0, 1); got {sparsity}")
    return allocation or _ALLOCATIONS[method]


def _check_experts(model: nn.Module, mixtures: dict[str, Mixture], method: str) -> None:
    for mixture in mixtures.values():
        for name, parameter in model.get_submodule(mixture.experts).named_parameters(mixture.experts):
            if not parameter.is_floating_point() or parameter.element_size() < 2:
                raise ValueError(
                    f"{name} is stored as {str(parameter.dtype).removeprefix('torch.')}: quantized experts cannot be "
                    "averaged; load the model dequantized, in bfloat16, say"
                )
            if not bool(parameter.isfinite().all()):
                raise ValueError(
                    f"{name} holds values that are NaN or infinite; nothing was merged. Check the checkpoint"
                )
        if method == "m-smoe":
            check_alignable(model.get_submodule(mixture.experts), mixture.experts)


def _check_router(mixtures: dict[str, Mixture], kept: dict[str, list[int]]) -> None:
    for name, mixture in mixtures.items():
        try:
            mixture.check_kept(kept[name])
        except ValueError as error:
            raise ValueError(
                f"the groups that were found leave the experts {kept[name]} as the dominant ones of {name}, and router="
                f"'dominant' keeps only their rows: {error}. router='keep' keeps all rows, so any groups will do"
            ) from error
