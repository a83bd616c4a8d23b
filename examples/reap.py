"""REAP (arXiv 2510.13999) on a mixture of experts trained here: which experts can go, by which ranking, and what that costs.

    python examples/reap.py                                          # minutes on a CPU: a small model of prose and Python code
    python examples/reap.py --data DIR --minutes 4 --output reap.json                  # a larger one, on a GPU
    python examples/reap.py --report --output reap.json              # the table and the pictures again
    python examples/reap.py --tiny                                   # seconds: checks the program

A Qwen3-MoE is trained from scratch on text of several domains, long enough that its experts specialise. Then 25, 50 and 75% of
the experts of every layer go: by REAP, by activation norm (mean and sum), by frequency, at random (three seeds); or are merged
as M-SMoE and HC-SMoE do (weights averaged, routers kept; that saves as many distinct experts). Nothing is trained afterwards.
Calibration is text of all domains, or of a single one. Measured on held-out text: perplexity by domain, and of generation the
agreement with the dense model's greedy choices, the dense model's perplexity on what the pruned one writes, and repetition.

DIR has train_<domain>.txt and valid_<domain>.txt. The recorded run has prose (English documentation and a dictionary), code
(Python's library and packages), mathematics (the Stacks project's TeX and GSM8K), biomedicine (PubMedQA's contexts and the
definitions of the Human Phenotype Ontology), 5 to 13 MB each. Without --data: an excerpt of WikiText-2 and Python's library.
"""

import argparse
import copy
import json
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

METHODS = ("reap", "ean_mean", "ean_sum", "gated_sum", "frequency")
MERGES = ("m-smoe", "hc-smoe")
SIZES = {  # hidden, layers, experts, top-k, intermediate, vocabulary, batch, learning rate
    "gpu": dict(hidden=384, layers=8, experts=32, top_k=4, intermediate=192, vocabulary=8192, batch=64, rate=1e-3),
    "cpu": dict(hidden=128, layers=4, experts=8, top_k=2, intermediate=64, vocabulary=2048, batch=2, rate=2e-3),
    "tiny": dict(hidden=64, layers=2, experts=4, top_k=1, intermediate=16, vocabulary=512, batch=2, rate=2e-3),
}
DATA = Path(__file__).resolve().parent / "data"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="folder with train_<domain>.txt and valid_<domain>.txt")
    add("--minutes", type=float, help="of training; default: 4 on a GPU, 3 on a CPU")
    add("--size", choices=SIZES, help="of the model; default: by the device")
    add("--sparsities", nargs="+", type=float, default=[0.25, 0.5, 0.75])
    add("--calibration", type=int, default=128, help="windows of 512 tokens; default: %(default)s")
    add("--balance", type=float, default=0.01, help="coefficient of the load-balancing loss; default: %(default)s")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("reap.json"), help="JSON; pictures lie beside it")
    add("--cpu", action="store_true", help="do not use a GPU")
    add("--tiny", action="store_true", help="a tiny model and few steps: checks the program, measures nothing")
    add("--report", action="store_true", help="only the table and the pictures of an earlier run")
    arguments = parser.parse_args()
    if arguments.report and not arguments.output.is_file():
        parser.error(f"no results in {arguments.output}")
    if arguments.data and not arguments.data.is_dir():
        parser.error(f"no such folder: {arguments.data}")
    if wrong := [s for s in arguments.sparsities if not 0 < s < 1]:
        parser.error(f"a sparsity is a fraction of the experts, between 0 and 1; got {wrong[0]}")
    return arguments


def own_data(folder: Path, tiny: bool) -> None:
    """Two domains that every machine has: the shipped excerpt of WikiText-2, and Python's own library."""
    prose = (DATA / "wikitext2_excerpt.txt").read_text(encoding="utf-8")
    held = (DATA / "wikitext2_test_excerpt.txt").read_text(encoding="utf-8")
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    code = "\n\n".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)
    size = 40_000 if tiny else 2_000_000
    for name, text in (
        ("train_prose", prose[:size]), ("valid_prose", held[:size]),
        ("train_code", code[:size]), ("valid_code", code[size : size + 200_000]),
    ):  # fmt: skip
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")


def main() -> None:
    arguments = parse()
    if arguments.report:
        return report(json.loads(arguments.output.read_text()), arguments.output)
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() and not (arguments.cpu or arguments.tiny) else "cpu")
    size = "tiny" if arguments.tiny else arguments.size or ("gpu" if device.type == "cuda" else "cpu")
    if arguments.data:
        return run(arguments, device, size, arguments.data)
    with tempfile.TemporaryDirectory() as folder:
        own_data(Path(folder), arguments.tiny)
        run(arguments, device, size, Path(folder))


