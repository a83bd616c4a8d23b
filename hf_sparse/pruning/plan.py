"""The plan: which pattern and how much sparsity each parameter gets, decided before any weight changes.

Overrides come first and stand outside the average; the rest share the average by the config's allocation. With an n:m
pattern and an allocation that is not uniform, parameters get different n for the same m.
"""

from collections.abc import Callable

import torch
from torch import nn

from hf_sparse import allocation, saliency
from hf_sparse.calibration import collect
from hf_sparse.capture import Captured, visiting
from hf_sparse.config import SparsityConfig
from hf_sparse.patterns import NM, Channel, Pattern, parse
from hf_sparse.targets import Target, match_names

__all__ = ["Plan", "data_needs", "looks_at_data", "make_plan"]

Plan = dict[str, tuple[Pattern, float]]  # {parameter name: (pattern, sparsity)}


def data_needs(config: SparsityConfig) -> str:
    """What pruning has to see beside the weights: ``nothing``, ``inputs``, ``hessian`` or ``gradient``.

    Raises:
        ValueError: repair or permute with a saliency that looks at gradients: they work from layer inputs.
    """
    needs = saliency.needs(config.saliency)
    if needs == "gradient" and (config.repair or config.permute):
        raise ValueError(
            f"{'repair' if config.repair else 'permute'} works from layer inputs and does not combine with a gradient "
            "saliency; use wanda or obs"
        )
    if config.repair:
        return "hessian"
    return "inputs" if config.permute and needs == "nothing" else needs


def looks_at_data(config: SparsityConfig) -> bool:
    """Whether a run takes calibration data at all."""
    return data_needs(config) != "nothing" or config.allocation == "owl"


def make_plan(
    model: nn.Module, config: SparsityConfig, targets: dict[str, Target], capture: Callable[[], Captured] | None
) -> Plan:
    """``{name: (pattern, sparsity)}`` for every target.

    Args:
        capture: gives the inputs of the dense model's layers, for allocations that look at data.

    Raises:
        ValueError: an unknown allocation, a pattern that does not fit a weight, entries that match nothing.
    """
    default = parse(config.pattern)
    plan: dict[str, tuple[Pattern, float]] = {}
    for entry, value in config.overrides.items():
        for name in match_names(entry, targets):
            if name in plan:
                continue
            if isinstance(value, str):
                pattern = parse(value)
                plan[name] = (
                    pattern,
                    config.sparsity if pattern.implied_sparsity is None else pattern.implied_sparsity,
                )
            else:
                plan[name] = (default if value > 0 else parse("unstructured"), float(value))  # dense is no 2:4
    rest = {name: target for name, target in targets.items() if name not in plan}
    sizes = {name: target.numel for name, target in rest.items()}
    if not rest:
        sparsities = {}
    elif isinstance(config.allocation, dict):
        sparsities = allocation.from_dict(config.allocation, rest)
    elif config.allocation == "uniform":
        sparsities = allocation.uniform(sizes, config.sparsity)
    elif config.allocation == "erk":
        shapes = {n: tuple(model.get_parameter(n).shape) if not t.is_experts else t.shape[1:] for n, t in rest.items()}
        sparsities = allocation.erk(sizes, config.sparsity, shapes, **config.allocation_options)
    elif config.allocation == "owl":
        sparsities = _owl(model, config, rest, sizes, capture())
    else:
        raise ValueError(
            f"unknown allocation {config.allocation!r}; known are {', '.join(allocation.ALLOCATIONS)} and a dict of sparsities"
        )
    if isinstance(default, NM) and config.allocation != "uniform" and rest:
        counts = allocation.nm_mix(sparsities, sizes, default.m)
        plan.update({name: (NM(count, default.m), 1.0 - count / default.m) for name, count in counts.items()})
    elif default.implied_sparsity is not None:
        plan.update(dict.fromkeys(rest, (default, default.implied_sparsity)))
    else:
        if not isinstance(config.allocation, dict):
            units = {n: default.unit(t.shape) * (t.shape[0] if t.is_experts else 1) for n, t in rest.items()}
            sparsities = allocation.in_units(sparsities, sizes, units)
        plan.update({name: (default, sparsities[name]) for name in rest})
    for name, (pattern, sparsity) in plan.items():
        reason = pattern.fits(targets[name].shape) if sparsity > 0 else None
        if reason:
            raise ValueError(f"pattern {pattern} does not fit {name}: {reason}. Ignore it or override its pattern")
        if isinstance(pattern, Channel) and config.saliency in saliency.SOLVERS:
            raise ValueError(
                f"{config.saliency} cannot prune whole channels; choose wanda or magnitude for pattern 'channel'"
            )
    return plan


def _owl(model, config, targets, sizes, captured: Captured) -> dict[str, float]:
    """OWL looks at the dense model, so it has a pass of its own."""
    options = dict(config.allocation_options)
    outlier = options.pop("outlier", 5.0)
    groups, ratios = {}, {}
    for index, layer in enumerate(captured.layers):
        mine = captured.targets_of(index, targets)
        with visiting(layer, captured.device):
            if mine:
                statistics = collect(captured, index, layer, mine, "inputs")
                # per token, so that an expert that serves many does not look like an outlier
                scores = [
                    saliency.wanda(matrix.float(), one) / one.tokens**0.5
                    for name, target in mine.items()
                    for matrix, one in _matrices(target, model.get_parameter(name), statistics[name])
                    if one.tokens
                ]
                ratios[index] = allocation.outlier_ratio(scores, outlier)
                groups.update(dict.fromkeys(mine, index))
            captured.advance(index, layer)
    return allocation.owl(sizes, config.sparsity, groups, ratios, **options)


def _matrices(target: Target, parameter: torch.Tensor, statistics):
    """``(matrix, statistics)`` pairs of a parameter: one, or one per expert."""
    matrix = target.matrix(parameter.data)
    return zip(matrix, statistics, strict=True) if target.is_experts else [(matrix, statistics)]
