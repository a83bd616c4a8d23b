"""How masks move: some kept weights are dropped, as many others are grown, and the count is exact.

    survivors = the kept weights without the `drop` of lowest drop score
    new mask  = survivors and, of all other positions, those of highest grow score, until `keep` are kept

A weight that was dropped a moment ago may be grown again, with its value: RigL's rule (arxiv.org/abs/1911.11134), that of
SET with random scores (arxiv.org/abs/1707.04780). Ties go by index, the lower one first, so equal scores give equal masks.

A tensor may be sharded over processes, each holding consecutive rows. Then nothing is gathered: the threshold is found by
bisection on the bits of a float, counting on every process and summing the counts, 32 sums of a few numbers for all tensors
of a model together, and the result is the one that a single process would find.
"""

import torch
import torch.distributed as dist

__all__ = ["drop_and_grow", "drop_and_grow_all", "lowest", "lowest_of_all"]


def drop_and_grow(
    mask: torch.Tensor, drop_scores: torch.Tensor, grow_scores: torch.Tensor, *, drop: int, keep: int
) -> torch.Tensor:
    """The mask after one update.

    Args:
        mask: boolean, any shape, True = kept.
        drop_scores: same shape; among the kept, the ``drop`` lowest go.
        grow_scores: same shape; among those not kept any more, the highest come, until ``keep`` are kept.

    Raises:
        ValueError: more is dropped than is kept, or more is to be kept than there are weights or than survive.
    """
    kept = int(mask.sum())
    if not 0 <= drop <= kept or not kept - drop <= keep <= mask.numel():
        raise ValueError(f"cannot drop {drop} of {kept} kept weights and then keep {keep} of {mask.numel()}")
    return drop_and_grow_all([mask], [drop_scores], [grow_scores], [drop], [keep])[0]


@torch.no_grad()
def drop_and_grow_all(
    masks: list[torch.Tensor],
    drop_scores: list[torch.Tensor],
    grow_scores: list[torch.Tensor] | None,
    drops: list[int],
    keeps: list[int],
    group: dist.ProcessGroup | None = None,
) -> list[torch.Tensor]:
    """:func:`drop_and_grow` for many tensors.

    Args:
        grow_scores: None: nothing is grown, and ``keeps`` is what is left.
        drops, keeps: counts over the whole of each tensor.
        group: the processes that the tensors are sharded over, each holding its consecutive rows in order of rank.
    """
    dropped = lowest(drop_scores, masks, drops, group)
    survivors = [mask & ~gone for mask, gone in zip(masks, dropped, strict=True)]
    if grow_scores is None:
        return survivors
    counts = _counts(survivors, group)
    missing = [keep - count for keep, count in zip(keeps, counts, strict=True)]
    if min(missing, default=0) < 0:
        raise ValueError(f"{-min(missing)} more weights survive than are to be kept; drop more of them")
    grown = lowest([-scores for scores in grow_scores], [~kept for kept in survivors], missing, group)
    return [kept | new for kept, new in zip(survivors, grown, strict=True)]


@torch.no_grad()
def lowest(
    scores: list[torch.Tensor],
    candidates: list[torch.Tensor],
    counts: list[int],
    group: dist.ProcessGroup | None = None,
) -> list[torch.Tensor]:
    """For every tensor a boolean mask of its ``count`` lowest scores among the candidates, ties by index.

    ``count`` is over the whole tensor and at most the number of candidates.
    """
    if group is None:
        return [_lowest(s, c, count) for s, c, count in zip(scores, candidates, counts, strict=True)]
    return _lowest_sharded(scores, candidates, counts, group)


def _lowest(scores: torch.Tensor, candidates: torch.Tensor, count: int) -> torch.Tensor:
    if count <= 0:
        return torch.zeros_like(candidates)
    key = _ordered(scores).masked_fill(~candidates, _LAST).flatten()
    # a GPU runs kthvalue of one long row in a single thread block, and sorts it with all of them
    threshold = key.sort().values[count - 1] if key.is_cuda else key.kthvalue(count).values
    below, ties = key < threshold, (key == threshold) & candidates.flatten()
    chosen = below | (ties & (ties.cumsum(0, dtype=torch.int32) <= count - below.sum()))
    return chosen.reshape(candidates.shape)


