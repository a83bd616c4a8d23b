"""How much of a model is left after pruning, and how much each step brought back: recovery in percent, with standard errors.

    report = RecoveryReport("dense", {"pruned": assess(pruned, ...), ...}, assess(dense, ...))

Every model answers the same items (questions of a task, windows of a text, rows of a dataset), so each item is its own
comparison with the original, and the errors of the two models, which often fail on the same items, cancel. With x_i and y_i
the values of item i under the model and under the original, over n items:

    accuracy      R = mean x / mean y                         se = sd(x_i - R y_i) / (sqrt(n) mean y)
    perplexity    R = exp(mean y - mean x), losses in nats    se = R sd(y_i - x_i) / sqrt(n)        (inverse: 100% is equal)
    divergence    no percentage: mean KL(original || model) in nats a token, 0 is equal
    average       of the tasks, as self-data distillation reports it (arXiv 2410.09982):
                  R = (sum over tasks of mean x) / (sum over tasks of mean y), tasks taken as independent

A recovery above what its items can tell is noise: the standard errors say so, and where the original itself is not
clearly better than guessing, a note does.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_sparse.instruments import tables_side_by_side

__all__ = ["KINDS", "Measure", "RecoveryReport", "average_recovery", "recovery"]

KINDS = ("accuracy", "perplexity", "divergence")


@dataclass(frozen=True)
class Measure:
    """One quality of one model, item by item.

    Attributes:
        kind: ``accuracy`` (values in [0, 1], more is better), ``perplexity`` (mean losses in nats) or ``divergence`` (mean KL
            to the original in nats).
        values: one per item, in an order that is the same for every model.
        chance: the accuracy of guessing, where known.
        facts: what it takes to compare it: metric, shots, versions, window length.
    """

    kind: str
    values: tuple[float, ...]
    chance: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"a measure is one of {', '.join(KINDS)}; got {self.kind!r}")
        if not self.values:
            raise ValueError(f"a measure of {self.kind} needs at least one item")

    @property
    def mean(self) -> float:
        """Accuracy in [0, 1], loss or divergence in nats."""
        return sum(self.values) / len(self.values)

    @property
    def stderr(self) -> float | None:
        """Of the mean, over the items; None for a single one."""
        return _stderr(self.values)

    @property
    def shown(self) -> float:
        """The number people compare: the perplexity of a loss, otherwise the mean."""
        return _exp(self.mean) if self.kind == "perplexity" else self.mean

    def to_dict(self) -> dict[str, Any]:
        """With every single item, so that :meth:`from_dict` gives the measure back."""
        return {"kind": self.kind, "values": list(self.values), "chance": self.chance, "facts": dict(self.facts)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Measure":
        return cls(content["kind"], tuple(content["values"]), content["chance"], content["facts"])


def recovery(measure: Measure, original: Measure) -> tuple[float | None, float | None]:
    """``(R, standard error)`` in percent; None where there is none (a divergence, an original that gets nothing right).

    Raises:
        ValueError: measures of different kinds or of different items.
    """
    _check_same(measure, original)
    if measure.kind == "divergence":
        return None, None
    if measure.kind == "perplexity":
        gains = [y - x for x, y in zip(measure.values, original.values, strict=True)]
        ratio = _exp(sum(gains) / len(gains))
        error = _stderr(gains)
        return 100 * ratio, None if error is None else 100 * ratio * error
    return _ratio([(measure, original)])


def average_recovery(
    measures: Mapping[str, Measure], originals: Mapping[str, Measure]
) -> tuple[float | None, float | None]:
    """``(R, standard error)`` in percent of the mean accuracy over all tasks; None without tasks."""
    pairs = [(measures[name], original) for name, original in originals.items() if original.kind == "accuracy"]
    for pair in pairs:
        _check_same(*pair)
    return _ratio(pairs) if pairs else (None, None)


def _ratio(pairs: list[tuple[Measure, Measure]]) -> tuple[float | None, float | None]:
    top, bottom = sum(x.mean for x, _ in pairs), sum(y.mean for _, y in pairs)
    if bottom <= 0:
        return None, None
    ratio = top / bottom
    errors = [_stderr([x - ratio * y for x, y in zip(a.values, b.values, strict=True)]) for a, b in pairs]
    if any(error is None for error in errors):
        return 100 * ratio, None
    return 100 * ratio, 100 * math.sqrt(sum(error**2 for error in errors)) / bottom


def _check_same(measure: Measure, original: Measure) -> None:
    if measure.kind != original.kind or len(measure.values) != len(original.values):
        raise ValueError(
            f"recovery compares the same items: {measure.kind} of {len(measure.values)} items stands beside the original's "
            f"{original.kind} of {len(original.values)}"
        )


def _stderr(values) -> float | None:
    count = len(values)
    if count < 2:
        return None
    mean = sum(values) / count
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)


def _exp(value: float) -> float:
    return math.inf if value > 700 else math.exp(value)


@dataclass
class RecoveryReport:
    """The original and the models made from it, in the order they were made.

    Attributes:
        name: of the original. models: ``{label: {measure: Measure}}``. original: ``{measure: Measure}``, without divergences.
        facts: protocol, versions, hardware; saved as they are.
    """

    name: str
    models: dict[str, dict[str, Measure]]
    original: dict[str, Measure]
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for label, measures in self.models.items():
            if missing := sorted(set(self.original) - set(measures)):
                raise ValueError(f"{label} was not measured on {', '.join(missing)}; every model needs all measures")
            for name, original in self.original.items():
                _check_same(measures[name], original)

    def notes(self) -> list[str]:
        """What a reader of the percentages should know."""
        notes = []
        for name, measure in self.original.items():
            if measure.chance is not None and measure.mean - measure.chance <= 2 * (measure.stderr or 0):
                notes.append(
                    f"{name}: the original ({measure.mean:.1%}) is within two standard errors of guessing "
                    f"({measure.chance:.1%}), so its recovery says little"
                )
        return notes

    def to_dict(self) -> dict[str, Any]:
        """Means, standard errors and recoveries; the single items are left out."""

        def row(measure: Measure, original: Measure | None) -> dict[str, Any]:
            percent, error = (None, None) if original is None else recovery(measure, original)
            result = {"kind": measure.kind, "value": measure.shown, "mean": measure.mean, "stderr": measure.stderr}
            result |= {"items": len(measure.values), "chance": measure.chance}
            return result | ({} if percent is None else {"recovery_percent": percent, "recovery_stderr": error})

        models = {}
        for label, measures in self.models.items():
            percent, error = average_recovery(measures, self.original)
            rows = {name: row(measure, self.original.get(name)) for name, measure in measures.items()}
            models[label] = {"average_recovery_percent": percent, "average_recovery_stderr": error, "measures": rows}
        facts = {name: dict(measure.facts) for name, measure in self.original.items() if measure.facts}
        return {
            "original": {"name": self.name, "measures": {name: row(m, None) for name, m in self.original.items()}},
            "models": models,
            "protocol": facts,
            "notes": self.notes(),
            **self.facts,
        }

    def save(self, path: str | Path) -> None:
        """Writes :meth:`to_dict` as JSON; the file appears when it is whole."""
        from hf_sparse.atomic import atomic_write_text

        atomic_write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")

    def tables(self, width: int = 100) -> list:
        """Rich Tables no wider than ``width`` characters where that is possible: a row per measure, a column per model, value
        and recovery with its standard error; as many tables as the models need."""
        names = list(dict.fromkeys([*self.original, *(name for m in self.models.values() for name in m)]))
        tasks = any(measure.kind == "accuracy" for measure in self.original.values())
        columns = {self.name: [_cell(self.original.get(name)) for name in names] + (["100%"] if tasks else [])}
        for label, measures in self.models.items():
            columns[label] = [_cell(measures.get(name), self.original.get(name)) for name in names]
            columns[label] += [_percent(*average_recovery(measures, self.original))] if tasks else []
        return tables_side_by_side([*names, *(["average of tasks"] if tasks else [])], columns, width)

    def plot(self, path: str | Path) -> None:
        """Recovery of every model on every measure, with standard errors, as an image at ``path``.

        Raises:
            ModuleNotFoundError: matplotlib is not installed (``pip install hf-sparse[plot]``).
        """
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("the plot needs matplotlib: pip install 'hf-sparse[plot]'") from error
        names = [name for name, measure in self.original.items() if measure.kind != "divergence"]
        tasks = any(self.original[name].kind == "accuracy" for name in names)
        figure = Figure(figsize=(2.5 + 1.5 * len(names), 4.2), layout="constrained")
        axes = figure.subplots()
        width = 0.8 / max(1, len(self.models))
        for place, (label, measures) in enumerate(self.models.items()):
            values = [recovery(measures[name], self.original[name]) for name in names]
            values += [average_recovery(measures, self.original)] if tasks else []
            x = [index + (place - (len(self.models) - 1) / 2) * width for index in range(len(values))]
            y = [math.nan if value is None else value for value, _ in values]
            axes.errorbar(x, y, [error or 0 for _, error in values], fmt="o", capsize=2, label=label)
        axes.axhline(100, color="grey", linewidth=0.8)
        kinds = {"accuracy": "accuracy", "perplexity": "perplexity"}
        labels = [f"{name}\n({kinds[self.original[name].kind]})" for name in names]
        labels += ["average\nof tasks"] if tasks else []
        axes.set_xticks(range(len(labels)), labels, fontsize=8)
        axes.set_ylabel("recovery of the original, %")
        axes.set_title(f"what is left of {self.name}, with standard errors", fontsize=10)
        axes.legend(fontsize=8)
        figure.savefig(path, dpi=120)


def _cell(measure: Measure | None, original: Measure | None = None) -> str:
    if measure is None:
        return "–"
    value = f"{measure.mean:.1%}" if measure.kind == "accuracy" else f"{measure.shown:.4g}"
    if original is None:
        error = measure.stderr
        if error is None:
            return value
        if measure.kind == "accuracy":
            return f"{value} ± {100 * error:.1f}"
        return f"{value} ± {error * (measure.shown if measure.kind == 'perplexity' else 1):.2g}"
    percent, error = recovery(measure, original)
    return value if percent is None else f"{value}\n{_percent(percent, error)}"


def _percent(percent: float | None, error: float | None) -> str:
    if percent is None:
        return "–"
    return f"{percent:.1f}%" + ("" if error is None else f" ± {error:.1f}")
