"""What a run costs: seconds by phase, peak memory, the device and the versions it ran on, and a progress bar."""

import importlib.metadata
import platform
import resource
import sys
import time
from contextlib import contextmanager

import torch

__all__ = [
    "Timer",
    "device_name",
    "peak_memory",
    "progress_bar",
    "reset_peak_memory",
    "tables_side_by_side",
    "versions",
]


class Timer:
    """Seconds by phase; on an accelerator each phase waits for its work, a handful of waits per layer."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str):
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    @contextmanager
    def around(self, phase: str, context):
        """Times the beginning and the end of a context, not what happens inside."""
        with self(phase):
            value = context.__enter__()
        try:
            yield value
        except BaseException as error:
            if not context.__exit__(type(error), error, error.__traceback__):
                raise
        else:
            with self(phase):
                context.__exit__(None, None, None)


@contextmanager
def progress_bar(show: bool, what: str, total: int):
    """A bar on standard error; yields a function that advances it by one and says what was done."""
    if not show:
        yield lambda text: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    left = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*left, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda text: bar.update(task, advance=1, description=f"{what} {text}")


def tables_side_by_side(rows: list[str], columns: dict[str, list[str]], width: int) -> list:
    """Rich Tables with one column per entry of ``columns``, as many beside each other as fit into ``width`` characters.

    Words are not broken: a heading takes several lines, a cell is as wide as its widest word or line.
    """
    from rich.table import Table

    parts: list[list[str]] = []
    left = 0
    for label, cells in columns.items():
        needs = 3 + max(len(word) for word in (*label.split(), *"\n".join(cells).split("\n")))
        if not parts or needs > left:
            parts.append([])
            left = width - max(map(len, rows)) - 4
        parts[-1].append(label)
        left -= needs
    tables = []
    for labels in parts:
        table = Table("", *labels, show_lines=any("\n" in cell for label in labels for cell in columns[label]))
        for place, name in enumerate(rows):
            table.add_row(name, *(columns[label][place] for label in labels))
        tables.append(table)
    return tables


def device_name(device: torch.device) -> str:
    """The accelerator's name, or the processor's with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()} ({torch.get_num_threads()} threads)"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.init()  # "cuda:0" alone does not start it, and there are no statistics before
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: the accelerator's peak since the last reset, or the process's resident peak since it started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, kilobytes on Linux


def versions() -> dict[str, str]:
    """Versions of everything a result depends on."""
    result = {"python": platform.python_version()}
    for package in ("hf-sparse", "torch", "transformers", "safetensors"):
        try:
            result[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            result[package] = "not installed as a package"
    return result
