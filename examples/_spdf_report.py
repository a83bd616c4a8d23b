"""The SPDF experiment as one JSON, a table and a plot: loss along training FLOPs, BLEU, does the paper's order hold.

What is compared with the paper (arXiv 2303.10464, its E2E table and its ablation of dense against sparse fine-tuning)
is the direction: dense >= 50% >= 75%, and at 75% dense >= sparse fine-tuning. The levels are those of another budget.
"""

import json
import statistics
from pathlib import Path

from _e2e import bleu, grouped

__all__ = ["PAPER", "assemble", "directions", "plot", "report"]

PAPER = {  # GPT-2 Small, E2E BLEU, mean and standard deviation; pre-training in FLOPs per sequence of 2,048, V = 50,257
    "bleu": {"dense": (67.49, 0.60), "static50": (67.39, 0.38), "static75": (66.50, 0.85)},
    "flops": {"dense": 1.99e12, "static50": 1.47e12, "static75": 1.20e12},
    "ablation": "WebNLG BLEU below dense at 75%: 1.48 with sparse fine-tuning, 0.78 with dense fine-tuning",
}
COLOURS = {"dense": "#000000", "static50": "#0072B2", "static75": "#D55E00", "rigl75": "#009E73"}  # Okabe and Ito
MARKERS = {"dense": "o", "static50": "s", "static75": "^", "rigl75": "D"}
LABELS = {"dense": "dense", "static50": "50% static", "static75": "75% static", "rigl75": "75% RigL"}


def assemble(folder: Path, test: list[tuple[str, str]]) -> dict:
    """Everything the finished stages left in ``folder``, scored against the references of ``test`` rows.

    Raises:
        FileNotFoundError: no stage has finished there.
        ValueError: generated words are for other meanings than those of ``test``.
    """
    groups = grouped(test)
    result: dict = {"paper": PAPER, "protocol": {}, "pretrain": {}, "finetune": {}}
    if (folder / "protocol.json").is_file():
        result["protocol"] = json.loads((folder / "protocol.json").read_text())
    for variant in LABELS:
        if (path := folder / variant / "pretrain.json").is_file():
            result["pretrain"][variant] = json.loads(path.read_text())
        for path in sorted((folder / variant).glob("finetune-*-*.jsonl")):
            _, kind, seed = path.stem.split("-")
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            if [row["mr"] for row in rows] != [meaning for meaning, _ in groups]:
                raise ValueError(
                    f"{path} is not about the meanings of this test set; --e2e must be the one it was made with"
                )
            facts = json.loads(path.with_suffix(".json").read_text()) | {"bleu": _bleu(rows, groups)}
            result["finetune"].setdefault(variant, {}).setdefault(kind, {})[seed] = facts
    if not (result["pretrain"] or result["finetune"]):
        raise FileNotFoundError(f"nothing to report in {folder}: no stage has finished")
    result["directions"] = directions(result)
    return result


def _bleu(rows: list[dict], groups: list[tuple[str, list[str]]]) -> float | None:
    try:
        return bleu([row["output"] for row in rows], [references for _, references in groups])
    except ModuleNotFoundError:
        return None  # the words are kept; scoring can be done elsewhere


def scores(result: dict, variant: str, kind: str) -> list[float]:
    """BLEU by seed."""
    runs = result["finetune"].get(variant, {}).get(kind, {})
    return [facts["bleu"] for facts in runs.values() if facts["bleu"] is not None]


def directions(result: dict) -> dict[str, bool]:
    """Which of the paper's orders hold here, among what has been run; means over seeds."""
    losses = {variant: facts["loss"] for variant, facts in result["pretrain"].items()}
    means = {
        (variant, kind): statistics.mean(found)
        for variant in LABELS
        for kind in ("dense", "sparse")
        if (found := scores(result, variant, kind))
    }
    checks = {}
    for better, worse in (("dense", "static50"), ("static50", "static75"), ("rigl75", "static75")):
        if better in losses and worse in losses:
            checks[f"pre-training loss: {better} <= {worse}"] = losses[better] <= losses[worse]
        if (better, "dense") in means and (worse, "dense") in means:
            checks[f"BLEU after dense fine-tuning: {better} >= {worse}"] = (
                means[better, "dense"] >= means[worse, "dense"]
            )
    for variant in LABELS:
        if (variant, "dense") in means and (variant, "sparse") in means:
            holds = means[variant, "dense"] >= means[variant, "sparse"]
            checks[f"BLEU of {variant}: dense fine-tuning >= sparse fine-tuning"] = holds
    return checks


