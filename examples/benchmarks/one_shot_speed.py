"""How long does one-shot pruning of a 7-billion-parameter Llama take, where does the time go, and against what?

SparseGPT (arxiv.org/abs/2301.00774) prunes a model in one pass over 128 sequences of 2,048 tokens. The arithmetic for
Llama-7B: two forward passes 7 PFLOP, the Hessians X^T X of four distinct inputs a layer 2.9 PFLOP, their factors some 40
TFLOP, the trailing updates 37 TFLOP. An H200 does that in about half a minute if nothing waits; a column loop written with
tensor operations adds eleven million kernel launches on top. This benchmark measures both:

    python examples/benchmarks/one_shot_speed.py --tiny                                        # seconds, on any CPU
    python examples/benchmarks/one_shot_speed.py --micro --output micro.json                   # the pieces, on a GPU
    python examples/benchmarks/one_shot_speed.py --output run.json                             # SparseGPT 50%, 32 layers
    python examples/benchmarks/one_shot_speed.py --against llmcompressor --against-layers 4    # beside llm-compressor
    python examples/benchmarks/one_shot_speed.py --saliency alps --layers 4                    # ALPS (2406.07831)

The weights are random (speed does not depend on them) and so are the tokens, unless ``--tokenizer`` and ``--text`` name a
tokenizer directory and a text file. Each contender runs in a process of its own on the same weights and tokens, so that
neither pays for the other's memory or imports; "output error" is the relative change of the last hidden states on a
sequence that was not calibrated on, a check that both did the same job rather than a quality claim. Times of fewer layers
are scaled by the number of layers and marked so.

llm-compressor 0.14.0.1 wants transformers from 5.15 to 5.17, hf_sparse 5.20 and later: ``--against-path`` names a folder of
packages (``pip install --target``) put in front of the path for its process alone. On a machine with Python 3.12, torch,
transformers 5.17, accelerate, pandas, pyarrow, requests, pillow, psutil, py-cpuinfo, nvidia-ml-py and without network, these
wheels complete it, installed with ``--no-deps``: llmcompressor==0.14.0.1 compressed-tensors==0.19.0 auto-round==0.15.1
loguru==0.7.3 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 pydantic==2.14.3 pydantic-core==2.50.4
annotated-types==0.8.0 typing-inspection==0.4.5.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

LLAMA_7B = dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, vocab_size=32000)
TINY = dict(hidden_size=128, intermediate_size=256, num_attention_heads=4, vocab_size=512)
FULL_DEPTH = 32


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tiny", action="store_true", help="a model of two narrow layers and eight short sequences")
    add("--micro", action="store_true", help="time the pieces instead of a run: kernels, selection, Hessian, Cholesky")
    add(
        "--layers",
        type=int,
        default=None,
        help=f"decoder layers (default {FULL_DEPTH}); times are scaled to {FULL_DEPTH}",
    )
    add("--sequences", type=int, default=None, help="calibration sequences (default 128)")
    add("--length", type=int, default=None, help="tokens per sequence (default 2048)")
    add("--sparsity", type=float, default=0.5)
    add("--pattern", default=None, help="such as 2:4; default unstructured")
    add("--saliency", default="sparsegpt", help="sparsegpt, alps, wanda, magnitude ... (hf_sparse)")
    add("--home", choices=["device", "cpu"], default="device", help="where the model lives; layers visit the device")
    add("--against", choices=["llmcompressor"], default=None)
    add("--against-layers", type=int, default=None, help="fewer layers for the contender (default: the same)")
    add("--against-path", default=None, help="folder of packages for the contender's process")
    add(
        "--against-defaults", action="store_true", help="its default batch of 1 and offload to the CPU, not the fastest"
    )
    add("--tokenizer", default=None, help="tokenizer directory, with --text")
    add("--text", default=None, help="a text file to calibrate on")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=None, help="write everything as JSON (command, hardware, versions, numbers)")
    add("--only", choices=["hf_sparse", "llmcompressor"], default=None, help=argparse.SUPPRESS)  # one child process
    arguments = parser.parse_args()
    arguments.layers = arguments.layers or (2 if arguments.tiny else FULL_DEPTH)
    arguments.sequences = arguments.sequences or (8 if arguments.tiny else 128)
    arguments.length = arguments.length or (64 if arguments.tiny else 2048)
    if bool(arguments.tokenizer) != bool(arguments.text):
        parser.error("--tokenizer and --text go together")
    return arguments


def environment(device: str) -> dict:
    """Hardware and versions, as every number needs them."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "triton", "transformers", "llmcompressor", "compressed-tensors"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    hardware = {"device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor()}
    hardware |= {"cpu_cores": os.cpu_count(), "threads": torch.get_num_threads(), "cuda": torch.version.cuda}
    return {"hardware": hardware, "versions": versions}


