"""Mixtures of experts: where they are in a model, which tensors have one entry per expert, and how to keep some of them.

    h(x) = sum over k of the top-k experts T(x) of   g_k(x) f_k(x)          g from the router, f_k an expert's MLP

transformers keeps all experts of a layer in one module with 3-D weights, beside the router that chooses among them:

    model.layers.1.mlp                      the block
        .experts   gate_up_proj [E, 2I, H], down_proj [E, H, I]    (or transposed, interleaved, with biases [E, ...])
        .gate      weight [E, H], perhaps bias [E], e_score_correction_bias [E]            (or .router, .gate.wg)
        .e_score_correction_bias [E]                                                       (on the block, or deeper)

They are found by these shapes, not by a table of class names: a module that states ``num_experts`` and owns 3-D parameters of
that first dimension, and a router beside it with one row per expert. Shared experts are another module and are left alone.
"""

from dataclasses import dataclass

import torch
from torch import nn

from hf_sparse.targets import expert_parameters

__all__ = ["Mixture", "find_mixtures", "select_experts", "set_expert_count", "stated_count"]

# what modules and configs of transformers call the number of experts
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts", "n_experts")
_TOP_K = ("top_k", "num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token")


@dataclass(frozen=True)
class Mixture:
    """One layer's mixture of experts.

    Attributes:
        name: the block's module name. experts, router: the names of its parts.
        count: experts E. top_k: how many a token is sent to.
        groups: contiguous groups of experts among which the router first chooses; 1 for none. groups_used: how many.
        input_scaled: the gate multiplies the expert's input, not its output (Llama 4).
        tensors: ``(name of a parameter or buffer, its dimension with an entry per expert)``.
    """

    name: str
    experts: str
    router: str
    count: int
    top_k: int
    groups: int
    groups_used: int
    input_scaled: bool
    tensors: tuple[tuple[str, int], ...]

    @property
    def fewest(self) -> int:
        """The least number of experts with which the router still works."""
        if self.groups == 1:
            return self.top_k
        per_group = max(2, -(-self.top_k // self.groups_used))  # a group is scored by its best two
        return per_group * self.groups

    def check_count(self, count: int) -> None:
        """Raises ValueError if the router cannot work with ``count`` experts."""
        if count < self.fewest:
            why = f"every token goes to {self.top_k} of them"
            if self.groups > 1:
                why += f", out of {self.groups_used} of {self.groups} groups"
            raise ValueError(f"{self.name} needs at least {self.fewest} experts ({why}); {count} would be left")
        if count % self.groups:
            raise ValueError(
                f"{self.name} chooses among {self.groups} groups of equal size, so the number of its experts must be a "
                f"multiple of {self.groups}; {count} would be left"
            )

    def check_kept(self, kept: list[int]) -> None:
        """Raises ValueError if these experts are not there, or the router cannot work with them alone."""
        if len(set(kept)) != len(kept) or (kept and (kept[0] < 0 or kept[-1] >= self.count)):
            raise ValueError(f"{self.name} has experts 0 to {self.count - 1}; asked to keep {kept}")
        self.check_count(len(kept))
        if self.groups > 1:
            size = self.count // self.groups
            each = [sum(index // size == group for index in kept) for group in range(self.groups)]
            if len(set(each)) > 1:
                raise ValueError(
                    f"{self.name} has {self.groups} groups of equal size, so as many experts of each must stay; asked to "
                    f"keep {each}"
                )


def find_mixtures(model: nn.Module) -> dict[str, Mixture]:
    """``{block name: Mixture}`` in the model's order.

    Raises:
        ValueError: no mixture, or one whose parts are not as described above; the message says what was seen.
    """
    found: dict[str, Mixture] = {}
    for name, module in model.named_modules():
        if expert_parameters(module):
            mixture = _mixture(model, name, module)
            found[mixture.name] = mixture
    if found:
        return found
    lists = [
        f"{name} ({type(module).__name__} of {len(module)})"
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and "expert" in name.rpartition(".")[2]
    ]
    if lists:
        raise ValueError(
            f"{type(model).__name__} keeps each expert as a module of its own, e.g. {lists[0]}; only fused experts, one 3-D "
            "weight for all of them as in transformers 5, can be scored and pruned. Load it with transformers' own class "
            "(trust_remote_code=False) if there is one"
        )
    kinds = sorted({type(module).__name__ for module in model.modules() if "mlp" in type(module).__name__.lower()})
    raise ValueError(
        f"{type(model).__name__} has no mixture of experts: no module states num_experts and owns 3-D weights of as many "
        f"matrices{' (its MLPs are ' + ', '.join(kinds) + ')' if kinds else ''}"
    )


def select_experts(model: nn.Module, mixture: Mixture, kept: list[int]) -> None:
    """Keeps the experts ``kept`` of one mixture, in place: their weights, their rows of the router, their biases.

    Their order stays. Works on the meta device. ``mixture`` describes the model as it was and is out of date afterwards.

    Raises:
        ValueError: indices that are not there or repeat, or too few of them for the router.
    """
    kept = sorted(int(index) for index in kept)
    mixture.check_kept(kept)
    for name, dim in mixture.tensors:
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        old = getattr(module, attribute)
        new = old.detach().index_select(dim, torch.tensor(kept, device=old.device))
        if attribute in module._parameters:
            parameter = nn.Parameter(new, requires_grad=old.requires_grad)
            parameter.__dict__.update(vars(old))
            module._parameters[attribute] = parameter
        else:
            module._buffers[attribute] = new
    for part in (mixture.name, mixture.experts):
        _replace_counts(model.get_submodule(part), _COUNTS, mixture.count, len(kept))
    for module in model.get_submodule(mixture.router).modules():
        _replace_counts(module, (*_COUNTS, "out_features"), mixture.count, len(kept))


def stated_count(model: nn.Module) -> int | None:
    """The number of experts that the config states."""
    values = (getattr(config, name, None) for config in reversed(_configs(model)) for name in _COUNTS)
    return next((value for value in values if isinstance(value, int)), None)


def set_expert_count(model: nn.Module, before: int, count: int) -> None:
    """Writes the number of experts, the same in all layers, where the model and its config state it.

    A config gets every spelling its class knows (``num_experts``, ``num_local_experts``, ``n_routed_experts`` ...), so that
    ``config.json`` is right for readers that know only one of them: transformers itself writes one, and not always that by
    which an older reader finds it.
    """
    for module in model.modules():  # outside the blocks: the model's own, for its load-balancing loss
        if not expert_parameters(module):
            _replace_counts(module, _COUNTS, before, count)
    for config in _configs(model):
        aliases = getattr(config, "attribute_map", {})
        names = [name for name in _COUNTS if isinstance(getattr(config, name, None), int)]
        for name in names:
            if getattr(config, name) == before:
                setattr(config, name, count)
        for name in names:
            if name in aliases and getattr(config, aliases[name]) == count:
                config.__dict__[name] = count  # past the alias, which setattr would follow: it is then written as well


def _configs(model: nn.Module) -> list:
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return [config] if text is config else [config, text]


def _replace_counts(module: nn.Module, names: tuple[str, ...], before: int, count: int) -> None:
    for name in names:
        if vars(module).get(name) == before:
            setattr(module, name, count)


def _mixture(model: nn.Module, name: str, experts: nn.Module) -> Mixture:
    block_name = name.rpartition(".")[0]
    block, count = model.get_submodule(block_name), experts.num_experts
    router_name, router = _router(block_name, block, name, experts, count)
    tensors = [(f"{name}.{key}", 0) for key, value in _tensors(experts) if value.dim() and value.shape[0] == count]
    for owner_name, owner in [(block_name, None), *_named(router_name, router)]:
        for key, value in _tensors(block if owner is None else owner):
            if not value.is_floating_point():
                raise ValueError(
                    f"{owner_name}.{key} is a table of {str(value.dtype).removeprefix('torch.')} in a router: experts chosen "
                    "by a table, not by scores, cannot be pruned by saliency"
                )
            dim = 0 if value.dim() and value.shape[0] == count else 1
            if value.dim() in (1, 2) and (dim == 0 or value.shape == (1, count)):
                tensors.append((f"{owner_name}.{key}", dim))
    config = _configs(model)[-1]
    groups, used = _groups(router, config, count)
    top_k = next(
        (
            value
            for owner in (router, block, config)
            for key in _TOP_K
            if isinstance(value := getattr(owner, key, None), int)
        ),
        None,
    )
    if top_k is None:
        raise ValueError(
            f"neither {router_name} nor the config says how many experts a token is sent to ({', '.join(_TOP_K)})"
        )
    indexed = hasattr(experts, "is_transposed") or len(_arguments(experts)) >= 3
    return Mixture(block_name, name, router_name, count, top_k, groups, used, not indexed, tuple(tensors))


def _router(block_name: str, block: nn.Module, experts_name: str, experts: nn.Module, count: int):
    """``(name, module)`` of what scores the experts: a child of the block with a matrix of one row per expert."""
    children = [
        (name, child) for name, child in block.named_children() if child is not experts and "shared" not in name
    ]
    likely = [(n, c) for n, c in children if n in ("gate", "router") or "Router" in type(c).__name__]
    for name, child in likely or children:
        matrices = [p for _, module in child.named_modules() for _, p in _tensors(module) if p.dim() == 2]
        if any(len(p) == count for p in matrices):
            return f"{block_name}.{name}", child
        if matrices and likely:
            raise ValueError(
                f"{block_name}.{name} ({type(child).__name__}) scores {len(matrices[0])} choices, but {experts_name} has "
                f"{count} experts: a layout with other choices beside experts is not supported"
            )
    seen = ", ".join(f"{name} ({type(child).__name__})" for name, child in block.named_children())
    raise ValueError(
        f"cannot find the router of {experts_name}: no module beside it has a weight with {count} rows. Seen in "
        f"{block_name} ({type(block).__name__}): {seen}"
    )


def _named(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(f"{name}.{inner}".rstrip("."), child) for inner, child in module.named_modules()]


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _groups(router: nn.Module, config, count: int) -> tuple[int, int]:
    """How many groups the router first chooses among, and how many of them it takes."""
    if getattr(config, "topk_method", None) == "greedy":
        return 1, 1
    for owner in (router, config):
        for groups, used in (("num_group", "topk_group"), ("n_group", "topk_group")):
            value, chosen = getattr(owner, groups, None), getattr(owner, used, None)
            if isinstance(value, int) and isinstance(chosen, int) and value > 1 and count % value == 0:
                return value, chosen
    return 1, 1


def _arguments(experts: nn.Module) -> list[str]:
    code = getattr(type(experts).forward, "__wrapped__", type(experts).forward).__code__
    return list(code.co_varnames[1 : code.co_argcount])
