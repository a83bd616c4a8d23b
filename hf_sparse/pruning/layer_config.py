"""The config of a model without some of its layers, and the proof that its class builds the layers that stay from it.

Configs tell layers apart in three ways: lists with an entry per layer (``layer_types``), lists of layer numbers
(``mlp_only_layers``), and counts of layers at the start (``first_k_dense_replace``, ``max_window_layers``). All three are
rewritten. Rules such as "every fourth layer" cannot be: so the shortened model is built from the new config, without memory,
and each of its layers is compared with the one it stands for.
"""

import copy

import torch
from torch import nn

__all__ = ["check_same_layers", "without_layers"]

_NUMBERS_OF_LAYERS = ("mlp_only_layers", "moe_layers", "full_attn_idxs", "cross_attention_layers", "attn_layer_indices")
_FIRST_LAYERS = ("first_k_dense_replace", "max_window_layers", "moe_layer_start_index")
_LAST_LAYER = ("moe_layer_end_index",)


def without_layers(config, kept: list[int], layers: int):
    """A copy of a transformers config for the model that keeps layers ``kept`` of its ``layers``."""
    config = copy.deepcopy(config)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    text.num_hidden_layers = len(kept)
    position = {old: new for new, old in enumerate(kept)}
    for key, value in list(vars(text).items()):
        if key in _NUMBERS_OF_LAYERS and isinstance(value, (list, tuple)):
            setattr(text, key, [position[index] for index in value if index in position])
        elif key in _FIRST_LAYERS and isinstance(value, int):
            setattr(text, key, sum(index < value for index in kept))
        elif key in _LAST_LAYER and isinstance(value, int) and value >= 0:
            setattr(text, key, max(0, sum(index <= value for index in kept) - 1))
        elif isinstance(value, (list, tuple)) and len(value) == layers:
            setattr(text, key, [value[index] for index in kept])
    return config


def check_same_layers(model: nn.Module, config, name: str, kept: list[int]) -> None:
    """Raises ValueError unless the model's class builds from ``config`` the very layers ``kept`` of its stack ``name``."""
    with torch.device("meta"):
        new = type(model)(copy.deepcopy(config))
    for index, old in enumerate(kept):
        here, there = model.get_submodule(f"{name}.{old}"), new.get_submodule(f"{name}.{index}")
        difference = _difference(here, there)
        if difference:
            raise ValueError(
                f"layer {old} of {type(model).__name__} would be layer {index} of the shorter model, but its class builds that "
                f"one otherwise: {difference}. Choose other layers, e.g. whole periods of the model's pattern"
            )


def _difference(here: nn.Module, there: nn.Module) -> str | None:
    mine, theirs = (dict(layer.named_modules()) for layer in (here, there))
    if set(mine) != set(theirs):
        return f"its modules differ ({', '.join(sorted(set(mine) ^ set(theirs))[:3])})"
    for name, module in mine.items():
        other = theirs[name]
        label = name or type(module).__name__
        if type(module).__name__ != type(other).__name__:
            return f"{label} is a {type(other).__name__}, not a {type(module).__name__}"
        shapes = [{k: tuple(v.shape) for k, v in m.named_parameters(recurse=False)} for m in (module, other)]
        if shapes[0] != shapes[1]:
            return f"{label} has weights {shapes[1]}, not {shapes[0]}"
        for key, value in vars(module).items():
            told_apart = isinstance(value, (bool, int, float, str)) or value is None
            if (
                told_apart
                and key not in ("layer_idx", "training", "_is_hf_initialized")
                and vars(other).get(key, value) != value
            ):
                return f"{label}.{key} is {vars(other)[key]!r}, not {value!r}"
    return None
