"""Pruning whole experts of a mixture: the lowest scores go, the rest stays as it is.

    scores = score_experts(model, batches)                  REAP (arxiv.org/abs/2510.13999) unless told otherwise
    report = prune_experts(model, scores, sparsity=0.5)

Dropping expert j replaces its share g_j f_j of the output by more of the experts that take its place; nothing is merged, the
router's other rows keep their values, and nothing is trained. The result is what the model would compute with the dropped
experts' router logits at minus infinity, in less memory, and loads with the stock classes if every layer keeps as many.

    uniform   E - floor(sparsity E) experts in every layer, each layer by its own ranking          (the paper)
    global    as many in all, by one ranking of scores over their layer's mean; at least what the router needs in each

Layers with different counts need ``import hf_sparse`` to load (:mod:`hf_sparse.integrations.uneven_experts`). Routers that
choose among groups of experts first lose as many in each group.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from hf_sparse.atomic import atomic_write_text
from hf_sparse.mixtures import Mixture, find_mixtures, select_experts, set_expert_count, stated_count
from hf_sparse.pruning.expert_scores import ExpertScores

__all__ = ["EXPERTS_KEY", "UNEVEN", "ExpertReport", "prune_experts", "super_experts"]

EXPERTS_KEY = "hf_sparse_experts"  # in the model's config: what was kept of the original experts, and by which ranking
UNEVEN = "uneven_experts"  # the quant_method that makes transformers ask us before it loads layers of different counts


@dataclass
class ExpertReport:
    """What :func:`prune_experts` did.

    Attributes:
        kept: ``{block: indices of the kept experts}``, of the model as it was given. experts_before: ``{block: count}``.
        parameters_before, parameters_after: of the whole model. notes: anything out of the ordinary.
    """

    saliency: str | None
    allocation: str
    sparsity: float
    kept: dict[str, list[int]]
    experts_before: dict[str, int]
    parameters_before: int
    parameters_after: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def uniform(self) -> bool:
        """Whether every layer keeps as many."""
        return len({len(indices) for indices in self.kept.values()}) == 1

    def to_dict(self) -> dict:
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Writes the report as JSON."""
        atomic_write_text(Path(path), json.dumps(self.to_dict(), indent=1) + "\n")


@torch.no_grad()
def prune_experts(
    model: nn.Module,
    scores: ExpertScores | dict[str, torch.Tensor] | None,
    sparsity: float | None = None,
    *,
    keep: int | dict[str, list[int]] | None = None,
    allocation: str = "uniform",
    keep_super: bool = False,
) -> ExpertReport:
    """Removes experts of every mixture, in place.

    Args:
        scores: what :func:`hf_sparse.pruning.expert_scores.score_experts` gave, or ``{block: [experts]}``, higher is kept;
            None if ``keep`` says which.
        sparsity: the fraction of experts to remove, in [0, 1), rounded down to whole experts of a layer.
        keep: instead of ``sparsity``: the number of experts of every layer, or ``{block: indices}`` for every block.
        allocation: ``uniform`` or ``global``.
        keep_super: never drop experts with extreme activations (:func:`super_experts`); needs an ExpertScores.

    Returns:
        The report. ``model.config.hf_sparse_experts`` records the original indices that stayed.

    Raises:
        ValueError: before any change: scores of another model, NaN scores, fewer experts than a token is sent to, sizes that
            a router with groups cannot have, both or neither of ``sparsity`` and ``keep``.
    """
    mixtures = find_mixtures(model)
    if (sparsity is None) == (keep is None):
        raise ValueError("give either sparsity (a fraction of the experts) or keep (how many, or which)")
    if allocation not in ("uniform", "global"):
        raise ValueError(f"unknown allocation of experts {allocation!r}; known are uniform and global")
    if isinstance(keep, dict):
        chosen = _given(mixtures, keep)
        scores = None
    else:
        counts = _counts(mixtures, sparsity, keep)
        values = _values(mixtures, scores)
        if keep_super:
            values = _lifted(values, scores)
        chosen = _uniform(mixtures, values, counts) if allocation == "uniform" else _global(mixtures, values, counts)
        if keep_super:
            _check_super(super_experts(scores), chosen)
    for name, mixture in mixtures.items():
        mixture.check_kept(chosen[name])
    _check_config(model, chosen)

    report = ExpertReport(
        saliency=None if scores is None else getattr(scores, "saliency", "given"),
        allocation=allocation,
        sparsity=1 - sum(map(len, chosen.values())) / sum(m.count for m in mixtures.values()),
        kept=chosen,
        experts_before={name: m.count for name, m in mixtures.items()},
        parameters_before=sum(p.numel() for p in model.parameters()),
    )
    if isinstance(scores, ExpertScores) and (never := scores.never_routed()):
        total = sum(len(one["count"]) for one in scores.statistics.values())
        report.notes.append(
            f"{never} of {total} experts were sent no token of the calibration data and went first: more data, or data of more "
            "kinds, would tell whether they matter"
        )
    for name, mixture in mixtures.items():
        select_experts(model, mixture, chosen[name])
    _write_counts(model, chosen)
    _record(model, report)
    report.parameters_after = sum(p.numel() for p in model.parameters())
    return report


