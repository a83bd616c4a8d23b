"""Trainer callbacks for sparse training, imported as ``hf_sparse.callbacks``.

A callback here is a thin wrapper: it calls the same functions that a custom loop can call (``hf_sparse.masks``,
``hf_sparse.schedules``) and holds configuration only, because the Trainer rebuilds callbacks from JSON on resume.

This folder lies at the top of the repository; ``hf_sparse/callbacks`` is a symbolic link to it, and the wheel carries
the files as ``hf_sparse/callbacks``. Modules here import by absolute names (``hf_sparse.callbacks.x``), never as
``callbacks``, which would be a second copy of the same module.
"""

import importlib

_EXPORTS = {
    "CardCallback": "hf_sparse.callbacks.card",
    "DenseFinetuningCallback": "hf_sparse.callbacks.dense_finetuning",
    "DistillationLoss": "hf_sparse.callbacks.distillation",
    "DistillationMixin": "hf_sparse.callbacks.distillation",
    "DistillationTrainer": "hf_sparse.callbacks.distillation",
    "FlopsCallback": "hf_sparse.callbacks.flops",
    "SparsityCallback": "hf_sparse.callbacks.sparsity",
    "plain_model": "hf_sparse.callbacks.fine_tuning",
    "sft_trainer": "hf_sparse.callbacks.fine_tuning",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return __all__
