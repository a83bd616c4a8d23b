"""The card of a pruned model: a Jinja template filled with a report."""

from importlib.resources import files
from pathlib import Path

from hf_sparse.atomic import atomic_write_text
from hf_sparse.report import SparsityReport

__all__ = ["render_card", "write_card"]

_PAPERS = {  # saliency or allocation -> (method, arXiv id)
    "wanda": ("Wanda", "2306.11695"),
    "sparsegpt": ("SparseGPT", "2301.00774"),
    "alps": ("ADMM in the manner of ALPS", "2406.07831"),
    "taylor": ("first-order Taylor", "1906.10771"),
    "owl": ("OWL", "2310.05175"),
    "erk": ("Erdős–Rényi-Kernel", "1911.11134"),
}


def render_card(report: SparsityReport, plot: str | None = None, packed: bool = False) -> str:
    """The card as Markdown with its metadata.

    Args:
        report: what :func:`hf_sparse.prune` returned.
        plot: file name of the report's plot in the same directory.
        packed: whether the weights beside it are packed.
    """
    import jinja2

    template = files("hf_sparse.hub_cards").joinpath("templates/pruned.md").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    config, provenance = report.config, report.config.get("provenance", {})
    base = provenance.get("base_model") or report.model
    return environment.from_string(template).render(
        report=report,
        kinds=report.by_kind(),
        config=config,
        base=base,
        base_on_hub=base.count("/") == 1 and not base.endswith(".gguf"),
        command=provenance.get("command"),
        calibration=report.calibration,
        method=_PAPERS.get(config.get("saliency")),
        allocation=_PAPERS.get(config.get("allocation")) if isinstance(config.get("allocation"), str) else None,
        plot=plot,
        packed=packed,
        two_four=bool(report.parameters) and all(p.two_four for p in report.parameters),
    )


def write_card(directory: str | Path, report: SparsityReport, plot: str | None = None) -> Path:
    """Writes ``README.md`` into a model directory (an existing one is replaced); returns its path."""
    directory = Path(directory)
    packed = (
        "hf_sparse" in (directory / "config.json").read_text() and (directory / "configuration_hf_sparse.py").is_file()
    )
    atomic_write_text(directory / "README.md", render_card(report, plot, packed))
    return directory / "README.md"
