"""``sparse_ift``: an architecture whose layers are replaced by sparse ones of the same FLOPs (Sparse-IFT, 2303.11525).

    model = AutoModelForCausalLM.from_config(GPT2Config())
    report = sparse_ift(model, "wide", sparsity=0.75, method="rigl")         # in place; the weights are new
    print(report)                                                            # what was replaced, FLOPs dense and sparse
    Trainer(model, args, callbacks=[SparsityCallback(report.config)], ...)   # masks come with the training

The model saves and loads as before (``save_pretrained``, ``from_pretrained`` with hf_sparse imported; a wide one anywhere).

It is a way to train from scratch: no function-preserving start from a dense checkpoint exists for layers with an activation
inside, so all weights are new. What stays dense is what the paper leaves dense: embeddings, the output head, the first layer
on the input (a stem, a patch embedding), routers, depthwise convolutions, norms, biases. Nothing is retuned: learning rate
and schedule are those of the dense model. The 1x1 convolutions of shortcuts are replaced like any other, so that every layer
keeps its cost; the released code masks them and leaves their shape.

New layers start as the model's ``_init_weights`` starts a layer of their kind. What a class does beyond that for single layers
(GPT-2's smaller ``c_proj``) is kept by :mod:`hf_sparse.models.sparse_gpt2`, not here.

**Budget.** ``layer`` (the paper's) makes every replaced layer cost what it did, with the sparsity asked for. A wider model
also has wider attention, stem and head, which are dense: whole-model FLOPs grow (1.47 times for GPT-2 Small at 75% and 2,048
tokens). ``model`` keeps the shapes and raises the sparsity until the whole forward pass costs what the dense one did, as the
released code does for its convolutional networks by a binary search; here it is solved for.
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn

from hf_sparse.config import SparsityConfig
from hf_sparse.flops import forward_flops
from hf_sparse.models.layers import FAMILIES, KINDS, masked_weights, transform_layers
from hf_sparse.models.ranks import exact
from hf_sparse.models.widths import wide_config
from hf_sparse.targets import Target, find_targets

__all__ = ["IFTReport", "default_inputs", "dense_by_default", "sparse_ift"]

BUDGETS = ("layer", "model")
REPLACED = "sparse_ift"  # the quant_method under which a config says which layers were replaced


@dataclass(frozen=True)
class IFTReport:
    """What :func:`sparse_ift` did.

    Attributes:
        family, budget: as asked.
        nominal_sparsity: as asked; it decides widths, branches and ranks.
        sparsity: that of the masks; higher than the nominal one under the ``model`` budget, or where widths were rounded up.
        layers: replaced layers -> branches or rank; for ``wide`` the widened fields of the config, ``name: (dense, wide)``.
        dense_flops, sparse_flops: of one forward pass of the whole model, before, and after with its masks.
        layer_ratio: of the FLOPs of the replaced layers alone, sparse over dense.
        config: for ``SparsityCallback`` or ``sparsify``.
    """

    family: str
    budget: str
    nominal_sparsity: float
    sparsity: float
    layers: dict
    dense_flops: float
    sparse_flops: float
    layer_ratio: float
    config: SparsityConfig | None

    @property
    def ratio(self) -> float:
        """FLOPs of the whole forward pass, sparse over dense."""
        return self.sparse_flops / self.dense_flops

    def __str__(self):
        if self.family == "wide":
            what = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in self.layers.items())
        else:
            sizes = sorted(set(self.layers.values()))
            word = "branches" if self.family == "parallel" else "ranks"
            what = f"{len(self.layers)} layers, {word} {', '.join(map(str, sizes))}"
        return (
            f"sparse {self.family}: {what}; sparsity {self.sparsity:.4g}; {self.dense_flops:.4g} -> {self.sparse_flops:.4g} "
            f"FLOPs (x{self.ratio:.4f}; replaced layers x{self.layer_ratio:.4f}; budget: {self.budget})"
        )


def sparse_ift(
    model: nn.Module,
    family: str,
    sparsity: float,
    *,
    method: str = "static",
    schedule: dict | None = None,
    budget: str = "layer",
    inputs: dict | None = None,
    targets: list[str] | None = None,
    ignore: list[str] = (),
    branch_activation: bool | str = True,
    sparse_u_only: bool = False,
    widths: dict | None = None,
    head_multiple: int = 1,
    seed: int = 0,
) -> IFTReport:
    """Replaces the layers of a model by those of a Sparse-IFT family, in place; its weights are new and still dense.

    Args:
        model: a transformers model; for the other families any torch model.
        family: ``wide``, ``parallel``, ``factorized`` or ``doped``.
        sparsity: in [0, 1); 0 leaves the model as it is.
        method, schedule: the training method of ``report.config`` (:mod:`hf_sparse.methods`); its allocation is uniform.
        budget: ``layer`` or ``model``, see the module.
        inputs: shapes of a forward pass to count, ``{"input_ids": (1, 1024)}``. Default: one sequence of the model's length
            (at most 2,048), or one image of its size.
        targets, ignore: which layers are replaced, in the grammar of ``SparsityConfig``. ``wide`` changes all widths, so
            there they choose only which weights are sparse.
        branch_activation, sparse_u_only: see :mod:`hf_sparse.models.layers`.
        widths, head_multiple: see :func:`hf_sparse.models.widths.wide_config`. With ``head_multiple`` above 1 (8 is good for
            GPUs) widths are rounded further, and the ``layer`` budget raises the sparsity so that the layers cost the same.
        seed: of the masks.

    Raises:
        ValueError: before the model is changed: a quantized model or one with replaced layers, an unknown family or budget, a
            sparsity the family has no layers for, a model budget that the dense parts alone exceed.
    """
    if family not in FAMILIES:
        raise ValueError(f"family is one of {', '.join(FAMILIES)}, got {family!r}")
    if budget not in BUDGETS:
        raise ValueError(f"budget is 'layer' or 'model', got {budget!r}")
    exact(sparsity)  # raises outside [0, 1)
    inputs = inputs or default_inputs(model)
    before = forward_flops(model, inputs)
    dense = sum(before.values())
    if not sparsity:
        return IFTReport(family, budget, 0.0, 0.0, {}, dense, dense, 1.0, None)
    config = getattr(model, "config", None)
    sparse_already = getattr(config, "family", None) and getattr(config, "sparsity", 0.0)
    if sparse_already or getattr(config, "sparse_ift", None) or any(isinstance(m, KINDS) for m in model.modules()):
        raise ValueError("the layers of this model were replaced or widened already; start from the stock architecture")
    if hasattr(config, "quantization_config"):
        raise ValueError("this model is quantized; start from one with plain weights")
    kept_dense = [*ignore, *dense_by_default(model, targets)]
    original = find_targets(model, targets, kept_dense)
    of_layers = sum(before.get(name, 0.0) for name in original)
    if family == "wide":
        trial, details = _widened(model, sparsity, widths, head_multiple)
        masked, after_ignore, names = targets, kept_dense, []
    else:
        if widths or head_multiple != 1:
            raise ValueError(f"widths and head_multiple belong to the wide family, not to {family!r}")
        names = [target.module for target in original.values()]
        _check_kinds(original)
        trial = _shape_copy(model)  # so that an error changes nothing
        details = transform_layers(trial, family, sparsity, names, branch_activation, sparse_u_only)
        masked, after_ignore = masked_weights(family, names, sparse_u_only), []
    after = forward_flops(trial, inputs)
    sparse = find_targets(trial, masked, after_ignore)
    of_masked = sum(after.get(name, 0.0) for name in sparse)
    rest = sum(after.values()) - of_masked
    used = float(sparsity)
    if family == "wide" and budget == "layer":
        used = _widened_share(model, of_layers, of_masked, used, solved=bool(widths) or head_multiple > 1)
    if budget == "model":
        used = 1.0 - (dense - rest) / of_masked
        if not 0 <= used < 1:
            raise ValueError(
                f"what stays dense costs {rest:.4g} FLOPs after the change, the whole dense model {dense:.4g}: no sparsity "
                f"of the {family} layers keeps the model's budget. Use budget='layer' or a lower sparsity"
            )
    training = SparsityConfig(
        sparsity=used,
        method=method,
        schedule=schedule or {},
        allocation="uniform",
        targets=masked,
        ignore=list(after_ignore),
        seed=seed,
    )
    total = rest + of_masked * (1 - used)
    if family == "wide":
        inside = of_masked * (1 - used)
        _take_over(model, trial)
    else:
        inside = total - (dense - of_layers) if of_layers else 0.0
        transform_layers(model, family, sparsity, names, branch_activation, sparse_u_only)
        _initialise(model, names)
    if hasattr(model, "config"):
        model.config.sparse_ift = dict(family=family, sparsity=float(sparsity), budget=budget)
        if family != "wide":  # for whoever loads it with a class that has other layers: integrations.replaced_layers
            how = dict(names=names, branch_activation=branch_activation, sparse_u_only=sparse_u_only)
            note = dict(quant_method=REPLACED, family=family, sparsity=float(sparsity), **how)
            model.config.quantization_config = note
    return IFTReport(family, budget, float(sparsity), used, details, dense, total, inside / of_layers, training)


def _widened_share(model: nn.Module, of_layers: float, of_masked: float, sparsity: float, solved: bool) -> float:
    """The sparsity of the masks of a widened model under the ``layer`` budget.

    Raises:
        ValueError: the layers got narrower, or some did not grow because their widths are not known.
    """
    if solved:
        sparsity = 1.0 - of_layers / of_masked
    share = of_masked * (1 - sparsity) / of_layers
    truncated = not getattr(model.config, "num_attention_heads", None)  # convolutions: widths are cut, as published
    if sparsity < 0 or (share < 0.97 and not truncated):
        raise ValueError(
            f"the layers of {type(model).__name__} would cost {share:.3f} of what they did: not all of its widths are known "
            "here. Give them: widths={'field': value, ...}"
        )
    return sparsity


def default_inputs(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of one forward pass: one sequence or one image.

    Raises:
        ValueError: the model takes something else.
    """
    config, name = getattr(model, "config", None), getattr(model, "main_input_name", "")
    if name == "input_ids":
        return {name: (1, min(2048, getattr(config, "max_position_embeddings", None) or 2048))}
    if name == "pixel_values":
        size = getattr(config, "image_size", None) or 224
        height, width = (size, size) if isinstance(size, int) else size
        return {name: (1, getattr(config, "num_channels", 3), height, width)}
    raise ValueError(f"say what {type(model).__name__} is fed: inputs={{'name of the argument': (shape)}}")


