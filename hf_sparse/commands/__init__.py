"""What each command of ``hf-sparse`` does: a function from parsed arguments to a dict, the one that ``--json`` prints.

All that can be wrong with the arguments is checked before a model is loaded; heavy modules are imported after that. One
file a command, or two that are each other's inverse; here is what they share.
"""

import re
import sys
from pathlib import Path

__all__ = ["check_device", "check_parent", "console", "layer_names", "portable", "show_report", "weight_bytes"]

OUTPUT = None  # where tables go; set by hf_sparse.cli.main
REPORT_FILE = "sparsity_report.json"
PLOT_FILE = "sparsity_report.png"


def check_device(device: str | None) -> None:
    if device is None:
        return
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}; use cpu, cuda or cuda:N") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but torch sees no CUDA device here; use --device cpu")
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device!r} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices here"
        )


def check_parent(file: str | None) -> None:
    """A result is written after the work; that there is a place for it is known before."""
    if file and not Path(file).absolute().parent.is_dir():
        raise FileNotFoundError(f"no such directory for {file}: {Path(file).absolute().parent}")


def console():
    from rich.console import Console

    # the stream that was standard output before main() sent what libraries print elsewhere; a path may hold [brackets]
    return Console(file=OUTPUT or sys.stdout, markup=False)


def weight_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def layer_names(numbers: list[int]) -> str:
    """``layers 3–5, 9`` of 3, 4, 5, 9."""
    groups: list[list[int]] = []
    for number in sorted(numbers):
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    names = ", ".join(str(group[0]) if len(group) == 1 else f"{group[0]}–{group[-1]}" for group in groups)
    return f"{'layer' if len(numbers) == 1 else 'layers'} {names}"


def portable(command: str) -> str:
    """A command without the folders of the machine it ran on: reports and cards are for others to read."""
    return re.sub(r"(?<![\w.:/])(?:~|\.{1,2})?/(?:[^\s/'\"]+/)*([^\s/'\"]+)/?", r"\1", command)


def show_report(report, output: Path | None) -> None:
    out = console()
    out.print(report.table())
    out.print(
        f"{report.model}: {report.sparsity:.2%} of {sum(p.numel for p in report.parameters) / 1e6:.1f} M weights are zero "
        f"({report.total_parameters / 1e6:.1f} M parameters in all); "
        f"{report.macs_sparse / 1e9:.4g} of {report.macs_dense / 1e9:.4g} GMACs per token; "
        f"{'runs as 2:4' if report.parameters and all(p.two_four for p in report.parameters) else 'not 2:4'}"
    )
    for note in report.all_notes():
        out.print(f"note: {note}")
    if output is not None:
        spent = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in report.timings.items())
        out.print(
            f"{report.seconds:.1f} s ({spent}), peak memory {report.peak_memory_bytes / 2**30:.2f} GiB, {report.device}"
        )
        out.print(
            f"saved {output} ({weight_bytes(output) / 1e6:.1f} MB of weights), with {REPORT_FILE} and a model card"
        )
