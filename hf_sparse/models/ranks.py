"""How many branches, or which rank, a Sparse-IFT layer has, so that it costs what the dense one did: exact arithmetic.

Computed in fractions, because as floats ``1 / (1 - 0.9)`` is a little more than 10 and a rank comes out one too large; rounded
up for factorized and down for doped layers, as in the released code (arxiv.org/abs/2303.11525). Needs nothing but Python: this
file travels with checkpoints that are loaded without hf_sparse.
"""

import math
from fractions import Fraction

__all__ = ["doped_rank", "exact", "factorized_rank", "parallel_branches"]


def exact(sparsity: float) -> Fraction:
    """The decimal number somebody wrote: 9/10 for 0.9.

    Raises:
        ValueError: it is outside [0, 1).
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is the fraction of zeros and lies in [0, 1), got {sparsity!r}")
    return Fraction(str(sparsity))


def parallel_branches(sparsity: float) -> int:
    """How many branches of this sparsity cost what one dense layer does.

    Raises:
        ValueError: 1 / (1 - sparsity) is no whole number.
    """
    branches = 1 / (1 - exact(sparsity))
    whole = round(branches)
    if abs(branches - whole) > Fraction(1, 1000):
        near = sorted({1 - Fraction(1, n) for n in (math.floor(branches), math.ceil(branches))})
        raise ValueError(
            f"the parallel family needs a whole number of branches, 1 / (1 - sparsity); sparsity {sparsity:g} gives "
            f"{float(branches):.3f}. The nearest that fit are {' and '.join(f'{float(s):.6g}' for s in near)}"
        )
    return whole


def factorized_rank(fan_in: int, out: int, sparsity: float, sparse_u_only: bool = False) -> int:
    """The rank d at which sparse U [d, fan_in] and V [out, d] cost what ``out x fan_in`` dense weights do, rounded up."""
    density = 1 - exact(sparsity)
    of_one_rank = density * fan_in + out if sparse_u_only else density * (fan_in + out)
    return math.ceil(fan_in * out / of_one_rank)


def doped_rank(fan_in: int, out: int, sparsity: float) -> int:
    """The rank d at which dense U [d, fan_in] and V [out, d] cost what the zeros of W save, rounded down."""
    return math.floor(exact(sparsity) * fan_in * out / (fan_in + out))
