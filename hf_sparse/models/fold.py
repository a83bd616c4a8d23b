"""Folding: a trained Sparse-IFT layer that is linear inside becomes the one dense layer it computes.

    parallel     W = sum_j g_j W_j                        b = sum_j (g_j b_j + h_j)
    factorized   W = V diag(g) U                          b = V (g b_u + h) + b_v
    doped        W = V U + diag(g) W_sparse               b = V b_u + b_v + g b + h

with ``g = gamma / sqrt(var + eps)`` and ``h = beta - g mean`` of a batch norm in the branch, which is a fixed map in eval mode
(g = 1, h = 0 without one). A convolution's U has the kernel and V is 1x1, so the same holds for every kernel position, at the
border too. Sums are taken in float64. A layer with an activation inside is no linear map and stays.

**What it costs.** A folded layer has the size of the dense layer it stands for, 1 / (1 - s) times smaller than its parts with
their zeros: a runtime that multiplies with zeros always gains. One that skips zeros paid for the parts what the dense layer
costs, because Sparse-IFT keeps that equal, and V U has no zeros left: a folded factorized or doped layer gains it nothing, and
costs MORE than its parts where those were made sparser than their rank assumes (``budget="model"``, masks raised later). Masks
of k parallel branches that fall independently leave (1 - 1/k)^k of W zero, 32% for k = 4, which it can skip. Compare
:func:`hf_sparse.flops.sparse_flops` before and after.
"""

import logging

import torch
from torch import nn

from hf_sparse.config import CONFIG_KEY
from hf_sparse.models.ift import REPLACED
from hf_sparse.models.layers import KINDS, SparseDoped, SparseFactorized, SparseParallel

__all__ = ["fold", "why_not_folded"]

logger = logging.getLogger(__name__)


def why_not_folded(model: nn.Module) -> dict[str, str]:
    """The Sparse-IFT layers of a model that :func:`fold` leaves -> the reason."""
    reasons = {name: _reason(module) for name, module in _layers(model).items()}
    return {name: reason for name, reason in reasons.items() if reason}


@torch.no_grad()
def fold(model: nn.Module) -> int:
    """Replaces every Sparse-IFT layer that is linear inside by one dense layer, in place. For inference: masks are lost.

    The names of the weights are those of the architecture without a family again, so a model that is folded completely is
    its stock parent: its ``state_dict`` loads into that class, and its config has no family any more. A convolution of a
    ResNet that gets a bias from batch norms inside passes it on to the batch norm that follows it, as a shift of its mean.
    The config of a sparse model (:mod:`hf_sparse.models.sparse_configs`) notes what is dense again, so it saves and loads.

    Args:
        model: in eval mode where batch norms are inside.

    Returns:
        How many layers were folded; those that stay are logged (:func:`why_not_folded`).
    """
    staying = why_not_folded(model)
    folded = [name for name in _layers(model) if name not in staying]
    for name in folded:
        parent = model.get_submodule(name.rpartition(".")[0])
        layer = parent.get_submodule(name.rpartition(".")[2])
        weight, bias = _folded(layer)
        dense = _dense(layer, weight, bias)
        following = getattr(parent, "normalization", None)
        if isinstance(dense, nn.Conv2d) and dense.bias is not None and not _had_bias(layer):
            if isinstance(following, nn.BatchNorm2d) and not following.training and following.track_running_stats:
                following.running_mean -= dense.bias.to(following.running_mean)
                dense.bias = None
        setattr(parent, name.rpartition(".")[2], dense.train(layer.training))
    if staying:
        kinds = "; ".join(sorted({f"{list(staying.values()).count(r)} layers: {r}" for r in staying.values()}))
        logger.warning("folded %d layers, %d stay: %s", len(folded), len(staying), kinds)
    if folded:
        _note(model, folded, complete=not staying)
    return len(folded)


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, KINDS) and name}


