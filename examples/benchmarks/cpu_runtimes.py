"""Sparse decoding on a CPU: our packed layers beside every other runtime, on the same model with the same zeros.

A language model writes one token at a time and reads all of its weights for each, so at batch 1 the bytes decide. Packed
layers read 70 % fewer of them at 70 % zeros; torch, OpenVINO and onnxruntime multiply the zeros; DeepSparse 1.8 (closed
source, no longer maintained, here to compare with only) skips them in float32.

    python examples/benchmarks/cpu_runtimes.py --tiny                        # stock torch and packed, under a minute
    python examples/benchmarks/cpu_runtimes.py --model SmolLM2-135M-Instruct --model 1b --work scratch \\
        --openvino-python ov/bin/python --onnxruntime-python ort/bin/python --deepsparse-python ds/bin/python \\
        --export-python exp/bin/python --output cpu_runtimes.json

``1b`` is a random model of the shape of TinyLlama-1.1B. For every model and sparsity the script makes random masks (exact in
every linear layer), saves the model in bfloat16, exports it (``hf_sparse.export``), and starts one process per runtime.
The processes take turns, round by round: a greedy generation of fixed length each, batch 1, with a key-value cache. What
disturbs the machine so disturbs all alike, and a speed-up is the median of the rounds' ratios. Runtimes that do not fit
into memory together run in groups; ``packed-bfloat16`` is in every group, and ratios never cross groups.

Each runtime may have an environment of its own; one whose ``--...-python`` is not given is left out, and said so:

    --export-python         torch, transformers, hf_sparse's dependencies, openvino, onnxscript: makes the exports
    --openvino-python       openvino                       --onnxruntime-python    onnxruntime
    --deepsparse-python     Python 3.11: "deepsparse<1.9" "protobuf<4" "numpy<2" "pandas<2.3" "setuptools<70"

What is measured is a token end to end, Python and sampling included. ``torch-...-compiled`` is ``torch.compile`` with a
static cache. DeepSparse is given fixed shapes and the prompt token by token, and only the engine's own call is timed.
"""

import argparse
import contextlib
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from _cpu_runtimes_report import free_memory, hardware, plot, print_table, say

