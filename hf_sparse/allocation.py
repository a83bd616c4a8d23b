"""Allocation: how one average sparsity is shared among parameters.

Functions from ``{name: number of weights}`` and an average sparsity to ``{name: sparsity}``; the average over parameters,
weighted by their sizes, is exactly the one asked for (to the last weight: every share is a whole number of weights).

    uniform   the same everywhere
    erk       density proportional to (sum of dimensions) / (product of dimensions), capped at 1 (Erdos-Renyi-Kernel,
              arxiv.org/abs/1911.11134): large matrices are sparser than small ones
    owl       decoder layers with more outliers in |w| * ||x|| are kept denser (arxiv.org/abs/2310.05175)
    a dict    {name or `re:` pattern: sparsity} covering every target
"""

import math

from hf_sparse.targets import Target, match_names

__all__ = ["ALLOCATIONS", "erk", "from_dict", "in_units", "nm_mix", "outlier_ratio", "owl", "uniform"]

Sizes = dict[str, int]  # {parameter name: number of weights}
ALLOCATIONS = {"uniform": (), "erk": (), "owl": ("lam", "outlier")}  # {name: its options}


def uniform(sizes: Sizes, sparsity: float) -> dict[str, float]:
    """Every parameter gets the same sparsity."""
    return _whole_weights(dict.fromkeys(sizes, sparsity), sizes)


def erk(sizes: Sizes, sparsity: float, shapes: dict[str, tuple[int, ...]]) -> dict[str, float]:
    """Erdos-Renyi-Kernel: density_l = scale * sum(dimensions) / product(dimensions), at most 1.

    The scale makes the average exact; parameters that would exceed density 1 become dense and the scale is solved again
    for the rest, as in RigL's reference implementation.

    Args:
        sizes: ``{name: number of weights}``.
        sparsity: average fraction of zeros.
        shapes: ``{name: shape of one matrix}``: (out, in), of a convolution (out, in, kernel...), of fused experts one
            expert's.
    """
    raw = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    kept = (1.0 - sparsity) * sum(sizes.values())
    dense: set[str] = set()
    while True:
        open_names = [name for name in sizes if name not in dense]
        if not open_names:
            return dict.fromkeys(sizes, 0.0)
        budget = kept - sum(sizes[name] for name in dense)
        scale = budget / sum(raw[name] * sizes[name] for name in open_names)
        over = [name for name in open_names if scale * raw[name] > 1.0]
        if not over:
            break
        dense.update(over)  # capping some frees weights and raises the scale, so none of them comes back below 1
    return _whole_weights({name: 0.0 if name in dense else 1.0 - scale * raw[name] for name in sizes}, sizes)


def outlier_ratio(scores: list, outlier: float = 5.0) -> float:
    """OWL's layer score: percent of entries of |w| * ||x|| above ``outlier`` times their mean, over a layer's weights."""
    total, count = sum(float(s.sum()) for s in scores), sum(s.numel() for s in scores)
    if count == 0:
        return 0.0
    threshold = outlier * total / count
    return 100.0 * sum(int((s > threshold).sum()) for s in scores) / count


def owl(
    sizes: Sizes, sparsity: float, groups: dict[str, int], ratios: dict[int, float], lam: float = 0.08
) -> dict[str, float]:
    """Outlier-weighed layerwise sparsity.

    The outlier ratios of the layers are scaled to [0, 2 lam] and shifted so that densities average 1 - sparsity; all
    parameters of a layer share its sparsity, which stays within about lam of the average.

    Args:
        groups: ``{name: layer index}``.
        ratios: ``{layer index: outlier ratio}`` (:func:`outlier_ratio`).
        lam: half the width of the band; 0 is uniform.
    """
    low, high = min(ratios.values()), max(ratios.values())
    spread = high - low
    if spread == 0 or lam == 0:  # all layers alike
        return uniform(sizes, sparsity)
    scaled = {layer: (ratio - low) / spread * 2 * lam for layer, ratio in ratios.items()}
    mean = sum(scaled[groups[name]] * size for name, size in sizes.items()) / sum(sizes.values())
    wanted = {name: sparsity - (scaled[groups[name]] - mean) for name in sizes}
    return _whole_weights(_clipped(wanted, sizes, sparsity), sizes)


def from_dict(content: dict[str, float], targets: dict[str, Target]) -> dict[str, float]:
    """Sparsities written out by name or ``re:`` pattern; the first entry that matches a parameter wins.

    Raises:
        ValueError: an entry matches nothing, or a target is covered by none.
    """
    result: dict[str, float] = {}
    for entry, sparsity in content.items():
        for name in match_names(entry, targets):
            result.setdefault(name, float(sparsity))
    missing = [name for name in targets if name not in result]
    if missing:
        raise ValueError(
            f"the allocation says nothing about {len(missing)} of {len(targets)} targets, e.g. {missing[0]!r}; "
            "add an entry such as 're:.*' for the rest"
        )
    return result


def nm_mix(sparsities: dict[str, float], sizes: Sizes, m: int) -> dict[str, int]:
    """Whole numbers n for an n:m pattern per parameter, as near to the wanted densities as their average allows.

    Rounds down, then gives one more kept weight to the parameters that lost most by rounding until the average is met.

    Returns:
        ``{name: n}`` with 1 <= n <= m.
    """
    wanted = {name: (1.0 - s) * m for name, s in sparsities.items()}
    counts = {name: min(m, max(1, math.floor(w + 1e-9))) for name, w in wanted.items()}
    budget = sum(wanted[name] * sizes[name] for name in sizes)
    spent = sum(counts[name] * sizes[name] for name in sizes)
    for name in sorted(sizes, key=lambda name: counts[name] - wanted[name]):
        if counts[name] < m and spent + sizes[name] <= budget + 0.5 * sizes[name]:
            counts[name] += 1
            spent += sizes[name]
    return counts


def _clipped(wanted: dict[str, float], sizes: Sizes, sparsity: float) -> dict[str, float]:
    """Clips sparsities to [0, 1] and hands what that frees to the others, so that the average stays."""
    fixed: dict[str, float] = {}
    goal = sparsity * sum(sizes.values())
    while True:
        free = [name for name in wanted if name not in fixed]
        if not free:
            return fixed
        held = sum(fixed[name] * sizes[name] for name in fixed)
        shift = (goal - held - sum(wanted[n] * sizes[n] for n in free)) / sum(sizes[n] for n in free)
        outside = {n: min(1.0, max(0.0, wanted[n] + shift)) for n in free if not 0.0 <= wanted[n] + shift <= 1.0}
        if not outside:
            return {**fixed, **{n: wanted[n] + shift for n in free}}
        fixed.update(outside)


def in_units(sparsities: dict[str, float], sizes: Sizes, units: Sizes) -> dict[str, float]:
    """Sparsities as whole numbers of a pattern's units (blocks, rows), the remainder carried to the next parameter, so
    that the average misses the one asked for by half a unit at most.

    Args:
        units: ``{name: weights that go together}`` (:meth:`hf_sparse.patterns.Pattern.unit`, times the experts).
    """
    result, wanted, given = {}, 0.0, 0
    for name, size in sizes.items():
        wanted += sparsities[name] * size
        unit = units[name]
        missing = round(wanted) - given if unit == 1 else round((wanted - given) / unit)
        count = min(size // unit, max(0, missing)) * unit
        given += count
        result[name] = count / size
    return result


def _whole_weights(sparsities: dict[str, float], sizes: Sizes) -> dict[str, float]:
    return in_units(sparsities, sizes, dict.fromkeys(sizes, 1))