def _reason(layer: nn.Module) -> str | None:
    if layer.activation is not None:
        return f"an activation inside ({type(layer.activation).__name__})"
    norms = [module for module in layer.modules() if isinstance(module, nn.BatchNorm2d)]
    if any(norm.training or not norm.track_running_stats for norm in norms):
        return "a batch norm in training mode inside; call model.eval() first"
    return None


def _folded(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight [out, fan-in], bias [out] or None), float64."""
    if isinstance(layer, SparseParallel):
        norms = layer.norms if layer.norms is not None else [None] * len(layer.branches)
        return _sum(*(_normed(*_affine(branch), norm) for branch, norm in zip(layer.branches, norms, strict=True)))
    if isinstance(layer, SparseFactorized):
        return _composed(_normed(*_affine(layer.u), layer.norm), _affine(layer.v))
    return _sum(_composed(_affine(layer.u), _affine(layer.v)), _normed(*_affine(layer.sparse), layer.norm))


def _affine(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    weight = module.weight.t() if type(module).__name__ == "Conv1D" else module.weight.flatten(1)
    return weight.double(), None if module.bias is None else module.bias.double()


def _normed(weight, bias, norm: nn.Module | None):
    if norm is None:
        return weight, bias
    g = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        g = g * norm.weight.double()
    h = -g * norm.running_mean.double()
    if norm.bias is not None:
        h = h + norm.bias.double()
    return g[:, None] * weight, h if bias is None else g * bias + h


def _composed(u, v):
    (weight_u, bias_u), (weight_v, bias_v) = u, v
    return weight_v @ weight_u, _sum_biases([bias_v, None if bias_u is None else weight_v @ bias_u])


def _sum(*parts):
    return sum(weight for weight, _ in parts), _sum_biases([bias for _, bias in parts])


def _sum_biases(biases):
    present = [bias for bias in biases if bias is not None]
    return sum(present) if present else None


def _first(layer: nn.Module) -> nn.Module:
    """The part that has the kernel, stride and kind of the layer that was replaced."""
    if isinstance(layer, SparseParallel):
        return layer.branches[0]
    return layer.sparse if isinstance(layer, SparseDoped) else layer.u


def _had_bias(layer: nn.Module) -> bool:
    return (layer.v if isinstance(layer, SparseFactorized) else _first(layer)).bias is not None


def _dense(layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    like = _first(layer)
    kind = {"device": like.weight.device, "dtype": like.weight.dtype}
    out, fan_in = weight.shape
    if isinstance(like, nn.Conv2d):
        names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        geometry = {name: getattr(like, name) for name in names}
        made = nn.Conv2d(like.in_channels, out, bias=bias is not None, **geometry, **kind)
    elif isinstance(like, nn.Linear):
        made = nn.Linear(fan_in, out, bias=bias is not None, **kind)
    else:  # GPT-2's Conv1D, which stores [in, out] and always has a bias
        from transformers.pytorch_utils import Conv1D

        made, weight = Conv1D(out, fan_in).to(**kind), weight.t()
    made.weight.copy_(weight.reshape(made.weight.shape))
    made.weight.requires_grad_(like.weight.requires_grad)
    if bias is not None:
        made.bias.copy_(bias)
        made.bias.requires_grad_(like.weight.requires_grad)
    return made


def _note(model: nn.Module, folded: list[str], complete: bool) -> None:
    """What the config of the model says of its layers holds again."""
    config = getattr(model, "config", None)
    if hasattr(config, CONFIG_KEY):
        delattr(config, CONFIG_KEY)  # it names weights that are no longer there
    if hasattr(config, "sparse_ift"):
        del config.sparse_ift
    replaced = getattr(config, "quantization_config", None)
    if isinstance(replaced, dict) and replaced.get("quant_method") == REPLACED:
        replaced["names"] = [name for name in replaced["names"] if name not in folded]
        if not replaced["names"]:
            del config.quantization_config
    if not hasattr(config, "folded"):
        return
    if complete:
        config.family, config.sparsity, config.budget, config.sparse_u_only = None, 0.0, "layer", False
        config.folded = None
        return
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    config.folded = sorted({*(config.folded or ()), *(name.removeprefix(prefix) for name in folded)})
