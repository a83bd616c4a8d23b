"""The FLOPs of a convolutional network as the Sparse-IFT paper's released code counts them (arxiv.org/abs/2303.11525).

Its budgets, such as the 1,115,226,800 of ResNet-18 on CIFAR-100, are the sum over one forward pass of one image of

    convolution     positions (numel - 1) additions, positions numel multiplications; numel is that of the whole weight
    linear layer    (inputs - 1) outputs additions, inputs outputs multiplications
    bias            one addition per output
    batch norm      with C channels and N values of each: 2 C (N - 1) additions for mean and variance, though an evaluation
                    has no use for them, 2 C N to subtract the mean and add the bias, 3 C N multiplications for the square,
                    the division and the gain, C roots

and nothing else. Activations, pooling and the residual additions are functions rather than modules there, which its profiler
does not see, so they are not counted here either. A masked weight costs its share of the additions and of the
multiplications, each rounded down.

:func:`hf_sparse.flops.forward_flops` counts 2 FLOPs per multiply-accumulate and no norms: 1,110,937,600 for the same network,
0.4% less. Its numbers compare over all kinds of models and are what ``budget="model"`` keeps; these are for the paper's tables.
"""

import copy
from collections.abc import Mapping

import torch
from torch import nn

__all__ = ["CIFAR_RESNET18_BUDGET", "paper_flops"]

CIFAR_RESNET18_BUDGET = 1_115_226_800  # base width 64, 100 classes, one image of 3 x 32 x 32

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def paper_flops(
    model: nn.Module, inputs: Mapping[str, tuple[int, ...]], densities: Mapping[str, float] | None = None
) -> int:
    """The additions, multiplications and roots of one forward pass of a network of convolutions.

    Args:
        model: its layers are ``nn.Conv*d``, ``nn.Linear`` and ``nn.BatchNorm*d``; it is not changed, and no number of it is
            used.
        inputs: shapes of the keyword arguments, ``{"pixel_values": (1, 3, 32, 32)}``.
        densities: ``{parameter name: fraction of weights kept}``; a weight that is missing is dense.

    Raises:
        ValueError: a density for a parameter that no counted layer has.
    """
    model = _without_numbers(model)
    densities, total = dict(densities or {}), 0
    layers = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, (*_CONVOLUTIONS, nn.Linear))}
    if unknown := sorted(set(densities) - layers):
        raise ValueError(f"{unknown[0]} is no weight of a convolution or a linear layer, so its density means nothing")

    def add(module: nn.Module, args: tuple, output: torch.Tensor, name: str) -> None:
        nonlocal total
        if isinstance(module, _NORMS):
            channels, values = args[0].shape[1], args[0].numel()
            total += 2 * (values - channels) + values + 2 * values + channels
            total += 2 * values if module.affine else 0
            return
        numel = module.weight.numel()
        if isinstance(module, nn.Linear):
            rows = args[0].numel() // module.in_features
            parts = rows * (module.in_features - 1) * module.out_features, rows * numel
        else:
            positions = output.numel() // output.shape[1]
            parts = positions * (numel - 1), positions * numel
        density = densities.get(f"{name}.weight", 1)
        total += sum(int(part * density) for part in parts)
        total += output.numel() if module.bias is not None else 0

    for name, module in model.named_modules():
        module._forward_hooks.clear()  # of the copy: those of a training are not for it
        module._forward_pre_hooks.clear()
        if isinstance(module, (*_CONVOLUTIONS, nn.Linear, *_NORMS)):
            module.register_forward_hook(lambda m, args, output, name=name: add(m, args, output, name))
    real = next(model.parameters()).dtype
    with torch.no_grad():
        model(**{name: torch.empty(shape, dtype=real, device="meta") for name, shape in inputs.items()})
    return total


def _without_numbers(model: nn.Module) -> nn.Module:
    memo = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo).eval()
