"""Channel permutation for n:m patterns (RIA, openreview.net/forum?id=Tr0lPx9woF): which weights share a group is a choice.

An n:m mask keeps n of every m *neighbouring* inputs, so two important inputs beside each other cost one of them. The hidden
units of an MLP have no order of their own: if the rows of the layers that produce them (gate, up) are reordered together
with the columns of the layer that consumes them (down), the function stays exactly the same and the groups change. The
order is stored in the weights; the checkpoint is an ordinary one and runs on n:m hardware as it is.

    1. deal the columns, by decreasing total score, to the groups in serpentine order (every group gets one of the best,
       one of the next best, ...)
    2. swap random pairs of columns between random pairs of groups wherever that raises the total kept score

Inputs whose order is fixed by something else (the residual stream, attention heads) are left as they are. Producers are
found by shape, and the layer is run before and after to make sure that nothing but the order changed.
"""

import torch
from torch import nn

from hf_sparse.patterns import NM
from hf_sparse.targets import Target

__all__ = ["choose_permutation", "permute_hidden_units", "producers_of"]

_ROUNDS = 200  # of swaps; the gain flattens after about a hundred


def choose_permutation(scores: torch.Tensor, pattern: NM, rounds: int = _ROUNDS, seed: int = 0) -> torch.Tensor:
    """An order of the columns of ``scores`` [out, in] whose n:m mask keeps a higher total score; ``[in]`` int64.

    Never worse than the order the columns come in.
    """
    inputs, m = scores.shape[1], pattern.m
    groups = inputs // m
    ranked = scores.sum(dim=0).argsort(descending=True, stable=True).view(m, groups)
    dealt = torch.stack([row if i % 2 == 0 else row.flip(0) for i, row in enumerate(ranked)], dim=1).flatten()
    natural = torch.arange(inputs, device=scores.device)
    order = max(dealt, natural, key=lambda o: float(_kept(scores[:, o], pattern).sum()))
    order = order.clone().view(groups, m)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(rounds if groups > 1 else 0):
        shuffled = torch.randperm(groups, generator=generator).to(order.device)[: groups // 2 * 2]
        left, right = shuffled.view(2, -1)
        positions = torch.randint(m, (2,), generator=generator).tolist()
        swapped = order.clone()
        swapped[left, positions[0]] = order[right, positions[1]]
        swapped[right, positions[1]] = order[left, positions[0]]
        both = torch.stack([left, right])
        before = _kept(scores[:, order[both].flatten()], pattern).view(2, -1).sum(0)
        after = _kept(scores[:, swapped[both].flatten()], pattern).view(2, -1).sum(0)
        better = after > before
        order[left[better]], order[right[better]] = swapped[left[better]], swapped[right[better]]
    return order.flatten()


def _kept(scores: torch.Tensor, pattern: NM) -> torch.Tensor:
    """The score kept in every group of columns, summed over rows: ``[in / m]``."""
    best = scores.view(len(scores), -1, pattern.m).topk(pattern.n, dim=-1).values
    return best.sum(dim=(0, 2))


def producers_of(consumer: Target, targets: dict[str, Target], hidden_size: int) -> list[Target]:
    """The weights whose output rows are the inputs of ``consumer``, by shape: siblings in the same module that map the
    residual stream to the hidden units that ``consumer`` maps back to it. Empty where that is not the shape of things."""
    if consumer.is_experts or consumer.shape[0] != hidden_size or consumer.shape[1] == hidden_size:
        return []
    parent = consumer.module.rpartition(".")[0]
    siblings = [t for t in targets.values() if t.module.rpartition(".")[0] == parent]
    return [t for t in siblings if t.shape == (consumer.shape[1], hidden_size)]


@torch.no_grad()
def permute_hidden_units(model: nn.Module, consumer: Target, producers: list[Target], order: torch.Tensor) -> None:
    """Puts the hidden units between ``producers`` and ``consumer`` in the given order, in place."""
    weight = consumer.matrix(model.get_parameter(consumer.name).data)
    weight.copy_(weight[:, order])
    for producer in producers:
        weight = producer.matrix(model.get_parameter(producer.name).data)
        weight.copy_(weight[order])
        bias = getattr(model.get_submodule(producer.module), "bias", None)
        if bias is not None:
            bias.copy_(bias[order])
