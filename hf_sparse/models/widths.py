"""Sparse Wide: a config whose layers are ``k = sqrt(1 / (1 - s))`` times as wide, so that at sparsity s they cost the same.

    wide_config(GPT2Config(), 0.5).n_embd      # 1092 = 768 * 1.414, rounded up to a multiple of the 12 heads
    wide_config(GPT2Config(), 0.75).n_embd     # 1536

Widths grow, the numbers of layers and of heads stay (heads get larger), as in the published GPT configs. A model's width is
the smallest multiple of its heads that is at least k times as large, of twice its heads where a rotary embedding needs even
heads; ``head_multiple`` makes the size of a head a multiple of 8, say: 1092 / 12 is 91, which suits few GPU kernels. MLPs keep
their ratio to the width. A convolutional network multiplies its first width by k once and truncates (64 -> 90, 128, 202 at
50, 75, 90%), and all others keep their ratio to that, as in the released code.
"""

import copy
import math

from .ranks import exact

__all__ = ["scaled_width", "wide_config"]

_WIDTHS = ("hidden_size", "n_embd", "d_model")
_INNER = ("intermediate_size", "n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "ffn_hidden_size")
_INNER += ("moe_intermediate_size", "shared_expert_intermediate_size")
_HEADS = ("head_dim", "d_kv")
_SAME = ("word_embed_proj_dim", "embedding_size")  # where they equal the width, they follow it


def scaled_width(width: int, sparsity: float, multiple: int = 0) -> int:
    """``width * sqrt(1 / (1 - sparsity))``: up to a multiple, or truncated if there is none."""
    squared = width * width / (1 - exact(sparsity))  # a fraction: no rounding decides
    floor = math.isqrt(int(squared))
    if not multiple:
        return floor
    needed = floor if floor * floor >= squared else floor + 1
    return -(-needed // multiple) * multiple


def wide_config(config, sparsity: float, widths: dict | None = None, head_multiple: int = 1):
    """A copy of a transformers config with wider layers.

    Args:
        config: a text model's (one width, heads), a ResNet's (``embedding_size``, ``hidden_sizes``), a ViT's, a MobileNet's
            (``depth_multiplier``).
        head_multiple: what the size of an attention head is to be a multiple of.
        widths: fields and values that replace what is computed, or name it for a config whose widths are not known here.

    Raises:
        ValueError: a sparsity outside [0, 1), or a config without widths that are known here.
    """
    wide = copy.deepcopy(config)
    if sparsity:
        for name, value in _wider(config, sparsity, head_multiple, known=not widths).items():
            setattr(wide, name, value)
    for name, value in (widths or {}).items():
        if not hasattr(config, name):
            raise ValueError(f"{type(config).__name__} has no field {name!r}")
        setattr(wide, name, value)
    return wide


def _wider(config, sparsity: float, head_multiple: int, known: bool) -> dict:
    if isinstance(getattr(config, "hidden_sizes", None), (list, tuple)) and hasattr(config, "embedding_size"):
        first = config.embedding_size
        new = scaled_width(first, sparsity)
        return {"embedding_size": new, "hidden_sizes": [size * new // first for size in config.hidden_sizes]}
    if hasattr(config, "depth_multiplier"):
        return {"depth_multiplier": config.depth_multiplier * float(1 / (1 - exact(sparsity))) ** 0.5}
    name = next((name for name in _WIDTHS if isinstance(_own(config, name), int)), None)
    heads = getattr(config, "num_attention_heads", None)
    if name is None or heads is None:
        if known:
            raise ValueError(
                f"the widths of {type(config).__name__} are not known here; give them: widths={{'field': value, ...}}, each "
                f"{float(1 / (1 - exact(sparsity))) ** 0.5:.4g} times as large"
            )
        return {}
    width = _own(config, name)
    rotary = any(hasattr(config, field) for field in ("rope_parameters", "rope_theta", "rotary_dim"))
    step = math.lcm(head_multiple, 2 if rotary else 1)
    new = scaled_width(width, sparsity, multiple=heads * step)
    found = {name: new}
    for inner in _INNER:
        if isinstance(_own(config, inner), int):
            found[inner] = round(_own(config, inner) * new / width)
    for same in _SAME:
        if _own(config, same) == width:
            found[same] = new
    for name in _HEADS:
        if isinstance(head := _own(config, name), int):
            found[name] = new // heads if head * heads == width else scaled_width(head, sparsity, multiple=step)
    return found


def _own(config, name: str):
    """A field under the name it is stored by; None for an alias (``hidden_size`` of GPT-2 is ``n_embd``) or a property."""
    return vars(config).get(name)
