"""Cannistraci-Hebb training, soft rule (CHTs, arxiv.org/abs/2501.19107): grow links that the topology predicts.

No gradient is needed: a missing link (u, v) of the bipartite graph of a mask ``[out, in]`` scores high where many paths of
length 3, u - t - d - v, lead around it (t an input of u, d another reader of t, v an input of d), and where the nodes t and d
in between mind their own business. They form the local community of (u, v). Such a node z has i_z links to nodes of the
community and e_z links that leave it (the links to u and v count as neither), and the node-based scores are

    CH2-L3n    sum over z of (1 + i_z) / (1 + e_z)        the default of the authors' Transformer runs
    CH3-L3n    sum over z of 1 / (1 + e_z)

every z counted once, on both sides. With A the mask as 0/1 and C = A Aᵀ (common inputs of two outputs), deg_d inputs of d:

    e[u, d] = deg_d - C[u, d] - 1,   i[u, d] = C[u, d],   score = S A + (S' Aᵀ)ᵀ

where S[u, d] is the term of d wherever C[u, d] > 0, and S' the same for Aᵀ. Two products of matrices per side: O(out² in +
in² out) time, ``out² + in²`` floats of memory.

Both halves of an update are drawn rather than ranked, so that early, unreliable weights and topologies decide nothing for
good: links are *kept* with probability p ~ |w|^T, T rising from 1 to 3 (:func:`temperature`), and *grown* with p ~ score.

Drawing k of N without replacement is a top-k: add independent Gumbel noise G = -log(-log U) to log p and take the k largest
sums. The largest of log p + G is item j with probability p_j / sum p (Gumbel-max); noise is independent, so the second largest
is distributed like the largest among the others, and so on, which is exactly drawing one after the other
(arxiv.org/abs/1903.06059; ``torch.multinomial`` without replacement does the same). So the caller passes uniform noise U of
the matrix' shape, nothing here holds a random state, equal noise gives equal masks on every rank, and counts are exact.
Links of probability zero are taken only when there are no others.
"""

import torch

from hf_sparse.patterns import _drop_lowest

__all__ = ["link_scores", "soft_drop", "soft_grow", "temperature"]


def temperature(step: int, end: int, first: float = 1.0, last: float = 3.0) -> float:
    """The exponent T of removal at an optimizer step: linear from ``first`` at 0 to ``last`` at ``end``, then constant."""
    return first + (last - first) * min(max(step / end, 0.0), 1.0)


@torch.no_grad()
def link_scores(mask: torch.Tensor, rule: str = "CH2") -> torch.Tensor:
    """Scores of the missing links of a mask, CH2-L3n or CH3-L3n.

    Args:
        mask: ``[out, in]`` boolean, True = link.
        rule: ``CH2`` or ``CH3``.

    Returns:
        ``[out, in]`` float32, zero at existing links and where no path of length 3 leads.

    Raises:
        ValueError: unknown rule, or ``mask`` is no matrix.
    """
    if rule not in ("CH2", "CH3"):
        raise ValueError(f"the rules of link prediction are 'CH2' and 'CH3', got {rule!r}")
    if mask.dim() != 2:
        raise ValueError(f"links are the entries of an [out, in] matrix, got shape {tuple(mask.shape)}")
    links = mask.float()
    return (_through(links, rule) + _through(links.T, rule).T).masked_fill_(mask.bool(), 0.0)


def _through(links: torch.Tensor, rule: str) -> torch.Tensor:
    """``[out, in]``: for every (u, v), the terms of the outputs d of its local community."""
    common = links @ links.T
    external = (links.sum(dim=1) - common - 1).clamp_min_(0)  # -1 where d has no input outside u's: no path ends there
    term = (common > 0) / (external + 1)
    if rule == "CH2":
        term *= common + 1
    return term @ links


@torch.no_grad()
def soft_drop(
    importance: torch.Tensor, mask: torch.Tensor, noise: torch.Tensor, *, drop: int, temperature: float
) -> torch.Tensor:
    """Keeps ``nnz - drop`` links, drawn with probability p ~ importance^temperature.

    Args:
        importance: ``[out, in]`` >= 0, such as ``weight.abs()``.
        mask: boolean, the same shape, True = link.
        noise: uniform in (0, 1), the same shape.
        drop: how many links go.
        temperature: T >= 0; 0 draws uniformly, infinity would keep the largest.

    Returns:
        Boolean mask, a subset of ``mask``.

    Raises:
        ValueError: shapes differ, or there are fewer than ``drop`` links.
    """
    links = int(mask.sum())
    if not 0 <= drop <= links:
        raise ValueError(f"{drop} links cannot be dropped of {links}")
    return _draw(temperature * _log(importance), mask, noise, links - drop)


@torch.no_grad()
def soft_grow(scores: torch.Tensor, mask: torch.Tensor, noise: torch.Tensor, *, keep: int) -> torch.Tensor:
    """Adds links until exactly ``keep`` exist, drawn among the missing with probability p ~ score.

    Where fewer missing links have a score than are to be grown, every missing link gets 1e-5 on top, as in the authors'
    code.

    Args:
        scores: ``[out, in]`` >= 0: :func:`link_scores` of the mask *after* dropping.
        mask: boolean, the same shape, True = link.
        noise: uniform in (0, 1), the same shape, independent of the one that dropped.
        keep: links wanted.

    Returns:
        Boolean mask, a superset of ``mask``.

    Raises:
        ValueError: shapes differ, or ``keep`` is less than the links there are or more than there can be.
    """
    links = int(mask.sum())
    if not links <= keep <= mask.numel():
        raise ValueError(f"{keep} links cannot be reached from {links} by growing, in a mask of {mask.numel()}")
    missing = ~mask.bool()
    grow = keep - links
    few = ((scores > 0) & missing).sum() < grow
    return mask.bool() | _draw(_log(scores + 1e-5 * few), missing, noise, grow)


def _draw(log_weights: torch.Tensor, among: torch.Tensor, noise: torch.Tensor, count: int) -> torch.Tensor:
    """Boolean, True at ``count`` entries of ``among``, drawn without replacement with probability ~ exp(log_weights)."""
    if not log_weights.shape == among.shape == noise.shape:
        raise ValueError(
            f"scores, mask and noise have one shape, got {tuple(log_weights.shape)}, {tuple(among.shape)} and "
            f"{tuple(noise.shape)}"
        )
    limits = torch.finfo(torch.float32)  # a generator gives 0 now and then, and rounding to float32 may give 1
    gumbel = -torch.log(-torch.log(noise.float().clamp(limits.tiny, 1 - limits.eps / 2)))
    keys = torch.where(among.bool(), log_weights + gumbel, -torch.inf).reshape(1, -1)
    return ~_drop_lowest(keys, keys.numel() - count).reshape(among.shape)


def _log(values: torch.Tensor) -> torch.Tensor:
    """log in float32; zero becomes the smallest normal number, so that what has no probability is still told from what
    is no candidate."""
    return values.float().clamp_min(torch.finfo(torch.float32).tiny).log()
