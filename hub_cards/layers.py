"""The card of a model that lost layers: a Jinja template filled with the facts of ``layer_report.json``."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from hf_sparse.atomic import atomic_write_text
from hf_sparse.commands import layer_names

__all__ = ["render_layer_card", "write_layer_card"]

_SALIENCIES = {
    "angular": "the span that turns what goes through it least, by the angular distance between the inputs of its first layer "
    "and of the layer after it ([arXiv:2403.17887](https://arxiv.org/abs/2403.17887))",
    "block-influence": "what changes least what goes through it, by block influence "
    "(ShortGPT, [arXiv:2403.03853](https://arxiv.org/abs/2403.03853))",
}


def render_layer_card(facts: dict[str, Any], plot: str | None = None) -> str:
    """The card as Markdown with its metadata.

    Args:
        facts: what ``hf-sparse prune --pattern layer`` writes as ``layer_report.json``.
        plot: file name of the plot in the same directory.
    """
    import jinja2

    template = files("hf_sparse.hub_cards").joinpath("templates/layers.md").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    influence = (facts["scores"] or {}).get("influence")
    return environment.from_string(template).render(
        facts=facts,
        base=facts["model"],
        base_on_hub=facts["model"].count("/") == 1 and not facts["model"].endswith(".gguf"),
        dropped=layer_names(facts["dropped"]).capitalize(),
        how=_SALIENCIES.get(facts["saliency"]),
        most_of_dropped=max(influence[layer] for layer in facts["dropped"]) if influence else None,
        median=sorted(influence)[len(influence) // 2] if influence else None,
        plot=plot,
    )


def write_layer_card(directory: str | Path, facts: dict[str, Any], plot: str | None = None) -> Path:
    """Writes ``README.md`` into a model directory (an existing one is replaced); returns its path."""
    path = Path(directory) / "README.md"
    atomic_write_text(path, render_layer_card(facts, plot))
    return path
