"""Patterns: which shapes a set of zeros may take.

A pattern turns scores into a mask. Scores have the shape of the weight seen as a matrix, ``[out, in]`` (rows are output
units, columns input units, whatever the storage order; leading dimensions are independent matrices, e.g. experts).
A mask is boolean, True = kept. The lowest scores are dropped, counts are exact, and ties are broken by index (the lower
index is dropped first), so that equal scores always give equal masks.

    parse("unstructured")      any zeros; one threshold for the whole matrix
    parse("row")               any zeros; the same share in every output row, exact in total
    parse("constant-fan-in")   every output row keeps the same number of inputs (SRigL, arxiv.org/abs/2305.02299)
    parse("2:4")               n:m, of every m consecutive inputs n are kept (arxiv.org/abs/2104.08378)
    parse("16x16")             whole blocks of 16 outputs x 16 inputs
    parse("channel")           whole output rows
"""

import math
import re
from dataclasses import dataclass

import torch

__all__ = ["NM", "Block", "Channel", "ConstantFanIn", "Pattern", "Unstructured", "parse", "pruned_count"]


def pruned_count(sparsity: float, numel: int) -> int:
    """How many of ``numel`` entries a sparsity in [0, 1] removes: the nearest integer (halves to even)."""
    return round(sparsity * numel)


