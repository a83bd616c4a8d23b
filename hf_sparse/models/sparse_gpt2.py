"""``SparseGPT2Model``, ``SparseGPT2ForCausalLM``: transformers' GPT-2 with the layers that its config asks for.

    AutoModelForCausalLM.from_config(SparseGPT2Config(family="wide", sparsity=0.75))      # n_embd 768 -> 1536
    SparseGPT2ForCausalLM.from_pretrained(directory of a dense GPT-2)                     # no family: the same model

Replaced are the four projections of every block, as in the paper; embeddings, norms and the (tied) output head stay. ``c_fc``
is the one an activation follows, so it is the one that has it in its branches.

**Initialisation.** GPT-2 starts the layers that write into the residual stream, both ``c_proj``, with a standard deviation of
``initializer_range / sqrt(2 n_layer)``, as the released Sparse-IFT configs do for all families. Here what is smaller is what
writes: every branch of a parallel layer, V of a factorized one, W and V of a doped one; a U starts like any other layer.
So k masked branches of density 1 / k add up to the variance of the one dense layer they stand for.

This file travels with a checkpoint, so its imports from the files beside it are relative.
"""

import math

import torch
from torch import nn
from transformers import initialization
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2LMHeadModel, GPT2Model

from .sparse_configs import SparseGPT2Config
from .sparse_model import ReplacedLayers, SavedWithItsCode

__all__ = ["SparseGPT2Config", "SparseGPT2ForCausalLM", "SparseGPT2Model"]


class SparseGPT2Model(ReplacedLayers, GPT2Model):
    config: SparseGPT2Config
    config_class = SparseGPT2Config
    _auto_class = "AutoModel"
    sparse_layers = r"h\.\d+\.(attn|crossattention|mlp)\.(c_attn|q_attn|c_proj|c_fc)"

    def __init__(self, config: SparseGPT2Config):
        super().__init__(config)
        self.replace_layers()

    @torch.no_grad()
    def _init_weights(self, module):
        replaced = isinstance(module, (GPT2Attention, GPT2MLP)) and not hasattr(module.c_proj, "weight")
        if not replaced:
            super()._init_weights(module)
            return
        std = self.config.initializer_range / math.sqrt(2 * self.config.n_layer)
        for name, layer in module.c_proj.named_modules():
            if hasattr(layer, "weight") and name != "u":
                initialization.normal_(layer.weight, mean=0.0, std=std)


class SparseGPT2ForCausalLM(SavedWithItsCode, GPT2LMHeadModel):
    config: SparseGPT2Config
    config_class = SparseGPT2Config
    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config: SparseGPT2Config):
        super(GPT2LMHeadModel, self).__init__(config)  # its parent's: the parts are made here, once
        self.transformer = SparseGPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()


SparseGPT2Model.base_class = SparseGPT2ForCausalLM.base_class = SparseGPT2Model
