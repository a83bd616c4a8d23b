"""Saliency: how much each weight matters.

A saliency is a plain function ``(weight [out, in], statistics) -> scores [out, in]``; the lowest scores are pruned. Any
callable with that signature works in place of a name. With x a row of the layer's input, X all of them, g the gradient:

    magnitude   |w|
    random      uniform noise, seeded
    wanda       |w_ij| * ||X_j||                                                arxiv.org/abs/2306.11695
    ria         (|w_ij| / sum_i |w_ij| + |w_ij| / sum_j |w_ij|) * ||X_j||^1/2   openreview.net/forum?id=Tr0lPx9woF
    obs         w_ij^2 / [H^-1]_jj, H = X^T X damped                            Hassibi & Stork 1993
    gradient    E|g_ij|
    taylor      |w_ij| * E|g_ij|                                                arxiv.org/abs/1906.10771

What a saliency needs to see is its attribute ``needs``: ``nothing``, ``inputs`` (the input norms), ``hessian`` or
``gradient``; a callable without the attribute gets ``inputs``. SparseGPT and ALPS choose weights while they update the
others, so they are solvers (:mod:`hf_sparse.pruning`) rather than functions of one weight, but go by the same argument.
"""

import difflib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["SALIENCIES", "SOLVERS", "Statistics", "default_pattern", "get", "needs", "noise"]

SOLVERS = ("sparsegpt", "alps")  # names that choose the mask and update the weights together; both need a Hessian


@dataclass
class Statistics:
    """What calibration saw of one weight's input.

    Attributes:
        tokens: rows of X seen (padding excluded; for an expert, the tokens routed to it).
        sum_squares: ``[in]``, sum over tokens of x_j^2.
        hessian: ``[in, in]`` float32, X^T X, where asked for.
        gradient: ``[out, in]``, mean over samples of |dL/dw|, where asked for.
        name: the parameter's name, and ``seed`` the config's: together they seed the random saliency.
        damp: the config's; the ridge of ``obs`` as a share of the Hessian's mean diagonal.
    """

    tokens: int = 0
    sum_squares: torch.Tensor | None = None
    hessian: torch.Tensor | None = None
    gradient: torch.Tensor | None = None
    name: str = ""
    seed: int = 0
    damp: float = 0.01


def magnitude(weight: torch.Tensor, statistics: Statistics) -> torch.Tensor:
    return weight.abs()


def random(weight: torch.Tensor, statistics: Statistics) -> torch.Tensor:
    return noise(weight.shape, f"{statistics.seed}/{statistics.name}", weight.device)


def noise(shape: tuple[int, ...], key: str, device: torch.device | str = "cpu", first: int = 0) -> torch.Tensor:
    """Uniform float32 numbers in (0, 1), a pure function of ``key`` and the position: no generator, no state.

    Counter-based (the finaliser of SplitMix64 applied to key + index), so that a CPU, a GPU and every shard of a tensor see
    the same numbers.

    Args:
        shape: shape of the result.
        key: any string; another key is another stream.
        first: flat index of the first element, for a shard of consecutive rows of a larger tensor.
    """
    start = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little", signed=True)
    size = torch.Size(shape).numel()
    result = torch.empty(size, dtype=torch.float32, device=device)
    for low in range(0, size, _NOISE_CHUNK):  # 8-byte temporaries of a whole weight would be several times the weight
        high = min(size, low + _NOISE_CHUNK)
        x = torch.arange(first + low, first + high, dtype=torch.int64, device=device)
        x.mul_(_signed(0x9E3779B97F4A7C15)).add_(start)  # int64 wraps around, as the algorithm wants
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x.bitwise_xor_((x >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(_signed(factor))
        x = (
            x >> 41
        ) & 0x7FFFFF  # the 23 high bits that the last xor-shift leaves as they are: v + 1/2 is exact in float32
        result[low:high] = (x.float() + 0.5) / (1 << 23)
    return result.reshape(shape)


_NOISE_CHUNK = 1 << 24


def _signed(value: int) -> int:
    """An unsigned 64-bit constant as the int64 of the same bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


def wanda(weight: torch.Tensor, statistics: Statistics) -> torch.Tensor:
    return weight.abs() * statistics.sum_squares.sqrt()


def ria(weight: torch.Tensor, statistics: Statistics) -> torch.Tensor:
    size = weight.abs()
    tiny = torch.finfo(size.dtype).tiny  # an all-zero row or column has no relative importance, not a NaN
    relative = size / size.sum(dim=0, keepdim=True).clamp_min(tiny) + size / size.sum(dim=1, keepdim=True).clamp_min(
        tiny
    )
    return relative * statistics.sum_squares.sqrt().sqrt()


def obs(weight: torch.Tensor, statistics: Statistics) -> torch.Tensor:
    hessian = statistics.hessian
    ridge = statistics.damp * hessian.diagonal().mean()
    inverse = torch.linalg.inv(hessian + ridge * torch.eye(len(hessian), device=hessian.device))
    return weight.square() / inverse.diagonal()


def gradient(weight: torch.Tensor, statistics: Statistics) -> torch.Tensor:
    return statistics.gradient


def taylor(weight: torch.Tensor, statistics: Statistics) -> torch.Tensor:
    return weight.abs() * statistics.gradient


magnitude.needs = random.needs = "nothing"
wanda.needs = ria.needs = "inputs"
obs.needs = "hessian"
gradient.needs = taylor.needs = "gradient"

SALIENCIES = {f.__name__: f for f in (magnitude, random, wanda, ria, obs, gradient, taylor)}


def get(saliency: str | Callable) -> Callable:
    """The function a name stands for (a callable is returned as it is).

    Raises:
        ValueError: no such saliency; the message has the near match. Solver names are not functions and raise too.
    """
    if callable(saliency):
        return saliency
    if saliency in SALIENCIES:
        return SALIENCIES[saliency]
    if saliency in SOLVERS:
        raise ValueError(
            f"{saliency!r} is a solver (hf_sparse.pruning), not a function of one weight; give it to prune()"
        )
    known = [*SALIENCIES, *SOLVERS]
    near = difflib.get_close_matches(str(saliency), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
    raise ValueError(f"unknown saliency {saliency!r}; {hint}")


def needs(saliency: str | Callable) -> str:
    """What a saliency or solver must see: ``nothing``, ``inputs``, ``hessian`` or ``gradient``."""
    return "hessian" if saliency in SOLVERS else getattr(get(saliency), "needs", "inputs")


def default_pattern(saliency: str | Callable) -> str:
    """The comparison group of the paper: Wanda ranks within an output row, the others within the matrix."""
    return "row" if saliency == "wanda" else "unstructured"
