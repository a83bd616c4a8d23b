"""Configs of models that say how they are sparse: ``SparseLlamaConfig``, ``SparseGPT2Config``, ``SparseResNetConfig``.

    config = SparseGPT2Config(family="wide", sparsity=0.75, method="rigl")     # the sizes given are those of the dense model
    model = SparseGPT2ForCausalLM(config)                                      # n_embd 768 -> 1536
    Trainer(model, args, callbacks=[SparsityCallback()], ...)                  # trains what the config says

Each is the config of transformers with these fields more:

    family             None (the architecture as it is), wide, parallel, factorized or doped (hf_sparse.models.layers)
    sparsity           decides widths, branches and ranks, and is that of the masks; 0: the dense model, bit for bit
    budget             "layer": a replaced layer costs what it did. "model": the masks are sparser, so that the model does
    branch_activation, sparse_u_only              see hf_sparse.models.layers
    head_multiple      wide only: what the size of a head is to be a multiple of, 8 for most GPU kernels
    method, schedule, pattern, seed               of the training, see hf_sparse.SparsityConfig
    dense_sizes        wide only, filled in: the widths before they grew. A config that has them is not widened again
    folded             layers that fold() made dense again

``sparsity_config()`` is the training as ``SparsityCallback`` and ``sparsify`` take it. All else needs torch and transformers
only: this file travels with a checkpoint, so its imports from the files beside it are relative.
"""

import importlib
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.resnet.configuration_resnet import ResNetConfig

from .layers import FAMILIES
from .ranks import exact, parallel_branches
from .widths import wide_config

__all__ = ["SparseGPT2Config", "SparseLlamaConfig", "SparseResNetConfig"]

_ARCHITECTURE = ("family", "sparsity", "head_multiple", "budget", "branch_activation", "sparse_u_only")
_TRAINING = ("method", "schedule", "pattern", "seed")


@dataclass(kw_only=True, eq=False, repr=False)
class _Sparse:
    """The fields that all three have; see the module.

    Raises:
        ValueError: from the constructor: a value out of range, options that do not belong to the family, a sparsity that the
            family has no layers for.
    """

    _auto_class: ClassVar[str] = "AutoConfig"  # this file is copied beside a saved config
    model_class: ClassVar[tuple[str, str]] = ("", "")  # the module and class that are trained

    family: str | None = None
    sparsity: float = 0.0
    budget: str = "layer"
    branch_activation: bool | str = True
    sparse_u_only: bool = False
    head_multiple: int = 1
    method: str = "static"
    schedule: dict | None = None
    pattern: str | None = None
    seed: int = 0
    dense_sizes: dict | None = None
    folded: list | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        _check(self)
        if self.family == "wide" and self.sparsity and self.dense_sizes is None:
            wide = vars(wide_config(self, self.sparsity, head_multiple=self.head_multiple))
            changed = {name: value for name, value in vars(self).items() if wide[name] != value}
            for name in changed:
                setattr(self, name, wide[name])
            self.dense_sizes = changed

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As in transformers; a family or sparsity among ``kwargs`` counts as if the dict had it: the dense sizes widen."""
        given = {name: kwargs.pop(name) for name in (*_ARCHITECTURE, *_TRAINING) if name in kwargs}
        content = dict(config_dict)
        if any(content.get(name) != given[name] for name in _ARCHITECTURE[:3] if name in given):
            content |= content.pop("dense_sizes", None) or {}
            content.pop("folded", None)
        return super().from_dict(content | given, **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As in transformers; the config of the dense architecture is ours too, so no warning of another model type."""
        content, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        types = [vars(base).get("model_type") for base in cls.__mro__]
        if content.get("model_type") in filter(None, types):
            content["model_type"] = cls.model_type
        return content, unused

    def dense_config(self):
        """The config of the dense model that this one costs as much as: a copy with its sizes, family None, sparsity 0."""
        content = self.to_dict() | (self.dense_sizes or {})
        as_it_is = {
            "family": None,
            "sparsity": 0.0,
            "budget": "layer",
            "sparse_u_only": False,
            "head_multiple": 1,
            "branch_activation": True,
        }
        return type(self)(**content | as_it_is | {"dense_sizes": None, "folded": None})

    def sparsity_config(self):
        """The training that the fields ask for, a :class:`hf_sparse.SparsityConfig`; None at sparsity 0. Needs hf_sparse.

        Raises:
            ValueError: a method, schedule or pattern that does not exist or does not fit; a budget that cannot be kept; a
                folded model.
        """
        if not self.sparsity:
            return None
        if self.folded:
            raise ValueError("this model is folded for inference; train the one it was folded from")
        try:  # not import statements: transformers would take them for what loading needs
            ift, found = (importlib.import_module(f"hf_sparse.models.{name}") for name in ("ift", self.model_class[0]))
            sparse = importlib.import_module("hf_sparse.config")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("sparse training needs hf_sparse: pip install hf-sparse") from error
        with torch.device("meta"):
            model = getattr(found, self.model_class[1])(self.dense_config())
        options = {"method": self.method, "schedule": dict(self.schedule or {}), "seed": self.seed}
        if self.family is None:
            ignore = ift.dense_by_default(model, None)
            return sparse.SparsityConfig(sparsity=self.sparsity, pattern=self.pattern, ignore=ignore, **options)
        of_family = {"branch_activation": self.branch_activation, "sparse_u_only": self.sparse_u_only} | {
            "head_multiple": self.head_multiple
        }
        report = ift.sparse_ift(model, self.family, self.sparsity, budget=self.budget, **of_family, **options)
        if self.pattern is None:
            return report.config
        fields = report.config.to_dict() | {"pattern": self.pattern}
        return sparse.SparsityConfig.from_dict(fields)


