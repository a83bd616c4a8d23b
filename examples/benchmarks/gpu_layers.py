"""Linear layers of Llama 8B and 70B with unstructured zeros on a GPU: packed against cuBLAS, layer by layer.

    python examples/benchmarks/gpu_layers.py --quick                          # two shapes at 70%, half a minute
    python examples/benchmarks/gpu_layers.py --output layers.json --plot layers.png

With few tokens a linear layer takes the time it takes to read its weight. A packed weight has fewer bytes, so the question
is how much of that its kernel turns into time. For every shape, sparsity and number of tokens:

    speed-up     time of F.linear (cuBLAS) on the dense weight over time on the packed one
    of bytes     the time to read the packed bytes once, at the bandwidth measured in the same run, over the kernel's time
    of bitmask   the same with the bytes of the best known exact format, a bit an entry and the nonzeros

Decoding reads every weight from memory, because the others passed through the cache since: each case goes round among as many
copies as exceed 300 MB. One CUDA graph holds a round; graphs of all contenders take turns, medians count. Every result is
first compared with float64 (512 rows). 2:4 is the layout of that name (cuSPARSELt through torch), for other zeros (half of
every four), for batches and prompts; a prompt of 2,048 tokens through a packed layer unpacks it and multiplies densely.
The picture shows the better of the two layouts.
"""

import argparse
import functools
import json
import sys
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from _gpu_tiny import show_sizes

from hf_sparse.instruments import device_name, versions
from hf_sparse.runtime.bench import read_bandwidth
from hf_sparse.runtime.gpu import delta, delta_triton, paired, semi_structured
from hf_sparse.runtime.gpu.timing import GraphOfCalls

SHAPES = {  # rows x columns
    "8B k, v": (1024, 4096),
    "8B q, o": (4096, 4096),
    "8B gate, up": (14336, 4096),
    "8B down": (4096, 14336),
    "70B q, o": (8192, 8192),
    "70B gate, up": (28672, 8192),
    "70B down": (8192, 28672),
}
TOKENS = {"delta": (1, 2, 4), "paired": (1, 2, 4, 8, 16), "triton": (1, 4)}
PROMPT = 2048
COLD = 300e6
ROUNDS = 7


def microseconds(graphs: dict[int, GraphOfCalls]) -> dict[int, float]:
    """tokens -> microseconds of a call, the graphs in turns."""
    times = {name: [] for name in graphs}
    for round in range(ROUNDS + 1):
        for name, graph in graphs.items():
            seconds = graph()
            if round:
                times[name].append(1e6 * seconds / len(graph.calls))
    return {name: median(values) for name, values in times.items()}


def graph_of(calls, x) -> GraphOfCalls:
    return GraphOfCalls([functools.partial(call, x) for call in calls])


def copies_of(tensors: dict, nbytes: int) -> list[dict]:
    return [tensors] + [{k: v.clone() for k, v in tensors.items()} for _ in range(min(256, int(COLD / nbytes) + 1))]


def relative_error(y, x, weight) -> float:
    exact = x.double() @ weight[:512].double().t()
    return float((y[:, :512].double() - exact).norm() / exact.norm())


def packed_calls(layout: str, packed: dict, shape):
    """One function of x for each copy of a packed weight."""
    if layout == "triton":
        return [lambda x, p=p: delta_triton.linear(x, p, shape, None) for p in copies_of(packed, delta.nbytes(packed))]
    module = {"delta": delta, "paired": paired}[layout]
    return [module.prepare(p, shape, torch.bfloat16, None) for p in copies_of(packed, module.nbytes(packed))]


def dense_times(shape, inputs: dict) -> dict[int, float]:
    weight = torch.randn(shape, device="cuda").bfloat16()
    weights = [c["w"] for c in copies_of({"w": weight}, weight.nbytes)]
    calls = [lambda x, w=w: F.linear(x, w) for w in weights]
    return microseconds({n: graph_of(calls, x) for n, x in inputs.items()})


def semi_structured_times(shape, inputs: dict) -> dict[int, float]:
    """2:4 for at least 16 tokens; empty where torch has no kernel."""
    if reason := semi_structured.unavailable(torch.device("cuda")):
        print(f"no 2:4: {reason}")
        return {}
    weight = torch.randn(shape, device="cuda").bfloat16()
    weight.view(-1, 4)[:, 2:] = 0
    packed = semi_structured.pack_tiles([weight], shape, torch.bfloat16)
    copies = copies_of(packed, weight.nbytes)
    calls = [semi_structured.prepare(copy, shape, torch.bfloat16, None) for copy in copies]
    return microseconds({n: graph_of(calls, x) for n, x in inputs.items() if n >= 16})


