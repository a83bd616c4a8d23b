"""Which weights are kept: the first masks, and the masks after an update, each method by its row of the table.

Patterns decide where work is done. Unstructured masks need one threshold for a weight, found across processes by counting
(:mod:`hf_sparse.training.update`). Patterns within a row are decided where the row is. What needs more (blocks, neurons that
are ablated, topology) gathers one weight at a time.
"""

from functools import partial

import torch

from hf_sparse.methods import Method
from hf_sparse.patterns import NM, ConstantFanIn, Unstructured, pruned_count
from hf_sparse.saliency import Statistics, get, noise
from hf_sparse.training.cannistraci_hebb import link_scores, soft_drop, soft_grow, temperature
from hf_sparse.training.fan_in import constant_fan_in_start, constant_fan_in_update
from hf_sparse.training.update import drop_and_grow_all, lowest, lowest_of_all
from hf_sparse.training.weight import Weight

__all__ = ["masks_by_score", "move", "start_scores"]


def start_scores(weight: Weight, saliency, seed: int) -> torch.Tensor:
    """The local scores that choose the first mask, in the stored layout."""
    if saliency == "random":
        values = weight.values()
        return noise(values.shape, f"{seed}/{weight.target.plain[0]}", values.device, weight.first_index())
    whole = weight.target.matrix(weight.gather(weight.values())).float()
    statistics = Statistics(name=weight.target.plain[0], seed=seed)
    scores = [get(saliency)(matrix, statistics) for matrix in (whole if weight.target.is_experts else [whole])]
    scores = torch.stack(scores) if weight.target.is_experts else scores[0]
    return weight.own(weight.target.stored(scores, weight.parameter))


@torch.no_grad()
def masks_by_score(
    weights: list[Weight], scores: list[torch.Tensor], sparsities: list[float], fan_in: bool = False
) -> list[torch.Tensor]:
    """Local masks that keep the highest scores, every weight in its own pattern, counts exact over all processes.

    Args:
        fan_in: by SRigL's own count of a constant fan-in (rounded down) instead of the nearest one.
    """
    masks: list[torch.Tensor | None] = [None] * len(weights)
    flat = [i for i, weight in enumerate(weights) if weight.pattern == Unstructured()]
    for group, members in _by_group([(i, weights[i]) for i in flat]):
        every = [torch.ones_like(scores[i], dtype=torch.bool) for i in members]
        counts = [pruned_count(sparsities[i], weights[i].numel) for i in members]
        gone = lowest([scores[i] for i in members], every, counts, group)
        for i, drop in zip(members, gone, strict=True):
            masks[i] = ~drop
    for i, (weight, score) in enumerate(zip(weights, scores, strict=True)):
        if masks[i] is not None:
            continue
        target = weight.target
        here = _rows_are_whole(weight)
        if here and score.numel() == 0:  # fewer rows than processes
            masks[i] = torch.ones_like(score, dtype=torch.bool)
            continue
        matrix = target.matrix(score if here else weight.gather(score))
        if fan_in:
            kept = _each(target, partial(constant_fan_in_start, density=1.0 - sparsities[i]), matrix)
        else:
            kept = weight.pattern.mask(matrix, sparsities[i])
        kept = target.stored(kept, score if here else weight.parameter)
        masks[i] = kept if here else weight.own(kept)
    return masks


@torch.no_grad()
def move(
    weights: list[Weight],
    method: Method,
    options: dict,
    *,
    step: int,
    sparsities: list[float],
    fraction: float,
    seed: int,
) -> list[torch.Tensor]:
    """The local masks after the update that follows optimizer step ``step``.

    Args:
        options: the method's schedule, ``begin`` and ``end`` as steps.
        sparsities: what every weight is to have after the update.
        fraction: share of the kept weights to exchange.
    """
    if method.pattern == "constant-fan-in":
        return [_move_fan_in(w, options, s, fraction) for w, s in zip(weights, sparsities, strict=True)]
    if method.grow == "topology":
        return [
            _move_by_topology(w, options, s, fraction, step, seed) for w, s in zip(weights, sparsities, strict=True)
        ]
    size = [weight.values().abs() for weight in weights]
    if any(weight.pattern != Unstructured() for weight in weights):  # gradual pruning in a pattern
        return masks_by_score(weights, size, sparsities)
    masks: list[torch.Tensor | None] = [None] * len(weights)
    for group, members in _by_group(list(enumerate(weights))):
        chosen = [weights[i] for i in members]
        wanted = [w.numel - pruned_count(sparsities[i], w.numel) for i, w in zip(members, chosen, strict=True)]
        if options.get("scope") == "global":
            keeps = _shares_of_global(chosen, [size[i] for i in members], sum(wanted), group)
        else:  # never more than now: a ramp that begins anew in a second training revives nothing
            keeps = [min(w.kept, keep) for w, keep in zip(chosen, wanted, strict=True)]
        drops = [w.kept - keep + int(fraction * keep) for w, keep in zip(chosen, keeps, strict=True)]
        grow = None if method.grow is None else [_grow_scores(w, method.grow, step, seed) for w in chosen]
        new = drop_and_grow_all([w.mask for w in chosen], [size[i] for i in members], grow, drops, keeps, group)
        for i, mask in zip(members, new, strict=True):
            masks[i] = mask
    return masks


