"""Which layers a model can do without, as a picture: the angular distance of every span, and the influence of every layer.

Left, a heat map: at (first layer l, number of layers n) the angular distance between the inputs of layers l and l + n, which
dropping those n layers would identify; the least of each n is marked. Right: block influence of the single layers, on a
logarithmic axis, those dropped in another colour.
"""

from pathlib import Path

import torch

from hf_sparse.pruning.layers import LayerScores

__all__ = ["plot_layers"]


def plot_layers(scores: LayerScores, dropped: list[int], path: str | Path, title: str | None = None) -> None:
    """Draws ``scores`` with the ``dropped`` layers into the image ``path``.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (``pip install hf-sparse[plot]``).
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the plot needs matplotlib: pip install 'hf-sparse[plot]'") from error
    layers = len(scores.influence)
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    spans, single = figure.subplots(1, 2, width_ratios=(1.4, 1))
    image = torch.full((max(1, layers - 1), layers), torch.nan, dtype=torch.float64)
    for count in range(1, layers):
        image[count - 1, : layers - count + 1] = scores.spans(count)
    drawn = spans.imshow(
        image, origin="lower", aspect="auto", cmap="viridis", extent=(-0.5, layers - 0.5, 0.5, layers - 0.5)
    )
    best = [(scores.best_span(count)[0], count) for count in range(1, layers)]
    spans.plot(*zip(*best, strict=True), "w.", markersize=4, label="least of its number, last layer kept")
    in_a_row = dropped == list(range(dropped[0], dropped[-1] + 1)) if dropped else False
    if in_a_row and len(dropped) < layers:
        spans.add_patch(
            Rectangle(
                (dropped[0] - 0.5, len(dropped) - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2, label="dropped"
            )
        )
    spans.set_xlabel("first layer of the span")
    spans.set_ylabel("layers in the span")
    spans.legend(fontsize=8, loc="upper right", facecolor="lightgrey")
    spans.set_title("angular distance over every span (0: the same direction)", fontsize=10)
    figure.colorbar(drawn, ax=spans)
    colours = ["tab:red" if layer in set(dropped) else "tab:blue" for layer in range(layers)]
    single.bar(range(layers), scores.influence.tolist(), color=colours)
    least = min((value for value in scores.influence.tolist() if value > 1e-6), default=1e-6)
    if float(scores.influence.min()) > 1e-6:
        single.set_yscale("log")
    else:  # a logarithmic axis has no room for a layer that does nothing
        single.set_yscale("symlog", linthresh=least)
    single.set_xlabel("layer")
    single.set_title("block influence of single layers (dropped: red)", fontsize=10)
    if title:
        figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=120)
