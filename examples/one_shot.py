"""Which one-shot method keeps most of a model? Perplexity after pruning, method by method, beside the official codes.

    python examples/one_shot.py --model MODEL --calibration valid.txt --text test.txt --output results.json
    python examples/one_shot.py --runs sparsegpt@0.5 alps+owl@0.7 wanda+repair@2:4 --model MODEL ...
    python examples/one_shot.py --tiny --model DIR

A run is written METHOD[+repair][+owl][+erk][+permute]@SPARSITY or @n:m. Results are added to the JSON one by one, so an
interrupted table continues where it stopped. `--official FILE` names a JSON with the numbers of the methods' own published
code under the same protocol (examples/results/one_shot_official.json holds those of SmolLM2-135M-Instruct); the table then
shows the ratio. The plot shows perplexity against sparsity.
"""

import argparse
import json
import sys
import time
from pathlib import Path

METHODS = ("wanda", "wanda+repair", "sparsegpt", "alps")
RUNS = [
    "magnitude@0.5",
    *(f"{method}@{amount}" for amount in ("0.5", "0.6", "0.7", "2:4") for method in METHODS),
    "alps+owl@0.7",
    "wanda+permute@2:4",
]


def parse_run(text: str):
    """The SparsityConfig of one run's short name."""
    from hf_sparse import SparsityConfig

    method, separator, amount = text.partition("@")
    if not separator:
        raise ValueError(f"a run is written METHOD@SPARSITY, got {text!r}")
    saliency, *options = method.split("+")
    unknown = set(options) - {"repair", "owl", "erk", "permute"}
    if unknown:
        raise ValueError(f"unknown option {unknown.pop()!r} in {text!r}; known are repair, owl, erk, permute")
    fields = {"pattern": amount} if ":" in amount else {"sparsity": float(amount)}
    allocation = next((o for o in options if o in ("owl", "erk")), "uniform")
    flags = {"repair": "repair" in options, "permute": "permute" in options}
    return SparsityConfig(saliency=saliency, allocation=allocation, **flags, **fields)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub id, directory or .gguf file")
    data = Path(__file__).resolve().parent / "data"
    parser.add_argument("--calibration", default=str(data / "wikitext2_excerpt.txt"), help="text; default: an excerpt")
    parser.add_argument(
        "--text", default=str(data / "wikitext2_test_excerpt.txt"), help="test text; default: an excerpt"
    )
    parser.add_argument("--runs", nargs="+", default=RUNS, metavar="RUN", help="default: the whole table")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--device", help="cpu or cuda; default: cpu")
    parser.add_argument("--official", help="JSON with the official codes' numbers")
    parser.add_argument("--output", default="one_shot.json")
    parser.add_argument("--tiny", action="store_true", help="two runs, a few tokens: seconds")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.runs = ["wanda+repair@2:4", "sparsegpt@0.5"]
        arguments.samples, arguments.sequence_length, arguments.window, arguments.windows = 2, 32, 32, 2

    configs = {run: parse_run(run) for run in arguments.runs}  # bad names are said before any work

    import transformers
    from rich.console import Console

    from hf_sparse import load_model, load_segments, load_tokenizer, perplexity, prune
    from hf_sparse.atomic import atomic_write_text
    from hf_sparse.data import load_tokens
    from hf_sparse.instruments import versions

    transformers.logging.set_verbosity_error()
    console = Console()
    tokenizer = load_tokenizer(arguments.model)
    calibration = load_segments(arguments.calibration, tokenizer, arguments.samples, arguments.sequence_length)
    test = load_tokens(arguments.text, tokenizer)
    output = Path(arguments.output)
    protocol = {
        "model": Path(arguments.model).name,
        "calibration": calibration.description,
        "text": Path(arguments.text).name,
        "window": arguments.window,
        "windows": arguments.windows,
    }
    content = json.loads(output.read_text()) if output.is_file() else {"protocol": protocol, "results": {}}
    if content["protocol"] != protocol:
        sys.exit(f"{output} holds results of another protocol; give another --output")
    content |= {"versions": versions(), "command": " ".join(["python", *sys.argv])}

    def keep(run: str, facts: dict) -> None:
        content["results"][run] = facts
        atomic_write_text(output, json.dumps(content, indent=1) + "\n")
        console.print(f"{run}: perplexity {facts['perplexity']:.4f}")

    def evaluate(model) -> float:
        model.to(arguments.device or "cpu")
        return perplexity(model, test, arguments.window, arguments.windows)["perplexity"]

    if "dense" not in content["results"]:
        keep("dense", {"perplexity": evaluate(load_model(arguments.model, dtype="float32"))})
    for run, config in configs.items():
        if run in content["results"]:
            continue
        model = load_model(arguments.model, dtype="float32")
        started = time.perf_counter()
        report = prune(model, config, calibration.ids, device=arguments.device, progress=sys.stderr.isatty())
        seconds = time.perf_counter() - started
        facts = {
            "perplexity": evaluate(model),
            "sparsity": report.sparsity,
            "conforms": report.conforms,
            "mean_error": _mean([p.error for p in report.parameters if p.error is not None]),
            "mean_layer_error": _mean(list(report.layer_errors.values())),
            "seconds": seconds,
            "device": report.device,
        }
        keep(run, facts)
    official = json.loads(Path(arguments.official).read_text())["results"] if arguments.official else {}
    console.print(table(content["results"], official))
    try:
        plot(content["results"], official, output.with_suffix(".png"), protocol["model"])
    except ModuleNotFoundError:
        console.print("no plot: matplotlib is not installed")


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def table(results: dict, official: dict):
    from rich.table import Table

    shown = Table()
    for column in ("run", "perplexity", "official code", "ratio", "mean error", "seconds"):
        shown.add_column(column, justify="left" if column == "run" else "right")
    for run, facts in results.items():
        theirs = official.get(run, {}).get("perplexity")
        shown.add_row(
            run,
            f"{facts['perplexity']:.3f}",
            f"{theirs:.3f}" if theirs else "–",
            f"{facts['perplexity'] / theirs:.4f}" if theirs else "–",
            f"{facts['mean_error']:.4f}" if facts.get("mean_error") is not None else "–",
            f"{facts['seconds']:.0f}" if "seconds" in facts else "–",
        )
    return shown


def plot(results: dict, official: dict, path: Path, model: str) -> None:
    """Perplexity against unstructured sparsity, a colour per method; crosses are the official codes' numbers."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    def by_method(source: dict) -> dict[str, list[tuple[float, float]]]:
        lines: dict[str, list[tuple[float, float]]] = {}
        for run, facts in source.items():
            method, _, amount = run.partition("@")
            if amount and ":" not in amount:
                lines.setdefault(method, []).append((float(amount), facts["perplexity"]))
        return {method: sorted(points) for method, points in lines.items()}

    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    ours, theirs = by_method(results), by_method(official)
    ours = dict(sorted(ours.items(), key=lambda item: -item[1][-1][1]))  # the legend in the order of the curves
    for number, (method, points) in enumerate(ours.items()):
        colour = colormaps["tab20"](number % 20)
        axis.plot(*zip(*points, strict=True), "o-", color=colour, label=method)
        if method in theirs:
            axis.plot(*zip(*theirs[method], strict=True), "x", color=colour, markersize=10, label=f"{method}, official")
    if "dense" in results:
        axis.axhline(results["dense"]["perplexity"], color="black", linestyle=":", label="dense")
    axis.set_yscale("log")
    axis.set_xlabel("sparsity")
    axis.set_ylabel("perplexity (log scale)")
    axis.set_title(f"{model}, one-shot pruning")
    axis.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