def measure(name: str, shape, sparsities, tokens, bandwidth: float, with_prompt: bool) -> list[dict]:
    rows, columns = shape
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = [*tokens, PROMPT] if with_prompt else list(tokens)
    inputs = {n: torch.randn(n, columns, device="cuda", generator=generator).bfloat16() for n in sizes}
    dense = dense_times(shape, inputs)
    results = [
        dict(
            layer=name, shape=shape, layout="2:4", sparsity=0.5, tokens=n, us=t, dense_us=dense[n], speedup=dense[n] / t
        )
        for n, t in semi_structured_times(shape, inputs).items()
    ]
    for sparsity in sparsities:
        weight = torch.randn(shape, device="cuda", generator=generator).bfloat16()
        weight.masked_fill_(torch.rand(shape, device="cuda", generator=generator) < sparsity, 0)
        bitmask = rows * columns / 8 + 2 * int((weight != 0).sum())
        for layout, supported in TOKENS.items():
            module = paired if layout == "paired" else delta
            packed = module.pack(weight)
            size, calls, graphs, errors = module.nbytes(packed), packed_calls(layout, packed, shape), {}, {}
            counts = [n for n in tokens if n in supported]
            if with_prompt and layout != "triton" and sparsity == sparsities[0]:
                counts.append(PROMPT)
            for n in counts:
                x = inputs[n]
                used = calls[:4] if n == PROMPT else calls
                errors[n] = max(relative_error(call(x), x, weight) for call in (used[0], used[-1]))
                graphs[n] = graph_of(used, x)
            for n, time in microseconds(graphs).items():
                results.append(
                    dict(layer=name, shape=shape, layout=layout, sparsity=sparsity, tokens=n, us=time, dense_us=dense[n],
                         speedup=dense[n] / time, bytes=size, of_dense=size / weight.nbytes, gb_per_s=size / time / 1e3,
                         of_bytes=size / bandwidth / time * 1e6, of_bitmask=bitmask / bandwidth / time * 1e6,
                         error=errors[n])
                )  # fmt: skip
                if not errors[n] < 4e-3:
                    print("WRONG:", results[-1])
            del packed, calls, graphs
    return results


def rounded(result: dict) -> dict:
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in result.items()}


def table(results: list[dict]) -> str:
    """Speed-ups: a line for each layer, sparsity and layout, a column for each number of tokens."""
    counts = sorted({r["tokens"] for r in results})
    lines = [f"{'':13} {'':11} zeros layout  of dense" + "".join(f"{n:>8}" for n in counts) + "   of bytes, of bitmask"]
    rows: dict[tuple, dict] = {}
    for r in results:
        rows.setdefault((r["layer"], tuple(r["shape"]), r["sparsity"], r["layout"]), {})[r["tokens"]] = r
    for (layer, shape, sparsity, layout), by_tokens in rows.items():
        first = by_tokens[min(by_tokens)]
        cells = "".join(f"{by_tokens[n]['speedup']:8.2f}" if n in by_tokens else " " * 8 for n in counts)
        shares = f"   {first['of_bytes']:.0%}, {first['of_bitmask']:.0%}" if "of_bytes" in first else ""
        name = (
            f"{layer:13} {f'{shape[0]}x{shape[1]}':11} {sparsity:5.0%} {layout:7} {first.get('of_dense', 0.5625):8.3f}"
        )
        lines.append(name + cells + shares)
    return "\n".join(lines)


def plot(results: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    layers = list(dict.fromkeys(r["layer"] for r in results))
    across = min(4, len(layers))
    down = -(-len(layers) // across)
    figure = Figure(figsize=(3.4 * across, 3.2 * down), layout="constrained")
    grid = figure.subplots(down, across, sharey=True, squeeze=False).ravel()
    for axes in grid[len(layers) :]:
        axes.set_visible(False)
    for axes, layer in zip(grid, layers, strict=False):
        for sparsity, color in zip((0.5, 0.7, 0.8, 0.9), ("#b0b7c3", "#2f6db5", "#2a9d5c", "#c2571a"), strict=True):
            best: dict[int, float] = {}
            for r in results:
                if r["layer"] == layer and r["sparsity"] == sparsity and r["layout"] in ("delta", "paired"):
                    if r["tokens"] <= 16:
                        best[r["tokens"]] = max(best.get(r["tokens"], 0), r["speedup"])
            if best:
                axes.plot(
                    sorted(best), [best[n] for n in sorted(best)], "o-", color=color, label=f"{sparsity:.0%} zeros"
                )
        axes.axhline(1, color="black", lw=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        axes.set_title(f"{layer}\n" + "x".join(map(str, next(r["shape"] for r in results if r["layer"] == layer))))
        axes.set_xlabel("tokens")
    grid[0].set_ylabel("speed-up over cuBLAS")
    grid[len(layers) - 1].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two shapes at 70%%, without prompts")
    parser.add_argument("--tiny", action="store_true", help="sizes of the layouts only; no GPU, seconds")
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    parser.add_argument("--plot", type=Path, help="where the picture goes")
    arguments = parser.parse_args()
    if arguments.tiny:
        return show_sizes()
    if reason := delta.unavailable(torch.device("cuda")):
        raise SystemExit(f"the GPU kernels cannot run here: {reason}")
    device = torch.device("cuda", torch.cuda.current_device())
    shapes = {k: SHAPES[k] for k in ("8B q, o", "70B gate, up")} if arguments.quick else SHAPES
    sparsities = (0.7,) if arguments.quick else (0.7, 0.5, 0.8, 0.9)
    bandwidth = read_bandwidth(device)
    results = []
    with torch.inference_mode():
        for name, shape in shapes.items():
            results += measure(name, shape, sparsities, (1, 2, 4, 8, 16), bandwidth, not arguments.quick)
            print(f"{name} done", flush=True)
            if arguments.output:
                words = [Path(word).name for word in sys.argv[1:]]
                command = " ".join(["python", "examples/benchmarks/gpu_layers.py", *words])
                about = dict(
                    command=command, device=device_name(device), bandwidth_gb_per_s=bandwidth / 1e9, versions=versions()
                )
                lines = ",\n".join(json.dumps(rounded(result)) for result in results)
                arguments.output.write_text(json.dumps(about)[:-1] + f', "results": [\n{lines}\n]}}\n')
    print(table(results))
    print(f"memory reads at {bandwidth / 1e9:.0f} GB/s")
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
