"""Does accuracy rise with sparsity at equal FLOPs? Sparse-IFT (arxiv.org/abs/2303.11525) with a ResNet-18 on CIFAR-10.

    python examples/sparse_ift_cifar10.py --tiny                                       # made-up images, a minute on a CPU
    python examples/sparse_ift_cifar10.py --data FOLDER --calibrate                    # times a step of every variant
    python examples/sparse_ift_cifar10.py --data FOLDER --output cifar10.json          # all runs, one GPU
    python examples/sparse_ift_cifar10.py --data FOLDER --runs wide90-rigl --seeds 0 1 2 --output cifar10.json
    python examples/sparse_ift_cifar10.py --output cifar10.json --report               # table and plots again

FOLDER holds ``cifar10_train.parquet`` and ``cifar10_test.parquet`` (columns ``img`` and ``label``, as on the Hub).

The network is the paper's: 3x3 stem, no max pooling, stages of W, 2 W, 4 W and 8 W channels, here with W = 16 for lack of
time rather than 64. Variants: ``dense``; ``wide`` at 50, 75 and 90% sparsity; ``parallel``, ``factorized`` and ``doped`` at
75%; each with a fixed random mask (static) and with RigL. Wide networks keep the FLOPs of the whole dense network
(``--budget model``: a wider stem and head, and widths cut to whole numbers, are made up for by the sparsity, as in the
released code: 47.4, 75.3 and 90.04% for 50, 75 and 90%), the others those of every layer; the table states every ratio.

Initial seed, order of the images, augmentation and schedule are the same for all and nothing is tuned for any: SGD with
Nesterov momentum 0.9, learning rate 0.1, weight decay 5e-4 on all parameters, batches of 128, crop and flip, as the paper has
it; but ``--epochs`` of warm-up and cosine, not 200 epochs of steps down. The test images choose nothing: the accuracy
reported is that after the last epoch (the best of all epochs is in the JSON beside it).

The headline has three seeds: dense, wide 75% RigL, wide 90% RigL. Results are added to the JSON run by run; the same command
goes on where it stopped. Equal FLOPs are not equal time: a GPU multiplies by the zeros.
"""

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HEADLINE = ("dense", "wide75-rigl", "wide90-rigl")
VARIANTS = {"dense": {"name": "dense", "family": None, "sparsity": 0.0, "method": None}}
for _family, _percent in (
    ("wide", 75),
    ("wide", 90),
    ("wide", 50),
    ("parallel", 75),
    ("factorized", 75),
    ("doped", 75),
):
    for _method in ("rigl", "static"):
        _name = f"{_family}{_percent}-{_method}"
        VARIANTS[_name] = {"name": _name, "family": _family, "sparsity": _percent / 100, "method": _method}
TINY = dict(epochs=1, width=4, batch=16, train_images=128, test_images=64, synthetic=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, metavar="FOLDER", help="where cifar10_train.parquet and cifar10_test.parquet are")
    add("--runs", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="RUN", help=f"of {', '.join(VARIANTS)}")
    add("--seeds", nargs="+", type=int, help="of every run; default: 0, and 0 1 2 for those of the headline")
    add("--width", type=int, default=16, help="channels of the dense network's first stage; default: %(default)s")
    add("--epochs", type=int, default=15, help="default: %(default)s")
    add("--batch", type=int, default=128, help="default: %(default)s")
    add("--rate", type=float, default=0.1, help="the highest learning rate; default: %(default)s")
    add("--every", type=int, default=100, help="steps between RigL's updates; default: %(default)s")
    add("--budget", choices=("model", "layer"), default="model", help="of the wide family; default: %(default)s")
    add("--minutes", type=float, help="begin nothing that is not expected to end within so many minutes")
    add("--no-spectral", action="store_true", help="leave out the spectral analysis of the masks")
    add(
        "--spectral-workers", type=int, default=4, help="threads that analyse beside the training; default: %(default)s"
    )
    add("--calibrate", action="store_true", help="time a few steps of every variant and say what the runs will take")
    add("--output", type=Path, default=Path("sparse_ift_cifar10.json"), help="default: %(default)s")
    add("--report", action="store_true", help="train nothing: the table and the plots of --output")
    add("--cpu", action="store_true", help="do not use an accelerator")
    add("--no-graph", action="store_true", help="on a GPU, start every kernel by itself: slower, the same numbers")
    add("--tiny", action="store_true", help="made-up images, a narrow network, one epoch: measures nothing")
    arguments = parser.parse_args()
    vars(arguments).update(train_images=None, test_images=None, synthetic=False)
    if arguments.tiny:
        vars(arguments).update(TINY)
    if not (arguments.data or arguments.synthetic or arguments.report):
        parser.error("--data FOLDER names the images; --tiny makes some up")
    for part in ("train", "test") if arguments.data and not (arguments.synthetic or arguments.report) else ():
        if not (file := arguments.data / f"cifar10_{part}.parquet").is_file():
            parser.error(f"no such file: {file}")
    return arguments


