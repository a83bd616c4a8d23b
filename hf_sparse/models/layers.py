"""Sparse-IFT layers: a dense layer of ``N`` weights as sparse ones of the same FLOPs (arxiv.org/abs/2303.11525, figure 2).

With sparsity s, a dense layer ``y = W x`` of fan-in n and m outputs (a convolution: n = channels x kernel area) becomes

    parallel     y = sum_j act(W_j x)             k = 1 / (1 - s) branches, each of sparsity s
    factorized   y = V act(U x)                   rank d = n m / ((n + m)(1 - s)), U and V of sparsity s
    doped        y = V U x + act(W x)             rank d = s n m / (n + m), W of sparsity s, U and V dense

The fourth member, ``wide``, has wider layers instead of other ones (``widths.py``); the numbers of branches and ranks are those
of ``ranks.py``.

``act`` is the nonlinearity that follows the dense layer: batch norm and ReLU for a convolution, the activation of an MLP for
its first linear layer, nothing for projections that none follows. The paper's figure has it in the branches; of its released
files the one for ImageNet does, the one for CIFAR mostly does not: ``branch_activation`` is True, ``"norm"`` (batch norm
only) or False. The model's own norm and activation stay where they were, after the layer. For convolutions, U has the
kernel and the stride, and V is 1x1.

This file needs only torch (and transformers, for GPT-2's ``Conv1D``) and the file of ranks beside it: they travel with
checkpoints that are loaded without hf_sparse.
"""

import copy

import torch
from torch import nn

from .ranks import doped_rank, factorized_rank, parallel_branches

__all__ = [
    "FAMILIES",
    "KINDS",
    "SparseDoped",
    "SparseFactorized",
    "SparseParallel",
    "joint_weight_decay",
    "masked_weights",
    "transform_layers",
]

FAMILIES = ("wide", "parallel", "factorized", "doped")


# ---------------------------------------------------------------------------------------------------------------- layers


class SparseParallel(nn.Module):
    """``y = sum_j act(norm_j(branch_j(x)))``; every branch has the shape of the layer it replaces."""

    def __init__(self, layer: nn.Module, sparsity: float, norm: bool = False, activation: nn.Module | None = None):
        super().__init__()
        _describe(self, layer)
        count, out = parallel_branches(sparsity), _shape(layer)[1]
        alone = not norm and activation is None  # then one bias is as good as many
        self.branches = nn.ModuleList(
            _like(layer, bias=layer.bias is not None and (i == 0 or not alone)) for i in range(count)
        )
        self.norms = nn.ModuleList(_batch_norm(layer, out) for _ in range(count)) if norm else None
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = None
        for index, branch in enumerate(self.branches):
            y = branch(x)
            if self.norms is not None:
                y = self.norms[index](y)
            if self.activation is not None:
                y = self.activation(y)
            total = y if total is None else total + y
        return total

    def extra_repr(self) -> str:
        return f"branches={len(self.branches)}"


class SparseFactorized(nn.Module):
    """``y = v(act(norm(u(x))))``; ``u`` has the kernel and the stride, ``v`` the bias."""

    def __init__(
        self,
        layer: nn.Module,
        sparsity: float,
        norm: bool = False,
        activation: nn.Module | None = None,
        sparse_u_only: bool = False,
    ):
        super().__init__()
        _describe(self, layer)
        self.rank = factorized_rank(*_shape(layer), sparsity, sparse_u_only)
        self.u, self.v = _pair(layer, self.rank, bias=layer.bias is not None)
        self.norm = _batch_norm(layer, self.rank) if norm else None
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.u(x)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return self.v(x)

    def extra_repr(self) -> str:
        return f"rank={self.rank}"


