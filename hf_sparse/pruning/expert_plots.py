"""What pruning experts took from each domain of the calibration data: a table, and a picture.

Every domain d is scored on its own and the decision is taken on the sum (:class:`hf_sparse.pruning.expert_scores.ExpertScores`
adds up), so afterwards one can ask what the kept experts K of a layer mean to one domain alone:

    routed mass   sum over K of G_j / sum over all of G_j      G_j: the sum of gates the domain gave expert j
    REAP mass     sum over K of S_j / sum over all of S_j      S_j: the domain's mean of g_j ||f_j||
    own top       |K and the |K| best of the domain's own ranking| / |K|

as means over layers, next to the layer with the least routed mass. A layer that keeps half of its experts has 50% of each if
the choice has nothing to do with the domain. A domain that no calibration text spoke for shows there first: code models
collapse when calibrated on generic text (arxiv.org/abs/2510.13999).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hf_sparse.pruning.expert_scores import ExpertScores
from hf_sparse.pruning.experts import ExpertReport

__all__ = ["heat_map", "retention", "retention_table"]


def retention(scores_by_domain: Mapping[str, ExpertScores], kept: Mapping[str, list[int]]) -> list[dict[str, Any]]:
    """What the kept experts carry of each domain, one row per domain.

    Args:
        scores_by_domain: ``{domain: its scores}``, of the model before pruning.
        kept: ``{block: indices of the kept experts}``, as in :attr:`hf_sparse.pruning.experts.ExpertReport.kept`.

    Returns:
        Rows with ``domain``, ``tokens``, ``routed_mass`` and ``reap_mass`` (shares in [0, 1], means over layers),
        ``least_routed_mass`` and ``least_layer``, ``own_top_kept`` of ``own_top`` (experts, all layers together; the domain's
        ranking by REAP if the decision was by a random one), ``never_routed`` (experts the domain sent no token to), and
        ``kept_share`` (what all shares would be if all experts were alike).

    Raises:
        ValueError: scores of another model than ``kept``, or a domain without data.
    """
    rows = []
    for domain, scores in scores_by_domain.items():
        if set(scores.statistics) != set(kept):
            raise ValueError(f"the scores of {domain!r} are of other blocks than those that were pruned")
        if not scores.tokens:
            raise ValueError(f"the scores of {domain!r} have seen no data; there is nothing to retain")
        reap = scores.scores("reap")
        own = reap if scores.saliency == "random" else scores.scores()
        routed, reaped, top, all_kept, everything = {}, [], 0, 0, 0
        for name, indices in kept.items():
            chosen = torch.tensor(indices, dtype=torch.long)
            routed[name] = _share(scores.statistics[name]["gate"], chosen)
            reaped.append(_share(reap[name], chosen))
            best = own[name].argsort(descending=True, stable=True)[: len(indices)]
            top += int(torch.isin(best, chosen).sum())
            all_kept += len(indices)
            everything += len(own[name])
        least = min(routed, key=routed.__getitem__)
        rows.append(
            {
                "domain": domain,
                "tokens": scores.tokens,
                "routed_mass": sum(routed.values()) / len(routed),
                "least_routed_mass": routed[least],
                "least_layer": least,
                "reap_mass": sum(reaped) / len(reaped),
                "own_top_kept": top,
                "own_top": all_kept,
                "never_routed": scores.never_routed(),
                "kept_share": all_kept / everything,
            }
        )
    return rows


def _share(values: torch.Tensor, chosen: torch.Tensor) -> float:
    total = float(values.sum())
    return float(values[chosen].sum()) / total if total else 1.0  # nothing was there, so nothing was lost


def retention_table(rows: list[dict[str, Any]]) -> str:
    """The rows of :func:`retention` as text, one line per domain."""
    titles = ["domain", "tokens", "routed mass", "in least layer", "REAP mass", "own top", "never routed"]
    lines = [titles]
    for row in rows:
        own = f"{row['own_top_kept']}/{row['own_top']}"
        shares = [f"{row[key]:.1%}" for key in ("routed_mass", "least_routed_mass", "reap_mass")]
        lines.append([row["domain"], f"{row['tokens']:,}", *shares, own, str(row["never_routed"])])
    widths = [max(len(line[i]) for line in lines) for i in range(len(titles))]
    text = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    if rows:
        text.append(f"(shares that the kept experts carry; {rows[0]['kept_share']:.1%} if all experts were alike)")
    return "\n".join(text)


def heat_map(
    scores: ExpertScores,
    path: str | Path,
    report: ExpertReport | None = None,
    rows: list[dict[str, Any]] | None = None,
    *,
    ranked: bool = False,
) -> None:
    """Saliency over layers and experts as an image at ``path``; kept experts in colour, dropped ones in grey.

    A score is shown as a multiple of its layer's mean, since scales grow with depth.

    Args:
        scores: of the model before pruning.
        report: what was kept; None draws all in colour.
        rows: of :func:`retention`, drawn as bars beneath.
        ranked: experts of a layer from its best to its worst, instead of by their index.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (``pip install hf-sparse[plot]``).
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the plot needs matplotlib: pip install 'hf-sparse[plot]'") from error
    layers = len(scores.statistics)
    height = min(8.0, max(2.6, 1.4 + 0.22 * layers))
    beneath = 1.3 + 0.62 * len(rows) if rows else 0.0
    figure = Figure(figsize=(10, height + beneath), layout="constrained")
    if rows:
        upper, lower = figure.subplots(2, 1, height_ratios=[height, beneath])
        _draw_retention(lower, rows)
    else:
        upper = figure.subplots()
    _draw_saliency(figure, upper, scores, report, ranked)
    figure.savefig(path, dpi=120)


