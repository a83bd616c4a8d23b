"""Masks: which weights are kept. The only mask notion: boolean tensors by parameter name, True = kept.

A mask is not part of the model's forward: weights are stored with their zeros and every stock operation works on them.
:class:`Masks` is a dict of masks in the *stored* layout of their parameters; parameters are looked up by name when they
are used and never held, so wrapping a model (FSDP, PEFT, compile) cannot leave a stale reference behind.
"""

import torch
from torch import nn

from hf_sparse.targets import Target

__all__ = ["Masks"]


class Masks(dict[str, torch.Tensor]):
    """``{parameter name: boolean mask in the parameter's stored shape}``, True = kept."""

    @classmethod
    def from_zeros(cls, model: nn.Module, targets: dict[str, Target]) -> "Masks":
        """The masks a pruned model's own zeros describe."""
        return cls({name: model.get_parameter(name).detach() != 0 for name in targets})

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Sets every masked weight of ``model`` to exactly zero, in place.

        Raises:
            ValueError: a mask's shape is not its parameter's.
        """
        for name, mask in self.items():
            parameter = model.get_parameter(name)
            if parameter.shape != mask.shape:
                raise ValueError(
                    f"the mask of {name} has shape {tuple(mask.shape)}, the parameter {tuple(parameter.shape)}"
                )
            parameter.masked_fill_(
                ~mask.to(parameter.device), 0
            )  # masked_fill, not *=: 0 * inf is NaN and 0 * -1 is -0

    def density(self) -> float:
        """Fraction of weights kept, over all masks; 1 if there are none."""
        total = sum(mask.numel() for mask in self.values())
        return sum(int(mask.sum()) for mask in self.values()) / total if total else 1.0