def main() -> None:
    arguments = parse()
    if arguments.report:
        from _cifar10_report import report

        report(arguments.output)
        return
    recipe = {name: getattr(arguments, name) for name in ("width", "epochs", "batch", "rate", "every", "budget")}
    recipe |= {"decay": 5e-4, "warmup": 0.1, "images": "made up" if arguments.synthetic else "CIFAR-10"}
    kept = load(arguments.output, recipe)
    plan = [run for run in planned(arguments) if key(*run) not in kept["runs"]]

    import torch
    from _cifar10_data import read_cifar10, synthetic
    from _cifar10_report import report

    from hf_sparse.instruments import device_name, versions

    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu")
    torch.backends.cudnn.benchmark = True
    begin = time.monotonic()
    if arguments.synthetic:
        data = synthetic(arguments.train_images, arguments.test_images)
    else:
        data = read_cifar10(arguments.data)
    data = tuple(images.to(device) for images in data)
    print(
        f"{len(data[0].labels):,} + {len(data[1].labels):,} images after {time.monotonic() - begin:.1f} s", flush=True
    )
    kept |= {"recipe": recipe, "device": device_name(device), "versions": versions()}
    kept["command"] = " ".join(
        ["python", "examples/sparse_ift_cifar10.py", *(Path(word).name for word in sys.argv[1:])]
    )
    if arguments.calibrate:
        kept["costs"] = calibrate(arguments, recipe, plan, data, device)
        save(arguments.output, kept)
    print("order:", ", ".join(key(*run) for run in plan) or "nothing is left to run", flush=True)
    if not arguments.calibrate:
        work(arguments, recipe, plan, data, device, kept, begin)
        report(arguments.output)


def planned(arguments) -> list[tuple[str, int]]:
    """(variant, seed), the headline first, so that a cut experiment has the most important runs."""
    runs = []
    for name in arguments.runs:
        seeds = arguments.seeds or ([0, 1, 2] if name in HEADLINE and not arguments.tiny else [0])
        runs += [(name, seed) for seed in seeds]
    order = list(VARIANTS)
    return sorted(runs, key=lambda run: (run[1], run[0] not in HEADLINE, order.index(run[0])))


def key(name: str, seed: int) -> str:
    return f"{name}-{seed}"


def load(path: Path, recipe: dict) -> dict:
    """What the file holds so far; results of different recipes must not land in one table."""
    if not path.is_file():
        return {"runs": {}}
    kept = json.loads(path.read_text())
    before = kept.get("recipe", recipe)
    changed = [f"{name} ({before.get(name)} -> {value})" for name, value in recipe.items() if before.get(name) != value]
    if changed and kept["runs"]:
        sys.exit(f"{path} holds results of another recipe: {', '.join(changed)}; give another --output")
    return kept


def save(path: Path, kept: dict) -> None:
    from hf_sparse.atomic import atomic_write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, json.dumps(kept, indent=1) + "\n")


