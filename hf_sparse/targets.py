"""Targets: which parameters are sparse, and how each is seen as a matrix.

The unit is the parameter, not ``nn.Linear``: transformers 5 keeps the experts of a mixture as fused 3-D parameters,
GPT-2 uses ``Conv1D`` (stored ``[in, out]``), convolutions are 4-D. :func:`find_targets` walks the modules once and returns
``{parameter name: Target}``; a target knows how to view its stored tensor as ``[out, in]`` (experts: ``[experts, out, in]``).

Found by structure, never by a table of class names:

* weights of ``nn.Linear``, ``Conv1D`` and convolutions,
* fused experts: 3-D parameters of a module that also says how many experts it has, their first dimension.

Dense unless asked for by name: embeddings, the output head, routers (whose rows are experts) and the gates of shared
experts, depthwise convolutions (a handful of weights per channel, as in RigL and in hybrid models), norms, biases.
A tensor reached under two names (tied weights) is one parameter and is listed once. In a model that PEFT wrapped the base
weights are the targets, under the names they have there and under their old ones; adapters are not.

Grammar of ``targets`` and ``ignore`` (that of compressed-tensors): a parameter name, a module name, the last component of
a module name (``q_proj``), a module class name (``Linear``), or ``re:`` and a regular expression matched from the start
of the parameter name.
"""

import difflib
import re
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["Target", "expert_parameters", "find_targets", "match_names"]


