"""Which is faster for a layer of this shape and density on this machine, dense or one of the packed layouts?

Nothing but a measurement knows: it depends on the number of threads, on what the vendor's library does with one token, on
launch overheads. So each shape is timed once, a few tens of milliseconds, and the times are kept in a small JSON file per
user, under the name of the processor and of the versions that decide.

While a model decodes, every layer is read from memory anew, because all the others passed through the cache since. The
measurement copies that: it goes round among so many copies of the weight that they exceed the last-level cache, and the
candidates take turns. The quickest round counts: what else the machine does can only add, and the choice is kept for long.
"""

import functools
import time
from collections.abc import Callable

import torch

from hf_sparse.instruments import device_name, versions
from hf_sparse.patterns import NM
from hf_sparse.runtime.cache import recall, remember
from hf_sparse.runtime.cpu.dense import prepare_dense
from hf_sparse.runtime.gpu.timing import GraphOfCalls
from hf_sparse.runtime.layouts import layout_module

__all__ = ["fastest"]

TIMES = "times.json"
ROUNDS = 7
COLD_BYTES = {"cpu": 96 << 20, "cuda": 256 << 20}  # more than the last-level caches of today
MAX_COPIES = 256
DENSITY_STEP = 0.05


def fastest(
    shape: tuple[int, int],
    dtype: torch.dtype,
    density: float,
    device: torch.device,
    batch_size: int,
    candidates: list[str],
) -> dict[str, float]:
    """Microseconds of a call with ``batch_size`` tokens for every candidate, measured or remembered: ``dense`` (torch),
    ``rows`` (our kernel for dense rows, CPU) or a layout (``2:4``: all are measured on a 2:4 weight)."""
    density = round(round(density / DENSITY_STEP) * DENSITY_STEP, 2)
    installed = versions()
    key = " ".join(
        [device_name(device), f"torch-{installed['torch']}", f"hf-sparse-{installed['hf-sparse']}"]
        + [f"{shape[0]}x{shape[1]}", str(dtype).removeprefix("torch."), f"density-{density}", f"tokens-{batch_size}"]
        + ["2:4"] * ("2:4" in candidates)
    )
    times = recall(TIMES).get(key, {})
    if set(times) != set(candidates):
        times = measure(shape, dtype, density, device, batch_size, candidates)
        remember(TIMES, key, times)
    return times


def measure(shape, dtype, density, device, batch_size, candidates) -> dict[str, float]:
    """The measurement itself, on random weights."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(shape, generator=generator, device=device).to(dtype)
    if "2:4" in candidates:
        weight.masked_fill_(~NM(2, 4).mask(weight.abs().float()), 0)
    else:
        weight.masked_fill_(torch.rand(shape, generator=generator, device=device) >= density, 0)
    x = torch.randn(batch_size, shape[1], generator=generator, device=device).to(dtype)
    sweeps = {name: _sweep(name, weight, x) for name in candidates}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(ROUNDS):
        for name, (sweep, calls) in sweeps.items():
            times[name].append(sweep() / calls)
    return {name: round(1e6 * min(values), 2) for name, values in times.items()}


def _sweep(name: str, weight: torch.Tensor, x: torch.Tensor) -> tuple[Callable[[], float], int]:
    """A function that calls every copy once and returns the seconds, and the number of copies."""
    shape, dtype, device = tuple(weight.shape), weight.dtype, weight.device
    if name in ("dense", "rows"):
        tensors = {"weight": weight}
    else:
        tensors = layout_module(name).pack_tiles([weight], shape, dtype)
    size = sum(tensor.nbytes for tensor in tensors.values())
    copies = min(MAX_COPIES, 1 + -(-COLD_BYTES[device.type] // max(1, size)))

    def call_of(copy: dict[str, torch.Tensor]):
        if name == "dense":
            return lambda x: torch.nn.functional.linear(x, copy["weight"])
        if name == "rows":
            return prepare_dense(copy["weight"])
        return layout_module(name).prepare(copy, shape, dtype, None)

    calls = [call_of({key: tensor.clone() for key, tensor in tensors.items()}) for _ in range(copies)]
    if device.type == "cuda":
        return GraphOfCalls([functools.partial(call, x) for call in calls], device), copies

    def run():
        for call in calls:
            call(x)

    with torch.inference_mode():
        run()
    return _on_cpu(run), copies


def _on_cpu(run: Callable[[], None]) -> Callable[[], float]:
    def sweep() -> float:
        with torch.inference_mode():
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin

    return sweep
