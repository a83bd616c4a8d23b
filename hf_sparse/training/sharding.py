"""Parameters spread over processes: what is supported, what each process holds, and how a whole tensor is cut.

DDP keeps whole tensors everywhere; masks are computed everywhere alike. FSDP2 (``fully_shard``) turns a parameter into a
DTensor of which every process holds consecutive rows of the first dimension; its mask is a DTensor cut in the same way.
FSDP1 and ZeRO-3 flatten parameters into buffers that have neither rows nor columns, DeepSpeed steps the optimizer inside
``backward``, and tensor parallelism that cuts the other dimension puts one row on several processes: refused, with the reason.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

__all__ = ["Rows", "all_agree", "average", "check_supported", "cut", "local", "rows_of", "sums", "unwrapped", "whole"]


@dataclass(frozen=True)
class Rows:
    """The consecutive rows of a sharded tensor that this process holds, and the processes that hold the others."""

    first: int
    count: int
    group: dist.ProcessGroup


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what ``torch.compile``, DDP and DataParallel put around it, under which parameters have other names."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def check_supported(model: nn.Module) -> None:
    """Refuses a model whose weights cannot be masked where they are.

    Raises:
        ValueError: it is wrapped in a way that hides its weights, or cut along another dimension than the first.
    """
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                "this model is wrapped by FSDP1, which flattens weights into one buffer, so single weights cannot be masked; "
                "use FSDP2 (fsdp_version: 2 in the accelerate config, fully_shard in a custom loop)"
            )
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise ValueError(
                "this model is partitioned by DeepSpeed ZeRO-3, which hides the weights between uses and steps the optimizer "
                "inside backward; use DDP or FSDP2"
            )
        rows_of(parameter, name)


def rows_of(parameter: torch.Tensor, name: str = "a weight") -> Rows | None:
    """What this process holds of a parameter; None if all of it.

    Raises:
        ValueError: it is sharded along another dimension than the first, or along several mesh dimensions.
    """
    if not isinstance(parameter, DTensor):
        return None
    cuts = [(index, place) for index, place in enumerate(parameter.placements) if not isinstance(place, Replicate)]
    if not cuts:
        return None
    index, place = cuts[0]
    if len(cuts) > 1 or type(place) is not Shard or place.dim != 0:
        raise ValueError(
            f"{name} is sharded as {parameter.placements}; sparse training works on whole rows (FSDP2, HSDP), not on tensor "
            "parallelism that cuts columns or on a mix of both; train with data parallelism"
        )
    group = parameter.device_mesh.get_group(index)
    size, rank, rows = dist.get_world_size(group), dist.get_rank(group), parameter.shape[0]
    each = -(-rows // size)  # as torch.chunk cuts: every rank but the last ones has the same
    first = min(rank * each, rows)
    return Rows(first, min(each, rows - first), group)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that lies on this process; a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, gathered if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def cut(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor that every process has, sharded as ``like`` is; no communication."""
    if not isinstance(like, DTensor):
        return tensor.to(like.device)
    rows = rows_of(like)
    part = tensor if rows is None else tensor[rows.first : rows.first + rows.count]
    part = part.to(local(like).device).contiguous()
    return DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def average(tensors: list[torch.Tensor]) -> None:
    """Averages gradients that every process of a data-parallel run holds as a whole, in place; sharded ones are averaged."""
    mine = [tensor for tensor in tensors if not isinstance(tensor, DTensor)]
    if not mine or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    for work in [dist.all_reduce(tensor, async_op=True) for tensor in mine]:
        work.wait()
    for tensor in mine:
        tensor.div_(dist.get_world_size())


def sums(numbers: list[torch.Tensor], rows: list[Rows | None]) -> torch.Tensor:
    """One number per tensor, of what lies here, summed over the processes that hold the rest of it.

    Args:
        numbers: scalars, e.g. the count of nonzeros of a local part.
        rows: how each tensor is sharded; None: it is whole here, and so is its number.
    """
    total = torch.stack(numbers)
    groups = dict.fromkeys(one.group for one in rows if one is not None)  # in the same order on every process
    for group in groups:
        shared = torch.tensor([one is not None and one.group is group for one in rows], device=total.device)
        of_group = total.masked_fill(~shared, 0)
        dist.all_reduce(of_group, group=group)
        total = torch.where(shared, of_group, total)
    return total


def all_agree(yes: bool, device: torch.device) -> bool:
    """Whether every process says yes; alone, whether this one does. ``device`` is one the processes can communicate on."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return yes
    votes = torch.tensor([int(yes)], device=device)
    dist.all_reduce(votes, dist.ReduceOp.MIN)
    return bool(votes)
