"""What every solver returns, the error they all report, and how precise their products are."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

__all__ = ["Solution", "matmul_precision", "relative_error"]


@dataclass
class Solution:
    """One pruned matrix.

    Attributes:
        weight: ``[out, in]`` float32, zero outside the mask.
        mask: ``[out, in]`` boolean, True = kept.
        error: relative reconstruction error on the calibration inputs (:func:`relative_error`).
    """

    weight: torch.Tensor
    mask: torch.Tensor
    error: float


def relative_error(dense: torch.Tensor, pruned: torch.Tensor, hessian: torch.Tensor) -> float:
    """||X W^T - X W'^T||^2 / ||X W^T||^2 from the undamped Hessian X^T X: tr(D H D^T) / tr(W H W^T), D = W - W'.

    Args:
        dense, pruned: ``[out, in]`` float32.
        hessian: ``[in, in]``.
    """
    difference = dense - pruned
    with matmul_precision("tf32"):  # three digits of an error will do
        lost = ((difference @ hessian) * difference).sum()
        total = ((dense @ hessian) * dense).sum()
    return float(lost / total) if float(total) > 0 else 0.0


@contextmanager
def matmul_precision(precision: str = "ieee") -> Iterator[None]:
    """Float32 products on a GPU in full (``ieee``) or with TF32 inputs (``tf32``), whatever the caller allows elsewhere."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before