class SparseDoped(nn.Module):
    """``y = v(u(x)) + act(norm(sparse(x)))``; ``sparse`` has the shape of the layer it replaces."""

    def __init__(self, layer: nn.Module, sparsity: float, norm: bool = False, activation: nn.Module | None = None):
        super().__init__()
        _describe(self, layer)
        fan_in, out = _shape(layer)
        self.rank = doped_rank(fan_in, out, sparsity)
        if self.rank < 1:
            raise ValueError(
                f"sparsity {sparsity:g} saves less in a layer of {out} x {fan_in} weights than one rank costs: ignore the "
                "layer, or choose another family"
            )
        self.sparse = _like(layer, bias=layer.bias is not None)
        self.u, self.v = _pair(layer, self.rank, bias=False)
        self.norm = _batch_norm(layer, out) if norm else None
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.sparse(x)
        if self.norm is not None:
            y = self.norm(y)
        if self.activation is not None:
            y = self.activation(y)
        return self.v(self.u(x)) + y

    def extra_repr(self) -> str:
        return f"rank={self.rank}"


KINDS = (SparseParallel, SparseFactorized, SparseDoped)
_CLASSES = {"parallel": SparseParallel, "factorized": SparseFactorized, "doped": SparseDoped}


def transform_layers(
    model: nn.Module,
    family: str,
    sparsity: float,
    names: list[str],
    branch_activation: bool | str = True,
    sparse_u_only: bool = False,
) -> dict[str, int]:
    """Replaces layers of a model in place by those of a family, dense still: masks come with the training.

    The new weights are not initialised as the model's class would; see :func:`hf_sparse.models.ift.sparse_ift`.

    Args:
        family: ``parallel``, ``factorized`` or ``doped``.
        names: modules, each an ``nn.Linear``, a ``Conv1D`` or an ungrouped ``nn.Conv2d``.
        branch_activation: see the module.
        sparse_u_only: only U of the factorized family is sparse, V dense.

    Returns:
        name -> number of branches, or rank.

    Raises:
        ValueError: before any layer is replaced: an unknown family or option, a layer of another kind, a sparsity that the
            family has no whole number for.
    """
    if family not in _CLASSES:
        raise ValueError(f"the families with layers of their own are {', '.join(_CLASSES)}, got {family!r}")
    if branch_activation not in (True, False, "norm"):
        raise ValueError(f"branch_activation is True, False or 'norm', got {branch_activation!r}")
    if sparse_u_only and family != "factorized":
        raise ValueError(f"sparse_u_only belongs to the factorized family, not to {family!r}")
    made = {}
    paths: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(name)
    for name in names:
        layer = model.get_submodule(name)
        _shape(layer)  # raises
        if len(shared := paths[id(layer)]) > 1:
            raise ValueError(f"one layer is used under several names, {' and '.join(shared)}: ignore them")
        convolution = isinstance(layer, nn.Conv2d)
        options = {"norm": convolution and branch_activation is not False}
        if branch_activation is True:
            options["activation"] = _activation_of(model, name)
        if sparse_u_only:
            options["sparse_u_only"] = True
        try:
            made[name] = _CLASSES[family](layer, sparsity, **options)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    for name, module in made.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.train(model.training))
    return {name: getattr(module, "rank", None) or len(module.branches) for name, module in made.items()}


def masked_weights(family: str, names: list[str], sparse_u_only: bool = False) -> list[str]:
    """Regular expressions for the parameters that a family makes sparse in the transformed layers ``names``."""
    inner = {"parallel": r"branches\.\d+", "factorized": "u" if sparse_u_only else "[uv]", "doped": "sparse"}[family]
    return [f"re:{_escaped(name)}\\.{inner}\\.weight$" for name in names]


def joint_weight_decay(model: nn.Module) -> torch.Tensor:
    """``sum ||V U||_F^2`` over the factorized and doped layers without an activation between U and V, to be added to a loss
    as ``decay / 2 * joint_weight_decay(model)``; U and V are then left out of the optimizer's own weight decay.

    ``||V U||^2 = <V^T V, U U^T>``: the product itself is never made. Off in the released code unless asked for.
    """
    total = None
    for module in model.modules():
        plain = isinstance(module, SparseFactorized) and module.norm is None and module.activation is None
        if plain or isinstance(module, SparseDoped):
            u, v = _matrix(module.u), _matrix(module.v)
            norm = ((v.t() @ v) * (u @ u.t())).sum()
            total = norm if total is None else total + norm
    if total is None:
        raise ValueError("this model has no factorized or doped layer that is linear between U and V")
    return total


