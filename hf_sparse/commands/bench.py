"""What ``hf-sparse bench`` does."""

import json
from pathlib import Path
from typing import Any

from hf_sparse import commands

__all__ = ["run_bench"]


def run_bench(arguments) -> dict[str, Any]:
    import torch

    for file in (arguments.output, arguments.plot):
        commands.check_parent(file)
    commands.check_device(arguments.device)
    if arguments.threads is not None and arguments.threads < 1:
        raise ValueError(f"--threads is at least 1, got {arguments.threads}")

    from hf_sparse.atomic import atomic_write_text
    from hf_sparse.loading import load_model
    from hf_sparse.runtime.bench import benchmark
    from hf_sparse.runtime.pack import check_runtime

    check_runtime(arguments.runtime)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    model = load_model(arguments.path, arguments.dtype, arguments.trust_remote_code).to(arguments.device or "cpu")
    report = benchmark(
        model,
        arguments.runtime,
        batch_size=arguments.batch_size,
        prompt=arguments.prompt,
        new_tokens=arguments.new_tokens,
        rounds=arguments.rounds,
        progress=not arguments.json,
    )
    path = Path(arguments.path)
    result = {"model": path.name if path.exists() else arguments.path, "command": arguments.command_line}
    result |= report.to_dict()
    if arguments.output:
        atomic_write_text(arguments.output, json.dumps(result, indent=1) + "\n")
    if arguments.plot:
        report.plot(arguments.plot)
    if not arguments.json:
        out = commands.console()
        out.print(report.table())
        out.print(report.choices)
        out.print(report.summary())
    return result