def _shares_of_global(weights: list[Weight], sizes: list[torch.Tensor], keep: int, group) -> list[int]:
    """How many weights each keeps if all are ranked together and ``keep`` of them stay."""
    excess = sum(weight.kept for weight in weights) - keep
    if excess <= 0:
        return [weight.kept for weight in weights]
    gone = lowest_of_all(sizes, [weight.mask for weight in weights], excess, group)
    counts = torch.stack([one.sum() for one in gone])
    if group is not None:
        torch.distributed.all_reduce(counts, group=group)
    return [weight.kept - count for weight, count in zip(weights, counts.tolist(), strict=True)]


def _grow_scores(weight: Weight, grow: str, step: int, seed: int) -> torch.Tensor:
    if grow == "gradient":
        return weight.gradient.abs()
    values = weight.values()
    return noise(values.shape, f"{seed}/{step}/grow/{weight.target.plain[0]}", values.device, weight.first_index())


def _move_fan_in(weight: Weight, options: dict, sparsity: float, fraction: float) -> torch.Tensor:
    target = weight.target

    def update(size, mask, gradient):
        wanted = dict(density=1.0 - sparsity, gamma_sal=options["gamma_sal"], ablate=not weight.is_output)
        return constant_fan_in_update(size, mask, gradient, fraction, **wanted)

    whole = [target.matrix(weight.gather(part)) for part in (weight.values(), weight.mask, weight.gradient)]
    return weight.own(target.stored(_each(target, update, *whole), weight.parameter))


def _move_by_topology(
    weight: Weight, options: dict, sparsity: float, fraction: float, step: int, seed: int
) -> torch.Tensor:
    target = weight.target
    key = f"{seed}/{step}/{{}}/{target.plain[0]}"
    heat = temperature(step, options["end"], options["initial_temperature"], options["final_temperature"])

    def update(values, mask, drop_noise, grow_noise):
        kept = int(mask.sum())
        survivors = soft_drop(values.abs(), mask, drop_noise, drop=int(fraction * kept), temperature=heat)
        return soft_grow(link_scores(survivors), survivors, grow_noise, keep=kept)

    values = weight.gather(weight.values())
    noises = [noise(values.shape, key.format(what), values.device) for what in ("drop", "grow")]
    whole = [target.matrix(tensor) for tensor in (values, weight.gather(weight.mask), *noises)]
    return weight.own(target.stored(_each(target, update, *whole), weight.parameter))


def _each(target, function, *matrices: torch.Tensor) -> torch.Tensor:
    """A function of ``[out, in]`` matrices, for every expert of a fused weight."""
    if not target.is_experts:
        return function(*matrices)
    return torch.stack([function(*one) for one in zip(*matrices, strict=True)])


def _rows_are_whole(weight: Weight) -> bool:
    """Whether the pattern can be decided from what lies here: everything, or whole rows of a row-wise pattern."""
    if weight.rows is None:
        return True
    row_wise = isinstance(weight.pattern, (NM, ConstantFanIn))
    return row_wise and (weight.target.layout == "matrix" or weight.target.is_experts)  # alike on every process


def _by_group(numbered: list[tuple[int, Weight]]):
    """``(process group or None, indices)``: the weights that are sharded over the same processes."""
    groups: dict[object, list[int]] = {}
    for index, weight in numbered:
        groups.setdefault(None if weight.rows is None else weight.rows.group, []).append(index)
    return groups.items()
