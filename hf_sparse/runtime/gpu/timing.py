"""Seconds that calls take on a GPU, without the launches from Python: captured in a CUDA graph and replayed."""

from collections.abc import Callable

import torch

__all__ = ["GraphOfCalls"]


class GraphOfCalls:
    """Calls, one after another, as one CUDA graph; ``graph()`` replays them and returns the seconds that took.

    Each call runs once before it is captured, so that kernels are compiled and loaded. The calls are kept: a graph knows
    addresses only, and the memory it reads has to live as long.

    Args:
        calls: functions without arguments.
        device: the CUDA device they run on (default: the current one).
    """

    def __init__(self, calls: list[Callable[[], object]], device: torch.device | None = None):
        self.calls, self.device = calls, device
        with torch.cuda.device(device), torch.inference_mode():
            for call in calls:
                call()
            torch.cuda.synchronize(device)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                for call in calls:
                    call()

    def __call__(self) -> float:
        with torch.cuda.device(self.device):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            self.graph.replay()
            end.record()
            end.synchronize()
        return begin.elapsed_time(end) / 1e3
