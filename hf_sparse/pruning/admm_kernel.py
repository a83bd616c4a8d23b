"""The elementwise half of an ADMM iteration on a GPU: two launches instead of a dozen.

Between two matrix products an iteration of :mod:`hf_sparse.pruning.admm` only adds and multiplies [rows, in] tensors, and on a
fast GPU that traffic costs several times the product. The sparse copy S and the dual U need not be stored: with C the
last candidate B + U / rho and M its mask, S = C where M, U = rho C where not M. What is read and written is then C, M, the
dense weight and the product, once each:

    pull:  (anchor - rho) change + rho (S - W) - U           the right side of the first step, in the product's dtype
    step:  C = U / rho + change + W  and its scores C^2      the candidate of the next mask

Without Triton, or on a CPU, the same is done with tensor operations.
"""

from __future__ import annotations  # the kernels annotate with tl.constexpr before tl exists

import functools

import torch

from hf_sparse.pruning.obs_kernel import _has_triton

__all__ = ["pull", "step"]

tl = None  # triton.language, bound by _kernels()
_BLOCK = 1024


def pull(
    candidate: torch.Tensor,
    mask: torch.Tensor,
    dense: torch.Tensor,
    change: torch.Tensor,
    penalty: float,
    previous: float,
    anchor: float,
) -> torch.Tensor:
    """The right side of the first step, ``[rows, in]`` in the dtype of ``change``.

    Args:
        candidate, dense: ``[rows, in]`` float32. mask: boolean, that of ``candidate``. change: B - W.
        penalty: rho now; previous: rho when ``candidate`` was made (0: the dual is zero). anchor: that of the inverse.
    """
    if not _has_triton(candidate):
        sparse = torch.where(mask, candidate, 0.0)
        dual = (candidate - sparse).mul_(previous)
        return sparse.sub_(dense).mul_(penalty).sub_(dual).add_(change, alpha=anchor - penalty).to(change.dtype)
    out = torch.empty_like(change)
    scalars = (penalty, previous, anchor, candidate.numel())
    grid = (-(-candidate.numel() // _BLOCK),)
    _kernels()["pull"][grid](candidate, mask.view(torch.uint8), dense, change, out, *scalars, BLOCK=_BLOCK)
    return out


def step(
    candidate: torch.Tensor,
    mask: torch.Tensor,
    dense: torch.Tensor,
    change: torch.Tensor,
    penalty: float,
    previous: float,
    dead: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next candidate, written over ``candidate``, and its scores with dead inputs at zero; both ``[rows, in]`` float32.

    Args:
        dead: ``[in]`` boolean. The others as in :func:`pull`.
    """
    if not _has_triton(candidate):
        candidate.masked_fill_(mask, 0.0).mul_(previous / penalty).add_(change).add_(dense)
        return candidate, candidate.square().masked_fill_(dead, 0.0)
    scores = torch.empty_like(candidate)
    scalars = (previous / penalty, candidate.numel(), candidate.shape[1])
    grid = (-(-candidate.numel() // _BLOCK),)
    inputs = (candidate, mask.view(torch.uint8), dense, change, dead.view(torch.uint8), scores)
    _kernels()["step"][grid](*inputs, *scalars, BLOCK=_BLOCK)
    return candidate, scores


@functools.cache
def _kernels() -> dict:
    import triton
    import triton.language

    globals()["tl"] = triton.language
    return {"pull": triton.jit(_pull), "step": triton.jit(_step)}


def _pull(candidate, mask, dense, change, out, penalty, previous, anchor, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    c = tl.load(candidate + at, mask=inside)
    kept = tl.load(mask + at, mask=inside) != 0
    w = tl.load(dense + at, mask=inside)
    d = tl.load(change + at, mask=inside).to(tl.float32)
    sparse = tl.where(kept, c, 0.0)
    dual = tl.where(kept, 0.0, c) * previous
    value = (sparse - w) * penalty - dual + (anchor - penalty) * d
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


def _step(candidate, mask, dense, change, dead, scores, ratio, count, columns, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    c = tl.load(candidate + at, mask=inside)
    kept = tl.load(mask + at, mask=inside) != 0
    w = tl.load(dense + at, mask=inside)
    d = tl.load(change + at, mask=inside).to(tl.float32)
    never = tl.load(dead + at % columns, mask=inside) != 0
    value = tl.where(kept, 0.0, c) * ratio + d + w
    tl.store(candidate + at, value, mask=inside)
    tl.store(scores + at, tl.where(never, 0.0, value * value), mask=inside)
