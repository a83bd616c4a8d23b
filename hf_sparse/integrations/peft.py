"""PEFT adapters that keep a sparse model sparse: what they add lies where weights were kept, so merging fills no zero.

An adapter of plain LoRA adds ``s B A`` to a weight W, and a product of two matrices is dense: merged into a model of which
half the weights are zero, it leaves none. With M the mask of kept weights (True = kept), there are two exact ways out.

**Masked LoRA** (:func:`masked_lora`): the layer computes ``x (W + M * (s B A))^T``, unmerged as merged. A has shape
``[r, in]``, B ``[out, r]``, s = alpha / r, or alpha / sqrt(r) with rsLoRA. As in LoRA, dropout acts on the input of the
added term. The price is the dense ``[out, in]`` update in every forward: one more matrix product of the layer's own size.
It is not kept for the backward pass but made again there (``torch.utils.checkpoint``), so it costs the memory of one layer.

**SHiRA** (:func:`shira_config`, arXiv 2406.13175): r (in + out) single entries of W are trained, as many as LoRA has
parameters; here they are chosen among the kept ones. The adapter is a stock PEFT adapter that loads anywhere, with the
positions in its file. Linear layers only.

    model = get_peft_model(model, masked_lora(LoraConfig(r=16)))     # or SFTTrainer(..., peft_config=masked_lora(...))
    model.save_pretrained(out)
    model = load_masked_lora(base, out)                              # PeftModel.from_pretrained(base, out) is an error
    base = merge_sparse(model)                                       # merges, once it is sure that no zero is filled

The mask is what training keeps beside the weight (``weight_mask``) if it is there, otherwise ``weight != 0``.

PEFT finds our layer through ``LoraConfig._register_custom_module``, documented but called experimental; that is the one
unstable thing here. What cannot be exact is refused: DoRA and the other variants of LoRA, initialisations that rewrite W,
biases on B, fused 3-D experts, embeddings and convolutions, batches that mix adapters.
"""

import copy
import dataclasses
import re
import warnings
from collections.abc import Iterator

import torch
from peft import LoraConfig, PeftModel, ShiraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from hf_sparse.masks import Masks
from hf_sparse.targets import find_targets

__all__ = ["MaskedLoraLinear", "load_masked_lora", "masked_lora", "merge_sparse", "shira_config"]

# Stands in adapter_config.json as `init_lora_weights`. Plain PEFT stops at a value it does not know and shows it, which is
# how a masked adapter loaded as a plain one is noticed.
_MARK = "masked: load this adapter with hf_sparse.integrations.peft.load_masked_lora(base_model, path)"
_EXACT_INITIALISATIONS = (True, False, "gaussian")  # the others rewrite the base weight, and so fill its zeros


