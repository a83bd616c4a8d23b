"""Cost: parameters, multiply-accumulates and bytes of a (sparse) model, parameter by parameter.

MACs per generated token follow the accounting of SD^2 (arxiv.org/abs/2504.08838): a weight that is used once per token
costs one MAC per nonzero, the output head included, embedding lookups and attention scores not. An expert is used by the
share of tokens routed to it, top-k of E. For Llama-3.2-3B with all decoder linears at 50% this gives the published -43.87%.
"""

from torch import nn

from hf_sparse.targets import Target

__all__ = ["active_share", "macs_per_token"]


def active_share(model: nn.Module, target: Target) -> float:
    """The share of tokens that use a weight: 1, or top-k / E for fused experts (1 if the model states no top-k)."""
    if not target.is_experts:
        return 1.0
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    for key in ("num_experts_per_tok", "moe_k", "top_k"):
        top_k = getattr(config, key, None)
        if isinstance(top_k, int):
            return min(1.0, top_k / target.shape[0])
    return 1.0


def macs_per_token(model: nn.Module, targets: dict[str, Target], densities: dict[str, float]) -> float:
    """Multiply-accumulates per token of the given weights, with ``densities`` where stated and dense elsewhere.

    Args:
        targets: every weight that multiplies activations once per token, output head included
            (``find_targets(model, ["re:.*"])``).
        densities: ``{name: fraction of nonzeros}``.
    """
    return sum(t.numel * active_share(model, t) * densities.get(name, 1.0) for name, t in targets.items())