def run(arguments, device, size: str, folder: Path) -> None:
    import torch
    from _reap_model import Examination, build, domains_of, load_tokens, train, windows

    from hf_sparse import prune_experts, score_experts
    from hf_sparse.atomic import atomic_write_text
    from hf_sparse.instruments import device_name, versions
    from hf_sparse.pruning.expert_merging import merge_experts

    begun = time.perf_counter()
    arguments.output.absolute().parent.mkdir(parents=True, exist_ok=True)

    def say(text: str) -> None:
        print(f"{time.perf_counter() - begun:6.0f} s  {text}", file=sys.stderr, flush=True)

    domains = domains_of(folder)
    options = dict(SIZES[size])
    vocabulary, batch, rate = (options.pop(key) for key in ("vocabulary", "batch", "rate"))
    tokenizer, data, held = load_tokens(folder, domains, vocabulary)
    say("tokens: " + ", ".join(f"{name} {len(ids):,}" for name, ids in data.items()))
    dense = build(tokenizer.get_vocab_size(), **options, balance=arguments.balance, device=device, seed=arguments.seed)
    say(f"{sum(p.numel() for p in dense.parameters()) / 1e6:.1f} M parameters")
    minutes = arguments.minutes or (4 if device.type == "cuda" else 3)
    training = train(dense, data, minutes, 6 if arguments.tiny else None, batch, rate, device, say)
    amounts = (2, 1, 8) if arguments.tiny else (64, 16, 64) if device.type == "cuda" else (8, 4, 32)
    exam = Examination(dense, held, *amounts, device)
    results = {
        "command": " ".join(["python", "examples/reap.py", *(Path(word).name for word in sys.argv[1:])]),
        "device": device_name(device),
        "versions": versions(),
        "model": options
        | {
            "vocabulary": vocabulary,
            "balance": arguments.balance,
            "seed": arguments.seed,
            "parameters": sum(p.numel() for p in dense.parameters()),
        },
        "training": training,
        "domains": {name: len(data[name]) for name in domains},
        "dense": exam.of(dense),
        "runs": [],
    }
    generator = torch.Generator().manual_seed(3)
    count = 2 if arguments.tiny else arguments.calibration
    drawn = {name: windows(data[name], count, generator) for name in domains}
    drawn = {"mixed": torch.cat([ids[: max(1, count // len(domains))] for ids in drawn.values()]), **drawn}
    scores = {name: score_experts(dense, ids) for name, ids in drawn.items()}
    by_domain = {name: scores[name] for name in domains}

    def record(method: str, sparsity: float, calibration: str, seed: int, change) -> None:
        model = copy.deepcopy(dense)
        experts = change(model)
        row = {"method": method, "sparsity": sparsity, "calibration": calibration, "seed": seed, "experts": experts}
        row |= exam.of(model) | {"parameters": sum(p.numel() for p in model.parameters())}
        results["runs"].append(row)
        atomic_write_text(arguments.output, json.dumps(results, indent=1) + "\n")
        say(
            f"{method:10} {sparsity:.0%} {calibration:12} perplexity {row['mean_perplexity']:.2f} "
            f"agreement {row['agreement']:.3f}"
        )

    def prune(values, sparsity):
        return lambda model: len(prune_experts(model, values, sparsity).kept[next(iter(scores["mixed"].statistics))])

    def merge(method, sparsity):
        def change(model):
            merged = merge_experts(model, drawn["mixed"], sparsity, method=method, allocation="uniform")
            return next(iter(merged.distinct.values()))

        return change

    for sparsity in arguments.sparsities:
        for method in METHODS:
            record(method, sparsity, "mixed", 0, prune(scores["mixed"].scores(method), sparsity))
        for seed in range(3):
            chance = score_experts(dense, None, "random", seed=seed)
            record("random", sparsity, "none", seed, prune(chance, sparsity))
        for method in MERGES:
            record(method, sparsity, "mixed", 0, merge(method, sparsity))
        for domain in domains:
            for method in ("reap", "frequency"):
                record(method, sparsity, domain, 0, prune(scores[domain].scores(method), sparsity))
    results["specialisation"] = specialisation(by_domain)
    results["one_by_one"] = one_by_one(dense, scores["mixed"], exam, 1 if arguments.tiny else 2, say)
    atomic_write_text(arguments.output, json.dumps(results, indent=1) + "\n")
    try:
        from hf_sparse.pruning.expert_plots import heat_map, retention

        kept = prune_experts(
            copy.deepcopy(dense), scores["mixed"], arguments.sparsities[len(arguments.sparsities) // 2]
        )
        rows = retention(by_domain, kept.kept)
        heat_map(scores["mixed"], arguments.output.with_name(arguments.output.stem + "_experts.png"), kept, rows)
    except ModuleNotFoundError:
        pass  # matplotlib is an extra
    report(results, arguments.output)


def one_by_one(dense, scores, exam, blocks: int, say) -> dict:
    """What each saliency knows: the loss that every single expert of some blocks causes when it alone goes, and the rank
    correlation of each saliency with it. The last block is among them, and one in the middle."""
    import torch
    from _reap_model import nll

    from hf_sparse import prune_experts

    names = list(scores.statistics)
    text = torch.cat([ids[: max(1, len(ids) // 4)] for ids in exam.text.values()])
    whole = float(nll(dense, text)[0].mean())
    everything = {name: list(range(len(one["count"]))) for name, one in scores.statistics.items()}
    result = {}
    for name in (names[len(names) // 2], names[-1])[:blocks]:
        damage = []
        for expert in everything[name]:
            model = copy.deepcopy(dense)
            prune_experts(model, None, keep=everything | {name: [e for e in everything[name] if e != expert]})
            damage.append(float(nll(model, text)[0].mean()) - whole)
        known = {method: scores.scores(method)[name] for method in METHODS}
        result[name] = {
            "damage": damage,
            "count": scores.statistics[name]["count"].tolist(),
            "reap": known["reap"].tolist(),
            "rank_correlation": {
                method: _rank_correlation(values, torch.tensor(damage)) for method, values in known.items()
            },
            "reap_with_frequency": _rank_correlation(known["reap"], known["frequency"]),
        }
        told = ", ".join(f"{method} {value:.2f}" for method, value in result[name]["rank_correlation"].items())
        say(f"{name}: rank correlation with the damage of one expert's absence: {told}")
    return result


def _rank_correlation(a, b) -> float:
    """Spearman's."""
    import torch

    ranks = torch.stack([values.argsort().argsort().double() for values in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def specialisation(by_domain: dict) -> dict:
    """By block: how far the domains' shares of each expert are from alike, as a mean total variation distance to their mean."""
    result = {}
    for block in next(iter(by_domain.values())).statistics:
        counts = [scores.statistics[block]["count"] for scores in by_domain.values()]
        shares = [count / count.sum() for count in counts]
        mean = sum(shares) / len(shares)
        result[block] = float(sum((share - mean).abs().sum() / 2 for share in shares) / len(shares))
    return result


def report(results: dict, output: Path) -> None:
    """The table on standard output, the picture beside the JSON."""
    dense, domains = results["dense"], list(results["domains"])
    head = f"{'method':12}{'zeros':>6}  {'calibration':12}" + "".join(f"{d[:11]:>12}" for d in domains)
    print(head + f"{'mean':>9}{'agrees':>8}{'written':>9}{'repeats':>9}")

    def line(name, sparsity, calibration, row):
        cells = "".join(f"{row['perplexity'][d]:12.2f}" for d in domains)
        print(
            f"{name:12}{sparsity:6.0%}  {calibration:12}{cells}{row['mean_perplexity']:9.2f}{row['agreement']:8.3f}"
            f"{row['written_perplexity']:9.2f}{row['repetition']:9.3f}"
        )

    line("dense", 0.0, "", dense)
    for row in sorted(results["runs"], key=lambda r: (r["sparsity"], r["calibration"] not in ("mixed", "none"))):
        line(row["method"], row["sparsity"], row["calibration"], row)
    try:
        plot(results, output.with_suffix(".png"))
    except ModuleNotFoundError:
        print("no picture: matplotlib is not installed", file=sys.stderr)


def plot(results: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    domains = list(results["domains"])
    colors = dict(
        zip(
            (*METHODS, "random", *MERGES),
            ("#c2571a", "#2f6db5", "#7fb0e0", "#e0a030", "#2a9d5c", "#888888", "#8a4fb0", "#c79be0"),
            strict=True,
        )
    )
    measures = [(f"perplexity: {d}", lambda row, d=d: row["perplexity"][d], True) for d in domains]
    measures += [
        ("greedy choices as the dense model's", lambda row: row["agreement"], False),
        ("dense model's perplexity of what is written", lambda row: row["written_perplexity"], True),
    ]
    across = 3
    figure = Figure(figsize=(4.2 * across, 3.4 * -(-len(measures) // across)), layout="constrained")
    grid = figure.subplots(-(-len(measures) // across), across, squeeze=False).ravel()
    for axes in grid[len(measures) :]:
        axes.set_visible(False)
    for axes, (title, value, logarithmic) in zip(grid, measures, strict=False):
        for method, color in colors.items():
            points: dict[float, list[float]] = {0.0: [value(results["dense"])]}
            for row in results["runs"]:
                if row["method"] == method and row["calibration"] in ("mixed", "none"):
                    points.setdefault(row["sparsity"], []).append(value(row))
            xs = sorted(points)
            style = "--" if method in MERGES else ":" if method == "random" else "-"
            axes.plot(
                xs, [sum(points[x]) / len(points[x]) for x in xs], style, marker="o", ms=4, color=color, label=method
            )
        if logarithmic:
            axes.set_yscale("log")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("experts removed or merged")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    grid[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
