"""``SparseResNetModel``, ``SparseResNetForImageClassification``: transformers' ResNet with the layers that its config asks for.

    config = SparseResNetConfig(stem="cifar", num_labels=100, family="wide", sparsity=0.9)      # 64 -> 202 channels
    model = AutoModelForImageClassification.from_config(config)

With the stem ``cifar`` and basic blocks it is the paper's ResNet-18 for CIFAR (11,220,132 parameters for 100 classes,
1,115,226,800 FLOPs for one image), and with ``zero_init_residual`` it starts as that does. Replaced are the convolutions of
all blocks, shortcuts included; the stem and the classifier stay.

This file travels with a checkpoint, so its imports from the files beside it are relative.
"""

import torch
from torch import nn
from transformers import initialization
from transformers.models.resnet.modeling_resnet import ResNetForImageClassification, ResNetModel

from .sparse_configs import SparseResNetConfig
from .sparse_model import ReplacedLayers, SavedWithItsCode

__all__ = ["SparseResNetConfig", "SparseResNetForImageClassification", "SparseResNetModel"]


class SparseResNetModel(ReplacedLayers, ResNetModel):
    config: SparseResNetConfig
    config_class = SparseResNetConfig
    _auto_class = "AutoModel"
    sparse_layers = r"encoder\.stages\..*\.convolution"

    def __init__(self, config: SparseResNetConfig):
        super().__init__(config)
        if config.stem == "cifar":
            stem = self.embedder.embedder
            stem.convolution = nn.Conv2d(
                config.num_channels, config.embedding_size, kernel_size=3, padding=1, bias=False
            )
            self.embedder.pooler = nn.Identity()
            self.init_weights()
        self.replace_layers()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        plain = self.config.family in (None, "wide")
        if plain and self.config.zero_init_residual and type(module).__name__ == "ResNetBasicLayer":
            initialization.zeros_(module.layer[-1].normalization.weight)


class SparseResNetForImageClassification(SavedWithItsCode, ResNetForImageClassification):
    config: SparseResNetConfig
    config_class = SparseResNetConfig
    _auto_class = "AutoModelForImageClassification"

    def __init__(self, config: SparseResNetConfig):
        super(ResNetForImageClassification, self).__init__(config)  # its parent's: the parts are made here, once
        self.num_labels = config.num_labels
        self.resnet = SparseResNetModel(config)
        head = nn.Linear(config.hidden_sizes[-1], config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.classifier = nn.Sequential(nn.Flatten(), head)
        self.post_init()


SparseResNetModel.base_class = SparseResNetForImageClassification.base_class = SparseResNetModel