def dense_by_default(model: nn.Module, targets: list[str] | None) -> list[str]:
    """The targets that stay dense unless asked for: layers on the input itself, a stem or a patch embedding."""
    if targets is not None:
        return []
    channels = getattr(getattr(model, "config", None), "num_channels", 3)
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    found = find_targets(model)
    modules = {name: model.get_submodule(target.module) for name, target in found.items()}
    return [n for n, m in modules.items() if isinstance(m, convolutions) and m.in_channels * m.groups == channels]


def _check_kinds(targets: dict[str, Target]) -> None:
    for target in targets.values():
        if target.is_experts:
            raise ValueError(f"{target.name} is a stack of experts; replace what is not: ignore={[target.kind]!r}")


def _shape_copy(model: nn.Module) -> nn.Module:
    """A copy of a model without numbers."""
    memo = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def _widened(model: nn.Module, sparsity: float, widths: dict | None, head_multiple: int) -> tuple[nn.Module, dict]:
    """(a wider model of the same class, device and dtype; the fields that changed)."""
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError(f"the wide family widens a config, and {type(model).__name__} has none: use another family")
    wide = wide_config(config, sparsity, widths, head_multiple)
    old, new = config.to_dict(), wide.to_dict()
    changed = {name: (old[name], new[name]) for name in old if name in new and old[name] != new[name]}
    parameter = next(model.parameters())
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(parameter.dtype)
    try:
        with parameter.device:
            trial = type(model)(wide)
    finally:
        torch.set_default_dtype(dtype)
    return trial.train(model.training), changed


def _take_over(model: nn.Module, other: nn.Module) -> None:
    """``model`` becomes ``other``: the same object for whoever holds it, with other modules."""
    model.__dict__.clear()
    model.__dict__.update(other.__dict__)


def _initialise(model: nn.Module, names: list[str]) -> None:
    """New layers start as the model's class starts its own."""
    rule = getattr(model, "_init_weights", None)
    for name in names if rule is not None else ():
        for module in model.get_submodule(name).modules():
            if not list(module.children()):
                rule(module)
