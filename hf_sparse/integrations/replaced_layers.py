"""How transformers loads a model whose layers :func:`hf_sparse.models.ift.sparse_ift` replaced: the ``sparse_ift`` quantizer.

A stock class knows nothing of branches and factors; without help it would find none of its weights and start them anew. So
``sparse_ift`` notes in the model's config what it replaced, under the key that makes transformers ask a quantizer before it
loads weights. Ours replaces the same layers in the model without numbers; loading then goes on as for any model.

Wide models need none of this: a wider config is a stock one. Nor do the models of :mod:`hf_sparse.models.sparse_configs`,
which carry their code. Without hf_sparse transformers warns of an unknown quantization type and of missing weights.
"""

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_sparse.integrations.names import name_in
from hf_sparse.models.ift import REPLACED
from hf_sparse.models.layers import transform_layers

__all__ = ["ReplacedLayersConfig", "ReplacedLayersQuantizer"]


@register_quantization_config(REPLACED)
class ReplacedLayersConfig(QuantizationConfigMixin):
    """What was replaced: the arguments of :func:`hf_sparse.models.layers.transform_layers`."""

    def __init__(self, family, sparsity, names, branch_activation=True, sparse_u_only=False, **kwargs):
        self.quant_method = REPLACED
        self.family, self.sparsity, self.names = family, sparsity, names
        self.branch_activation, self.sparse_u_only = branch_activation, sparse_u_only
        self.dequantize = True  # nothing is quantized: transformers forgets it once the weights are in place


@register_quantizer(REPLACED)
class ReplacedLayersQuantizer(HfQuantizer):
    """Replaces layers before their weights are loaded."""

    requires_calibration = False

    def validate_environment(self, *args, **kwargs):
        if not self.pre_quantized:
            raise ValueError("layers are replaced in a model, not while it loads: hf_sparse.sparse_ift(model, ...)")

    def _process_model_before_weight_loading(self, model, **kwargs):
        asked = self.quantization_config
        asked.names = [name_in(model, name) for name in asked.names]
        arguments = asked.family, asked.sparsity, asked.names, asked.branch_activation, asked.sparse_u_only
        transform_layers(model, *arguments)
        for (
            name
        ) in asked.names:  # GPT-2 would start a block anew by the weights its layers had; all are in the checkpoint
            model.get_submodule(name.rpartition(".")[0])._is_hf_initialized = True
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        content = {key: value for key, value in vars(self.quantization_config).items() if key != "dequantize"}
        model.config.quantization_config = content  # so that it can be saved again
        return model

    def is_serializable(self):
        return True

    @property
    def is_trainable(self):
        return True

    @property
    def is_compileable(self):
        return True