# ------------------------------------------------------------------------------------------------------------- whole runs


def build_model(arguments):
    """A random Llama in bfloat16, made on the device, where filling seven billion weights takes a second."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = TINY if arguments.tiny else LLAMA_7B
    positions = max(2048, arguments.length)
    config = AutoConfig.for_model(
        "llama", **shape, num_hidden_layers=arguments.layers, max_position_embeddings=positions
    )
    torch.manual_seed(arguments.seed)
    with torch.device(arguments.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    return model.to("cpu") if arguments.home == "cpu" else model


def warm_up(arguments) -> float:
    """Seconds it takes to start the GPU's libraries and, for hf_sparse, to compile its kernels on a tiny model."""
    started = time.perf_counter()
    if arguments.device.startswith("cuda"):
        torch.linalg.cholesky(torch.eye(256, device=arguments.device))
    if arguments.only == "hf_sparse":
        tiny = argparse.Namespace(**{**vars(arguments), "tiny": True, "layers": 1, "sequences": 4, "length": 64})
        tiny.text = None
        model = build_model(tiny)
        run_hf_sparse(model, token_ids(tiny, model.config.vocab_size)[:-1], tiny)
    return time.perf_counter() - started


def token_ids(arguments, vocabulary: int) -> torch.Tensor:
    """``[sequences + 1, length]``: the last one is held out."""
    count = arguments.sequences + 1
    if arguments.text:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
        ids = tokenizer(Path(arguments.text).read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
        wanted = count * arguments.length
        if len(ids) < wanted or max(ids) >= vocabulary:
            raise SystemExit(
                f"{arguments.text} has {len(ids)} tokens below {max(ids) + 1}; {wanted} below {vocabulary} needed"
            )
        return torch.tensor(ids[:wanted]).view(count, arguments.length)
    generator = torch.Generator().manual_seed(arguments.seed)
    return torch.randint(vocabulary, (count, arguments.length), generator=generator)


@torch.no_grad()
def last_hidden(model, ids: torch.Tensor, device: str) -> torch.Tensor:
    home = next(model.parameters()).device
    hidden = model.to(device).model(ids[None].to(device)).last_hidden_state.float().cpu()
    model.to(home)
    return hidden


def run_hf_sparse(model, ids, arguments) -> dict:
    from hf_sparse import SparsityConfig, prune

    pattern = {} if arguments.pattern is None else {"pattern": arguments.pattern}
    sparsity = {} if arguments.pattern and ":" in arguments.pattern else {"sparsity": arguments.sparsity}
    config = SparsityConfig(saliency=arguments.saliency, **sparsity, **pattern)
    report = prune(model, config, list(ids.split(1)), device=arguments.device)
    return {
        "seconds": report.seconds,
        "timings": dict(report.timings),
        "peak_memory_bytes": report.peak_memory_bytes,
        "report": report.to_dict(),
    }


def run_llmcompressor(model, ids, arguments) -> dict:
    """``oneshot`` of llm-compressor 0.14.0.1. A module matched by ``targets=["Linear"]`` is seen there under its name with a
    dot behind it, so ``ignore`` is a pattern. It looks at a configuration and a tokenizer on disk and uses neither."""
    from compressed_tensors.offload import remove_dispatch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
    from loguru import logger
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"t{i}": i for i in range(model.config.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0")))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    batch = 1 if arguments.against_defaults else max(1, 8192 // arguments.length)
    options = {} if arguments.against_defaults else {"sequential_offload_device": arguments.device}
    n_m = arguments.pattern if arguments.pattern and ":" in arguments.pattern else "0:0"
    recipe = SparseGPTModifier(
        sparsity=arguments.sparsity,
        mask_structure=n_m,
        block_size=128,
        dampening_frac=0.01,
        targets=["Linear"],
        ignore=["re:.*lm_head"],
    )
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model.config._name_or_path = model.name_or_path = folder
        solves = []  # it logs "time 0.12s" for every solve
        logger.add(
            lambda line: solves.append(line.record["message"]), filter=lambda r: r["message"].startswith("time ")
        )
        started = time.perf_counter()
        oneshot(
            model=model,
            tokenizer=tokenizer,
            dataset=torch.utils.data.DataLoader(rows, batch_size=batch),
            recipe=recipe,
            num_calibration_samples=len(ids),
            max_seq_length=arguments.length,
            **options,
        )
        if arguments.device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    remove_dispatch(model)  # an ordinary model again
    peak = torch.cuda.max_memory_allocated() if arguments.device.startswith("cuda") else 0
    solve = sum(float(line.removeprefix("time ").rstrip("s")) for line in solves)
    timings = {"solve": solve, "all the rest": seconds - solve}
    return {"seconds": seconds, "timings": timings, "peak_memory_bytes": peak, "batch_size": batch, "options": options}


def run_only(arguments) -> dict:
    """The child: one contender on a fresh model."""
    warm_up_seconds = warm_up(arguments)
    model = build_model(arguments)
    ids = token_ids(arguments, model.config.vocab_size)
    calibration, held_out = ids[:-1], ids[-1]
    dense = last_hidden(model, held_out, arguments.device)
    if arguments.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    contender = {"hf_sparse": run_hf_sparse, "llmcompressor": run_llmcompressor}[arguments.only]
    result = contender(model, calibration, arguments)
    linears = [p for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name]
    zeros = sum(int((p == 0).sum()) for p in linears)
    pruned = last_hidden(model, held_out, arguments.device)
    result |= {
        "contender": arguments.only,
        "layers": arguments.layers,
        "warm_up_seconds": warm_up_seconds,
        "sparsity": zeros / sum(p.numel() for p in linears),
        "output_error": float((pruned - dense).norm() / dense.norm()),
        **environment(arguments.device),
    }
    return result


def run_child(contender: str, layers: int, path: str | None) -> dict:
    """This script again with ``--only``, so that memory, imports and package versions are the contender's own."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        paths = [path, str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")]
        child = ["--only", contender, "--layers", str(layers), "--output", str(output)]
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], *child],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)},
            stdout=sys.stderr,
        )
        if done.returncode:
            return {"contender": contender, "layers": layers, "failed": f"exit status {done.returncode}"}
        return json.loads(output.read_text())


def print_runs(runs: list[dict], depth: int) -> None:
    for run in runs:
        print(f"\n{run['contender']}, {run['layers']} layers")
        if "failed" in run:
            print(f"  failed: {run['failed']}")
            continue
        per_layer = run["seconds"] / run["layers"]
        scaled = f"   scaled to {depth} layers: {per_layer * depth:.1f} s (linear, not measured)"
        print(f"  {run['seconds']:.2f} s, {per_layer:.2f} s a layer{scaled if run['layers'] != depth else ''}")
        print(f"  {run['warm_up_seconds']:.2f} s before that to start libraries and compile kernels")
        print(f"  peak memory {run['peak_memory_bytes'] / 1e9:.2f} GB")
        print(f"  sparsity {run['sparsity']:.5f}, output error {run['output_error']:.4f}")
        for phase, seconds in sorted(run["timings"].items(), key=lambda item: -item[1]):
            print(f"    {phase:<12} {seconds:8.2f} s {seconds / run['seconds']:6.1%}")
    if len(runs) == 2 and not any("failed" in run for run in runs):
        ours, theirs = (run["seconds"] / run["layers"] for run in runs)
        print(f"\nper layer, {runs[0]['contender']} is {theirs / ours:.2f} times as fast as {runs[1]['contender']}")


# ----------------------------------------------------------------------------------------------------------------- pieces


class Bench:
    """Times functions, prints a line each and keeps the rows."""

    def __init__(self, device: str, seconds: float):
        self.cuda, self.seconds, self.rows = device.startswith("cuda"), seconds, []

    def _wait(self):
        if self.cuda:
            torch.cuda.synchronize()

    def __call__(self, piece: str, shape: str, function, work: float = 0.0, error=None, once: bool = False) -> None:
        """Median milliseconds (with device events on a GPU), and how long the host takes to queue one call.

        Args:
            work: floating-point operations, for TFLOP/s.
            error: called with the result, after the timing; what it returns is printed.
        """
        row = {"piece": piece, "shape": shape}
        try:
            result = function()  # compiles
            self._wait()
            begin = time.perf_counter()
            function()
            row["queue_ms"] = 1e3 * (time.perf_counter() - begin)
            self._wait()
            one = max(time.perf_counter() - begin, 1e-6)
            times = []
            for _ in range(1 if once else max(3, min(100, int(self.seconds / one)))):
                if self.cuda:
                    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    start.record()
                    function()
                    stop.record()
                    stop.synchronize()
                    times.append(start.elapsed_time(stop))
                else:
                    begin = time.perf_counter()
                    function()
                    times.append(1e3 * (time.perf_counter() - begin))
            row["ms"] = sorted(times)[len(times) // 2]
            row["tflops"] = work / row["ms"] / 1e9 if work else None
            row["error"] = error(result) if error else None
        except Exception as problem:  # one variant that a version lacks must not cost the others
            row["failed"] = f"{type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}"
        self.rows.append(row)
        queue = f"queue {row.get('queue_ms', 0):8.3f} ms"
        rate = f"{row['tflops']:8.1f} TFLOP/s" if row.get("tflops") else " " * 16
        tail = row.get("failed") or ("" if row["error"] is None else f"error {row['error']:.1e}")
        print(f"{piece:<36}{shape:<18}{row.get('ms', float('nan')):10.3f} ms  {queue}{rate}  {tail}", flush=True)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def covariance(width: int, device: str, seed: int) -> torch.Tensor:
    """``[width, width]``: the Hessian of correlated inputs with the customary ridge of 1 %."""
    generator = torch.Generator(device).manual_seed(seed)
    inputs = torch.randn(2 * width, width, device=device, generator=generator)
    inputs *= torch.logspace(0, -2, width, device=device)
    inputs = inputs @ torch.randn(width, width, device=device, generator=generator) / width**0.5
    hessian = inputs.T @ inputs / len(inputs)
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    return hessian


def factor_published(hessian):
    """Three cubic steps: factor H, invert it, factor the inverse."""
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)


def factor_reversed(hessian):
    """Two: factor H read backwards, invert the triangle, read it backwards again. U = P inv(chol(P H P)) P."""
    lower = torch.linalg.cholesky(hessian.flip(0, 1))
    identity = torch.eye(len(lower), device=lower.device)
    return torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)


@torch.no_grad()
def micro(arguments) -> list[dict]:
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("highest")
    bench = Bench(arguments.device, seconds=0.02 if arguments.tiny else 0.3)
    widths = (64, 160) if arguments.tiny else (4096, 11008)
    stacks = [[64], [64, 64]] if arguments.tiny else [[4096], [4096] * 3, [11008] * 2]  # o and down, qkv, gate and up
    for width in widths:
        time_hessian(bench, width, 256 if arguments.tiny else 8192, arguments)
    for stack in stacks:
        time_block(bench, stack, widths[0], arguments)
    return bench.rows


def time_hessian(bench, width: int, tokens: int, arguments) -> None:
    """What a layer pays once per distinct input: X^T X over all tokens, and the factor of its inverse."""
    hessian = covariance(width, arguments.device, arguments.seed)
    truth = factor_reversed(hessian.double()) if width <= 4096 else None

    def residual(upper):
        if truth is not None:
            return relative(upper, truth)
        return relative(upper @ hessian @ upper.T, torch.eye(width, device=upper.device))

    size = str(width)
    bench("factor of H^-1, three steps", size, lambda: factor_published(hessian), error=residual)
    bench("factor of H^-1, reversed", size, lambda: factor_reversed(hessian), error=residual)
    bench("Cholesky alone", size, lambda: torch.linalg.cholesky_ex(hessian), work=width**3 / 3)
    if width <= 4096:
        bench("eigendecomposition (ALPS)", size, lambda: torch.linalg.eigh(hessian)[1], once=True)

    inputs = torch.randn(tokens, width, device=arguments.device).bfloat16()
    exact = inputs[:, :64].double().T @ inputs.double()
    work, size = 2 * tokens * width**2, f"{tokens}x{width}"

    def check(got):
        return relative(got[:64], exact)

    bench("Hessian, fp32", size, lambda: inputs.float().T @ inputs.float(), work, check)
    bench("Hessian, bf16 in, bf16 out", size, lambda: inputs.T @ inputs, work, check)
    if bench.cuda:
        torch.set_float32_matmul_precision("high")
        bench("Hessian, TF32", size, lambda: inputs.float().T @ inputs.float(), work, check)
        torch.set_float32_matmul_precision("highest")
        bench(
            "Hessian, bf16 in, fp32 out", size, lambda: torch.mm(inputs.T, inputs, out_dtype=torch.float32), work, check
        )


def time_block(bench, stack: list[int], width: int, arguments) -> None:
    """What a solve pays once per 128 columns: select, prune, update everything to the right (here ``width`` columns)."""
    from hf_sparse.pruning.obs_kernel import lowest_mask, prune_block

    rows, size = sum(stack), f"{'+'.join(map(str, stack))}x128"
    upper = factor_reversed(covariance(128, arguments.device, arguments.seed)).contiguous()
    weight = torch.randn(rows, 128, device=arguments.device)
    scores = (weight / upper.diagonal()).square()
    half = [part * 64 for part in stack]
    by_sort = lowest_mask(scores, half, stack, kernel="torch")

    def by_topk():
        return [
            s.flatten().topk(k, largest=False, sorted=False) for s, k in zip(scores.split(stack), half, strict=True)
        ]

    def entries_that_differ(got):
        return float((got != by_sort).sum())

    bench("selection, sort", size, lambda: lowest_mask(scores, half, stack, kernel="torch"), error=entries_that_differ)
    bench("selection, topk (ties not exact)", size, by_topk)
    if bench.cuda:
        bench("selection, radix", size, lambda: lowest_mask(scores, half, stack), error=entries_that_differ)

    variants = [("torch", 32)] + [(kernel, r) for kernel in ("panel", "rank1") for r in (16, 32, 64) if bench.cuda]
    for kernel, r in variants:
        for what, arguments_ in {"mask": (by_sort,), "2:4": (None, 2, 4)}.items():

            def loop(kernel=kernel, r=r, arguments_=arguments_):
                return prune_block(weight, upper, *arguments_, kernel=kernel, rows_per_program=r)[0]

            want = prune_block(weight, upper, *arguments_, kernel="torch")[0]
            bench(f"block loop, {what}, {kernel} {r}", size, loop, error=lambda got, want=want: relative(got, want))

    trailing = torch.randn(rows, width, device=arguments.device)
    right = torch.randn(128, width, device=arguments.device)
    work = 2 * rows * 128 * width
    for precision, name in (("high", "TF32"), ("highest", "fp32")):
        torch.set_float32_matmul_precision(precision)
        bench(
            f"trailing update, {name}", f"{rows}x128x{width}", lambda: trailing.addmm_(weight, right, alpha=-1e-6), work
        )

    def whole_step():
        keep = lowest_mask((weight / upper.diagonal()).square(), half, stack)
        error = prune_block(weight, upper, keep)[1]
        trailing.addmm_(error, right, alpha=-1e-6)

    bench("score, select, prune, update", size, whole_step)
    if bench.cuda:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            whole_step()
        bench("the same, one CUDA graph", size, graph.replay)


def main() -> None:
    arguments = parse_arguments()
    result = {"command": shlex.join(sys.argv), "arguments": {k: str(v) for k, v in vars(arguments).items()}}
    result |= environment(arguments.device)
    if arguments.only:
        result = run_only(arguments)
    elif arguments.micro:
        result["micro"] = micro(arguments)
    else:
        runs = [run_child("hf_sparse", arguments.layers, None)]
        if arguments.against:
            layers = arguments.against_layers or arguments.layers
            runs.append(run_child(arguments.against, layers, arguments.against_path))
        result["runs"] = runs
        print_runs(runs, arguments.layers if arguments.tiny else FULL_DEPTH)
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1, default=str))
    if any("failed" in run for run in result.get("runs", [])):
        sys.exit(1)


if __name__ == "__main__":
    main()