def _draw_saliency(figure, axes, scores: ExpertScores, report: ExpertReport | None, ranked: bool) -> None:
    import numpy as np
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.patches import Patch

    values = scores.scores()
    widest = max(len(one) for one in values.values())
    relative = np.full((len(values), widest), np.nan)  # layers may have different numbers of experts
    dropped = np.zeros_like(relative, dtype=bool)
    for row, (name, one) in enumerate(values.items()):
        order = one.argsort(descending=True, stable=True) if ranked else torch.arange(len(one))
        mean = float(one.mean()) or 1.0
        relative[row, : len(one)] = (one[order] / mean).numpy()
        if report is not None:
            dropped[row, : len(one)] = ~torch.isin(order, torch.tensor(report.kept[name])).numpy()
    lowest, highest = np.nanquantile(relative, (0.01, 0.99))  # a few super experts must not make all others pale
    scale = Normalize(lowest, highest)
    colours, greys = (ListedColormap(_colours(name, low, high)) for name, low, high in _MAPS)
    style = {"aspect": "auto", "interpolation": "nearest", "norm": scale}
    shown = axes.imshow(np.ma.masked_array(relative, dropped | np.isnan(relative)), cmap=colours, **style)
    if report is not None:
        axes.imshow(np.ma.masked_array(relative, ~dropped), cmap=greys, **style)
        kept, before = sum(map(len, report.kept.values())), sum(report.experts_before.values())
        patches = [Patch(color=colours(0.6), label="kept"), Patch(color=greys(0.5), label="dropped")]
        axes.legend(handles=patches, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize="small")
        axes.set_title(f"{kept} of {before} experts kept by {scores.saliency}", loc="left")
    else:
        axes.set_title(f"saliency of experts: {scores.saliency}", loc="left")
    figure.colorbar(shown, ax=axes, pad=0.01, extend="both", label="score / mean of its layer")
    names = list(values)
    every = -(-len(names) // 24)  # labels that do not fit are left out
    axes.set_yticks(range(0, len(names), every), [_short(name) for name in names[::every]], fontsize="small")
    axes.set_ylabel("layer")
    axes.set_xlabel("expert, the layer's best first" if ranked else "expert")
    axes.set_xticks(range(0, widest, max(1, -(-widest // 16))))


_MAPS = (("viridis_r", 0.0, 1.0), ("Greys", 0.12, 0.75))  # the part of each of matplotlib's maps that is used


def _colours(name: str, low: float, high: float):
    import numpy as np
    from matplotlib import colormaps

    return colormaps[name](np.linspace(low, high, 256))


def _short(name: str) -> str:
    """The layer's number if the name has one: ``model.layers.11.mlp`` is 11."""
    return next((part for part in reversed(name.split(".")) if part.isdigit()), name)


def _draw_retention(axes, rows: list[dict[str, Any]]) -> None:
    bars = {
        "routed mass": [row["routed_mass"] for row in rows],
        "REAP mass": [row["reap_mass"] for row in rows],
        "own top experts": [row["own_top_kept"] / row["own_top"] for row in rows],
    }
    for index, (label, shares) in enumerate(bars.items()):
        places = [row + (index - 1) * 0.26 for row in range(len(rows))]
        drawn = axes.barh(places, shares, height=0.24, label=label, color=("#21618c", "#2e9c8f", "#b7a33a")[index])
        style = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
        axes.bar_label(drawn, [f"{share:.0%}" for share in shares], padding=3, fontsize="x-small", bbox=style)
    axes.axvline(rows[0]["kept_share"], color="black", linestyle="--", linewidth=1, label="experts kept")
    axes.set_yticks(range(len(rows)), [row["domain"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.06)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    axes.set_title("what the kept experts carry of each domain", loc="left", fontsize="medium")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small", ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