_LAST = 2**31 - 1


def _ordered(scores: torch.Tensor) -> torch.Tensor:
    """float32 scores as int32 of the same order (the bits of a float are ordered but for the sign); -0 equals 0."""
    bits = (scores.detach().float() + 0.0).contiguous().view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _counts(masks: list[torch.Tensor], group: dist.ProcessGroup | None) -> list[int]:
    return _summed(torch.stack([mask.sum() for mask in masks]), group).tolist()


@torch.no_grad()
def lowest_of_all(
    scores: list[torch.Tensor], candidates: list[torch.Tensor], count: int, group: dist.ProcessGroup | None = None
) -> list[torch.Tensor]:
    """The ``count`` lowest scores of all tensors together, as one boolean mask for each; ties by tensor, then by index."""
    keys = [_ordered(s).masked_fill(~c, _LAST) for s, c in zip(scores, candidates, strict=True)]
    wanted = torch.tensor([count], device=keys[0].device)

    def at_most(threshold: torch.Tensor) -> torch.Tensor:
        return _summed(torch.stack([(key <= threshold).sum() for key in keys]).sum().reshape(1), group)

    threshold = _bisect(at_most, wanted)
    ties = [(key == threshold) & c for key, c in zip(keys, candidates, strict=True)]
    tied = _summed(torch.stack([tie.sum() for tie in ties]), group)
    room = wanted - at_most(threshold - 1)
    before = tied.cumsum(0) - tied  # ties in the tensors before; within a tensor the processes before come first
    rooms = torch.minimum((room - before).clamp_min(0), tied)
    return _take(keys, ties, threshold.expand(len(keys)), rooms, group, [count] * len(keys))


def _lowest_sharded(scores, candidates, counts, group) -> list[torch.Tensor]:
    keys = [_ordered(s).masked_fill(~c, _LAST) for s, c in zip(scores, candidates, strict=True)]
    wanted = torch.tensor(counts, device=keys[0].device)

    def at_most(thresholds: torch.Tensor) -> torch.Tensor:
        return _summed(torch.stack([(key <= t).sum() for key, t in zip(keys, thresholds, strict=True)]), group)

    thresholds = _bisect(at_most, wanted)
    ties = [(key == t) & c for key, t, c in zip(keys, thresholds, candidates, strict=True)]
    return _take(keys, ties, thresholds, wanted - at_most(thresholds - 1), group, counts)


def _bisect(at_most, wanted: torch.Tensor) -> torch.Tensor:
    """The smallest keys that at least ``wanted`` candidates do not exceed; 32 counts, no wait for the device."""
    low, high = torch.full_like(wanted, -(2**31)), torch.full_like(wanted, _LAST)
    for _ in range(32):
        middle = torch.div(low + high, 2, rounding_mode="floor")
        enough = at_most(middle) >= wanted
        low, high = torch.where(enough, low, middle + 1), torch.where(enough, middle, high)
    return high


def _take(keys, ties, thresholds, rooms, group, counts) -> list[torch.Tensor]:
    """What lies below the thresholds and, of what lies on them, the first ones over all processes in order of rank."""
    if group is not None:
        mine = torch.stack([tie.sum() for tie in ties])
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everyone, mine, group=group)
        before = sum(everyone[: dist.get_rank(group)], torch.zeros_like(mine))
        rooms = (rooms - before).clamp_min(0)
    chosen = []
    for key, tie, threshold, room, count in zip(keys, ties, thresholds, rooms, counts, strict=True):
        taken = (key < threshold) | (tie & (tie.flatten().cumsum(0) <= room).reshape(tie.shape))
        chosen.append(taken if count > 0 else torch.zeros_like(tie))
    return chosen


def _summed(counts: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    if group is not None:
        dist.all_reduce(counts, group=group)
    return counts