# ------------------------------------------------------------------------------------------------------- kinds of layers


def _shape(layer: nn.Module) -> tuple[int, int]:
    """(fan-in, outputs).

    Raises:
        ValueError: the layer is of no kind that can be replaced.
    """
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, nn.Conv2d) and layer.groups == 1:
        return layer.weight[0].numel(), layer.out_channels
    if type(layer).__name__ == "Conv1D":  # transformers' GPT-2 layer, weight [in, out]
        return layer.weight.shape[0], layer.weight.shape[1]
    raise ValueError(f"{type(layer).__name__} is no linear layer, Conv1D or ungrouped Conv2d")


def _describe(module: nn.Module, layer: nn.Module) -> None:
    """The sizes of the layer that is replaced, under the names it has them: model code asks (MobileNet pads by the stride)."""
    names = (
        "in_features",
        "out_features",
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
    )
    for name in (*names, "groups", "nf", "nx"):
        if hasattr(layer, name):
            setattr(module, name, getattr(layer, name))


def _matrix(layer: nn.Module) -> torch.Tensor:
    """The weight as [out, fan-in]."""
    return layer.weight.t() if type(layer).__name__ == "Conv1D" else layer.weight.flatten(1)


def _make(layer: nn.Module, inputs: int, outputs: int, bias: bool, kernel: bool) -> nn.Module:
    """A new layer of the kind, device and dtype of ``layer``; ``kernel``: with its kernel and stride, else 1x1."""
    kind = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Conv2d):
        geometry = {"kernel_size": 1}
        if kernel:
            names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
            geometry = {name: getattr(layer, name) for name in names}
        return nn.Conv2d(inputs, outputs, bias=bias, **geometry, **kind)
    if isinstance(layer, nn.Linear):
        return nn.Linear(inputs, outputs, bias=bias, **kind)
    from transformers.pytorch_utils import Conv1D

    with torch.device(layer.weight.device):
        made = Conv1D(outputs, inputs).to(layer.weight.dtype)
    return made  # it always has a bias, which starts at zero


def _like(layer: nn.Module, bias: bool) -> nn.Module:
    inputs = layer.in_channels if isinstance(layer, nn.Conv2d) else _shape(layer)[0]
    return _make(layer, inputs, _shape(layer)[1], bias, kernel=True)


def _pair(layer: nn.Module, rank: int, bias: bool) -> tuple[nn.Module, nn.Module]:
    inputs = layer.in_channels if isinstance(layer, nn.Conv2d) else _shape(layer)[0]
    return _make(layer, inputs, rank, False, kernel=True), _make(layer, rank, _shape(layer)[1], bias, kernel=False)


def _batch_norm(layer: nn.Module, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels, device=layer.weight.device, dtype=layer.weight.dtype)


def _is_activation(module: nn.Module) -> bool:
    where = type(module).__module__
    return where == "torch.nn.modules.activation" or where.startswith("transformers.activations")


def _activation_of(model: nn.Module, name: str) -> nn.Module | None:
    """A copy of the activation that follows a layer: that of the block a convolution is in, else the model's; that of an MLP
    for the linear layer that widens into it; None for other projections."""
    layer, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    near = [child for child in parent.children() if _is_activation(child)]
    if isinstance(layer, nn.Conv2d):
        anywhere = (module for module in model.modules() if _is_activation(module))
        found = near[0] if near else next(anywhere, nn.ReLU())
    elif near and layer is next((child for child in parent.children() if _widens(child)), None):
        found = near[0]
    else:
        return None
    return copy.deepcopy(found)


def _widens(module: nn.Module) -> bool:
    try:
        fan_in, out = _shape(module)
    except ValueError:
        return False
    return out > fan_in


def _escaped(name: str) -> str:
    return name.replace(".", r"\.")