def calibrate(arguments, recipe: dict, plan: list, data: tuple, device) -> dict:
    """{variant without its method: seconds to begin, of a step, of an epoch's rest}; prints what the plan will take.

    Ends with one epoch of a RigL run, whose updates are not in those times.
    """
    from _cifar10_run import time_steps, train

    costs: dict = {}
    steps = len(data[0].labels) // recipe["batch"] * recipe["epochs"]
    for name, _ in plan:
        kind = name.partition("-")[0]
        if kind not in costs:
            costs[kind] = cost = time_steps(
                VARIANTS[name], recipe, data, device, 4 if arguments.tiny else 45, not arguments.no_graph
            )
            text = ", ".join(f"{what} {1000 * cost[what]:.2f} ms" for what in ("begin", "step", "epoch"))
            print(
                f"{kind}: {text}; a run {expected(cost, steps, recipe):.0f} s; "
                f"gradients of the graph differ by {cost['gradient_error']:.1e}",
                flush=True,
            )
    total = sum(expected(costs[name.partition("-")[0]], steps, recipe) for name, _ in plan)
    print(f"all {len(plan)} runs: about {total:.0f} s for {recipe['epochs']} epochs", flush=True)
    one = train(VARIANTS["wide75-rigl"], 0, recipe | {"epochs": 1}, data, device, graph=not arguments.no_graph)
    print(
        f"one epoch of wide75-rigl: {one['accuracy']:.2%}, density {one['density']:.4f}, {one['mask']}, "
        f"{one['seconds']:.1f} s, of which {one['seconds_before_the_first_step']:.1f} s before the first step",
        flush=True,
    )
    return costs


def expected(cost: dict, steps: int, recipe: dict) -> float:
    return cost["begin"] + cost["step"] * steps + cost["epoch"] * recipe["epochs"]


def work(arguments, recipe: dict, plan: list, data: tuple, device, kept: dict, begin: float) -> None:
    """Every run of the plan; its result is in the file as soon as it ends, its spectrum as soon as that is known."""
    from _cifar10_run import train

    from hf_sparse.instruments import progress_bar

    steps = len(data[0].labels) // recipe["batch"] * recipe["epochs"]
    took = {kind: expected(cost, steps, recipe) for kind, cost in kept.get("costs", {}).items()}
    waiting: list = []

    def collect(wait: bool) -> None:
        for entry in list(waiting):
            run, when, future = entry
            if (wait or future.done()) and run in kept["runs"]:
                waiting.remove(entry)
                kept["runs"][run].setdefault("spectral", {})[when] = future.result()

    with (
        ThreadPoolExecutor(max(1, arguments.spectral_workers)) as pool,
        progress_bar(sys.stderr.isatty(), "training", len(plan) * recipe["epochs"]) as advance,
    ):
        for position, (name, seed) in enumerate(plan):
            spent = time.monotonic() - begin
            if arguments.minutes is not None and spent + took.get(name.partition("-")[0], 0.0) > 60 * arguments.minutes:
                print(
                    f"{key(name, seed)} would end after {arguments.minutes:g} minutes; the same command goes on there"
                )
                continue
            snapshots = {}

            def snapshot(when: str, model, snapshots=snapshots) -> None:
                if not arguments.no_spectral:
                    snapshots[when] = pool.submit(spectral_metrics, model)

            try:
                result = train(
                    VARIANTS[name], seed, recipe, data, device, snapshot, advance, graph=not arguments.no_graph
                )
            except FloatingPointError as error:
                print(f"{error}; the run is left out", flush=True)
                continue
            took[name.partition("-")[0]] = result["seconds"] + 2
            kept["runs"][key(name, seed)] = (
                VARIANTS[name] | {"seed": seed, "nominal_sparsity": VARIANTS[name]["sparsity"]} | result
            )
            waiting += [(key(name, seed), when, future) for when, future in snapshots.items()]
            collect(wait=False)
            save(arguments.output, kept)
            print(
                f"[{position + 1}/{len(plan)}] {key(name, seed)}: {result['accuracy']:.2%} "
                f"(best {result['best_accuracy']:.2%}), "
                f"FLOPs x{result['iso_flop_ratio']:.4f}, density {result['density']:.4f}, {result['seconds']:.1f} s",
                flush=True,
            )
        collect(wait=True)
        save(arguments.output, kept)


def spectral_metrics(model) -> dict:
    """The spectral quantities of the sparse weights of a model, as means over them."""
    import re

    from hf_sparse.masks import Masks
    from hf_sparse.models.spectral import spectrum

    sparse = [f"re:^{re.escape(name)}$" for name in Masks.attached(model)]
    return dict(spectrum(model, targets=sparse).metrics())


if __name__ == "__main__":
    main()