def super_experts(scores: ExpertScores, all_layers: bool = False) -> dict[str, list[int]]:
    """``{block: experts}`` with extreme activations, which carry a model's attention sinks (arxiv.org/abs/2507.23279).

    Those with a largest activation above the 99.5th percentile of all experts' and above a tenth of the largest; the last
    quarter of the layers left out unless ``all_layers``.
    """
    peaks = torch.cat([one["peak"] for one in scores.statistics.values()])
    threshold = max(float(peaks.quantile(0.995)), float(peaks.max()) / 10)
    names = list(scores.statistics)
    names = names if all_layers else names[: max(1, int(len(names) * 0.75))]
    found = {name: (scores.statistics[name]["peak"] > threshold).nonzero().flatten().tolist() for name in names}
    return {name: indices for name, indices in found.items() if indices}


def _given(mixtures: dict[str, Mixture], keep: dict[str, list[int]]) -> dict[str, list[int]]:
    _same_blocks(mixtures, keep, "keep")
    return {name: sorted(int(index) for index in keep[name]) for name in mixtures}


def _same_blocks(mixtures: dict[str, Mixture], given, what: str) -> None:
    if set(mixtures) != set(given):
        missing, unknown = sorted(set(mixtures) - set(given)), sorted(set(given) - set(mixtures))
        raise ValueError(
            f"{what} must have an entry for each block {', '.join(mixtures)}; "
            + (f"missing: {', '.join(missing)}" if missing else f"unknown: {', '.join(unknown)}")
        )


def _counts(mixtures: dict[str, Mixture], sparsity: float | None, keep: int | None) -> dict[str, int]:
    """How many experts each block keeps if all layers lose the same share."""
    counts = {}
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is the fraction of experts to remove, in [0, 1); got {sparsity}")
    for name, mixture in mixtures.items():
        count = mixture.count
        if keep is not None:
            if not isinstance(keep, int) or not 1 <= keep <= count:
                raise ValueError(f"keep is a number of experts from 1 to {count}, all that {name} has; got {keep!r}")
            counts[name] = keep
        else:
            drop = int(count * sparsity + 1e-9)  # 0.29 * 100 is 28.999999999999996
            counts[name] = count - round(drop / mixture.groups) * mixture.groups
        mixture.check_count(counts[name])
    return counts


def _values(mixtures: dict[str, Mixture], scores) -> dict[str, torch.Tensor]:
    if scores is None:
        raise ValueError("give scores (from score_experts), or keep={block: indices of the experts to keep}")
    values = scores.scores() if isinstance(scores, ExpertScores) else scores
    _same_blocks(mixtures, values, "scores")
    values = {name: torch.as_tensor(values[name]).double().cpu().flatten() for name in mixtures}
    for name, mixture in mixtures.items():
        if len(values[name]) != mixture.count:
            raise ValueError(f"{name} has {mixture.count} experts, but {len(values[name])} scores were given")
        if bool(values[name].isnan().any()):
            raise ValueError(f"the scores of {name} hold NaN")
    return values