def masked_lora(config: LoraConfig) -> LoraConfig:
    """A copy of ``config`` whose layers add ``mask * (s B A)``; give it to ``get_peft_model`` or ``SFTTrainer``.

    Raises:
        TypeError: not a LoraConfig.
        ValueError: an option under which the merged weight would not be ``W + mask * (s B A)``.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"masked_lora takes a peft.LoraConfig, got {type(config).__name__}")
    variants = [f.name for f in dataclasses.fields(config) if f.metadata.get("is_lora_variant")]
    for name in [*variants, "lora_bias", "target_parameters", "layer_replication", "megatron_config"]:
        if getattr(config, name, None):
            raise ValueError(f"masked LoRA is not exact with {name}={getattr(config, name)!r}; leave it out")
    config = copy.deepcopy(config)
    if config.init_lora_weights != _MARK:
        if config.init_lora_weights not in _EXACT_INITIALISATIONS:
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} rewrites the base weights and would fill their zeros; "
                f"masked LoRA takes {', '.join(map(repr, _EXACT_INITIALISATIONS))}"
            )
        config._masked_initialisation = config.init_lora_weights
        config.init_lora_weights = _MARK
    config._register_custom_module({nn.Linear: MaskedLoraLinear, Conv1D: MaskedLoraLinear, nn.Module: _refuse})
    return config


def load_masked_lora(model: nn.Module, path: str, **kwargs) -> PeftModel:
    """``PeftModel.from_pretrained`` for an adapter of :func:`masked_lora`; ``model`` is the sparse base model.

    Args:
        kwargs: those of ``PeftModel.from_pretrained``, e.g. ``is_trainable=True``.

    Raises:
        ValueError: the adapter is another kind, or none of the layers it adapts has a zero (a dense base model, under
            which it would compute something else).
    """
    config = LoraConfig.from_pretrained(path)
    if getattr(config, "init_lora_weights", None) != _MARK:
        raise ValueError(f"{path} is not an adapter of masked LoRA; load it with peft.PeftModel.from_pretrained")
    adapted = PeftModel.from_pretrained(model, path, config=masked_lora(config), **kwargs)
    layers = [layer for layer in adapted.modules() if isinstance(layer, MaskedLoraLinear)]
    if all(bool(_kept(layer.get_base_layer()).all()) for layer in layers):
        raise ValueError(
            f"none of the {len(layers)} layers that {path} adapts has a zero in this base model; it was trained on a "
            "sparse one: load that"
        )
    return adapted


class MaskedLoraLinear(LoraLinear):
    """PEFT's LoRA layer over ``nn.Linear`` or ``Conv1D``, with ``mask * (s B A)`` in the place of ``s B A``."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs):
        base = base_layer.get_base_layer() if isinstance(base_layer, BaseTunerLayer) else base_layer
        if not base.weight.is_floating_point() or type(base).__module__.startswith(("bitsandbytes", "torchao")):
            raise TypeError(f"masked LoRA needs plain weights, {type(base).__name__} holds quantized ones")
        self._merged_mask: torch.Tensor | None = None
        transposed = isinstance(base, Conv1D)
        super().__init__(base_layer, adapter_name, config=config, is_target_conv_1d_layer=transposed, **kwargs)
        self.fan_in_fan_out = transposed  # a property of this layer; a config may cover layers of both kinds

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs) -> None:
        if config.init_lora_weights != _MARK:
            raise ValueError(f"adapter {adapter_name!r} would share a layer with masked LoRA; pass masked_lora(config)")
        plain = copy.copy(config)
        plain.init_lora_weights = getattr(config, "_masked_initialisation", True)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=plain, **kwargs)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """``mask * (s B A)`` in the layout of the stored weight, float32."""
        mask = _kept(self.get_base_layer()) if self._merged_mask is None else self._merged_mask
        return self._delta(self.lora_A[adapter].weight, self.lora_B[adapter].weight, self.scaling[adapter], mask)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if self._merged_mask is None:  # a merged weight may cancel to zero, so the mask is read before the first merge
            self._merged_mask = _kept(self.get_base_layer()).clone()
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        if not self.merged:
            self._merged_mask = None

    def unmerge(self) -> None:
        super().unmerge()
        self._merged_mask = None

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if kwargs.pop("adapter_names", None) is not None:
            raise NotImplementedError("masked LoRA cannot mix adapters in one batch; run one batch per adapter")
        kwargs.pop("alora_offsets", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for adapter in self.active_adapters:
            if adapter in self.lora_A:
                inputs = self.lora_dropout[adapter](x)
                weights = self.lora_A[adapter].weight, self.lora_B[adapter].weight
                result = result + self._recomputed(inputs, *weights, self.scaling[adapter]).to(result.dtype)
        return result

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # the masked update has no low rank

    def _recomputed(self, x, a, b, scaling):
        if not torch.is_grad_enabled():
            return self._added(x, a, b, scaling)
        return checkpoint(self._added, x, a, b, scaling, use_reentrant=False, preserve_rng_state=False)

    def _added(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
        delta = self._delta(a, b, scaling, _kept(self.get_base_layer())).to(x.dtype)
        return linear(x, delta.T if self.fan_in_fan_out else delta)

    def _delta(self, a: torch.Tensor, b: torch.Tensor, scaling: float, mask: torch.Tensor) -> torch.Tensor:
        with torch.autocast(
            a.device.type, enabled=False
        ):  # r terms per entry: float32 costs little, rounding would show
            delta = (b.float() @ a.float()) * scaling
        return torch.where(mask, delta.T if self.fan_in_fan_out else delta, 0)


def shira_config(
    model: nn.Module,
    r: int | None = None,
    *,
    entries: str = "magnitude",
    target_modules: list[str] | str | None = None,
    seed: int = 0,
    **kwargs,
) -> ShiraConfig:
    """A ``ShiraConfig`` that trains r (in + out) kept weights of every target of ``model``.

    Args:
        r: as LoRA's rank, for the count only; None takes the largest that every target has enough kept weights for, at
            most 32.
        entries: ``magnitude``, the largest kept weights, or ``random``.
        target_modules: as in PEFT; None: the linear layers that are sparse by default.
        kwargs: further fields of ``ShiraConfig``.

    Raises:
        TypeError: a target is not ``nn.Linear`` (GPT-2's ``Conv1D``); masked LoRA takes those.
        ValueError: a target has too few kept weights for r (the message says which r fits), or no target matches.
    """
    if entries not in ("magnitude", "random"):
        raise ValueError(f"entries is 'magnitude' or 'random', got {entries!r}")
    if target_modules is None:
        target_modules = [target.module for target in find_targets(model).values()]
    layers = {name: module for name, module in model.named_modules() if _is_named(name, target_modules)}
    if not layers:
        raise ValueError(f"target_modules={target_modules!r} names no module of {type(model).__name__}")
    largest, scarcest = None, ""
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear):
            raise TypeError(
                f"{name} is {type(layer).__name__}; PEFT's SHiRA adapts nn.Linear only. Leave it out of target_modules, or "
                "use masked_lora"
            )
        fits = int(_kept(layer).sum()) // sum(layer.weight.shape)
        if largest is None or fits < largest:
            largest, scarcest = fits, name
    if largest == 0 or (r is not None and r > largest):
        rows, columns = layers[scarcest].weight.shape
        raise ValueError(
            f"{scarcest} keeps {int(_kept(layers[scarcest]).sum())} weights, SHiRA with r={r or 1} trains "
            f"{r or 1} * ({rows} + {columns}) = {(r or 1) * (rows + columns)} of them; "
            + (
                f"r is at most {largest} for these target_modules"
                if largest
                else "leave that layer out of target_modules"
            )
        )
    with warnings.catch_warnings():  # PEFT asks for a mask function; it is set below
        warnings.filterwarnings("ignore", message=".*mask_type.*")
        config = ShiraConfig(
            r=r or min(largest, 32), mask_type=f"kept-{entries}", target_modules=target_modules, **kwargs
        )

    def mask_fn(base_layer: nn.Linear, r: int, **kwargs) -> torch.Tensor:
        weight, kept = base_layer.weight.detach(), _kept(base_layer)
        if kept.sum() < r * sum(weight.shape):
            raise ValueError(
                f"this model keeps {int(kept.sum())} weights in a target, too few for r={r}: make its own config"
            )
        scores = weight.abs().float()
        if entries == "random":
            scores = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)).to(weight.device)
        scores = scores.masked_fill(~kept, -1).flatten()  # a kept weight may be zero: below every kept score
        chosen = scores.topk(r * sum(weight.shape)).indices
        return torch.zeros_like(scores, dtype=weight.dtype).index_fill_(0, chosen, 1).view_as(weight)

    config.mask_fn = mask_fn
    return config


