"""The card of a model whose mixtures lost experts: a Jinja template filled with the facts of ``expert_report.json``."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from hf_sparse.atomic import atomic_write_text

__all__ = ["render_expert_card", "write_expert_card"]

_SALIENCIES = {
    "reap": "REAP, the mean over its tokens of gate times output norm ([arXiv:2510.13999](https://arxiv.org/abs/2510.13999))",
    "ean_mean": "the mean norm of its outputs",
    "ean_sum": "the sum of the norms of its outputs",
    "frequency": "how many tokens were sent to it",
    "gate_sum": "the sum of its gates",
    "gated_sum": "the sum over its tokens of gate times output norm",
    "random": "chance",
}


def render_expert_card(facts: dict[str, Any], plot: str | None = None) -> str:
    """The card as Markdown with its metadata.

    Args:
        facts: an ExpertReport's ``to_dict()`` with ``model``, ``calibration``, ``command``, ``retention``, ``device``,
            ``seconds`` and ``versions``, as ``hf-sparse prune --pattern expert`` writes them.
        plot: file name of the plot in the same directory.
    """
    import jinja2

    template = files("hf_sparse.hub_cards").joinpath("templates/experts.md").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    counts = {name: len(kept) for name, kept in facts["kept"].items()}
    return environment.from_string(template).render(
        facts=facts,
        base=facts["model"],
        base_on_hub=facts["model"].count("/") == 1 and not facts["model"].endswith(".gguf"),
        counts=counts,
        uneven=len(set(counts.values())) > 1,
        left=sum(counts.values()),
        had=sum(facts["experts_before"].values()),
        how=_SALIENCIES.get(facts["saliency"], f"`{facts['saliency']}`"),
        plot=plot,
    )


def write_expert_card(directory: str | Path, facts: dict[str, Any], plot: str | None = None) -> Path:
    """Writes ``README.md`` into a model directory (an existing one is replaced); returns its path."""
    path = Path(directory) / "README.md"
    atomic_write_text(path, render_expert_card(facts, plot))
    return path
