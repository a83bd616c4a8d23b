"""A target of any cost with the function of a model at hand, for experiments on speculative decoding.

Layers whose output projections are zero change nothing: the residual stream passes them by. A model with many of them writes
exactly what it wrote before, and takes as long as a model of that many layers, so that acceptance is that of real models and
the ratio of costs is whatever is asked for.
"""

import copy

import torch

__all__ = ["deepen"]


def deepen(model, layers: int):
    """A model of ``layers`` layers with the same output; the added ones are spread evenly and hold weights of their own.

    Args:
        model: a decoder-only model whose layers write through ``o_proj`` and ``down_proj`` (Llama and its kin).

    Raises:
        ValueError: fewer layers than the model has, or layers of another kind.
    """
    stack, config = model.model.layers, copy.deepcopy(model.config)
    have = len(stack)
    if layers < have:
        raise ValueError(f"the model has {have} layers already, more than {layers}")
    if not (
        hasattr(stack[0], "self_attn") and hasattr(stack[0].self_attn, "o_proj") and hasattr(stack[0].mlp, "down_proj")
    ):
        raise ValueError(f"the layers of {type(model).__name__} have no o_proj and down_proj to be made silent")
    own = {round(index * (layers - 1) / max(1, have - 1)): index for index in range(have)}  # places of the real layers
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        last = 0
        kinds = []
        for place in range(layers):
            last = own.get(place, last)
            kinds.append(model.config.layer_types[last])
        config.layer_types = kinds
    with torch.device("meta"):
        deep = type(model)(config)
    deep = deep.to_empty(device=model.device).to(model.dtype)
    with torch.no_grad():
        source = model.state_dict()
        for name, value in deep.state_dict().items():
            parts = name.split(".")
            if "layers" in parts:
                at = parts.index("layers") + 1
                place = int(parts[at])
                index = own.get(place, max((own[p] for p in own if p <= place), default=0))
                given = source[".".join([*parts[:at], str(index), *parts[at + 1 :]])]
                silent = place not in own and parts[-2] in ("o_proj", "down_proj")
                value.copy_(torch.zeros_like(given) if silent else given)
            else:
                value.copy_(source[name])
        for (name, buffer), (_, given) in zip(deep.named_buffers(), model.named_buffers(), strict=True):
            if name not in deep.state_dict():
                buffer.copy_(given)
    deep.tie_weights()
    deep.generation_config = copy.deepcopy(model.generation_config)
    return deep.eval()
