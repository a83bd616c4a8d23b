"""``hf-sparse compare``: models side by side, from what is known of each: size, density, speed, quality.

    hf-sparse compare dense pruned pruned-packed --output comparison.json --plot comparison.png

Everything comes from the directories: bytes and zeros are counted, the rest is read from the reports beside the weights
(evaluation.json of ``eval --record``, bench.json, recovery.json). What was measured under different protocols or on different
hardware is shown and marked: such numbers are not to be compared.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

from hf_sparse import commands

__all__ = ["compare", "run_compare"]


def run_compare(arguments) -> dict[str, Any]:
    from hf_sparse.atomic import atomic_write_text
    from hf_sparse.instruments import tables_side_by_side

    for file in (arguments.output, arguments.plot):
        commands.check_parent(file)
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("--plot needs matplotlib: pip install 'hf-sparse[plot]'")
    names: dict[str, str] = {}
    for entry in arguments.paths:
        name, separator, path = entry.partition("=")
        name, path = (name, path) if separator else (Path(entry).name, entry)
        if name in names:
            raise ValueError(f"two models are called {name}; name them, e.g. other={path}")
        if not (Path(path) / "config.json").is_file():
            raise FileNotFoundError(f"{path} is no model directory: it has no config.json")
        names[name] = path
    result = compare(names)
    if arguments.output:
        atomic_write_text(arguments.output, json.dumps(result, indent=1) + "\n")
    if arguments.plot:
        _plot(result, arguments.plot)
    if not arguments.json:
        out = commands.console()
        rows = list(dict.fromkeys(row for model in result["models"].values() for row in model))
        columns = {name: [_shown(model.get(row)) for row in rows] for name, model in result["models"].items()}
        out.print(*tables_side_by_side(rows, columns, out.width))
        for note in result["notes"]:
            out.print(f"note: {note}")
    return result


def compare(models: dict[str, str | Path]) -> dict[str, Any]:
    """What is known of models in directories.

    Returns:
        ``{"models": {name: {row: {"value", "unit", "stderr", "under"}}}, "notes": [...]}``; ``under``: hardware or protocol.
    """
    rows = {name: _rows(Path(path)) for name, path in models.items()}
    notes = []
    for row in dict.fromkeys(row for model in rows.values() for row in model):
        under: dict[str, list[str]] = {}
        for name, model in rows.items():
            if row in model and model[row].get("under"):
                under.setdefault(model[row]["under"], []).append(name)
        if len(under) > 1:
            parts = "; ".join(f"{', '.join(names)}: {what}" for what, names in under.items())
            notes.append(f"{row} was measured differently and is not to be compared ({parts})")
    return {"models": rows, "notes": notes}


def _rows(path: Path) -> dict[str, dict[str, Any]]:
    from hf_sparse.hub_cards.facts import gather
    from hf_sparse.hub_cards.sparsity_card import task_values

    facts = gather(path)
    found: dict[str, dict[str, Any]] = {"weights on disk": {"value": commands.weight_bytes(path) / 1e6, "unit": "MB"}}
    sparsity = facts.reports.get("sparsity")
    if sparsity:
        found["parameters"] = {"value": sparsity["total_parameters"] / 1e6, "unit": "M"}
        found["zeros in linear layers"] = {"value": 100 * sparsity["sparsity"], "unit": "%"}
        found["MACs per token"] = {"value": sparsity["macs_per_token_sparse"] / 1e9, "unit": "G"}
    evaluation = facts.reports.get("evaluation", {})
    if "perplexity" in evaluation:
        row = f"perplexity, {evaluation.get('text', 'text')}"
        found[row] = {"value": evaluation["perplexity"], "unit": "", "under": str(evaluation.get("protocol", ""))}
    protocol = evaluation.get("tasks", {}).get("protocol", {})
    for task, metric, value, error in task_values(evaluation):
        shots = (protocol.get("num_fewshot") or {}).get(task)
        under = f"{protocol.get('harness', '')}, {metric}, {shots} shots, limit {protocol.get('limit')}"
        found[task] = {
            "value": 100 * value,
            "unit": "%",
            "stderr": None if error is None else 100 * error,
            "under": under,
        }
    bench = facts.reports.get("bench")
    if bench:
        under = f"{bench['device']}, {bench['dtype']}, batch {bench['batch_size']}"
        found["decode, dense"] = {"value": bench["dense_tokens_per_second"], "unit": "tokens/s", "under": under}
        found["decode, packed"] = {"value": bench["packed_tokens_per_second"], "unit": "tokens/s", "under": under}
    return found


def _shown(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "–"
    error = f" ± {entry['stderr']:.2g}" if entry.get("stderr") else ""
    return f"{entry['value']:.4g}{error} {entry['unit']}".strip()


def _plot(result: dict[str, Any], path: str) -> None:
    """A panel per row that more than one model has, bars with their standard errors."""
    from matplotlib.figure import Figure

    models = result["models"]
    rows = [
        row
        for row in dict.fromkeys(r for m in models.values() for r in m)
        if sum(row in m for m in models.values()) > 1
    ]
    figure = Figure(figsize=(3.2 * max(1, min(4, len(rows))), 2.6 * max(1, -(-len(rows) // 4))), layout="constrained")
    axes = figure.subplots(max(1, -(-len(rows) // 4)), max(1, min(4, len(rows))), squeeze=False).flatten()
    for axis, row in zip(axes, rows, strict=False):
        have = {name: model[row] for name, model in models.items() if row in model}
        errors = [1.96 * (entry.get("stderr") or 0) for entry in have.values()]
        axis.barh(list(have), [entry["value"] for entry in have.values()], xerr=errors, color="#2f6db5")
        axis.invert_yaxis()
        axis.set_title(
            f"{row}{', ' + next(iter(have.values()))['unit'] if next(iter(have.values()))['unit'] else ''}", fontsize=9
        )
        axis.tick_params(labelsize=8)
    for axis in axes[len(rows) :]:
        axis.set_axis_off()
    figure.savefig(path, dpi=120)
