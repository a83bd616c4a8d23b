"""densify: from sparse pre-training to dense fine-tuning (SPDF, arxiv.org/abs/2303.10464).

The masks go, the zeros stay: every pruned weight starts its dense life at exactly zero. That is no symmetric trap, for the
gradient of a zero weight is its input times the error of its output, which are not zero. Starting them from scaled noise
instead did no better in the paper.
"""

from torch import nn

from hf_sparse.config import CONFIG_KEY
from hf_sparse.masks import COMPANIONS, Masks
from hf_sparse.training.sharding import whole

__all__ = ["densify"]


def densify(model: nn.Module) -> int:
    """Takes the masks off ``model``; all its weights train from now on.

    Weights keep their values. Make a fresh optimizer and schedule for the fine-tuning, as the paper does: one that goes on
    has moments of zero for the revived weights and a bias correction that takes them for old. The ``hf_sparse`` entry of
    ``model.config`` goes too: what it said about the zeros stops being true with the first step.

    Args:
        model: a model that :func:`hf_sparse.sparsify` or a callback made sparse. Stop the training first
            (:meth:`SparseTraining.stop`; callbacks do so when the Trainer ends).

    Returns:
        The number of weights revived.

    Raises:
        ValueError: the model carries no masks.
    """
    masks = Masks.attached(model)
    if not masks:
        raise ValueError(
            "this model carries no masks, so all its weights train already; densify comes after a sparse training in the same "
            "process. A sparse checkpoint that was loaded is dense as soon as it is trained without SparsityCallback"
        )
    revived = 0
    for name, mask in masks.items():
        revived += mask.numel() - int(whole(mask).sum())
        owner, _, attribute = name.rpartition(".")
        for what in COMPANIONS:
            model.get_submodule(owner)._buffers.pop(f"{attribute}_{what}", None)
    described = getattr(model, "config", model)
    if hasattr(described, CONFIG_KEY):
        delattr(described, CONFIG_KEY)
    return revived
