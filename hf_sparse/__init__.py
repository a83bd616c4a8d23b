"""Weight sparsity for Hugging Face models: prune, measure, save and load, with transformers' own calls.

    from hf_sparse import SparsityConfig, prune

    report = prune(model, SparsityConfig(sparsity=0.5, saliency="sparsegpt"), calibration_batches)
    model.save_pretrained(out)

Importing the package teaches ``from_pretrained`` to read packed checkpoints. Nothing heavy is imported until it is used.
"""

import importlib
from pathlib import Path as _Path

from hf_sparse.integrations import register as _register

__version__ = "0.1.0"

_EXPORTS = {
    "ExpertScores": "hf_sparse.pruning.expert_scores",
    "Masks": "hf_sparse.masks",
    "SparsityConfig": "hf_sparse.config",
    "SparsityReport": "hf_sparse.report",
    "RecoveryReport": "hf_sparse.recovery",
    "SparsityCard": "hf_sparse.hub_cards.sparsity_card",
    "SparseTraining": "hf_sparse.training.sparse_training",
    "SpeculativeDecoding": "hf_sparse.speculative.decoding",
    "TapOut": "hf_sparse.speculative.tapout",
    "assess": "hf_sparse.integrations.assessment",
    "attach_drafter": "hf_sparse.speculative.attach",
    "densify": "hf_sparse.training.densify",
    "drop_layers": "hf_sparse.pruning.layers",
    "find_mixtures": "hf_sparse.mixtures",
    "find_targets": "hf_sparse.targets",
    "inspect_checkpoint": "hf_sparse.inspection",
    "load_model": "hf_sparse.loading",
    "load_segments": "hf_sparse.data",
    "load_tokenizer": "hf_sparse.loading",
    "make_drafter": "hf_sparse.recipes.drafters",
    "measure": "hf_sparse.pruning.measure",
    "merge_checkpoints": "hf_sparse.distillation.merging",
    "pack_checkpoint": "hf_sparse.formats",
    "pack_for_inference": "hf_sparse.runtime.pack",
    "parse_pattern": "hf_sparse.patterns",
    "perplexity": "hf_sparse.evaluation",
    "prune": "hf_sparse.pruning.prune",
    "prune_experts": "hf_sparse.pruning.experts",
    "push": "hf_sparse.hub_cards.push",
    "repair": "hf_sparse.pruning.repair",
    "save_packed": "hf_sparse.formats",
    "score_experts": "hf_sparse.pruning.expert_scores",
    "score_layers": "hf_sparse.pruning.layers",
    "self_distill": "hf_sparse.distillation.self_data",
    "sparse_ift": "hf_sparse.models.ift",
    "sparsify": "hf_sparse.training.sparse_training",
    "spectrum": "hf_sparse.models.spectral",
    "unpack": "hf_sparse.runtime.pack",
    "unpack_checkpoint": "hf_sparse.formats",
}
_RENAMED = {"parse_pattern": "parse"}

__all__ = sorted([*_EXPORTS, "__version__"])

# A checkout without symlinks (Windows): the packages beside this folder are found through the package's path.
_root = _Path(__file__).resolve().parent.parent
if not (_Path(__file__).parent / "callbacks").is_dir() and (_root / "callbacks" / "__init__.py").is_file():
    __path__.append(str(_root))


def __getattr__(name: str):
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), _RENAMED.get(name, name))
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return __all__


_register()