def report(folder: Path, test: list[tuple[str, str]], decoding: dict) -> None:
    """Writes ``spdf.json`` and ``spdf.png`` into ``folder`` and prints the table."""
    from hf_sparse.atomic import atomic_write_text

    result = assemble(folder, test) | {"decoding": decoding, "meanings": len(grouped(test))}
    atomic_write_text(folder / "spdf.json", json.dumps(result, indent=1) + "\n")
    table(result)
    if any(
        facts["bleu"] is None
        for kinds in result["finetune"].values()
        for runs in kinds.values()
        for facts in runs.values()
    ):
        print("BLEU was not scored: pip install sacrebleu, then --stage score")
    try:
        plot(result, folder / "spdf.png")
    except ModuleNotFoundError:
        print("no plot: matplotlib is not installed")


def table(result: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table()
    for column in ("variant", "loss", "FLOPs", "of dense", "fine-tuning", "BLEU", "paper"):
        shown.add_column(column, justify="left" if column in ("variant", "fine-tuning") else "right")
    for variant, facts in result["pretrain"].items():
        cost = (f"{facts['loss']:.4f}", f"{facts['flops']:.3g}", f"{facts['flops'] / facts['flops_dense']:.1%}")
        for kind in result["finetune"].get(variant, {"–": {}}):
            paper = PAPER["bleu"].get(variant) if kind == "dense" else None
            shown.add_row(
                *(LABELS[variant], *cost, kind, _spread(scores(result, variant, kind))),
                f"{paper[0]:.2f} ± {paper[1]:.2f}" if paper else "–",
            )
    console = Console()
    console.print(shown)
    for check, holds in result["directions"].items():
        console.print(f"{'yes' if holds else 'NO '}  {check}", highlight=False)


def _spread(found: list[float]) -> str:
    if len(found) < 2:
        return f"{found[0]:.2f}" if found else "–"
    return f"{statistics.mean(found):.2f} ± {statistics.stdev(found):.2f}"


def plot(result: dict, path: Path) -> None:
    """Left: held-out loss along training FLOPs. Right: BLEU, a mark for every seed, beside the paper's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    for variant, facts in result["pretrain"].items():
        points = [(point["flops"], point["loss"]) for point in facts["curve"]]
        left.plot(
            *zip(*points, strict=True), color=COLOURS[variant], marker=MARKERS[variant], ms=4, label=LABELS[variant]
        )
    left.set_yscale("log")
    left.set_xlabel("training FLOPs (of a machine that skips zeros)")
    left.set_ylabel("held-out loss (log scale)")
    left.set_title("Pre-training", loc="left")
    left.yaxis.set_major_formatter("{x:.1f}")
    left.yaxis.set_minor_formatter("{x:.1f}")
    if result["pretrain"]:
        left.legend()
    names = [variant for variant in LABELS if variant in result["finetune"]]
    for place, variant in enumerate(names):
        for kind, shift in (("dense", -0.12), ("sparse", 0.12)):
            found = scores(result, variant, kind)
            face = COLOURS[variant] if kind == "dense" else "white"
            style = dict(marker=MARKERS[variant], color=COLOURS[variant], mfc=face, ls="none", ms=8)
            right.plot([place + shift] * len(found), found, **style)
        if variant in PAPER["bleu"]:
            right.errorbar(place - 0.3, *PAPER["bleu"][variant], color="0.6", marker="_", ms=12, capsize=3)
    for label, style in (
        ("dense fine-tuning", dict(marker="o", color="0.2", ls="none")),
        ("sparse fine-tuning", dict(marker="o", color="0.2", mfc="white", ls="none")),
        ("paper, 2.5 billion tokens", dict(marker="_", color="0.6", ls="none", ms=12)),
    ):
        right.plot([], [], label=label, **style)
    right.set_xticks(range(len(names)), [LABELS[name] for name in names])
    right.margins(x=0.15, y=0.25)
    right.set_ylabel("BLEU on the E2E test set")
    right.set_title("After fine-tuning", loc="left")
    right.legend(fontsize="small")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
