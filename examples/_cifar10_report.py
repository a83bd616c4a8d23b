"""The CIFAR-10 experiment as a table and two plots: accuracy against sparsity, and against the spectra of the masks."""

import json
import math
import statistics
from pathlib import Path

__all__ = ["claims", "correlations", "report", "table"]

COLOURS = {"static": "#0072B2", "rigl": "#D55E00", "dense": "#000000"}  # Okabe and Ito
LABELS = {"static": "static", "rigl": "RigL"}
MARKERS = {"dense": "o", "wide": "o", "parallel": "s", "factorized": "^", "doped": "D"}


def report(path: Path) -> None:
    """Prints the table, adds what follows from it to the JSON and draws the plots beside it, if matplotlib is there."""
    from hf_sparse.atomic import atomic_write_text

    kept = json.loads(Path(path).read_text())
    if not kept["runs"]:
        print("no run has ended yet")
        return
    rows = table(kept["runs"])
    print(f"{'variant':20} {'seeds':>5} {'accuracy':>16} {'FLOPs':>8} {'training':>9} {'sparsity':>9} {'weights':>10}")
    for name, row in rows.items():
        spread = "" if row["spread"] is None else f" +- {100 * row['spread']:.2f}"
        print(
            f"{name:20} {row['seeds']:5} {100 * row['accuracy']:8.2f}{spread:8} {row['iso_flop_ratio']:8.4f} "
            f"{row['training_flops_ratio']:9.4f} {row['sparsity']:9.4f} {row['nonzero_parameters']:10,}"
        )
    kept |= {"table": rows, "claims": claims(rows), "correlations": correlations(kept["runs"])}
    for claim in kept["claims"]:
        spread = "one seed" if claim["spread"] is None else f"spread of the difference {claim['spread']:.2f}"
        print(f"{'yes' if claim['holds'] else 'no':3}  {claim['claim']}: {claim['gain']:+.2f} points ({spread})")
    atomic_write_text(path, json.dumps(kept, indent=1) + "\n")
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("no matplotlib: no plots; --report draws them later")
        return
    matplotlib.use("Agg")
    plot_accuracy(rows, kept["recipe"], Path(path).with_suffix(".png"))
    if kept["correlations"]:
        plot_spectra(kept["runs"], kept["correlations"], Path(path).with_name(f"{Path(path).stem}_spectral.png"))


def table(runs: dict) -> dict:
    """``{variant: mean over its seeds}``; ``spread`` is the sample standard deviation of accuracy, None for one seed."""
    rows = {}
    for name in dict.fromkeys(run["name"] for run in runs.values()):
        same = [run for run in runs.values() if run["name"] == name]
        found = [run["accuracy"] for run in same]
        rows[name] = {
            "seeds": len(same),
            "accuracy": statistics.fmean(found),
            "spread": statistics.stdev(found) if len(found) > 1 else None,
            "best_accuracy": statistics.fmean(run["best_accuracy"] for run in same),
            "seconds": statistics.fmean(run["seconds"] for run in same),
        }
        same_for_all = ("family", "method", "nominal_sparsity", "sparsity", "iso_flop_ratio", "training_flops_ratio")
        same_for_all += ("paper_flops", "parameters", "nonzero_parameters", "density")
        rows[name] |= {what: same[0][what] for what in same_for_all}
    return rows


def claims(rows: dict) -> list[dict]:
    """The paper's order, pair by pair: more sparsity is better at equal FLOPs, dynamic is better than static.

    ``gain`` is in points; ``spread`` is the standard deviation of a difference of two runs, None where one has a single seed.
    """
    pairs = [("dense", f"wide{s}-{method}") for method in ("rigl", "static") for s in (50, 75, 90)]
    pairs += [(f"wide{a}-{m}", f"wide{b}-{m}") for m in ("rigl", "static") for a, b in ((50, 75), (75, 90))]
    kinds = ("wide50", "wide75", "wide90", "parallel75", "factorized75", "doped75")
    pairs += [(f"{kind}-static", f"{kind}-rigl") for kind in kinds]
    found = []
    for low, high in pairs:
        if low in rows and high in rows:
            gain = 100 * (rows[high]["accuracy"] - rows[low]["accuracy"])
            spreads = [rows[name]["spread"] for name in (low, high)]
            spread = None if None in spreads else 100 * math.hypot(*spreads)
            found.append({"claim": f"{high} above {low}", "gain": gain, "spread": spread, "holds": gain > 0})
    return found


