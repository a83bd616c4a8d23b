"""The start of a sparse training: which weights, and which of their entries are kept first.

Everything that can be wrong with a config, a model or the two together is found here, before a weight is changed.
"""

import logging

import torch
from torch import nn

from hf_sparse.config import CONFIG_KEY, SparsityConfig
from hf_sparse.masks import Masks
from hf_sparse.methods import METHODS
from hf_sparse.patterns import Unstructured, parse
from hf_sparse.pruning.plan import make_plan
from hf_sparse.targets import Target, find_targets
from hf_sparse.training import dense_weights
from hf_sparse.training.sharding import local, rows_of, sums
from hf_sparse.training.topology import masks_by_score, start_scores
from hf_sparse.training.weight import Weight

logger = logging.getLogger(__name__)

__all__ = ["choose_first_masks", "describe_zeros", "find_weights"]


def find_weights(model: nn.Module, config: SparsityConfig) -> tuple[list[Weight], int]:
    """The parameters that get masks, with what their zeros are to be at the end; the size of the targets that get none.

    Raises:
        ValueError: targets that match nothing, a pattern that fits no weight, no zeros to keep, masks of another config,
            frozen weights under a method that trains them.
    """
    method = METHODS[config.method]
    attached = Masks.attached(model)
    if attached:
        _check_same_run(model, config)
    targets = find_targets(model, config.targets, config.ignore)
    if config.saliency == "zeros":
        dense = _dense_ones(model, targets)
        chosen = [name for name in targets if (name in attached if attached else name not in dense)]
        if not chosen:
            raise ValueError(
                "this model has no zeros to keep: every target is dense. Prune it first (hf_sparse.prune, hf-sparse "
                "prune), or give SparsityCallback a config, e.g. SparsityConfig(sparsity=0.5, method='static')"
            )
        plan = {name: (Unstructured(), 0.0) for name in chosen}  # shape and amount are those of the zeros
    else:
        plan = {n: (p, s) for n, (p, s) in make_plan(model, config, targets, None).items() if s > 0}
    head = _output_head(model)
    weights = []
    for name, (pattern, sparsity) in plan.items():
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        weights.append(Weight(targets[name], pattern, sparsity, module, attribute, is_output=module is head))
        if not weights[-1].parameter.is_floating_point():
            raise ValueError(
                f"{name} is stored as {weights[-1].parameter.dtype} (quantized) and has no weights to mask; load the model in "
                "bfloat16 or float32, or ignore it"
            )
    if not weights:
        raise ValueError(f"sparsity {config.sparsity:g} leaves every target dense; nothing would be trained sparse")
    frozen = [weight.name for weight in weights if not weight.parameter.requires_grad]
    if frozen and (method.grow is not None or method.dense_weights):
        peft = " (PEFT froze it)" if frozen[0].startswith("base_model.") else ""
        raise ValueError(
            f"method {config.method!r} trains the masked weights, but {frozen[0]} is frozen{peft}; use 'static' or 'gmp', "
            "which mask frozen weights too, ignore what is frozen, or train all parameters"
        )
    return weights, sum(target.numel for target in targets.values()) - sum(weight.numel for weight in weights)


@torch.no_grad()
def choose_first_masks(weights: list[Weight], config: SparsityConfig, options: dict, sparsities: list[float]) -> None:
    """Puts the first masks beside the weights; those that lie there already stay.

    Args:
        options: the method's schedule.
        sparsities: of every weight at step 0.
    """
    method = METHODS[config.method]
    for weight in weights:  # masks of an earlier training of this model are saved again
        weight.module._non_persistent_buffers_set.discard(f"{weight.attribute}_mask")
        weight.align()  # they may have been attached before the model was sharded
    if method.dense_weights:
        dense_weights.begin(weights, config.method, options)
    elif all(weight.companion("mask") is not None for weight in weights):
        pass  # carried on
    elif config.saliency == "zeros":
        for weight in weights:
            weight.put("mask", weight.values() != 0)
    else:
        scores = [start_scores(weight, config.saliency, config.seed) for weight in weights]
        masks = masks_by_score(weights, scores, sparsities, fan_in=method.pattern == "constant-fan-in")
        for weight, mask in zip(weights, masks, strict=True):
            weight.put("mask", mask)
    if method.grow is not None:
        for weight in weights:
            if weight.companion("explored") is None:
                weight.put("explored", weight.mask.clone())


def describe_zeros(model: nn.Module, config: SparsityConfig, weights: list[Weight]) -> None:
    """Completes a config of saliency ``zeros`` by what was found, and by what the checkpoint says of its zeros."""
    for weight in weights:
        weight.sparsity = 1.0 - weight.kept / weight.numel
    config.sparsity = 1.0 - sum(weight.kept for weight in weights) / sum(weight.numel for weight in weights)
    if config.sparsity < 0.01:
        logger.warning(
            "only %.3f%% of the masked weights are zero: is this a pruned model? A dense one has a zero here and there",
            100 * config.sparsity,
        )
    # not parsed: its saliency may be a callable that only its author has
    before = getattr(getattr(model, "config", model), CONFIG_KEY, None) or {}
    config.provenance = before.get("provenance", {})
    pattern = before.get("pattern", config.pattern)
    implied = parse(pattern).implied_sparsity
    if implied is None or abs(config.sparsity - implied) < 1e-6:
        config.pattern = pattern


def _output_head(model: nn.Module) -> nn.Module | None:
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _dense_ones(model: nn.Module, targets: dict[str, Target]) -> set[str]:
    """Names of the targets that have no zero, on any process."""
    names = list(targets)
    parameters = [model.get_parameter(name).detach() for name in names]
    zeros = sums([(local(parameter) == 0).sum() for parameter in parameters], [rows_of(p) for p in parameters])
    return {name for name, count in zip(names, zeros.tolist(), strict=True) if count == 0}


def _check_same_run(model: nn.Module, config: SparsityConfig) -> None:
    """A model that carries masks may go on with them, but not under another config."""
    carried = getattr(getattr(model, "config", model), CONFIG_KEY, None)
    if config.saliency == "zeros":
        return
    mine = {key: value for key, value in config.to_dict().items() if key != "provenance"}
    theirs = {key: value for key, value in (carried or {}).items() if key != "provenance"}
    if mine != theirs:
        different = [key for key in mine if mine[key] != theirs.get(key)]
        raise ValueError(
            f"this model is already masked by another config (they differ in {', '.join(different)}); call densify(model) to "
            "take those masks off, or give SparsityCallback no config to go on with them"
        )