WORKER = Path(__file__).with_name("_cpu_runtimes_worker.py")
ROOT = Path(__file__).resolve().parents[2]
ANCHOR = "packed-bfloat16"
# runtime -> bytes of memory per parameter at its peak, while it loads (measured with 1b, rounded up)
RUNTIMES = {
    ANCHOR: 4.5,
    "packed-bfloat16-compiled": 5,
    "packed-float32": 6.5,
    "torch-bfloat16": 2.5,
    "torch-bfloat16-compiled": 4,
    "torch-float32": 6.5,
    "torch-float32-compiled": 7,
    "openvino-bfloat16": 4,
    "openvino-float32": 8,
    "onnxruntime-float32": 6,
    "deepsparse-float32": 9,
}
BASE_BYTES = 600e6
ONE_BILLION = dict(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
)
TINY = ONE_BILLION | dict(
    vocab_size=320, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tiny", action="store_true", help="a tiny model, 70 %% zeros, stock torch and packed only")
    add("--model", action="append", help="a directory, or 1b; may be given more than once (default 1b)")
    add("--sparsity", type=float, nargs="+", default=[0.5, 0.7, 0.8, 0.9])
    add(
        "--runtimes",
        nargs="+",
        choices=list(RUNTIMES),
        default=list(RUNTIMES),
        metavar="RUNTIME",
        help="; ".join(RUNTIMES),
    )
    add("--rounds", type=int, default=7)
    add("--prompt", type=int, default=32, help="tokens")
    add("--new", type=int, default=64, help="tokens")
    add("--threads", type=int, default=2, help="cores to use")
    add("--packed-runtime", default="auto", help="runtime= of pack_for_inference")
    add("--memory", type=float, default=None, help="GB that may be in use at once (default 85 %% of what is free)")
    for name in ("export", "openvino", "onnxruntime", "deepsparse"):
        add(f"--{name}-python", type=Path, help="interpreter of an environment with it (see above)")
    add("--work", type=Path, help="directory for models and exports, up to 16 GB for 1b (default: a temporary one)")
    add("--keep", action="store_true", help="keep models and exports in --work, and use those that are there")
    add("--output", type=Path, help="JSON; the plot lies beside it as .png")
    add("--make", nargs=3, help=argparse.SUPPRESS)  # MODEL SPARSITY FOLDER, in a process of its own
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.sparsity, arguments.rounds, arguments.prompt, arguments.new = [0.7], 2, 4, 6
        arguments.runtimes = ["packed-bfloat16", "torch-bfloat16", "torch-float32"]
    arguments.model = arguments.model or ["tiny" if arguments.tiny else "1b"]
    return arguments


# ------------------------------------------------------------------------------------------------------ models and exports


def make_model(name: str, sparsity: float, folder: Path) -> None:
    """Saves the model in bfloat16 with random zeros, the same fraction in every linear layer."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from hf_sparse import SparsityConfig, prune

    torch.manual_seed(0)
    if name in ("1b", "tiny"):
        config = LlamaConfig(**(ONE_BILLION if name == "1b" else TINY), dtype="bfloat16")
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    else:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    prune(model, SparsityConfig(sparsity=sparsity, saliency="random", pattern="unstructured"))
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder / "model")
    facts = {"parameters": sum(p.numel() for p in model.parameters()), "vocabulary": model.config.vocab_size}
    shape = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    facts["config"] = {key: getattr(model.config, key) for key in (*shape, "num_key_value_heads")}
    (folder / "facts.json").write_text(json.dumps(facts))


def make(name: str, sparsity: float, folder: Path, runtimes: list[str], arguments) -> dict:
    """The model and what each runtime reads, made where they are missing; returns its facts."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "facts.json").exists():
        say(f"  random masks, {sparsity:.0%}")
        subprocess.run(
            [sys.executable, __file__, "--make", name, str(sparsity), str(folder)], check=True, env=environment()
        )
    wanted = {
        runtime: ("openvino", {"dtype": runtime.partition("-")[2]}) for runtime in runtimes if "openvino" in runtime
    }
    if {"onnxruntime-float32", "deepsparse-float32"} & set(runtimes):
        wanted["onnx"] = ("onnx", {"opset": 14})
    for place, (target, options) in wanted.items():
        if not (folder / place).exists():
            say(f"  export: {place}")
            code = "import json, sys; from hf_sparse.export import export; "
            code += "export(*sys.argv[1:4], verify=False, **json.loads(sys.argv[4]))"
            paths = [str(folder / "model"), target, str(folder / place)]
            command = [str(arguments.export_python), "-c", code, *paths, json.dumps(options)]
            subprocess.run(command, check=True, env=environment(), stdout=sys.stderr)
    return json.loads((folder / "facts.json").read_text())


def environment(threads: int | None = None, own: bool = True) -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH")] if own else []  # a foreign environment gets nothing of ours
    changed = {"PYTHONPATH": os.pathsep.join(path for path in paths if path), "HF_HUB_OFFLINE": "1"}
    if threads:
        changed["OMP_NUM_THREADS"] = str(threads)
    return os.environ | changed


# -------------------------------------------------------------------------------------------------------------- measurement


class Worker:
    """One runtime's process; dead once it has failed."""

    def __init__(self, runtime: str, folder: Path, vocabulary: int, arguments):
        self.runtime, self.rounds, self.failed = runtime, [], None
        own = runtime.startswith(("torch", "packed"))
        python = sys.executable if own else getattr(arguments, f"{runtime.partition('-')[0]}_python")
        command = [str(python), str(WORKER), runtime, str(folder), "--packed-runtime", arguments.packed_runtime]
        for name, value in {"prompt": arguments.prompt, "new": arguments.new, "threads": arguments.threads}.items():
            command += [f"--{name}", str(value)]
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in close)
        self.process = subprocess.Popen(
            [*command, "--vocabulary", str(vocabulary)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment(arguments.threads, own),
        )
        self.facts = self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.process.wait()
        self.errors.seek(0)
        lines = [text for text in self.errors.read().splitlines() if text.strip()]
        self.failed = lines[-1] if lines else f"exit status {self.process.returncode}"
        say(f"  {self.runtime} failed: {self.failed}")
        return {}

    def run(self, counts: bool) -> None:
        if self.failed is None:
            with contextlib.suppress(BrokenPipeError):  # it has died; the answer says of what
                print(file=self.process.stdin, flush=True)
            if (answer := self._answer()) and counts:
                self.rounds.append(answer)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.errors.close()


def groups(runtimes: list[str], parameters: int, budget: float) -> list[list[str]]:
    """Runtimes that fit into memory together; the anchor in each."""
    need = {runtime: RUNTIMES[runtime] * parameters + BASE_BYTES for runtime in runtimes}
    made: list[list[str]] = []
    for runtime in sorted((r for r in runtimes if r != ANCHOR), key=need.get):
        first = [ANCHOR] if ANCHOR in runtimes else []
        if not made or sum(need[r] for r in made[-1]) + need[runtime] > budget:
            made.append(first)
        made[-1].append(runtime)
    return made or [[ANCHOR]]


def measure(folder: Path, facts: dict, runtimes: list[str], arguments) -> dict[str, dict]:
    """Per runtime: seconds of a token in every round, and the ratio to the anchor of the same round."""
    budget = (arguments.memory or 0) * 1e9 or 0.85 * free_memory()
    results: dict[str, dict] = {}
    for group in groups(runtimes, facts["parameters"], budget):
        say(f"  together: {', '.join(group)}")
        workers = []
        try:
            for runtime in group:
                workers.append(Worker(runtime, folder, facts["vocabulary"], arguments))
            for turn in range(-1, arguments.rounds):  # the first does not count: the processes have just been loading
                for index in range(len(workers)):
                    workers[(index + turn) % len(workers)].run(counts=turn >= 0)
                rates = [f"{w.runtime} {1 / step_seconds(w)[-1]:.1f}" for w in workers if w.rounds]
                say(f"  round {turn + 1} of {arguments.rounds}, tokens/s: {', '.join(rates)}")
        finally:
            for worker in workers:
                worker.close()
        anchor = next((w for w in workers if w.runtime == ANCHOR and w.failed is None), None)
        for worker in workers:
            result = summary(worker, anchor)
            if worker.runtime in results and not worker.failed:
                result["round_seconds"] = results[worker.runtime].get("round_seconds", []) + result["round_seconds"]
                result["ms_per_token"] = 1e3 * median(result["round_seconds"])
                result["tokens_per_second"] = 1e3 / result["ms_per_token"]
            results[worker.runtime] = result
    reference = next((results[r]["tokens"] for r in ("torch-float32", *results) if "tokens" in results.get(r, {})), [])
    for result in results.values():
        if "tokens" in result:
            pairs = list(zip(result.pop("tokens"), reference, strict=True))
            equal = [a == b for a, b in pairs]
            result["leading_equal_tokens"] = equal.index(False) if False in equal else len(equal)
    return results


def step_seconds(worker: Worker) -> list[float]:
    """Seconds of a token, round by round."""
    return [sum(answer["step_seconds"]) / len(answer["step_seconds"]) for answer in worker.rounds]


def summary(worker: Worker, anchor: Worker | None) -> dict:
    if worker.failed is not None or not worker.rounds:
        return {"failed": worker.failed or "no round finished"}
    seconds = step_seconds(worker)
    result = worker.facts | {
        "round_seconds": seconds,
        "ms_per_token": 1e3 * median(seconds),
        "tokens_per_second": 1 / median(seconds),
        "prompt_ms": 1e3 * median(answer["prompt_seconds"] for answer in worker.rounds),
        **{kind: worker.rounds[-1][kind] for kind in ("rss_bytes", "anonymous_bytes", "peak_bytes")},
        "tokens": worker.rounds[0]["tokens"],
    }
    if anchor is not None and anchor is not worker:
        ratios = sorted(a / b for a, b in zip(seconds, step_seconds(anchor), strict=True))
        result["packed_is_faster_by"] = {"median": median(ratios), "lowest": ratios[0], "highest": ratios[-1]}
    return result


# ------------------------------------------------------------------------------------------------------------------ command


def command_without_paths(arguments) -> str:
    """The command with names for the paths of this machine."""
    shown = {
        "model": [Path(m).name for m in arguments.model],
        "sparsity": arguments.sparsity,
        "runtimes": arguments.runtimes,
    }
    shown |= {key: getattr(arguments, key) for key in ("rounds", "prompt", "new", "threads", "packed_runtime")}
    words = ["python examples/benchmarks/cpu_runtimes.py"] + ["--tiny"] * arguments.tiny
    for key, value in shown.items():
        values = value if isinstance(value, list) else [value]
        flag = f"--{key.replace('_', '-')}"
        words += [f"{flag} {v}" for v in values] if key == "model" else [f"{flag} {' '.join(map(str, values))}"]
    return " ".join(words)


def available(arguments) -> list[str]:
    """The runtimes whose environments were given; what is left out is said."""
    kept = []
    for runtime in arguments.runtimes:
        kind = runtime.partition("-")[0]
        needs = [] if kind in ("torch", "packed") else [kind, "export"]
        missing = [f"--{name}-python" for name in needs if getattr(arguments, f"{name}_python") is None]
        if missing:
            say(f"left out: {runtime} ({' and '.join(missing)} not given)")
        else:
            kept.append(runtime)
    return kept


def main() -> None:
    arguments = parse_arguments()
    if arguments.make:
        name, sparsity, folder = arguments.make
        return make_model(name, float(sparsity), Path(folder))
    runtimes = available(arguments)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])  # the children inherit it
    report = {"command": command_without_paths(arguments), "date": datetime.date.today().isoformat()}
    report |= {"hardware": hardware(arguments.threads), "models": {}}
    with tempfile.TemporaryDirectory(dir=arguments.work) as scratch:
        for model in arguments.model:
            name = Path(model).name if Path(model).exists() else model
            for sparsity in arguments.sparsity:
                say(f"{name}, {sparsity:.0%} zeros")
                folder = (arguments.work if arguments.keep and arguments.work else Path(scratch)) / f"{name}-{sparsity}"
                facts = make(model, sparsity, folder, runtimes, arguments)
                results = measure(folder, facts, runtimes, arguments)
                entry = report["models"].setdefault(name, {**facts, "sparsities": {}})
                entry["sparsities"][str(sparsity)] = results
                print_table(name, sparsity, results)
                if arguments.output:  # after every step, so that nothing measured is lost
                    arguments.output.write_text(json.dumps(report, indent=1))
                if not arguments.keep:
                    shutil.rmtree(folder)
    if arguments.output:
        plot(report, runtimes, arguments.output.with_suffix(".png"))
    if any("failed" in r for m in report["models"].values() for s in m["sparsities"].values() for r in s.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
