"""What does sparse training cost? Step time and memory with SparsityCallback and without, side by side in one run.

    python examples/benchmarks/sparse_training_speed.py --output sparse_training_speed.json
    python examples/benchmarks/sparse_training_speed.py --tiny

One model of GPT-2-Small shape trains in bfloat16 under torch.compile with fused AdamW and clipping. Blocks of steps without
the callback alternate with blocks of a static mask and of RigL (an update every 100 steps, its cost averaged in), so that
every ratio compares neighbours in time; the figure is the median of the ratios of neighbouring blocks, with its range. The
callback is driven at the Trainer's events and its numbers are logged every 50 steps, as a Trainer would.

What the bytes allow: per step the masks are read twice, gradients and weights are read and written once more.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=16, help="sequences a step; default 16")
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=100, help="steps of a block; RigL updates once in it")
    parser.add_argument("--blocks", type=int, default=4, help="blocks of each kind")
    parser.add_argument("--methods", nargs="+", default=["static", "rigl"])
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--output", default="sparse_training_speed.json")
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model on the CPU: checks the program, measures nothing"
    )
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.batch_size, arguments.sequence_length, arguments.steps, arguments.blocks = 2, 32, 4, 1

    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from hf_sparse.atomic import atomic_write_text
    from hf_sparse.instruments import device_name, progress_bar, versions

    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.tiny else "cpu")
    torch.manual_seed(0)
    small = dict(n_layer=2, n_embd=64, n_head=4, vocab_size=128) if arguments.tiny else dict(vocab_size=50304)
    settings = dict(n_positions=arguments.sequence_length, bos_token_id=0, eos_token_id=0, **small)
    model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, **settings))
    model = model.to(device).train()
    torch.set_float32_matmul_precision("high")
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    run = model if arguments.tiny else torch.compile(model)
    shape = (arguments.batch_size, arguments.sequence_length)
    batches = [torch.randint(0, model.config.vocab_size, shape, device=device) for _ in range(8)]

    def step(index: int) -> None:
        tokens = batches[index % len(batches)]
        with torch.autocast(device.type, torch.bfloat16):
            loss = run(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def block(method: str | None) -> dict:
        callback, state = _start(method, model, optimizer, arguments)
        for index in range(5 if device.type == "cuda" else 1):  # compiles, and fills caches
            _events(callback, state, model, lambda index=index: step(index))
        _reset(device)
        started = time.perf_counter()
        for index in range(arguments.steps):
            _events(callback, state, model, lambda index=index: step(index))
        _wait(device)
        seconds = (time.perf_counter() - started) / arguments.steps
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        _stop(callback, state, model)
        return {"method": method or "none", "seconds": seconds, "peak_bytes": peak}

    block(None)  # the first compilation belongs to nobody
    order = [m for _ in range(arguments.blocks) for method in arguments.methods for m in (None, method)] + [None]
    results = []
    with progress_bar(sys.stderr.isatty(), "blocks", len(order)) as advance:
        for method in order:
            results.append(block(method))
            advance(method or "none")
            print(f"{method or 'none':8} {1e3 * results[-1]['seconds']:8.3f} ms/step", file=sys.stderr)

    summary = {}
    for method in arguments.methods:
        ratios = [
            2 * now["seconds"] / (before["seconds"] + after["seconds"])
            for before, now, after in zip(results, results[1:], results[2:], strict=False)
            if now["method"] == method
        ]
        peaks = [r["peak_bytes"] for r in results if r["method"] == method]
        plain = [r["peak_bytes"] for r in results if r["method"] == "none"]
        summary[method] = {
            "step_time_ratio_median": statistics.median(ratios),
            "step_time_ratio_range": [min(ratios), max(ratios)],
            "peak_memory_ratio": max(peaks) / max(plain) if max(plain) else None,
        }
    masked = sum(p.numel() for n, p in model.named_parameters() if n.endswith("weight") and p.dim() == 2 and ".h." in n)
    bytes_moved = masked * (
        2 * 1 + 2 * 4 + 2 * 4
    )  # two masks of a byte, gradient and weight in float32 read and written
    content = {
        "command": " ".join(
            ["python", "examples/benchmarks/sparse_training_speed.py", *(Path(word).name for word in sys.argv[1:])]
        ),
        "device": device_name(device),
        "versions": versions(),
        "model": "GPT-2 Small shape, bfloat16 autocast, torch.compile, fused AdamW, clipping",
        "batch": list(shape),
        "sparsity": arguments.sparsity,
        "steps_per_block": arguments.steps,
        "summary": summary,
        "masked_weights": masked,
        "bytes_moved_per_step": bytes_moved,
        "least_milliseconds_at_4.8_TB_per_s": 1e3 * bytes_moved / 4.8e12,
        "blocks": results,
    }
    atomic_write_text(Path(arguments.output), json.dumps(content, indent=1))
    for method, row in summary.items():
        low, high = row["step_time_ratio_range"]
        memory = "" if row["peak_memory_ratio"] is None else f", peak memory x{row['peak_memory_ratio']:.3f}"
        print(f"{method}: step time x{row['step_time_ratio_median']:.4f} ({low:.4f} to {high:.4f}){memory}")


def _start(method, model, optimizer, arguments):
    """The callback as a Trainer has it, after on_train_begin."""
    from hf_sparse import SparsityConfig
    from hf_sparse.callbacks import SparsityCallback

    state = SimpleNamespace(global_step=0, max_steps=10**6, log_history=[], stateful_callbacks={})
    if method is None:
        return None, state
    schedule = {} if method == "static" else {"every": arguments.steps, "begin": 0, "end": 10**6}
    callback = SparsityCallback(SparsityConfig(method=method, sparsity=arguments.sparsity, schedule=schedule))
    callback.on_init_end(SimpleNamespace(), state, None, model=model)
    callback.on_train_begin(None, state, None, model=model, optimizer=optimizer)
    return callback, state


def _events(callback, state, model, step) -> None:
    if callback is not None:
        callback.on_step_begin(None, state, None)
    step()
    state.global_step += 1
    if callback is not None and state.global_step % 50 == 0:
        callback.on_log(SimpleNamespace(world_size=1), state, None, logs={"loss": 0.0})


def _stop(callback, state, model) -> None:
    from hf_sparse import densify

    if callback is not None:
        callback.on_train_end(None, state, None, model=model)
        densify(model)


def _reset(device) -> None:
    import torch

    _wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _wait(device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
