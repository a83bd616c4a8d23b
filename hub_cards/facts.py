"""What is known of a model in a directory: its config, and the reports that lie beside it.

    sparsity_report.json   hf-sparse prune             training_report.json   CardCallback
    expert_report.json     hf-sparse prune             evaluation.json        hf-sparse eval --record
    layer_report.json      hf-sparse prune             recovery.json          hf-sparse recovery --output DIR/recovery.json
    drafter_report.json    make_drafter                bench.json, speculative.json    hf-sparse bench --output DIR/...

Nothing here is computed but one thing: where no report counts the zeros, they are counted from the weights.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["REPORTS", "Facts", "gather"]

REPORTS = {
    "sparsity": "sparsity_report.json",
    "experts": "expert_report.json",
    "layers": "layer_report.json",
    "training": "training_report.json",
    "drafter": "drafter_report.json",
    "evaluation": "evaluation.json",
    "recovery": "recovery.json",
    "bench": "bench.json",
    "speculative": "speculative.json",
}
_PLOTS = {
    "sparsity_report.png": "density and error over depth",
    "expert_report.png": "saliency of experts, kept and dropped",
    "layer_report.png": "angular distance of every span of layers, influence of every layer",
    "training_report.png": "loss and density over training",
    "recovery.png": "recovery of the original",
    "bench.png": "time of each kind of layer",
    "speculative.png": "speed-up, draft lengths and what the policies learned",
}


@dataclass
class Facts:
    """``reports`` by the names of :data:`REPORTS`; ``plots`` ``{file: what it shows}``; ``counted``: zeros counted just now."""

    directory: Path
    config: dict[str, Any]
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    plots: dict[str, str] = field(default_factory=dict)
    counted: bool = False

    @property
    def sparsity(self) -> dict[str, Any]:
        """The recorded SparsityConfig; of a packed checkpoint too."""
        return self.config.get("hf_sparse") or {}

    @property
    def packed(self) -> bool:
        return (self.directory / "configuration_hf_sparse.py").is_file()

    @property
    def kinds(self) -> list[str]:
        """What was done to the model, in the order in which it is told."""
        found = [kind for kind in ("layers", "experts") if kind in self.reports]
        if self.ift is not None:
            found.append("ift")
        elif self.sparsity.get("method"):
            found.append("trained")
        elif (
            "sparsity" in self.reports
            and self.reports["sparsity"]["sparsity"] > 0.01
            and (self.sparsity or not self.counted)
        ):
            found.append("pruned")
        training = self.reports.get("training", {})
        if training.get("self_distilled_rows") or training.get("teacher"):
            found.append("distilled")
        return found + [kind for kind in ("drafter",) if kind in self.reports]

    @property
    def ift(self) -> dict[str, Any] | None:
        """What a Sparse-IFT model records of itself."""
        if str(self.config.get("model_type", "")).startswith("sparse_") and self.config.get("family"):
            return self.config
        stated = self.config.get("quantization_config") or {}
        return stated if stated.get("quant_method") == "sparse_ift" else None

    @property
    def base(self) -> str | None:
        """The model this one was made from, as the first of the reports names it."""
        for kind in ("layers", "experts"):
            if kind in self.reports:
                return self.reports[kind].get("model")
        stated = (self.sparsity.get("provenance") or {}).get("base_model")
        return (
            stated
            or self.reports.get("training", {}).get("base_model")
            or self.reports.get("sparsity", {}).get("model")
        )


def gather(directory: str | Path, count: bool = True) -> Facts:
    """Reads a model directory.

    Args:
        count: count the zeros where no report has; reads all weights.

    Raises:
        FileNotFoundError: no config.json. ValueError: a report that is no JSON.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory} has no config.json and so is no model directory")
    facts = Facts(directory, json.loads((directory / "config.json").read_text(encoding="utf-8")))
    for name, file in REPORTS.items():
        if (directory / file).is_file():
            try:
                facts.reports[name] = json.loads((directory / file).read_text(encoding="utf-8"))
            except json.JSONDecodeError as error:
                raise ValueError(f"{directory / file} is no JSON: {error}") from error
    facts.plots = {file: what for file, what in _PLOTS.items() if (directory / file).is_file()}
    if count and "sparsity" not in facts.reports:
        from hf_sparse.inspection import inspect_checkpoint

        try:
            report = inspect_checkpoint(str(directory))
        except (ValueError, FileNotFoundError):
            return facts
        facts.reports["sparsity"] = report.to_dict()
        facts.counted = True
    return facts
