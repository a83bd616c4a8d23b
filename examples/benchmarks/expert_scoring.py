"""What scoring experts costs: time and peak memory beside a plain forward pass of the same data.

    python examples/benchmarks/expert_scoring.py --output expert_scoring.json      # a GPU with 80 GB or more; a minute
    python examples/benchmarks/expert_scoring.py --tiny                            # seconds on a CPU: checks the program

A model of the shape of Qwen3-30B-A3B (48 layers, 128 experts, top-8; 61 GB in bfloat16) with random weights, and 64 sequences
of 2,048 tokens, four at a time. Forward (no cache, logits of the last token) and ``score_experts`` take turns; medians of the
rounds. Scoring runs the same experts on the same (token, expert) pairs once, and adds a norm of each output; beside the model
it keeps the hidden states of all the data, on the GPU or (``offload``) in CPU memory. ``layers visit``: eight layers of the
model in CPU memory, each taken to the GPU for its turn, as for models larger than the GPU.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

import torch

from hf_sparse import score_experts
from hf_sparse.atomic import atomic_write_text
from hf_sparse.instruments import device_name, peak_memory, reset_peak_memory, versions

SHAPE = dict(
    hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128,
    num_experts_per_tok=8, moe_intermediate_size=768, intermediate_size=6144, vocab_size=151936, norm_topk_prob=True,
)  # fmt: skip
TINY = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=8,
    num_experts_per_tok=2, moe_intermediate_size=32, vocab_size=256, norm_topk_prob=True,
)  # fmt: skip


def random_model(shape: dict, device: torch.device):
    """Made where it is to be, without a copy in CPU memory."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(**shape, decoder_sparse_step=1)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    torch.set_default_dtype(before)
    model.to_empty(device=device)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config).to(device)  # its frequencies are no weights
    for name, parameter in model.named_parameters():
        parameter.data.fill_(1) if "norm" in name else parameter.data.normal_(0, 0.02)
    return model.eval()


def seconds(function, device: torch.device) -> tuple[float, int]:
    """``(seconds, peak bytes)`` of a call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    reset_peak_memory(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, peak_memory(device)


@torch.inference_mode()
def forward(model, ids: torch.Tensor, batch: int) -> None:
    for part in ids.split(batch):
        model(input_ids=part.to(model.device), use_cache=False, logits_to_keep=1)


def compare(ways: dict, rounds: int, device: torch.device) -> dict:
    """Each way once to warm up, then in turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    peaks = {}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            spent, peaks[name] = seconds(way, device)
            if turn:
                times[name].append(spent)
            print(f"{'warm-up' if not turn else f'round {turn}'}: {name} {spent:.2f} s", file=sys.stderr, flush=True)
    return {name: {"seconds": median(t), "rounds": t, "peak_gib": peaks[name] / 2**30} for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64, help="sequences of 2,048 tokens; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        raise SystemExit("this needs a GPU with 80 GB or more; --tiny checks the program on a CPU")
    device = torch.device("cpu" if arguments.tiny else "cuda")
    shape, length, samples = (TINY, 32, 4) if arguments.tiny else (SHAPE, 2048, arguments.samples)
    ids = torch.randint(0, shape["vocab_size"], (samples, length), generator=torch.Generator().manual_seed(0))
    model = random_model(shape, device)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    ways = {
        "forward": lambda: forward(model, ids, 4),
        "scoring": lambda: score_experts(model, ids),
        "scoring, offload": lambda: score_experts(model, ids, storage="cpu"),
    }
    results = {
        "command": " ".join(["python", "examples/benchmarks/expert_scoring.py", *(Path(w).name for w in sys.argv[1:])]),
        "device": device_name(device),
        "versions": versions(),
        "model": shape | {"gib": size / 2**30},
        "tokens": ids.numel(),
        "ways": compare(ways, 1 if arguments.tiny else arguments.rounds, device),
    }
    counted = score_experts(model, ids[:2])
    assert all(
        int(one["count"].sum()) == 2 * length * shape["num_experts_per_tok"] for one in counted.statistics.values()
    )
    model = None  # room for the next
    if not arguments.tiny:
        torch.cuda.empty_cache()
        small = random_model(shape | {"num_hidden_layers": 8}, device).to("cpu")
        few = ids[: max(4, samples // 4)]
        resident = random_model(shape | {"num_hidden_layers": 8}, device)
        results["eight layers"] = compare(
            {
                "forward": lambda: forward(resident, few, 4),
                "layers visit": lambda: score_experts(small, few, device="cuda", storage="cpu"),
            },
            1,
            device,
        )
    results["ratio"] = results["ways"]["scoring"]["seconds"] / results["ways"]["forward"]["seconds"]
    print(json.dumps({key: results[key] for key in ("ratio", "ways")}, indent=1))
    if arguments.output:
        atomic_write_text(arguments.output, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
