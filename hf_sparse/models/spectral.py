"""The spectrum of sparse layers: how well a mask connects inputs with outputs (Ramanujan graphs), layer by layer.

The mask of a weight ``[out, in]`` is a bipartite graph: left nodes are inputs (of a convolution: channel x kernel position),
right nodes are outputs, an edge is a kept weight; nodes without edges are left out. The eigenvalues of its adjacency matrix
``[[0, M], [M^T, 0]]`` are the singular values of M and their negatives, so the two that count are

    mu_0  = sigma_1(M)      grows with the degrees
    mu^   = sigma_2(M)      the smaller, the better connected (0: complete; mu_0: it falls apart into equal parts)

With d_L and d_R the mean degrees of the two sides, and K the sub-graphs of all inputs of one degree d_i:

    Ramanujan gap                        sqrt(d_L - 1) + sqrt(d_R - 1) - mu^(M)        >= 0: the layer is Ramanujan
    iterative mean difference of bound   mean over K of  sqrt(d_i - 1) + sqrt(d_R(K) - 1) - mu^(M_K)
    weighted spectral gap                mu_0(|W|) - mu^(|W|)
    iterative mean weighted gap          mean over K of  mu_0(|W_K|) - mu^(|W_K|)
    full-spectrum magnitude              Euclidean norm of these four, what is unknown counted as 0

Sparse-IFT (arxiv.org/abs/2303.11525) reports the first four, as means over the layers of a model. Where degrees are too small
for a bound to mean anything there is no value (None): a sub-graph needs 3 inputs, and any graph mean degrees of 3 on both
sides, as in VITA-Group/ramanujan-on-pai. Only the weighted spectral gap of a whole layer needs nothing but an edge.

    report = spectrum(model)
    report.metrics()     # {"ramanujan_gap": 4.1, ...}: what a callback logs
    report.layers[0].ramanujan_gap

Singular values are found in float64 on the weight's own device (:mod:`hf_sparse.models.singular_values`), without touching the
random state of a training.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_sparse.masks import Masks
from hf_sparse.models.singular_values import two_largest
from hf_sparse.targets import find_targets
from hf_sparse.training.sharding import whole

__all__ = ["HEADINGS", "QUANTITIES", "LayerSpectrum", "SpectralReport", "plot_checkpoints", "spectral_gaps", "spectrum"]

# name -> the title of its plot
QUANTITIES = {
    "ramanujan_gap": "Ramanujan gap",
    "iterative_mean_difference_of_bound": "iterative mean difference of bound",
    "weighted_spectral_gap": "weighted spectral gap",
    "iterative_mean_weighted_spectral_gap": "iterative mean weighted spectral gap",
    "full_spectrum_magnitude": "full-spectrum magnitude",
}

# the same five, as columns of a table
HEADINGS = ("Ramanujan gap", "iterative bound", "weighted gap", "iterative weighted", "magnitude")

_CHUNK = 2**25  # entries of the sub-graphs that are gathered at a time (256 MB)


@dataclass(frozen=True)
class LayerSpectrum:
    """One layer's graph; a quantity is None where the graph is too sparse for it.

    Attributes:
        left, right, edges: inputs and outputs that have edges, and weights kept. density: of the whole matrix.
        mu_0, mu_hat: the two largest singular values of the mask. weighted_mu_0, weighted_mu_hat: those of ``|W|``.
        subgraphs: how many groups of inputs of equal degree the iterative means are over.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    left: int
    right: int
    edges: int
    mu_0: float
    mu_hat: float
    weighted_mu_0: float
    weighted_mu_hat: float
    subgraphs: int
    ramanujan_gap: float | None
    iterative_mean_difference_of_bound: float | None
    weighted_spectral_gap: float | None
    iterative_mean_weighted_spectral_gap: float | None

    @property
    def density(self) -> float:
        return self.edges / (self.shape[0] * self.shape[1])

    @property
    def full_spectrum_magnitude(self) -> float:
        four = (getattr(self, name) for name in list(QUANTITIES)[:4])
        return math.sqrt(sum(value * value for value in four if value is not None))