def _lifted(values: dict[str, torch.Tensor], scores) -> dict[str, torch.Tensor]:
    """Super experts above all others, in their own order."""
    if not isinstance(scores, ExpertScores):
        raise ValueError("keep_super needs the largest activations, which only the scores of score_experts hold")
    values = {name: one.clone() for name, one in values.items()}
    for name, indices in super_experts(scores).items():
        values[name][indices] += float(sum(one.abs().sum() for one in values.values())) + 1
    return values


def _check_super(wanted: dict[str, list[int]], chosen: dict[str, list[int]]) -> None:
    for name, indices in wanted.items():
        if not set(indices) <= set(chosen[name]):
            raise ValueError(f"{name} has {len(indices)} super experts and would keep {len(chosen[name])} experts")


def _units(mixture: Mixture, values: torch.Tensor) -> torch.Tensor:
    """Experts in the order in which they go, last first: ``[ranks, groups]``, row r with the r-th best of every group."""
    size = mixture.count // mixture.groups
    order = values.view(mixture.groups, size).argsort(dim=1, descending=True, stable=True)
    return (order + torch.arange(mixture.groups).unsqueeze(1) * size).T


def _uniform(mixtures, values, counts) -> dict[str, list[int]]:
    return {
        name: sorted(_units(m, values[name])[: counts[name] // m.groups].flatten().tolist())
        for name, m in mixtures.items()
    }


def _global(mixtures, values, counts) -> dict[str, list[int]]:
    """One ranking of all layers' experts; a score counts in means of its layer, since scales grow with depth."""
    budget = sum(counts.values())
    kept = {name: m.fewest // m.groups for name, m in mixtures.items()}  # rows of _units
    units = {name: _units(m, values[name]) for name, m in mixtures.items()}
    budget -= sum(rows * mixtures[name].groups for name, rows in kept.items())
    candidates = []
    for order, (name, unit) in enumerate(units.items()):
        scale = values[name].mean().clamp_min(torch.finfo(torch.float64).tiny)
        for row in range(kept[name], len(unit)):
            candidates.append((-float((values[name][unit[row]] / scale).mean()), order, row, name))
    full = set()  # a layer whose next row no longer fits gets no later one either
    for _, _, _, name in sorted(candidates):
        if name not in full and mixtures[name].groups <= budget:
            kept[name] += 1
            budget -= mixtures[name].groups
        else:
            full.add(name)
    return {name: sorted(units[name][: kept[name]].flatten().tolist()) for name in mixtures}


def _quantization(model: nn.Module) -> dict:
    known = getattr(model.config, "quantization_config", None)
    return known if isinstance(known, dict) else getattr(known, "__dict__", {})


def _check_config(model: nn.Module, chosen: dict[str, list[int]]) -> None:
    method = _quantization(model).get("quant_method")
    if method not in (None, UNEVEN) and len({len(indices) for indices in chosen.values()}) > 1:
        raise ValueError(
            f"this model is loaded through another quantization method ({method}), so its layers cannot keep different numbers "
            "of experts; choose allocation='uniform', or load it dequantized"
        )


def _write_counts(model: nn.Module, chosen: dict[str, list[int]]) -> None:
    """The number of experts in the config; or, where layers differ, each block's own beside the number they all had."""
    counts = {name: len(indices) for name, indices in chosen.items()}
    if len(set(counts.values())) > 1:
        model.config.quantization_config = {"quant_method": UNEVEN, "experts": counts}
        return
    if _quantization(model).get("quant_method") == UNEVEN:
        del model.config.quantization_config
    if stated := stated_count(model):
        set_expert_count(model, stated, next(iter(counts.values())))


def _record(model: nn.Module, report: ExpertReport) -> None:
    """What stayed of the experts the model once had, through any number of prunings."""
    earlier = getattr(model.config, EXPERTS_KEY, None) or {}
    first = earlier.get("kept", {})
    content = {
        "saliency": report.saliency,
        "allocation": report.allocation,
        "experts_before": earlier.get("experts_before", report.experts_before),
        "kept": {name: [first[name][i] if name in first else i for i in kept] for name, kept in report.kept.items()},
    }
    setattr(model.config, EXPERTS_KEY, content)
