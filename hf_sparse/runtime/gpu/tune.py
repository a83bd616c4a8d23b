"""The fastest of a few configurations of a kernel, measured once and remembered for this kind of device.

While a model decodes, every weight comes from memory, because all the others passed through the cache since. The measurement
copies that: a CUDA graph for each candidate goes round among so many copies of the weight that they exceed the last-level
cache, the graphs take turns, and medians count. What it found lies in ``gpu_kernels.json`` of the cache directory, by device
and by the kernels' sources. The choice changes nothing of what a kernel computes but the order of its float32 sums.
"""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from hf_sparse.runtime.cache import recall, remember
from hf_sparse.runtime.gpu.timing import GraphOfCalls

__all__ = ["fastest"]

ROUNDS = 7
WORTH_IT = 1 << 20  # bytes: smaller weights take what is listed first
MOST_COPIES = 64
CHOICES = "gpu_kernels.json"
_known: dict[str, dict] = {}


def fastest(
    key: str, candidates: list[dict], trials: Callable[[int], list[list[Callable]]], nbytes: int, device: torch.device
) -> dict:
    """One of ``candidates``; the first where there is nothing to measure or no way to (while a graph is being captured).

    Args:
        key: what the choice depends on, besides the device and the kernels' sources.
        trials: number of copies -> for each candidate a call on each copy.
        nbytes: size of one.
    """
    if len(candidates) == 1 or nbytes < WORTH_IT:
        return candidates[0]
    key = f"{torch.cuda.get_device_name(device)} {_sources()} {key}"
    if key not in _known:
        _known.update(recall(CHOICES))
    if _known.get(key) not in candidates:
        if torch.cuda.is_current_stream_capturing():
            return candidates[0]
        cold = 4 * getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
        try:
            times = _measure(trials(min(MOST_COPIES, 2 + cold // nbytes)), device)
        except torch.cuda.OutOfMemoryError:
            return candidates[0]
        _known[key] = candidates[min(range(len(candidates)), key=times.__getitem__)]
        remember(CHOICES, key, _known[key])
    return _known[key]


def _measure(calls: list[list[Callable]], device: torch.device) -> list[float]:
    """Seconds of each list of calls."""
    graphs, times = [GraphOfCalls(candidate, device) for candidate in calls], [[] for _ in calls]
    for round in range(ROUNDS + 1):  # the first one warms up
        for graph, spent in zip(graphs, times, strict=True):
            seconds = graph()
            if round:
                spent.append(seconds)
    return [median(spent) for spent in times]


@functools.cache
def _sources() -> str:
    texts = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.cu*"))]
    return hashlib.sha256(b"".join(texts)).hexdigest()[:8]
