"""How transformers loads a model whose layers keep different numbers of experts: the ``uneven_experts`` quantizer.

A config has one number of experts for all layers. So :func:`hf_sparse.pruning.experts.prune_experts` leaves that number as it
was and notes each block's own in ``quantization_config``, the key that makes transformers ask a quantizer before it loads:

    {"quant_method": "uneven_experts", "experts": {"model.layers.0.mlp": 5, "model.layers.1.mlp": 3}}

Ours cuts the mixtures of the model without numbers to those counts; loading then goes on as for any model, and nothing is
quantized. Without hf_sparse transformers does not know the method, and finds weights of other shapes than it built: an error.
"""

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_sparse.integrations.names import name_in
from hf_sparse.mixtures import find_mixtures, select_experts
from hf_sparse.pruning.experts import UNEVEN

__all__ = ["UnevenExpertsConfig", "UnevenExpertsQuantizer"]


@register_quantization_config(UNEVEN)
class UnevenExpertsConfig(QuantizationConfigMixin):
    """``experts``: the number of experts of each block, by its module name."""

    def __init__(self, experts: dict[str, int], **kwargs):
        self.quant_method = UNEVEN
        self.experts = dict(experts)
        self.dequantize = True  # nothing is quantized: transformers forgets it once the weights are in place


@register_quantizer(UNEVEN)
class UnevenExpertsQuantizer(HfQuantizer):
    """Cuts mixtures before their weights are loaded."""

    requires_calibration = False

    def validate_environment(self, *args, **kwargs):
        if not self.pre_quantized:
            raise ValueError(
                "experts are removed from a model, not while it loads: hf_sparse.prune_experts(model, ...)"
            )

    def _process_model_before_weight_loading(self, model, **kwargs):
        asked = self.quantization_config
        asked.experts = {name_in(model, name): count for name, count in asked.experts.items()}
        mixtures = find_mixtures(model)
        if missing := sorted(set(mixtures) - set(asked.experts)):
            raise ValueError(f"the checkpoint says nothing of the number of experts of {', '.join(missing)}")
        for name, count in asked.experts.items():
            size = mixtures[name].count // mixtures[name].groups
            each = count // mixtures[name].groups  # as many of every group, for routers that choose among groups
            kept = [group * size + i for group in range(mixtures[name].groups) for i in range(each)]
            select_experts(model, mixtures[name], kept)
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        model.config.quantization_config = {"quant_method": UNEVEN, "experts": self.quantization_config.experts}
        return model

    def is_serializable(self):
        return True

    @property
    def is_trainable(self):
        return True

    @property
    def is_compileable(self):
        return True