def correlations(runs: dict) -> dict:
    """``{quantity: {pearson, spearman, runs}}`` of the spectra at the end with accuracy, and of the wide runs alone."""
    found = {}
    for quantity in _quantities(runs):
        for which, chosen in (("", runs), (" (wide)", {k: r for k, r in runs.items() if r["family"] == "wide"})):
            points = [
                (r["spectral"]["end"][quantity], r["accuracy"])
                for r in _analysed(chosen)
                if quantity in r["spectral"]["end"]
            ]
            if len(points) >= 3:
                values, scores = zip(*points, strict=True)
                found[quantity + which] = {
                    "pearson": _correlation(values, scores),
                    "spearman": _correlation(_ranks(values), _ranks(scores)),
                    "runs": len(points),
                }
    return found


def _analysed(runs: dict) -> list[dict]:
    return [run for run in runs.values() if "end" in run.get("spectral", {})]


def _quantities(runs: dict) -> list[str]:
    names = dict.fromkeys(
        name for run in _analysed(runs) for name, value in run["spectral"]["end"].items() if _real(value)
    )
    return list(names)


def _real(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _correlation(a, b) -> float | None:
    """Pearson's; None where one of them is constant."""
    try:
        return statistics.correlation(a, b)
    except statistics.StatisticsError:
        return None


def _ranks(values) -> list[float]:
    """1 for the smallest; equal values share the mean of their ranks."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) + 1) / 2 for value in values]


def plot_accuracy(rows: dict, recipe: dict, path: Path) -> None:
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    if dense := rows.get("dense"):
        level, spread = 100 * dense["accuracy"], 100 * (dense["spread"] or 0)
        axis.axhline(level, color="0.4", ls="--", label=f"dense ({dense['seeds']} seeds)")
        axis.axhspan(level - spread, level + spread, color="0.85", zorder=0)
    for shift, method in ((-0.5, "static"), (0.5, "rigl")):
        for family in ("wide", "parallel", "factorized", "doped"):
            chosen = [row for row in rows.values() if (row["family"], row["method"]) == (family, method)]
            chosen.sort(key=lambda row: row["nominal_sparsity"])
            if not chosen:
                continue
            axis.errorbar(
                [100 * row["nominal_sparsity"] + shift * (family == "wide" or 3) for row in chosen],
                [100 * row["accuracy"] for row in chosen],
                [100 * (row["spread"] or 0) for row in chosen],
                color=COLOURS[method],
                marker=MARKERS[family],
                ls="-" if family == "wide" else "none",
                mfc=COLOURS[method] if family == "wide" else "white",
                capsize=3,
                label=f"{family}, {LABELS[method]}",
            )
    axis.set_xlabel("sparsity [%], at equal FLOPs")
    axis.set_ylabel(f"{recipe['images']} test accuracy [%]")
    axis.set_title(
        f"ResNet-18 of base width {recipe['width']}, {recipe['epochs']} epochs, one schedule for all\n"
        "bars: standard deviation, where there are several seeds",
        fontsize="medium",
        loc="left",
    )
    axis.legend(fontsize="small", ncols=2)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot_spectra(runs: dict, found: dict, path: Path) -> None:
    from matplotlib import pyplot

    names = [name for name in _quantities(runs) if found.get(name, {}).get("pearson") is not None][:6]
    if not names:
        return
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(4 * columns, 3.6 * lines), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        for run in _analysed(runs):
            if name in run["spectral"]["end"]:
                style = dict(color=COLOURS[run["method"]], marker=MARKERS[run["family"]], ls="none", alpha=0.8)
                axis.plot(run["spectral"]["end"][name], 100 * run["accuracy"], **style)
        wide = found.get(f"{name} (wide)", {}).get("pearson")
        text = f"r = {found[name]['pearson']:.2f}" + ("" if wide is None else f", wide alone {wide:.2f}")
        axis.set_title(text, fontsize="medium", loc="left")
        axis.set_xlabel(name.replace("_", " "))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("test accuracy [%]")
    for method, label in LABELS.items():
        axes[0, 0].plot([], [], color=COLOURS[method], marker="o", ls="none", label=label)
    for family in ("wide", "parallel", "factorized", "doped"):
        axes[0, 0].plot([], [], color="0.4", marker=MARKERS[family], ls="none", label=family)
    axes[0, 0].legend(fontsize="x-small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
