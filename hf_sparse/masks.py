"""Masks: which weights are kept. The only mask notion: boolean tensors by parameter name, True = kept.

A mask is not part of the model's forward: weights are stored with their zeros and every stock operation works on them.
:class:`Masks` is a dict of masks in the *stored* layout of their parameters; parameters are looked up by name when they
are used and never held, so wrapping a model (FSDP, PEFT, compile) cannot leave a stale reference behind.

While a model trains, its masks live in the model as buffers beside their parameters (``q_proj.weight_mask`` beside
``q_proj.weight``), so a checkpoint holds them: a weight that was grown a moment ago is exactly zero, and zeros alone could
not tell it from a pruned one. Afterwards they are made non-persistent and the model saves as the plain checkpoint it is.
"""

import torch
from torch import nn

from hf_sparse.targets import Target

__all__ = ["COMPANIONS", "Masks", "training_companions"]

COMPANIONS = ("mask", "explored", "dense", "trained")  # what lies beside a weight in training, as <weight>_<companion>
_SUFFIX = "_mask"


class Masks(dict[str, torch.Tensor]):
    """``{parameter name: boolean mask in the parameter's stored shape}``, True = kept."""

    @classmethod
    def from_zeros(cls, model: nn.Module, targets: dict[str, Target]) -> "Masks":
        """The masks a pruned model's own zeros describe."""
        return cls({name: model.get_parameter(name).detach() != 0 for name in targets})

    @classmethod
    def attached(cls, model: nn.Module) -> "Masks":
        """The masks that lie beside the parameters of ``model``; empty if it carries none. They are not copies."""
        return cls(
            {
                name: mask
                for name, _ in model.named_parameters(
                    remove_duplicate=False
                )  # of a tied weight, the one that is masked
                if isinstance(mask := getattr(*_place(model, name), None), torch.Tensor) and mask.dtype == torch.bool
            }
        )

    def attach(self, model: nn.Module) -> None:
        """Puts every mask beside its parameter, as a buffer that checkpoints hold.

        Raises:
            ValueError: a mask's shape is not its parameter's, or the module has another attribute of that name.
        """
        for name, mask in self.items():
            parameter = model.get_parameter(name)
            _check_shape(name, mask, parameter)
            module, attribute = _place(model, name)
            if attribute not in module._buffers and hasattr(module, attribute):
                raise ValueError(
                    f"{type(module).__name__} already has an attribute {attribute!r}; the mask needs that name"
                )
        for name, mask in self.items():
            module, attribute = _place(model, name)
            module.register_buffer(attribute, mask.to(model.get_parameter(name).device), persistent=True)

    @staticmethod
    def keep_out_of_checkpoints(model: nn.Module) -> None:
        """Leaves attached masks where they are but out of ``state_dict``: the model saves as a plain checkpoint."""
        for name in Masks.attached(model):
            module, attribute = _place(model, name)
            module._non_persistent_buffers_set.add(attribute)

    @staticmethod
    def in_checkpoints(model: nn.Module) -> bool:
        """Whether attached masks are part of ``state_dict``: a training is under way."""
        places = [_place(model, name) for name in Masks.attached(model)]
        return any(attribute not in module._non_persistent_buffers_set for module, attribute in places)

    @staticmethod
    def detach(model: nn.Module) -> "Masks":
        """Takes the masks off ``model`` and returns them."""
        masks = Masks.attached(model)
        for name in masks:
            delattr(*_place(model, name))
        return masks

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Sets every masked weight of ``model`` to exactly zero, in place.

        Raises:
            ValueError: a mask's shape is not its parameter's.
        """
        for name, mask in self.items():
            parameter = model.get_parameter(name)
            _check_shape(name, mask, parameter)
            # masked_fill, not *=: 0 * inf is NaN and 0 * -1 is -0
            parameter.masked_fill_(~mask.to(parameter.device), 0)

    def density(self) -> float:
        """Fraction of weights kept, over all masks; 1 if there are none."""
        total = sum(mask.numel() for mask in self.values())
        return sum(int(mask.sum()) for mask in self.values()) / total if total else 1.0


def training_companions(names: set[str]) -> set[str]:
    """Those names of a checkpoint's tensors that lie beside a weight only while it is trained sparse."""
    return {f"{name}_{what}" for name in names for what in COMPANIONS} & names


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that owns a parameter and the attribute its mask has there."""
    owner, _, attribute = name.rpartition(".")
    return model.get_submodule(owner), attribute + _SUFFIX


def _check_shape(name: str, mask: torch.Tensor, parameter: torch.Tensor) -> None:
    if parameter.shape != mask.shape:
        raise ValueError(f"the mask of {name} has shape {tuple(mask.shape)}, the parameter {tuple(parameter.shape)}")
