"""The two largest singular values of many matrices, fast enough to watch them during training.

Two values do not ask for a decomposition. Up to a side of 1024 a matrix X becomes its Gram matrix X X^T (n x n, n the smaller
side; of a 0/1 mask in float32 it is exact, the entries being whole numbers). Up to n = 384 all its eigenvalues are taken;
above that, block Lanczos finds two: a basis Q of the Krylov space [B, A B, A^2 B, ...] of A = X X^T is kept orthogonal in
full, and the largest eigenvalues of the small matrix Q^T A Q (Ritz values) approach those of A from below. They are done when
their residuals say that they are known to 1e-5 of themselves. Work is float64; small eigenvalue problems go to the CPU.
"""

import torch
from torch import nn

__all__ = ["two_largest"]

_FULL = 384  # up to this side, all eigenvalues of the Gram matrix (7 ms)
_GRAM = 1024  # up to this side, forming the Gram matrix costs less than it saves
_BLOCK = 3  # eigenvalues of this multiplicity are still found as many; two are needed
_ZERO = 1e-7  # of the largest: what float64 leaves of a singular value that is zero, squared and rooted


def two_largest(matrices: torch.Tensor, tolerance: float = 1e-5) -> torch.Tensor:
    """The two largest singular values of each of ``[batch, rows, columns]`` as float64 ``[batch, 2]`` on the CPU."""
    if matrices.shape[1] > matrices.shape[2]:
        matrices = matrices.mT
    side = matrices.shape[1]
    if side <= _GRAM:
        gram = (matrices @ matrices.mT).double()
        if side <= _FULL:
            squares = torch.linalg.eigvalsh(gram.cpu()).flip(-1)[:, :2]
            squares = nn.functional.pad(squares, (0, 2 - squares.shape[1]))
        else:
            squares = _lanczos(lambda q: (q.mT @ gram).mT, gram.sum(dim=-1), tolerance)
    else:
        matrices = matrices.double()
        squares = _lanczos(lambda q: matrices @ (matrices.mT @ q), matrices.sum(dim=-1), tolerance)
    values = squares.clamp(min=0).sqrt()
    return values.masked_fill(values <= _ZERO * values[:, :1], 0.0)


def _lanczos(apply, first: torch.Tensor, tolerance: float) -> torch.Tensor:
    """The two largest eigenvalues of symmetric operators by block Lanczos, ``[batch, 2]`` on the CPU.

    ``first`` ``[batch, n]`` begins the block (the degrees, near the leading vector); the rest of it is random. A Ritz value is
    off by at most its residual r, and by about r^2 / (distance to the next): the smaller decides. A direction in which the
    block adds nothing becomes zero, which adds an eigenvalue 0 to the projection; when all are zero the result is exact.
    """
    batch, side = first.shape
    random = torch.randn(side, _BLOCK - 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    block = torch.cat([first[..., None], random.to(first.device).expand(batch, -1, -1)], dim=-1)
    basis = first.new_zeros(batch, side, 0)
    block = _orthonormal(block, basis)
    projected = first.new_zeros(batch, 0, 0)
    for step in range(1, -(-side // _BLOCK) + 2):
        basis = torch.cat([basis, block], dim=-1)
        image = apply(block)
        column = basis.mT @ image
        projected = nn.functional.pad(projected, (0, _BLOCK, 0, _BLOCK))
        projected[..., -_BLOCK:], projected[:, -_BLOCK:] = column, column.mT
        image -= basis @ column
        image -= basis @ (basis.mT @ image)
        if step % 6 == 0 or step * _BLOCK >= side:
            ritz, vectors = torch.linalg.eigh(((projected + projected.mT) / 2).cpu())
            rest = (image.mT @ image).cpu()
            last = vectors[:, -_BLOCK:, -2:]
            residual = (last.mT @ rest @ last).diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
            gap = (ritz[:, -2:] - ritz[:, -3:-1]).clamp(min=1e-300)
            error = torch.minimum(residual, residual * residual / gap)
            known = error <= 2 * tolerance * ritz[:, -2:]  # of the square: twice that of the value
            if bool((known | (ritz[:, -2:] <= _ZERO**2 * ritz[:, -1:])).all()) or step * _BLOCK >= side + _BLOCK:
                break
        block = _orthonormal(image, basis)
        if not block.any():
            ritz = torch.linalg.eigvalsh(((projected + projected.mT) / 2).cpu())
            break
    return ritz[:, -2:].flip(-1)


def _orthonormal(block: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """The block's columns made orthonormal, to each other and to the basis; those that depend on others become zero."""
    scale = torch.linalg.vector_norm(block, dim=(1, 2), keepdim=True).clamp(min=1e-300)
    done = block[..., :0]
    for index in range(block.shape[-1]):
        vector = block[..., index : index + 1]
        for _ in range(2):
            vector = vector - done @ (done.mT @ vector)
        norm = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
        done = torch.cat([done, torch.where(norm > 1e-9 * scale, vector / norm.clamp(min=1e-300), 0.0)], dim=-1)
    done = done - basis @ (basis.mT @ done)
    norm = torch.linalg.vector_norm(done, dim=1, keepdim=True)
    return torch.where(norm > 0.5, done / norm.clamp(min=0.5), 0.0)