def _drop_lowest(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Boolean ``[groups, n]``, True at the ``k`` lowest scores of every row; among equals the lower index goes first."""
    groups, n = scores.shape
    if k <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if k >= n:
        return torch.ones_like(scores, dtype=torch.bool)
    if n <= 16:  # groups of n:m: counting who ranks lower takes n passes and no sort
        index = torch.arange(n, device=scores.device)
        rank = torch.zeros(scores.shape, dtype=torch.uint8, device=scores.device)
        for other in range(n):
            rival = scores[:, other : other + 1]
            rank += (rival < scores) | ((rival == scores) & (index > other))
        return rank < k
    if scores.is_cuda:  # kthvalue runs one thread block per row, far slower than a sort when there are few long rows
        threshold = scores.sort(dim=1).values[:, k - 1 : k]
    else:
        threshold = scores.kthvalue(k, dim=1, keepdim=True).values
    drop = scores < threshold
    ties = scores == threshold
    missing = k - drop.sum(dim=1, keepdim=True)
    return drop | (ties & (ties.cumsum(dim=1) <= missing))


@dataclass(frozen=True)
class Pattern:
    """Base of all patterns. Frozen and hashable; ``str(pattern)`` is what :func:`parse` reads."""

    @property
    def implied_sparsity(self) -> float | None:
        """The sparsity the pattern itself fixes (n:m), or None where the caller chooses it."""
        return None

    def unit(self, shape: tuple[int, ...]) -> int:
        """How many weights of a ``[out, in]`` matrix go together: sparsities come in multiples of this."""
        return 1

    def fits(self, shape: tuple[int, ...]) -> str | None:
        """None if a matrix of this ``[..., out, in]`` shape can take the pattern, else the reason why not."""
        return None

    def mask(self, scores: torch.Tensor, sparsity: float | None = None) -> torch.Tensor:
        """Boolean mask like ``scores`` (``[..., out, in]``), True = kept, with exactly the asked number of zeros.

        Raises:
            ValueError: the sparsity is outside [0, 1], contradicts the pattern, or the shape does not divide.
        """
        sparsity = self._resolve(sparsity)
        reason = self.fits(tuple(scores.shape))
        if reason:
            raise ValueError(f"pattern {self} does not fit a weight of shape {tuple(scores.shape)}: {reason}")
        if scores.dim() == 2:
            return ~self._drop(scores, sparsity)
        matrices = scores.reshape(-1, *scores.shape[-2:])
        return torch.stack([~self._drop(matrix, sparsity) for matrix in matrices]).reshape(scores.shape)

    def check(self, weight: torch.Tensor) -> bool:
        """Whether the zeros of ``weight`` (``[..., out, in]``) conform to the pattern."""
        return True

    def _resolve(self, sparsity: float | None) -> float:
        implied = self.implied_sparsity
        if sparsity is None:
            sparsity = implied
        if sparsity is None:
            raise ValueError(f"pattern {self} needs a sparsity")
        if not 0.0 <= sparsity <= 1.0:
            raise ValueError(f"sparsity is the fraction of zeros and lies in [0, 1], got {sparsity}")
        if implied is not None and not math.isclose(sparsity, implied, abs_tol=1e-9):
            raise ValueError(f"pattern {self} always has sparsity {implied:g}, but {sparsity:g} was asked for")
        return sparsity

    def _drop(self, scores: torch.Tensor, sparsity: float) -> torch.Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Any zeros. ``scope="tensor"`` ranks the whole matrix; ``"row"`` ranks each output row on its own, the counts of
    rows differing by at most one so that the total is exact."""

    scope: str = "tensor"

    def __post_init__(self):
        if self.scope not in ("tensor", "row"):
            raise ValueError(f"scope is 'tensor' or 'row', got {self.scope!r}")

    def _drop(self, scores, sparsity):
        total = pruned_count(sparsity, scores.numel())
        if self.scope == "tensor":
            return _drop_lowest(scores.reshape(1, -1), total).reshape(scores.shape)
        rows = scores.shape[0]
        ends = torch.arange(1, rows + 1) * total // rows
        counts = ends.diff(prepend=ends.new_zeros(1))
        drop = torch.empty_like(scores, dtype=torch.bool)
        for count in counts.unique().tolist():  # at most two different counts
            chosen = (counts == count).to(scores.device)
            drop[chosen] = _drop_lowest(scores[chosen], count)
        return drop

    def __str__(self):
        return "unstructured" if self.scope == "tensor" else "row"


@dataclass(frozen=True)
class ConstantFanIn(Pattern):
    """Every output row keeps the same number of inputs; a row of zeros (an ablated neuron) conforms too."""

    def unit(self, shape):
        return shape[-2]

    def _drop(self, scores, sparsity):
        return _drop_lowest(scores, pruned_count(sparsity, scores.shape[1]))

    def check(self, weight):
        for matrix in weight.reshape(-1, *weight.shape[-2:]):
            fan_in = (matrix != 0).sum(dim=1)
            if fan_in[fan_in > 0].unique().numel() > 1:
                return False
        return True

    def __str__(self):
        return "constant-fan-in"


@dataclass(frozen=True)
class NM(Pattern):
    """Of every ``m`` consecutive inputs, ``n`` are kept."""

    n: int
    m: int

    def __post_init__(self):
        if not 0 < self.n <= self.m:
            raise ValueError(f"n:m keeps n of m with 0 < n <= m, got {self.n}:{self.m}")

    @property
    def implied_sparsity(self):
        return 1.0 - self.n / self.m

    def fits(self, shape):
        if shape[-1] % self.m:
            return f"its input dimension {shape[-1]} is not a multiple of {self.m}"
        return None

    def _drop(self, scores, sparsity):
        return _drop_lowest(scores.reshape(-1, self.m), self.m - self.n).reshape(scores.shape)

    def check(self, weight):
        if weight.shape[-1] % self.m:
            return False
        return bool(((weight != 0).reshape(-1, self.m).sum(dim=1) <= self.n).all())

    def __str__(self):
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Block(Pattern):
    """Whole blocks of ``rows`` outputs x ``cols`` inputs, ranked over the matrix by the sum of their scores."""

    rows: int
    cols: int

    def __post_init__(self):
        if self.rows < 1 or self.cols < 1:
            raise ValueError(f"a block has at least one row and one column, got {self.rows}x{self.cols}")

    def fits(self, shape):
        if shape[-2] % self.rows or shape[-1] % self.cols:
            return f"{shape[-2]}x{shape[-1]} is not made of whole {self.rows}x{self.cols} blocks"
        return None

    def unit(self, shape):
        return self.rows * self.cols

    def _blocks(self, matrix):
        out, inp = matrix.shape
        return matrix.reshape(out // self.rows, self.rows, inp // self.cols, self.cols)

    def _drop(self, scores, sparsity):
        sums = self._blocks(scores).sum(dim=(1, 3))
        drop = _drop_lowest(sums.reshape(1, -1), pruned_count(sparsity, sums.numel())).reshape(sums.shape)
        return drop.repeat_interleave(self.rows, dim=0).repeat_interleave(self.cols, dim=1)

    def check(self, weight):
        if self.fits(tuple(weight.shape)):
            return False
        for matrix in weight.reshape(-1, *weight.shape[-2:]):
            kept = self._blocks(matrix != 0).sum(dim=(1, 3))
            if not ((kept == 0) | (kept == self.rows * self.cols)).all():
                return False
        return True

    def __str__(self):
        return f"{self.rows}x{self.cols}"


@dataclass(frozen=True)
class Channel(Pattern):
    """Whole output rows, ranked by the sum of their scores. The weight keeps its shape: this is a mask, not a resize."""

    def unit(self, shape):
        return shape[-1]

    def _drop(self, scores, sparsity):
        sums = scores.sum(dim=1)
        drop = _drop_lowest(sums.reshape(1, -1), pruned_count(sparsity, sums.numel())).reshape(-1, 1)
        return drop.expand_as(scores).contiguous()

    def check(self, weight):
        kept = (weight != 0).sum(dim=-1)
        return bool(((kept == 0) | (kept == weight.shape[-1])).all())

    def __str__(self):
        return "channel"


_NAMED = {
    "unstructured": Unstructured(),
    "row": Unstructured(scope="row"),
    "constant-fan-in": ConstantFanIn(),
    "channel": Channel(),
}


def parse(text: "str | Pattern") -> Pattern:
    """The pattern a string names: ``unstructured``, ``row``, ``constant-fan-in``, ``channel``, ``n:m`` or ``RxC``.

    Raises:
        ValueError: the string names no pattern, or the numbers make none.
    """
    if isinstance(text, Pattern):
        return text
    if not isinstance(text, str):
        raise ValueError(f"a pattern is a string such as 'unstructured' or '2:4', got {text!r}")
    if text in _NAMED:
        return _NAMED[text]
    if found := re.fullmatch(r"(\d+):(\d+)", text):
        return NM(int(found[1]), int(found[2]))
    if found := re.fullmatch(r"(\d+)x(\d+)", text):
        return Block(int(found[1]), int(found[2]))
    raise ValueError(
        f"unknown pattern {text!r}; known are {', '.join(_NAMED)}, n:m (such as 2:4) and RxC (such as 16x16)"
    )
