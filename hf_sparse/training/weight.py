"""One sparse weight of a model in training: where it is, what it is to look like, and the tensors that lie beside it.

The parameter and its companions are looked up on their module at every use: wrapping a model replaces parameters. Companions
are buffers of the module, so that they move, shard and save with it:

    weight_mask       boolean, what is kept (:class:`hf_sparse.masks.Masks`)
    weight_explored   boolean, what was ever kept, for masks that move (ITOP, arxiv.org/abs/2102.02887)
    weight_dense      the dense weights of SR-STE and Top-KAST, and weight_trained: which of them receive gradients
"""

import weakref
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hf_sparse.masks import COMPANIONS
from hf_sparse.patterns import Pattern
from hf_sparse.targets import Target
from hf_sparse.training.sharding import Rows, cut, local, rows_of

__all__ = ["Weight"]


@dataclass
class Weight:
    """A masked parameter.

    Attributes:
        target: its name and layout.
        pattern, sparsity: what the zeros look like and how many they are at the end of the schedule.
        module, attribute: where the parameter is.
        is_output: its rows are the model's outputs, so no neuron of it may go.
        kept: how many weights are kept now, over all processes; exact, known without asking the device.
        gradient: the gradient of all its weights, put aside for the next update; local to this process.
    """

    target: Target
    pattern: Pattern
    sparsity: float
    module: nn.Module
    attribute: str
    is_output: bool = False
    kept: int = 0
    gradient: torch.Tensor | None = None
    accumulating: "weakref.ref[torch.Tensor] | None" = None

    @property
    def name(self) -> str:
        return self.target.name

    @property
    def parameter(self) -> nn.Parameter:
        return getattr(self.module, self.attribute)

    @property
    def rows(self) -> Rows | None:
        return rows_of(self.parameter, self.name)

    @property
    def numel(self) -> int:
        return self.target.numel

    def values(self) -> torch.Tensor:
        """The local part of the weight, stored layout, without autograd."""
        return local(self.parameter.detach())

    def companion(self, what: str) -> torch.Tensor | None:
        """The local part of a companion, or None if there is none."""
        tensor = getattr(self.module, f"{self.attribute}_{what}", None)
        return None if tensor is None else local(tensor)

    @property
    def mask(self) -> torch.Tensor:
        return self.companion("mask")

    def put(self, what: str, tensor: torch.Tensor) -> None:
        """Puts a companion (its local part) beside the weight, or overwrites the one there in place."""
        there = self.companion(what)
        if there is not None:
            there.copy_(tensor)
            return
        parameter = self.parameter
        if isinstance(parameter, DTensor):
            placed = (parameter.device_mesh, parameter.placements)
            tensor = DTensor.from_local(tensor.contiguous(), *placed, shape=parameter.shape, stride=parameter.stride())
        self.module.register_buffer(f"{self.attribute}_{what}", tensor, persistent=True)

    def drop(self, what: str) -> None:
        """Removes a companion."""
        if hasattr(self.module, f"{self.attribute}_{what}"):
            delattr(self.module, f"{self.attribute}_{what}")

    def align(self) -> None:
        """Gives companions that were attached before the model was sharded the sharding and device of the parameter."""
        for what in COMPANIONS:
            name = f"{self.attribute}_{what}"
            tensor = getattr(self.module, name, None)
            if tensor is None:
                continue
            parameter = self.parameter
            if isinstance(parameter, DTensor):
                if isinstance(tensor, DTensor) and tensor.placements == parameter.placements:
                    continue
                tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                setattr(self.module, name, cut(tensor, parameter))
            elif tensor.device != parameter.device:
                setattr(self.module, name, tensor.to(parameter.device))

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """The whole of a tensor of this weight's shape, from every process' local part."""
        if self.rows is None:
            return part
        parameter = self.parameter
        placed = (parameter.device_mesh, parameter.placements)
        return DTensor.from_local(part, *placed, shape=parameter.shape, stride=parameter.stride()).full_tensor()

    def own(self, full: torch.Tensor) -> torch.Tensor:
        """This process' part of a whole tensor."""
        rows = self.rows
        return full if rows is None else full[rows.first : rows.first + rows.count]

    def first_index(self) -> int:
        """The flat index, in the whole weight, of the first element held here."""
        rows = self.rows
        return 0 if rows is None else rows.first * self.parameter.shape[1:].numel()  # indexing would gather the weight
