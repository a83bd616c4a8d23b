"""What ``self_data_distillation.py`` found: tables, pictures and one JSON, from the measures in its output folder.

    recovery.json              per depth: every model, value and recovery with the standard error over the items; means over
                               seeds; and the comparisons below
    recovery_<N>_layers.png    recovery of every model with N layers dropped
    overview.png               the measures over the number of layers dropped, SFT, self-data and merged in one colour each

The comparisons are paired, item by item, then averaged over the seeds: the standard error is that of the mean over the items of
the seeds' mean difference, so it says what another sample of items would change, not what another seed would.

    self-data minus SFT        of the same set and depth
    merged minus the parents   of the same method and depth: beside the better of its two parents, measure by measure
"""

import json
import math
import re
from pathlib import Path

__all__ = ["report"]

SETTINGS = (
    "model",
    "remove",
    "seeds",
    "rows",
    "epochs",
    "steps",
    "batch_size",
    "accumulation",
    "learning_rate",
    "lora",
)
SETTINGS += ("length", "window", "windows", "held_out", "limit", "new_tokens")


def report(output: Path) -> None:
    """Shows and writes all that is measured by now."""
    from rich.console import Console

    from hf_sparse.atomic import atomic_write_text
    from hf_sparse.recovery import Measure, RecoveryReport

    options = json.loads((output / "options.json").read_text(encoding="utf-8"))

    def read(file: Path) -> dict[str, Measure]:
        return {name: Measure.from_dict(row) for name, row in json.loads(file.read_text(encoding="utf-8")).items()}

    original, console = read(output / "measures" / "original.json"), Console()
    name = Path(options["model"]).name
    content = options["facts"] | {"settings": {key: options[key] for key in SETTINGS} | {"model": name}}
    content["rewriting"] = {
        file.parent.name: json.loads(file.read_text(encoding="utf-8"))
        for file in sorted((output / "sets").glob("*/rewriting.json"))
    }
    content["depths"], measured = {}, {}
    for folder in sorted((output / "measures").glob("* layers"), key=lambda f: int(f.name.split()[0])):
        files = {file.stem: file for file in folder.glob("*.json")}
        labels = sorted(files, key=lambda label: (label != "pruned", "merged" in label, label))
        models = measured[folder.name] = {label: read(files[label]) for label in labels}
        recovered = RecoveryReport(name, models, original)
        made = {label: output / "models" / folder.name / label / "made.json" for label in labels}
        made = {label: json.loads(file.read_text()) for label, file in made.items() if file.is_file()}
        found = {"means": _means(recovered), "comparisons": _comparisons(models), "made": made}
        content["depths"][folder.name] = recovered.to_dict() | found
        console.print(
            f"{folder.name} dropped", *_tables(recovered, found["means"], console.width), *_lines(found), sep="\n"
        )
        for note in recovered.notes():
            console.print(f"note: {note}")
        _draw(
            lambda path, report=recovered: report.plot(path), output / f"recovery_{folder.name.replace(' ', '_')}.png"
        )
    _draw(lambda path: _overview(content["depths"], original, path), output / "overview.png")
    atomic_write_text(output / "recovery.json", json.dumps(content, indent=1) + "\n")
    console.print(f"saved {output / 'recovery.json'}")


def _draw(function, path: Path) -> None:
    try:
        function(path)
    except ModuleNotFoundError:
        print("no plot: matplotlib is not installed")


def _kind(label: str) -> str:
    """A model's label without its seed."""
    return re.sub(r", seed \d+$", "", label)


def _means(recovered) -> dict[str, dict]:
    """``{kind: {seeds, average recovery, measures}}``: means over the seeds and, with several, how far the seeds lie apart."""
    content = recovered.to_dict()["models"]
    kinds: dict[str, list[str]] = {}
    for label in content:
        kinds.setdefault(_kind(label), []).append(label)

    def mean(values) -> dict:
        values = [value for value in values if value is not None]
        if not values:
            return {}
        return {"mean": sum(values) / len(values)} | ({"range": max(values) - min(values)} if len(values) > 1 else {})

    return {
        kind: {
            "seeds": len(labels),
            "average_recovery_percent": mean(content[label]["average_recovery_percent"] for label in labels),
            "measures": {
                name: mean(content[label]["measures"][name]["value"] for label in labels)
                for name in content[labels[0]]["measures"]
            },
        }
        for kind, labels in kinds.items()
    }


def _comparisons(models: dict) -> dict[str, dict]:
    """``{"what minus what": {measure: {difference, stderr, seeds}}}``; of perplexities the loss in nats."""
    groups: dict[str, dict[str, dict]] = {}
    for label, measures in models.items():
        groups.setdefault(_kind(label), {})[label[len(_kind(label)) :]] = measures
    found = {}
    for kind in groups:
        if kind.startswith("self-data ") and (other := "SFT " + kind.removeprefix("self-data ")) in groups:
            found[f"{kind} minus {other}"] = _paired(groups[kind], groups[other])
        if " merged by " in kind:
            method = kind.split(" merged by ")[0]
            parents = [groups[k] for k in groups if k.startswith(f"{method} ") and " merged by " not in k]
            against = [_paired(groups[kind], parent) for parent in parents]
            better = {}
            for name in against[0] if against else ():
                sign = 1 if next(iter(groups[kind].values()))[name].kind == "accuracy" else -1
                better[name] = min((one[name] for one in against), key=lambda row, sign=sign: sign * row["difference"])
            found[f"{kind} minus the better parent"] = better
    return found