@dataclass(frozen=True)
class SpectralReport:
    """The layers of a model, in its order."""

    layers: list[LayerSpectrum]

    @property
    def mean(self) -> dict[str, float | None]:
        """Every quantity's mean over the layers that have it; None where none has."""
        return self._mean(self.layers)

    def metrics(self) -> dict[str, float]:
        """:attr:`mean` without what is unknown, for a logger."""
        return {name: value for name, value in self.mean.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, means first."""
        layers = [
            asdict(layer)
            | {"shape": list(layer.shape), "density": layer.density}
            | {"full_spectrum_magnitude": layer.full_spectrum_magnitude}
            for layer in self.layers
        ]
        return {"mean": self.mean, "edges": sum(layer.edges for layer in self.layers), "layers": layers}

    def save(self, path: str | Path) -> None:
        """Writes the report as JSON, atomically."""
        from hf_sparse.atomic import atomic_write_text

        atomic_write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")

    def table(self):
        """A rich Table: a row per layer, or per kind of layer if there are more than 40; the means last."""
        from rich.table import Table

        by_kind = len(self.layers) > 40
        table = Table()
        for column in ("kind (layers)" if by_kind else "layer", "density", *HEADINGS):
            table.add_column(column, justify="right" if table.columns else "left", overflow="fold")
        for name in dict.fromkeys(layer.kind if by_kind else layer.name for layer in self.layers):
            group = [layer for layer in self.layers if name == (layer.kind if by_kind else layer.name)]
            table.add_row(f"{name} ({len(group)})" if by_kind else name.removesuffix(".weight"), *self._row(group))
        table.add_section()
        table.add_row("mean", *self._row(self.layers))
        return table

    def plot(self, path: str | Path) -> None:
        """The four gaps over depth, one line per kind of layer, as an image at ``path``.

        Raises:
            ModuleNotFoundError: matplotlib is not installed (``pip install hf-sparse[plot]``).
        """
        figure, axes = _four_panels("layer, in the model's order")
        for axis, name in zip(axes, QUANTITIES, strict=False):
            for kind in dict.fromkeys(layer.kind for layer in self.layers):
                known = [
                    (place, getattr(layer, name))
                    for place, layer in enumerate(self.layers)
                    if layer.kind == kind and getattr(layer, name) is not None
                ]
                axis.plot([x for x, _ in known], [y for _, y in known], marker=".", label=kind)
        axes[0].legend(fontsize="x-small", ncols=2)
        figure.savefig(path, dpi=120)

    @staticmethod
    def _mean(layers: list[LayerSpectrum]) -> dict[str, float | None]:
        known = {n: [v for layer in layers if (v := getattr(layer, n)) is not None] for n in QUANTITIES}
        return {name: sum(values) / len(values) if values else None for name, values in known.items()}

    def _row(self, layers: list[LayerSpectrum]) -> list[str]:
        numel = sum(layer.shape[0] * layer.shape[1] for layer in layers)
        values = ["–" if v is None else f"{v:.4g}" for v in self._mean(layers).values()]
        return [f"{sum(layer.edges for layer in layers) / numel:.4f}", *values]


def spectrum(
    model: nn.Module,
    targets: list[str] | None = None,
    ignore: list[str] = (),
    *,
    cheeger: bool = False,
    min_nodes: int = 3,
    min_degree: float = 3.0,
) -> SpectralReport:
    """The spectra of a model's layers. The model is only read; sharded weights are gathered one at a time.

    The graph of a weight is its mask if the model carries one (in training), else its nonzeros. Fused experts are one layer
    each, and a grouped convolution is the graph it is: its groups share no node.

    Args:
        targets, ignore: in the grammar of :mod:`hf_sparse.targets`; by default all weights that are sparse by default.
        cheeger, min_nodes, min_degree: see :func:`spectral_gaps`.

    Raises:
        ValueError: nothing to look at, or a weight that is not finite; the message names it.
    """
    masks, layers = Masks.attached(model), []
    for name, target in find_targets(model, targets, list(ignore)).items():
        weight = whole(model.get_parameter(name).detach())
        mask = whole(masks[name]) if name in masks else weight != 0
        groups = getattr(model.get_submodule(target.module), "groups", 1) if target.layout == "conv" else 1
        for part, matrix, kept in _matrices(target, weight, mask, groups):
            try:
                options = {"cheeger": cheeger, "min_nodes": min_nodes, "min_degree": min_degree}
                layers.append(spectral_gaps(matrix, kept, name=name + part, kind=target.kind, **options))
            except ValueError as error:
                raise ValueError(f"{name}{part}: {error}") from None
    return SpectralReport(layers)


@torch.no_grad()
def spectral_gaps(
    weight: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    cheeger: bool = False,
    min_nodes: int = 3,
    min_degree: float = 3.0,
    name: str = "",
    kind: str = "",
) -> LayerSpectrum:
    """The spectrum of one matrix ``[out, in]``: a weight, or a boolean mask, whose edges then all weigh 1.

    Args:
        mask: True = kept, of the weight's shape; by default the nonzeros.
        cheeger: multiply the term of each sub-graph by max(n_L, n_R) / (n_L + n_R - 1), as some code does.
        min_nodes: inputs of equal degree that make a sub-graph.
        min_degree: mean degree of both sides below which a graph has no value; at least 1.

    Raises:
        ValueError: not a matrix, not finite, a mask of another shape, or an option out of range.
    """
    if weight.dim() != 2 or weight.is_complex() or not weight.numel():
        raise ValueError(f"a layer is a real matrix [out, in], got {weight.dtype} of shape {tuple(weight.shape)}")
    if mask is not None and (mask.shape != weight.shape or mask.dtype != torch.bool):
        raise ValueError(
            f"the mask is boolean and of the weight's shape {tuple(weight.shape)}, got {mask.dtype} {tuple(mask.shape)}"
        )
    if min_nodes < 1 or min_degree < 1:
        raise ValueError(f"min_nodes and min_degree are at least 1, got {min_nodes} and {min_degree}")
    device = weight.device if weight.device.type in ("cpu", "cuda") else torch.device("cpu")  # others lack float64
    weight = weight.to(device)
    mask = weight != 0 if mask is None else mask.to(device)
    by_input = mask.t().contiguous()
    graphs = [by_input.float()]  # [in, out]
    if weight.dtype != torch.bool:
        graphs.append(weight.t().contiguous().double().abs().mul_(by_input))
        if not torch.isfinite(graphs[1].sum()):
            raise ValueError("the weight holds infinities or NaN, which have no spectrum")
    degrees = by_input.sum(dim=1)
    left, right, edges = int((degrees > 0).sum()), int(by_input.any(dim=0).sum()), int(degrees.sum())
    tops = [two_largest(graph[None])[0].tolist() for graph in graphs]
    (mu_0, mu_hat), (heavy_0, heavy_hat) = tops[0], tops[-1]

    def bound(d_left: float, d_right: float) -> float | None:
        return None if min(d_left, d_right) < min_degree else math.sqrt(d_left - 1) + math.sqrt(d_right - 1)

    whole_bound = bound(edges / left, edges / right) if edges else None
    differences, gaps = [], []
    for degree, nodes, touched, top, heavy in _subgraphs(graphs, degrees, left, right, tops, min_nodes, min_degree):
        limit = bound(degree, degree * nodes / touched)
        if limit is not None:
            factor = max(nodes, touched) / (nodes + touched - 1) if cheeger else 1.0
            differences.append(factor * (limit - top[1]))
            gaps.append(factor * (heavy[0] - heavy[1]))
    count = len(gaps)
    return LayerSpectrum(
        name=name,
        kind=kind,
        shape=tuple(weight.shape),
        left=left,
        right=right,
        edges=edges,
        mu_0=mu_0,
        mu_hat=mu_hat,
        weighted_mu_0=heavy_0,
        weighted_mu_hat=heavy_hat,
        subgraphs=count,
        ramanujan_gap=None if whole_bound is None else whole_bound - mu_hat,
        iterative_mean_difference_of_bound=sum(differences) / count if count else None,
        weighted_spectral_gap=heavy_0 - heavy_hat if edges else None,
        iterative_mean_weighted_spectral_gap=sum(gaps) / count if count else None,
    )


def _matrices(target, weight, mask, groups: int) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(what to add to the name, matrix, mask) of every graph a parameter holds."""
    weight, mask = target.matrix(weight), target.matrix(mask)
    if target.is_experts:
        for expert in range(weight.shape[0]):
            yield f"[{expert}]", weight[expert], mask[expert]
    elif groups > 1:
        yield "", torch.block_diag(*weight.chunk(groups)), torch.block_diag(*mask.chunk(groups)).bool()
    else:
        yield "", weight, mask


def _subgraphs(graphs, degrees, left: int, right: int, tops, min_nodes: int, min_degree: float):
    """(degree, left nodes, right nodes, two values of the mask, two of the weights) of every left-regular sub-graph."""
    values, counts = torch.unique(degrees, return_counts=True)
    found = [
        (d, c)
        for d, c in zip(values.tolist(), counts.tolist(), strict=True)
        if d >= max(min_degree, 1) and c >= min_nodes
    ]
    if len(found) == 1 and found[0][1] == left:  # the graph is left-regular itself
        yield *found[0], right, tops[0], tops[-1]
        return
    order = torch.argsort(degrees, stable=True)
    starts = dict(zip(values.tolist(), (counts.cumsum(0) - counts).tolist(), strict=True))
    found.sort(key=lambda pair: pair[1])  # those of like width together: they are padded to the widest
    while found:
        room = max(1, _CHUNK // graphs[0].shape[1])
        chunk = [found.pop()]
        width = chunk[0][1]
        while found and 2 * found[-1][1] >= width and (len(chunk) + 1) * width <= room:
            chunk.append(found.pop())
        index = torch.zeros(len(chunk), width, dtype=torch.long, device=degrees.device)
        real = torch.zeros(len(chunk), width, dtype=torch.bool, device=degrees.device)
        for row, (degree, count) in enumerate(chunk):
            index[row, :count] = order[starts[degree] : starts[degree] + count]
            real[row, :count] = True
        parts = [graph[index].mul_(real[..., None]) for graph in graphs]  # [sub-graphs, left nodes, right nodes]
        touched = (parts[0].amax(dim=1) > 0).sum(dim=1).tolist()
        of_parts = [two_largest(part).tolist() for part in parts]
        yield from ((*pair, *rest) for pair, *rest in zip(chunk, touched, of_parts[0], of_parts[-1], strict=True))


def plot_checkpoints(places: list[int] | list[str], reports: list[SpectralReport], path: str | Path) -> None:
    """The means of several reports over training, at steps (or under names) ``places``, as an image at ``path``."""
    figure, axes = _four_panels("step" if isinstance(places[0], int) else "checkpoint")
    for axis, name in zip(axes, QUANTITIES, strict=False):
        values = [report.mean[name] for report in reports]
        axis.plot(places, [math.nan if value is None else value for value in values], marker=".")
        axis.tick_params(axis="x", rotation=0 if isinstance(places[0], int) else 30)
    figure.savefig(path, dpi=120)


def _four_panels(below: str):
    """A matplotlib figure with an axis for each of the four gaps."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the plot needs matplotlib: pip install 'hf-sparse[plot]'") from error
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True).flatten()
    for axis, title in zip(axes, QUANTITIES.values(), strict=False):
        axis.set_title(title, fontsize="medium")
        axis.grid(alpha=0.3)
    for axis in axes[2:]:
        axis.set_xlabel(below)
    return figure, axes
