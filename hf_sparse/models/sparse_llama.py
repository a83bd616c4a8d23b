"""``SparseLlamaModel``, ``SparseLlamaForCausalLM``: transformers' Llama with the layers that its config asks for.

    AutoModelForCausalLM.from_config(SparseLlamaConfig(family="factorized", sparsity=0.75, hidden_size=576, ...))
    SparseLlamaForCausalLM.from_pretrained(directory of a dense Llama)              # no family: the same model

Replaced are the seven projections of every layer, as in the paper; embeddings, norms and the output head stay. Of those,
``gate_proj`` is the one an activation follows, so it is the one that has it in its branches.

This file travels with a checkpoint, so its imports from the files beside it are relative.
"""

from torch import nn
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel

from .sparse_configs import SparseLlamaConfig
from .sparse_model import ReplacedLayers, SavedWithItsCode

__all__ = ["SparseLlamaConfig", "SparseLlamaForCausalLM", "SparseLlamaModel"]


class SparseLlamaModel(ReplacedLayers, LlamaModel):
    config: SparseLlamaConfig
    config_class = SparseLlamaConfig
    _auto_class = "AutoModel"
    sparse_layers = r"layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj"

    def __init__(self, config: SparseLlamaConfig):
        super().__init__(config)
        self.replace_layers()


class SparseLlamaForCausalLM(SavedWithItsCode, LlamaForCausalLM):
    config: SparseLlamaConfig
    config_class = SparseLlamaConfig
    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config: SparseLlamaConfig):
        super(LlamaForCausalLM, self).__init__(config)  # its parent's: the parts are made here, once
        self.model = SparseLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


SparseLlamaModel.base_class = SparseLlamaForCausalLM.base_class = SparseLlamaModel