def _paired(ours: dict[str, dict], theirs: dict[str, dict]) -> dict[str, dict]:
    seeds = [seed for seed in ours if seed in theirs]
    result = {}
    for name in ours[seeds[0]] if seeds else ():
        pairs = [zip(ours[seed][name].values, theirs[seed][name].values, strict=True) for seed in seeds]
        differences = [sum(x - y for x, y in item) / len(seeds) for item in zip(*pairs, strict=True)]
        mean = sum(differences) / len(differences)
        spread = math.sqrt(sum((d - mean) ** 2 for d in differences) / max(1, len(differences) - 1) / len(differences))
        result[name] = {"kind": ours[seeds[0]][name].kind, "difference": mean, "stderr": spread, "seeds": len(seeds)}
    return result


def _tables(recovered, means: dict, width: int) -> list:
    """A column per kind of model, a row per measure: means over the seeds."""
    from hf_sparse.instruments import tables_side_by_side

    names = list(next(iter(means.values()))["measures"])
    kinds = {name: m.kind for measures in recovered.models.values() for name, m in measures.items()}
    shown = lambda kind, value: f"{value:.1%}" if kind == "accuracy" else f"{value:.3g}"  # noqa: E731
    original = [recovered.original.get(name) for name in names]
    columns = {"original": ["100%", *("–" if m is None else shown(m.kind, m.shown) for m in original)]}
    for kind, row in means.items():
        average = row["average_recovery_percent"].get("mean")
        cells = ["–" if average is None else f"{average:.1f}%"]
        columns[f"{kind} ({row['seeds']} seeds)" if row["seeds"] > 1 else kind] = cells + [
            shown(kinds[name], row["measures"][name]["mean"]) for name in names
        ]
    return tables_side_by_side(["average recovery", *names], columns, width)


def _lines(found: dict):
    """The comparisons in words, what is not clearer than twice its standard error left out."""
    for what, measures in found["comparisons"].items():
        parts = []
        for name, row in measures.items():
            sign = "+" if row["difference"] >= 0 else "−"
            if abs(row["difference"]) <= 2 * row["stderr"]:
                continue
            scale, unit = (100, " points") if row["kind"] == "accuracy" else (1, " nats")
            parts.append(f"{name} {sign}{abs(row['difference']) * scale:.2g}{unit}")
        if parts:
            yield f"{what}: {', '.join(parts)}"


def _overview(depths: dict, original: dict, path: Path) -> None:
    """Each measure over the layers dropped; lines are means over seeds."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter, ScalarFormatter

    numbers = {depth: int(depth.split()[0]) for depth in depths}
    kinds = list(dict.fromkeys(kind for found in depths.values() for kind in found["means"]))
    names = list(
        dict.fromkeys(n for found in depths.values() for row in found["means"].values() for n in row["measures"])
    )
    panels = ["average recovery, %", *names]
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.9 * columns, 3.1 * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for kind in kinds:
        method = "black" if kind == "pruned" else "tab:orange" if kind.startswith("self-data") else "tab:blue"
        line = ":" if "merged by slerp" in kind else "-." if "merged" in kind else "--" if "gsm8k" in kind else "-"
        for axis, name in zip(axes, panels, strict=False):
            points = []
            for depth, found in depths.items():
                row = found["means"].get(kind)
                value = row and (
                    row["average_recovery_percent"] if name == panels[0] else row["measures"].get(name, {})
                ).get("mean")
                if value is not None:
                    points.append((numbers[depth], value))
            if points:
                axis.plot(*zip(*points, strict=True), line, color=method, marker="o", markersize=3, label=kind)
    for axis, name in zip(axes, panels, strict=False):
        axis.set_title(name, fontsize=10)
        axis.set_xticks(list(numbers.values()))
        axis.set_xlabel("layers dropped", fontsize=8)
        measure = original.get(name)
        if measure is not None:
            axis.axhline(measure.shown, color="grey", linewidth=0.8)
        if measure is not None and measure.kind == "accuracy":
            axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        if measure is None and name != panels[0]:
            axis.set_ylabel("nats a token", fontsize=8)
        elif measure is not None and measure.kind == "perplexity":
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(ScalarFormatter())
            axis.yaxis.set_minor_formatter(ScalarFormatter())
            axis.set_ylabel("perplexity", fontsize=8)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle("blue: as the data is (SFT); orange: as the original rewrote it; grey: the original", fontsize=10)
    figure.savefig(path, dpi=110)
