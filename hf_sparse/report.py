"""The report: what pruning did, or what a checkpoint holds, as measured.

One :class:`ParameterReport` per sparse parameter and a :class:`SparsityReport` over all of them. Nothing in it is a goal:
densities are counted from the weights, errors and seconds measured, packed bytes computed for those very zeros. It prints
as a table, saves as JSON and draws density and error over depth.
"""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["ParameterReport", "SparsityReport"]


@dataclass
class ParameterReport:
    """One parameter.

    Attributes:
        name, kind, shape: as of :class:`hf_sparse.targets.Target`.
        pattern: the pattern it was pruned to. conforms: whether its zeros keep to it.
        density: fraction of nonzeros, counted.
        error: relative reconstruction error of the layer's output on the calibration data, or None if unknown.
        bytes_dense, bytes_packed: as stored now, and as the best packed format stores it.
        two_four: whether it could run on 2:4 sparse hardware (every 4 consecutive inputs hold at most 2 nonzeros).
        note: anything out of the ordinary, e.g. experts that fell back to magnitude.
    """

    name: str
    kind: str
    shape: list[int]
    pattern: str
    density: float
    conforms: bool
    two_four: bool
    bytes_dense: int
    bytes_packed: int
    macs_per_token: float
    error: float | None = None
    note: str | None = None

    @property
    def numel(self) -> int:
        size = 1
        for dimension in self.shape:
            size *= dimension
        return size

    @property
    def layer(self) -> int | None:
        """The decoder layer's number, read from the name."""
        found = re.search(r"\.(\d+)\.", self.name)
        return int(found[1]) if found else None


