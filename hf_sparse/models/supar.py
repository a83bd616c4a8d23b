"""SuPar: initialisation and learning rate that carry over between widths and static sparsities (arxiv.org/abs/2405.15743).

    report = sparse_ift(model, "wide", 0.75)                                        # width 768 -> 1536
    groups = supar_parameters(model, report.config, learning_rate=6e-4, base_width=768)
    Trainer(model, args, optimizers=(torch.optim.AdamW(groups), None), callbacks=[SparsityCallback(report.config)], ...)

A hidden matrix of width d and density r sees d r inputs per output, where the model that was tuned saw d_base r_base. With
m = (d / d_base)(r / r_base), its activations and Adam's updates of them keep their size if

    initial variance  = that of the tuned model / m          learning rate  = that of the tuned model / m

Embeddings, norms and biases keep both; hidden matrices that stay dense have r = r_base. At a constant number of weights per
output (d r) it is the maximal-update parametrisation for width alone. The rest of that parametrisation, attention scores
over d_head and logits over d / d_base, is a matter of the model's forward pass and is not touched here.

For masks that do not move: the authors report that it overcorrects for RigL and gradual pruning, which choose weights by
their size or gradient. Sparse-IFT and SPDF train with the dense model's settings; this is an option beside them.
"""

import torch
from torch import nn

from hf_sparse.config import SparsityConfig
from hf_sparse.methods import METHODS
from hf_sparse.models.ift import dense_by_default
from hf_sparse.models.layers import KINDS
from hf_sparse.pruning.plan import make_plan
from hf_sparse.targets import find_targets

__all__ = ["supar_parameters"]


@torch.no_grad()
def supar_parameters(
    model: nn.Module,
    config: SparsityConfig,
    *,
    learning_rate: float,
    base_width: int,
    base_sparsity: float = 0.0,
    weight_decay: float = 0.0,
) -> list[dict]:
    """Rescales the initial hidden weights of ``model`` in place and returns parameter groups for an Adam optimizer.

    Args:
        model: freshly initialised as the tuned model was (the same standard deviations), before masks are chosen.
        config: of the sparse training, with a method whose masks do not move.
        learning_rate, weight_decay: tuned for a model of ``base_width`` and ``base_sparsity``. Decay is for matrices.
        base_width: hidden size of the tuned model.

    Raises:
        ValueError: a method that moves masks, layers of a family other than wide, a width or learning rate that is not
            positive, a model without a width.
    """
    if config.method is None or METHODS[config.method].is_dynamic:
        raise ValueError(
            f"this scaling holds for masks that stay (method 'static'), not for {config.method!r}: it overcorrects there"
        )
    if not learning_rate > 0 or base_width < 1 or not 0 <= base_sparsity < 1:
        raise ValueError(
            f"learning_rate and base_width are positive and base_sparsity in [0, 1), got {learning_rate}, {base_width}, "
            f"{base_sparsity}"
        )
    if any(isinstance(module, KINDS) for module in model.modules()):
        raise ValueError(
            "widths say nothing of branches and ranks: only wide models are scaled, not the other families"
        )
    width = getattr(getattr(model, "config", None), "hidden_size", None)
    if not isinstance(width, int):
        raise ValueError(
            f"{type(model).__name__} has no hidden_size in its config, so it cannot be compared with {base_width}"
        )
    plan = make_plan(model, config, find_targets(model, config.targets, config.ignore), None)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    hidden = {}
    for name in find_targets(model, None, dense_by_default(model, None)):  # a stem's inputs do not grow with the width
        sparsity = plan[name][1] if name in plan else base_sparsity
        multiple = width / base_width * (1 - sparsity) / (1 - base_sparsity)
        hidden[name] = multiple
        model.get_parameter(name).mul_(multiple**-0.5)
    for name, parameter in model.named_parameters():
        rate = learning_rate / hidden.get(name, 1.0)
        decay = weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]