def _check(config) -> None:
    if config.family is not None and config.family not in FAMILIES:
        raise ValueError(f"family is None or one of {', '.join(FAMILIES)}, got {config.family!r}")
    exact(config.sparsity)  # raises outside [0, 1)
    if config.budget not in ("layer", "model"):
        raise ValueError(f"budget is 'layer' or 'model', got {config.budget!r}")
    if config.budget == "model" and config.family is None and config.sparsity:
        raise ValueError("budget='model' is of a family; without one every zero makes the model cheaper")
    if config.branch_activation not in (True, False, "norm"):
        raise ValueError(f"branch_activation is True, False or 'norm', got {config.branch_activation!r}")
    if config.sparse_u_only and config.family != "factorized":
        raise ValueError(f"sparse_u_only belongs to the factorized family, not to {config.family!r}")
    if config.head_multiple != 1 and config.family != "wide":
        raise ValueError(f"head_multiple belongs to the wide family, not to {config.family!r}")
    if isinstance(config.head_multiple, bool) or not isinstance(config.head_multiple, int) or config.head_multiple < 1:
        raise ValueError(f"head_multiple is a whole number >= 1, got {config.head_multiple!r}")
    if config.family == "parallel":
        parallel_branches(config.sparsity)  # raises where they are no whole number


class SparseLlamaConfig(_Sparse, LlamaConfig):
    """``LlamaConfig`` with the fields of a sparse model."""

    model_type = "sparse_llama"
    model_class = ("sparse_llama", "SparseLlamaForCausalLM")


class SparseGPT2Config(_Sparse, GPT2Config):
    """``GPT2Config`` with the fields of a sparse model."""

    model_type = "sparse_gpt2"
    model_class = ("sparse_gpt2", "SparseGPT2ForCausalLM")


class SparseResNetConfig(_Sparse, ResNetConfig):
    """``ResNetConfig`` with the fields of a sparse model, and of the paper's networks; the default is its ResNet-18.

    Args:
        stem: ``imagenet``, transformers' own: a 7x7 convolution of stride 2 and a max pooling; or ``cifar``: a 3x3
            convolution of stride 1 and no pooling.
        image_size: pixels of a side, for counting FLOPs; default 32 for the stem of CIFAR, else 224.
        zero_init_residual: the last batch norm of a block starts at zero (the paper's choice for dense and wide).
    """

    model_type = "sparse_resnet"
    model_class = ("sparse_resnet", "SparseResNetForImageClassification")

    hidden_sizes: list[int] | tuple[int, ...] | None = (64, 128, 256, 512)
    depths: list[int] | tuple[int, ...] | None = (2, 2, 2, 2)
    layer_type: str = "basic"
    stem: str = "imagenet"
    image_size: int | None = None
    zero_init_residual: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.stem not in ("imagenet", "cifar"):
            raise ValueError(f"stem is 'imagenet' or 'cifar', got {self.stem!r}")
        if self.image_size is None:
            self.image_size = 32 if self.stem == "cifar" else 224