@dataclass
class SparsityReport:
    """Everything about one pruned model.

    Attributes:
        parameters: one entry per sparse parameter (``inspect``: per parameter that could be sparse).
        layer_errors: ``{layer: relative error of the layer's contribution to the hidden states}``.
        total_parameters, macs_dense, macs_sparse: of the whole model; MACs per generated token (:mod:`hf_sparse.flops`).
        seconds, timings, peak_memory_bytes, device: of the run; timings by phase.
        config: the SparsityConfig as a dict. calibration, versions: what went in.
    """

    model: str
    config: dict[str, Any]
    parameters: list[ParameterReport]
    total_parameters: int
    macs_dense: float
    macs_sparse: float
    layer_errors: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0
    timings: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    device: str = ""
    calibration: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def density(self) -> float:
        """Fraction of nonzeros over the listed parameters."""
        if not self.parameters:
            return 1.0  # nothing is sparse
        return sum(p.density * p.numel for p in self.parameters) / sum(p.numel for p in self.parameters)

    @property
    def sparsity(self) -> float:
        return 1.0 - self.density

    @property
    def conforms(self) -> bool:
        return all(p.conforms for p in self.parameters)

    @property
    def bytes_dense(self) -> int:
        return sum(p.bytes_dense for p in self.parameters)

    @property
    def bytes_packed(self) -> int:
        return sum(p.bytes_packed for p in self.parameters)

    def by_kind(self) -> dict[str, dict[str, Any]]:
        """``{kind: count, weights, density, error, bytes...}``, errors averaged over the parameters that have one."""
        result: dict[str, dict[str, Any]] = {}
        for kind in dict.fromkeys(p.kind for p in self.parameters):
            group = [p for p in self.parameters if p.kind == kind]
            numel = sum(p.numel for p in group)
            errors = [p.error for p in group if p.error is not None]
            result[kind] = {
                "count": len(group),
                "weights": numel,
                "density": sum(p.density * p.numel for p in group) / numel,
                "min_density": min(p.density for p in group),
                "max_density": max(p.density for p in group),
                "conforms": all(p.conforms for p in group),
                "two_four": all(p.two_four for p in group),
                "error": sum(errors) / len(errors) if errors else None,
                "bytes_dense": sum(p.bytes_dense for p in group),
                "bytes_packed": sum(p.bytes_packed for p in group),
            }
        return result

    def all_notes(self) -> list[str]:
        """Everything out of the ordinary, equal notes of one kind of parameter told once."""
        told: dict[tuple[str, str], int] = {}
        for p in self.parameters:
            if p.note:
                told[p.kind, p.note] = told.get((p.kind, p.note), 0) + 1
        return [*self.notes, *(f"{kind}, {count} of them: {note}" for (kind, note), count in told.items())]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, totals first."""
        summary = {
            "model": self.model,
            "sparsity": self.sparsity,
            "density": self.density,
            "conforms": self.conforms,
            "two_four": bool(self.parameters) and all(p.two_four for p in self.parameters),
            "sparse_parameters": sum(p.numel for p in self.parameters),
            "total_parameters": self.total_parameters,
            "bytes_dense": self.bytes_dense,
            "bytes_packed": self.bytes_packed,
            "macs_per_token_dense": self.macs_dense,
            "macs_per_token_sparse": self.macs_sparse,
            "by_kind": self.by_kind(),
        }
        rest = dataclasses.asdict(self)
        for moved in ("model", "macs_dense", "macs_sparse", "total_parameters"):
            rest.pop(moved)
        rest["parameters"] = rest.pop("parameters")  # the longest part last
        return summary | rest

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "SparsityReport":
        """The report a :meth:`to_dict` describes."""
        fields = {f.name for f in dataclasses.fields(cls)}
        kept = {key: value for key, value in content.items() if key in fields}
        kept["macs_dense"] = content["macs_per_token_dense"]
        kept["macs_sparse"] = content["macs_per_token_sparse"]
        kept["parameters"] = [ParameterReport(**p) for p in content["parameters"]]
        kept["layer_errors"] = {int(k): v for k, v in content.get("layer_errors", {}).items()}
        return cls(**kept)

    def save(self, path: str | Path) -> None:
        """Writes the report as JSON, atomically."""
        from hf_sparse.atomic import atomic_write_text

        atomic_write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")

    def table(self):
        """A rich Table: one row per kind of layer, totals last."""
        from rich.table import Table

        table = Table(title=None)
        for column in ("kind", "count", "weights", "density", "pattern kept", "error", "MB dense", "MB packed"):
            table.add_column(column, justify="left" if column == "kind" else "right")
        for kind, row in self.by_kind().items():
            table.add_row(
                kind,
                str(row["count"]),
                f"{row['weights'] / 1e6:.2f} M",
                f"{row['density']:.4f}",
                "yes" if row["conforms"] else "no",
                "–" if row["error"] is None else f"{row['error']:.4f}",
                f"{row['bytes_dense'] / 1e6:.1f}",
                f"{row['bytes_packed'] / 1e6:.1f}",
            )
        table.add_section()
        table.add_row(
            "all",
            str(len(self.parameters)),
            f"{sum(p.numel for p in self.parameters) / 1e6:.2f} M",
            f"{self.density:.4f}",
            "yes" if self.conforms else "no",
            "",
            f"{self.bytes_dense / 1e6:.1f}",
            f"{self.bytes_packed / 1e6:.1f}",
        )
        return table

    def plot(self, path: str | Path) -> None:
        """Density and reconstruction error over depth, one line per kind, as an image at ``path``.

        Raises:
            ModuleNotFoundError: matplotlib is not installed (``pip install hf-sparse[plot]``).
        """
        try:
            import matplotlib
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("the plot needs matplotlib: pip install 'hf-sparse[plot]'") from error
        from matplotlib.figure import Figure

        del matplotlib
        figure = Figure(figsize=(9, 6), layout="constrained")
        density, error_axis = figure.subplots(2, 1, sharex=True)
        for kind in self.by_kind():
            group = sorted(
                (p for p in self.parameters if p.kind == kind and p.layer is not None), key=lambda p: p.layer
            )
            density.plot([p.layer for p in group], [p.density for p in group], marker=".", label=kind)
            known = [p for p in group if p.error is not None]
            if known:
                error_axis.plot([p.layer for p in known], [p.error for p in known], marker=".", label=kind)
        if self.layer_errors:
            layers = sorted(self.layer_errors)
            style = {"color": "black", "linewidth": 2, "label": "whole layer"}
            error_axis.plot(layers, [self.layer_errors[layer] for layer in layers], **style)
        density.set_ylabel("density (fraction of nonzeros)")
        density.set_ylim(0, 1.05)
        density.set_title(f"{self.model}: {self.sparsity:.1%} sparse")
        error_axis.set_ylabel("relative output error")
        error_axis.set_xlabel("decoder layer")
        for axis in (density, error_axis):
            axis.grid(alpha=0.3)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize="small", ncols=2)
        figure.savefig(path, dpi=120)