@dataclass(frozen=True)
class Target:
    """One sparse parameter: its name, its layout, and the view of it as a matrix.

    Attributes:
        name: the parameter's name in the model, e.g. ``model.layers.0.mlp.down_proj.weight``.
        module: the name of the module that owns it.
        class_name: that module's class.
        shape: matrix shape, ``(out, in)`` or ``(experts, out, in)``.
        layout: ``matrix`` ([out, in]), ``transposed`` ([in, out], also per expert) or ``conv`` ([out, in, *kernel]).
    """

    name: str
    module: str
    class_name: str
    shape: tuple[int, ...]
    layout: str

    @property
    def plain(self) -> tuple[str, str]:
        """The names of the parameter and its module as they were before PEFT wrapped the model."""
        return _without_peft(self.name), _without_peft(self.module)

    @property
    def kind(self) -> str:
        """The name reports group by: the last component of the module's name (``q_proj``; ``experts.gate_up_proj``)."""
        last = self.plain[1].rpartition(".")[2]
        attribute = self.name.rpartition(".")[2]
        return last if attribute == "weight" else f"{last}.{attribute}"

    @property
    def is_experts(self) -> bool:
        return len(self.shape) == 3

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` (the stored parameter, or anything of its shape) as ``[out, in]``; a view wherever one exists."""
        if self.layout == "transposed":
            return tensor.transpose(-1, -2)
        if self.layout == "conv":
            return tensor.flatten(1)
        return tensor

    def stored(self, matrix: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`matrix`: a matrix in the shape of the stored parameter ``like``."""
        if self.layout == "transposed":
            return matrix.transpose(-1, -2)
        return matrix.reshape(like.shape)


def find_targets(model: nn.Module, targets: list[str] | None = None, ignore: list[str] = ()) -> dict[str, Target]:
    """The parameters of ``model`` that ``targets`` selects and ``ignore`` does not, in the model's order.

    Args:
        targets: entries of the grammar above; None selects every weight that is sparse by default.
        ignore: entries to leave dense.

    Raises:
        ValueError: an entry matches nothing (the message lists near matches), or nothing is left.
    """
    candidates = _candidates(model)
    everything = {name: target for name, (target, _) in candidates.items()}
    if targets is None:
        chosen = {name for name, (_, by_default) in candidates.items() if by_default}
        if not chosen:
            raise ValueError(
                f"{type(model).__name__} has no linear, convolution or fused expert weights; it has "
                f"{', '.join(sorted({type(m).__name__ for m in model.modules()}))}"
            )
    else:
        chosen = set()
        for entry in targets:
            matched = match_names(entry, everything)
            # a class name selects what is sparse by default among that class: `Linear` does not mean the output head
            if not entry.startswith("re:") and any(t.class_name == entry for t in everything.values()):
                matched = [name for name in matched if candidates[name][1]]
            chosen.update(matched)
    for entry in ignore:
        chosen.difference_update(match_names(entry, everything))
    if not chosen:
        raise ValueError(f"no target is left: targets={targets} ignore={list(ignore)} leave every parameter dense")
    return {name: target for name, target in everything.items() if name in chosen}


def match_names(entry: str, targets: dict[str, Target]) -> list[str]:
    """The names of ``targets`` that one entry of the grammar selects.

    Raises:
        ValueError: it selects none; the message has near matches.
    """
    if entry.startswith("re:"):
        matched = [name for name, t in targets.items() if any(re.match(entry[3:], n) for n in (name, t.plain[0]))]
    else:
        matched = [
            name
            for name, target in targets.items()
            if entry in (name, target.module, *target.plain, target.class_name, target.kind)
            or any(plain.endswith("." + entry) for plain in target.plain)
        ]
    if matched:
        return matched
    words = {w for t in targets.values() for w in (t.name, t.module, t.kind, t.class_name)}
    near = difflib.get_close_matches(entry.removeprefix("re:"), sorted(words), n=3, cutoff=0.5)
    kinds = sorted({t.kind for t in targets.values()})
    hint = f"near matches: {', '.join(near)}" if near else f"kinds in this model: {', '.join(kinds)}"
    raise ValueError(f"{entry!r} matches no parameter of this model; {hint}")


def _candidates(model: nn.Module) -> dict[str, tuple[Target, bool]]:
    """``{parameter name: (target, sparse by default)}`` for every weight that could be sparse."""
    heads = _embeddings_and_heads(model)
    expert_counts = {}  # module name -> number of experts, to recognise routers beside them
    found: dict[str, tuple[Target, bool]] = {}
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        if expert_parameters(module):
            expert_counts[module_name] = next(iter(expert_parameters(module).values())).shape[0]
    adapters = _adapter_modules(model)
    for module_name, module in model.named_modules():
        if module_name in adapters:
            continue
        for attribute, parameter, layout, shape in _weights(module, model):
            name = f"{module_name}.{attribute}" if module_name else attribute
            if id(parameter) in seen:  # tied to a weight already listed
                continue
            seen.add(id(parameter))
            target = Target(name, module_name, _class_name(module), shape, layout)
            by_default = not (
                id(parameter) in heads or _is_router(module_name, shape, expert_counts) or _is_depthwise(module)
            )
            found[name] = (target, by_default)
    return found


def _class_name(module: nn.Module) -> str:
    """The class as it was before ``fully_shard`` made it ``FSDP<class>``."""
    bases = type(module).__bases__
    return (bases[1] if bases[0].__name__ == "FSDPModule" else type(module)).__name__


def _weights(module: nn.Module, model: nn.Module):
    """Yields ``(attribute, parameter, layout, matrix shape)`` of the weights a module owns."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, nn.Parameter):
        if isinstance(module, nn.Linear) and weight.dim() == 2:
            yield "weight", weight, "matrix", tuple(weight.shape)
        elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            yield "weight", weight, "conv", (weight.shape[0], weight.shape[1:].numel())
        elif _class_name(module) == "Conv1D" and weight.dim() == 2:  # transformers' GPT-2 layer, y = x @ weight + bias
            yield "weight", weight, "transposed", (weight.shape[1], weight.shape[0])
    for attribute, parameter in expert_parameters(module).items():
        transposed = _expert_is_transposed(module, attribute, parameter)
        experts, first, second = parameter.shape
        shape = (experts, second, first) if transposed else (experts, first, second)
        yield attribute, parameter, "transposed" if transposed else "matrix", shape


def expert_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The fused 3-D expert weights of a module: first dimension = the number of experts the module states."""
    count = getattr(module, "num_experts", None)
    if not isinstance(count, int):
        return {}
    return {
        name: parameter
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and parameter.shape[0] == count
    }


def _expert_is_transposed(module: nn.Module, attribute: str, parameter: nn.Parameter) -> bool:
    """Whether an expert's matrix is stored ``[in, out]``: as the module says, else read from the shapes.

    Of two fused weights, the first maps hidden -> intermediate (twice that when gate and up are concatenated) and the
    second intermediate -> hidden, so the dimension shared by both is the hidden size, input of the first.
    """
    stated = getattr(module, "is_transposed", None)
    if isinstance(stated, bool):
        return stated
    hidden = getattr(module, "hidden_size", None) or getattr(module, "hidden_dim", None)
    is_down = "down" in attribute or attribute.endswith("w2")
    rows_hidden, cols_hidden = parameter.shape[1] == hidden, parameter.shape[2] == hidden
    if rows_hidden == cols_hidden:
        raise ValueError(
            f"cannot tell which dimension of the fused expert weight {type(module).__name__}.{attribute} "
            f"{tuple(parameter.shape)} is its input (hidden size {hidden}, no is_transposed attribute); "
            "ignore it or name other targets"
        )
    return cols_hidden if is_down else rows_hidden


def _adapter_modules(model: nn.Module) -> set[str]:
    """Names of the modules that PEFT put beside a base layer (``lora_A``, ``lora_B``, ...), with all that is in them."""
    found = set()
    for name, module in model.named_modules():
        if {"original_module", "modules_to_save"} <= set(module._modules):  # trained as a copy; the original waits
            original = module.get_submodule("original_module")
            found.update(f"{name}.original_module.{inner}".rstrip(".") for inner, _ in original.named_modules())
        if isinstance(module._modules.get("base_layer"), nn.Module):
            found.add(name)  # the wrapper passes its base layer's weight off as its own
            for child, below in module.named_children():
                if child != "base_layer":
                    found.update(f"{name}.{child}.{inner}".rstrip(".") for inner, _ in below.named_modules())
    return found


def _without_peft(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def _embeddings_and_heads(model: nn.Module) -> set[int]:
    """ids of the parameters of input embeddings and output head, which stay dense by default."""
    owners = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        if hasattr(model, getter):
            try:
                owners.append(getattr(model, getter)())
            except (NotImplementedError, AttributeError):
                continue
    for name, module in model.named_children():  # heads of classifiers and the like sit directly on the model
        if hasattr(model, "base_model_prefix") and name != model.base_model_prefix:
            inside = module if isinstance(module, nn.Sequential) else [module]  # ResNet: Sequential(Flatten, Linear)
            owners.extend(child for child in inside if isinstance(child, nn.Linear))
    return {id(p) for owner in owners if owner is not None for p in owner.parameters(recurse=False)}


def _is_router(module_name: str, shape: tuple[int, ...], expert_counts: dict[str, int]) -> bool:
    """A linear that scores experts: one row per expert of a mixture in the same block, or one for its shared expert."""
    if len(shape) != 2:
        return False
    parts = module_name.split(".")
    for depth in (1, 2):  # block.gate beside block.experts, or block.router.layer
        parent = ".".join(parts[:-depth])
        for experts, count in expert_counts.items():
            if shape[0] in (1, count) and experts.rpartition(".")[0] == parent and experts != module_name:
                return True
    return False


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups == module.in_channels > 1
