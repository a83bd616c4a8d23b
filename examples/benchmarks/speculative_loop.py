"""What the draft/verify loop costs: per drafted token beside the drafter's bare forward pass, and in all beside transformers'.

    python examples/benchmarks/speculative_loop.py --model MODEL --device cuda --dtype bfloat16
    python examples/benchmarks/speculative_loop.py --model MODEL --tiny                # checks the program, measures nothing

Targets are the model and the model made deeper by layers that change nothing; drafters are the model with some of its layers
dropped. All ways draft exactly k tokens a round, greedily, so they do the same work and write the same text:

    transformers   generate(assistant_model=...), its confidence threshold off and a constant schedule
    loop           SpeculativeDecoding(static=False): the same forward passes, without nested generate calls
    graphs         SpeculativeDecoding(static=True): CUDA graphs over caches of fixed size (on a CPU: left out)
    plain          the target alone

Ways take turns, prompt by prompt, and a time is the median over the rounds. ``forward`` is one bare forward pass of the drafter
over one token with a growing cache, its argmax read by the host; ``per drafted`` is what a drafted token takes in the loop when
its signals are looked at (a rule that never stops). Beside them stands the time to read the drafter's weights once at the
bandwidth measured here.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="Hub id, directory or .gguf file")
    add("--depths", type=float, nargs="+", default=[1, 5], metavar="X", help="targets, in models; default: %(default)s")
    add(
        "--remove",
        type=int,
        nargs="+",
        default=[6, 20],
        metavar="N",
        help="layers a drafter lacks; default: %(default)s",
    )
    add("--k", type=int, nargs="+", default=[1, 2, 4, 8], help="tokens a draft; default: %(default)s")
    add("--new-tokens", type=int, default=96, help="default: %(default)s")
    add("--rounds", type=int, default=3, help="default: %(default)s")
    add("--dtype", default="bfloat16")
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--output", type=Path, default=Path("speculative_loop.json"))
    add("--tiny", action="store_true", help="a few tokens")
    arguments = parser.parse_args()
    if arguments.tiny:
        vars(arguments).update(depths=[1], remove=[1], k=[2], new_tokens=8, rounds=1, dtype="float32")
    return arguments


def main() -> None:
    arguments = parse()
    import torch
    import transformers
    from _deepened import deepen
    from rich.console import Console
    from rich.table import Table

    from hf_sparse import load_model, load_tokenizer
    from hf_sparse.atomic import atomic_write_text
    from hf_sparse.instruments import device_name, versions
    from hf_sparse.pruning.layers import drop_layers

    transformers.logging.set_verbosity_error()
    tokenizer = load_tokenizer(arguments.model)
    base = load_model(arguments.model, dtype=arguments.dtype).to(arguments.device)
    layers = base.config.num_hidden_layers
    drafters = {}
    for count in arguments.remove:
        drafter = copy.deepcopy(base)
        first = (layers - count) // 2
        drop_layers(drafter, list(range(first, first + count)))
        drafters[f"{layers - count} layers"] = drafter
    ids = tokenizer("Once upon a time, in a village by the sea,", return_tensors="pt")["input_ids"].to(arguments.device)
    content = {
        "command": " ".join(
            ["python", "examples/benchmarks/speculative_loop.py", *(Path(w).name for w in sys.argv[1:])]
        ),
        "hardware": device_name(base.device),
        "versions": versions(),
        "model": Path(arguments.model).name,
        "dtype": arguments.dtype,
        "new_tokens": arguments.new_tokens,
        "drafters": {},
        "results": [],
    }
    console = Console()
    for name, drafter in drafters.items():
        content["drafters"][name] = forwards(drafter, ids, arguments)
    for depth in arguments.depths:
        target = base if depth == 1 else deepen(base, round(depth * layers))
        for name, drafter in drafters.items():
            for k in arguments.k:
                row = {"target_layers": len(target.model.layers), "drafter": name, "k": k}
                row |= compare(target, drafter, k, ids, arguments)
                content["results"].append(row)
                atomic_write_text(arguments.output, json.dumps(content, indent=1) + "\n")
                print(json.dumps(row), file=sys.stderr)
        del target
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
    table = Table(
        "target",
        "drafter",
        "k",
        "plain, tokens/s",
        "transformers",
        "loop",
        "graphs",
        "loop / transformers",
        "graphs / t.",
    )
    for row in content["results"]:
        speeds = [row["tokens_per_second"].get(way) for way in ("plain", "transformers", "loop", "graphs")]
        ratios = [speed / speeds[1] if speed else None for speed in speeds[2:]]
        cells = [f"{value:.1f}" if value else "–" for value in speeds] + [f"{r:.2f}" if r else "–" for r in ratios]
        table.add_row(f"{row['target_layers']} layers", row["drafter"], str(row["k"]), *cells)
    console.print(table)
    console.print(f"saved {arguments.output}", markup=False)


def wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def forwards(drafter, ids, arguments) -> dict:
    """Seconds of one bare forward pass over one token, and of reading the weights."""
    import torch
    from rewriting_speed import copy_bandwidth
    from transformers import DynamicCache

    steps = min(64, 4 * arguments.new_tokens)
    cache = DynamicCache(config=drafter.config)
    times = []
    with torch.no_grad():
        token = (
            drafter(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            .logits[:, -1]
            .argmax(-1, True)
        )
        for _ in range(steps):
            wait(arguments.device)
            started = time.perf_counter()
            logits = drafter(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            token = logits[:, -1].argmax(-1, True)
            int(token)
            times.append(time.perf_counter() - started)
    weights = sum(p.numel() * p.element_size() for p in drafter.parameters())
    return {
        "forward_seconds": statistics.median(times),
        "weights_bytes": weights,
        "read_seconds": weights / copy_bandwidth(drafter.device),
    }


def compare(target, drafter, k: int, ids, arguments) -> dict:
    import torch

    from hf_sparse.speculative.decoding import SpeculativeDecoding
    from hf_sparse.speculative.rules import MaxConfidence, StaticLength

    stock = drafter.generation_config
    stock.num_assistant_tokens, stock.num_assistant_tokens_schedule, stock.assistant_confidence_threshold = (
        k,
        "constant",
        0.0,
    )
    options = dict(do_sample=False, max_new_tokens=arguments.new_tokens, eos_token_id=None)
    never = lambda: MaxConfidence(1e-30, max_draft=k)  # noqa: E731
    decodings = {
        "loop": SpeculativeDecoding(drafter, StaticLength(k), static=False),
        "loop, looking": SpeculativeDecoding(drafter, never(), static=False),
    }
    if arguments.device == "cuda":
        decodings["graphs"] = SpeculativeDecoding(drafter, StaticLength(k), static=True)
        decodings["graphs, looking"] = SpeculativeDecoding(drafter, never(), static=True)
    ways = {"plain": {}, "transformers": {"assistant_model": drafter}}
    ways |= {name: {"custom_generate": decoding} for name, decoding in decodings.items()}
    times = {way: [] for way in ways}
    outputs = {}
    for number in range(arguments.rounds + 1):
        for way, more in ways.items():
            torch.manual_seed(0)
            wait(arguments.device)
            started = time.perf_counter()
            outputs[way] = target.generate(ids, **options, **more)
            wait(arguments.device)
            if number:  # the first is what a first call sets up
                times[way].append(time.perf_counter() - started)
    result = {
        "tokens_per_second": {way: arguments.new_tokens / statistics.median(values) for way, values in times.items()},
        "mean_accepted_length": decodings["loop"].last.mean_accepted_length,
        "same_text": {way: bool(torch.equal(outputs[way], outputs["plain"])) for way in ways},
    }
    for way in ("loop, looking", "graphs, looking"):
        if way in decodings:
            last = decodings[way].last
            result[f"per drafted token, {way.split(',')[0]}"] = last.draft_seconds / last.timed_tokens
            result[f"per verification, {way.split(',')[0]}"] = last.verify_seconds / last.timed_rounds
    return result


if __name__ == "__main__":
    main()