def merge_sparse(model: PeftModel) -> nn.Module:
    """``model.merge_and_unload()``, after making sure that no pruned weight becomes nonzero.

    Nothing is changed when it raises.

    Raises:
        TypeError: an adapter of a kind that does not add to a weight.
        ValueError: the active adapters would fill zeros; names the first layer and how many.
    """
    for name, weight, kept in _changes(model):
        filled = int(((weight != 0) & ~kept).sum())
        if filled:
            zeros = int((~kept).sum())
            raise ValueError(
                f"merging would fill {filled} of the {zeros} zeros of {name}. Train with masked_lora(LoraConfig(...)) or "
                "shira_config(model), keep this adapter unmerged, or call merge_and_unload() and prune again"
            )
    return model.merge_and_unload()


@torch.no_grad()
def _changes(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """``(layer, what is added to or replaces its weight, mask of kept weights)`` for all that merging changes."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            base = module.get_base_layer()
            if isinstance(base, nn.Embedding):  # a zero row is a padding token, not a pruned weight
                continue
            if module.merged:
                if isinstance(module, MaskedLoraLinear):
                    continue
                raise ValueError(f"{name} is merged already, so its zeros are not known; call unmerge_adapter() first")
            if not hasattr(module, "get_delta_weight"):
                raise TypeError(
                    f"{name} is {type(module).__name__}, which merge_sparse cannot look into before merging"
                )
            parts = getattr(module, module.adapter_layer_names[0])
            for adapter in module.active_adapters:
                if adapter in parts:
                    delta = module.get_delta_weight(adapter)
                    yield name, delta.to_dense() if delta.is_sparse else delta, _kept(base)
        elif isinstance(module, ModulesToSaveWrapper):
            for adapter in module.active_adapters:
                if adapter in module.modules_to_save:
                    trained = dict(module.modules_to_save[adapter].named_modules())
                    for inner, layer in module.original_module.named_modules():
                        if isinstance(layer, (nn.Linear, Conv1D)):
                            yield f"{name}.{inner}".rstrip("."), trained[inner].weight, _kept(layer)


def _kept(layer: nn.Module) -> torch.Tensor:
    """The mask of a layer's kept weights: the one attached for training, or where the weight is not zero."""
    attached = Masks.attached(layer).get("weight")
    return layer.weight.detach() != 0 if attached is None else attached


def _is_named(name: str, target_modules: list[str] | set[str] | str) -> bool:
    """PEFT's rule: a string is a regular expression for the whole name, a list holds names or their ends."""
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    return any(name == entry or name.endswith("." + entry) for entry in target_modules)


def _refuse(target: nn.Module, adapter_name: str, **kwargs):
    raise TypeError(f"masked LoRA adapts nn.Linear and Conv1D, {kwargs.get('target_name')} is {type(target).__name__}")
