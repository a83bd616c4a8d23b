"""How fast a dataset is rewritten: tokens a second of each way of generating, beside ``generate`` one row after the other.

    python examples/benchmarks/rewriting_speed.py --model MODEL --data gsm8k_train.jsonl --device cuda
    python examples/benchmarks/rewriting_speed.py --model MODEL --tiny

Every way answers the same requests (the ``math`` template of self-data distillation), greedily, with the same limit of new
tokens. ``one by one`` answers the first of them only, since it takes long. Only tokens that end up in a response count, not
what a batch computes for rows that have ended. Beside each rate is the bound of the memory: while a batch of B sequences
decodes, every step reads all weights once, so no more than B x bandwidth / bytes of the weights tokens come in a second;
bandwidth is that of a large copy, measured here.
"""

import argparse
import json
import sys
import time
from pathlib import Path


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="Hub id, directory or .gguf file")
    add("--data", type=Path, help='JSON lines with "question" and "answer"; default: simple sums')
    add("--rows", type=int, default=1024, help="default: %(default)s")
    add("--alone", type=int, default=12, help="rows answered one by one; default: %(default)s")
    add("--new-tokens", type=int, default=256, help="at most, a row; default: %(default)s")
    add("--tokens-per-batch", type=int, nargs="+", default=[16_384, 262_144], help="default: %(default)s")
    add("--ways", nargs="+", default=["generate", "continuous"], help="besides one by one; default: %(default)s")
    add("--seconds", type=float, help="leave a way after so long, at the end of its batch")
    add("--device", default="cpu")
    add("--dtype", default="bfloat16")
    add("--output", type=Path, default=Path("rewriting_speed.json"))
    add("--tiny", action="store_true", help="a few rows of a few tokens: checks the program, measures nothing")
    arguments = parser.parse_args()
    if arguments.data and not arguments.data.is_file():
        parser.error(f"no such file: {arguments.data}")
    if wrong := set(arguments.ways) - {"generate", "continuous"}:
        parser.error(f"unknown way {sorted(wrong)[0]!r}; known are generate, continuous")
    if arguments.tiny:
        arguments.rows, arguments.alone, arguments.new_tokens, arguments.tokens_per_batch = 6, 2, 8, [2048]
    return arguments


def main() -> None:
    arguments = parse()
    import torch
    import transformers
    from rich.console import Console
    from rich.table import Table

    from hf_sparse import load_model, load_tokenizer
    from hf_sparse.atomic import atomic_write_text
    from hf_sparse.distillation.generation import respond
    from hf_sparse.instruments import device_name, peak_memory, reset_peak_memory, versions

    transformers.logging.set_verbosity_error()
    device = torch.device(arguments.device)
    if device.type == "cpu" and "continuous" in arguments.ways and not arguments.tiny:
        arguments.ways.remove("continuous")
    tokenizer = load_tokenizer(arguments.model)
    model = load_model(arguments.model, dtype=arguments.dtype).to(device).eval()
    chats = requests(arguments)
    bandwidth, weights = copy_bandwidth(device), sum(p.numel() * p.element_size() for p in model.parameters())

    runs = [("one by one", "generate", 1, arguments.alone)]
    for way in arguments.ways:
        sizes = arguments.tokens_per_batch if way == "generate" else arguments.tokens_per_batch[-1:]
        runs += [(f"{way}, {size:,} tokens a batch", way, size, len(chats)) for size in sizes]
    content = {
        "command": " ".join(
            ["python", "examples/benchmarks/rewriting_speed.py", *(Path(w).name for w in sys.argv[1:])]
        ),
        "hardware": device_name(device),
        "versions": versions(),
        "model": Path(arguments.model).name,
        "weights_bytes": weights,
        "copy_bandwidth_bytes_per_second": bandwidth,
        "bound_of_one_sequence_tokens_per_second": bandwidth / weights,
        "results": [],
    }
    results = content["results"]
    for label, backend, size, rows in runs:
        options = dict(backend=backend, tokens_per_batch=size, max_new_tokens=arguments.new_tokens)
        list(respond(model, tokenizer, chats[:2], **options | {"max_new_tokens": 4}))  # what a first call sets up
        reset_peak_memory(device)
        tokens = ended = done = 0
        started = time.perf_counter()
        for _, answer in respond(model, tokenizer, chats[:rows], **options):
            tokens, ended, done = tokens + answer.tokens, ended + answer.finished, done + 1
            if arguments.seconds and time.perf_counter() - started > arguments.seconds:
                break  # what is in flight is not counted, so a way is not made to look faster
        seconds = time.perf_counter() - started
        results.append(
            {
                "way": label,
                "rows": done,
                "of": rows,
                "tokens": tokens,
                "seconds": seconds,
                "tokens_per_second": tokens / seconds,
                "came_to_an_end": ended / done,
                "peak_memory_bytes": peak_memory(device),
            }
        )
        print(f"{label}: {tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} tokens/s", file=sys.stderr)
        atomic_write_text(arguments.output, json.dumps(content, indent=1) + "\n")  # the next may take too long
    table = Table("way", "rows", "tokens/s", "beside one by one", "peak memory, GiB")
    for result in results:
        ratio = result["tokens_per_second"] / results[0]["tokens_per_second"]
        cells = (result["rows"], f"{result['tokens_per_second']:.0f}", f"{ratio:.1f}")
        table.add_row(result["way"], *map(str, cells), f"{result['peak_memory_bytes'] / 2**30:.1f}")
    Console().print(table)


def requests(arguments) -> list[list[dict[str, str]]]:
    from hf_sparse.distillation.answers import without_calculator_notes
    from hf_sparse.distillation.templates import load_template

    if arguments.data:
        with open(arguments.data, encoding="utf-8") as lines:
            rows = [json.loads(line) for line, _ in zip(lines, range(arguments.rows), strict=False)]
    else:
        rows = [{"question": f"What is {n} + {n + 3}?", "answer": f"#### {2 * n + 3}"} for n in range(arguments.rows)]
    template = load_template("math")
    return [
        template.messages([{"role": "user", "content": row["question"]}], without_calculator_notes(row["answer"]))
        for row in rows
    ]


def copy_bandwidth(device) -> float:
    """Bytes a second of reading and writing a gigabyte, the best of five; a sixteenth of that on a CPU."""
    import torch

    source = torch.empty(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), 0.0
    for _ in range(5):
        started = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * source.numel() / (time.perf_counter() - started))
    return best


if __name__ == "__main__":
    main()
