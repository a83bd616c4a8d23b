"""What the sparse Llama, GPT-2 and ResNet share: their layers are replaced as the config says when they are built.

Each is a subclass of transformers' own model. Once that has built its dense layers (which cost a moment at most: loading
builds models without numbers), those that the family replaces are swapped, and the new ones start as the class's
``_init_weights`` starts its own. Without a family nothing happens at all, so the model is its dense parent bit for bit.

This file travels with a checkpoint, so its imports from the files beside it are relative.
"""

import re

from torch import nn

from .layers import transform_layers

__all__ = ["ReplacedLayers", "SavedWithItsCode"]


class SavedWithItsCode:
    """``save_pretrained`` puts the files a model needs beside it, for ``trust_remote_code`` where hf_sparse is missing."""

    base_class: type  # what AutoModel gives

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: transformers would skip the initialisation of modules that own no weights, such as GPT-2's attention."""
        return False

    def save_pretrained(self, save_directory, *args, **kwargs):
        base = self.base_class
        name = f"{base.__module__.rpartition('.')[2]}.{base.__name__}"
        self.config.auto_map = (getattr(self.config, "auto_map", None) or {}) | {"AutoModel": name}
        return super().save_pretrained(save_directory, *args, **kwargs)


class ReplacedLayers(SavedWithItsCode):
    """For a base model: ``replace_layers()`` at the end of its constructor."""

    sparse_layers: str  # a regular expression for the names of the modules that may be replaced

    def replace_layers(self) -> None:
        config = self.config
        if config.family == "wide" and config.sparsity and config.dense_sizes is None:
            raise ValueError(
                "this config was given its family after it was made, so its sizes did not grow; give them together: "
                f"{type(config).__name__}(family='wide', sparsity={config.sparsity:g}, ...)"
            )
        if config.family in (None, "wide") or not config.sparsity:
            return
        folded = set(config.folded or ())
        names = [
            name
            for name, module in self.named_modules()
            if re.fullmatch(self.sparse_layers, name) and hasattr(module, "weight") and name not in folded
        ]
        transform_layers(self, config.family, config.sparsity, names, config.branch_activation, config.sparse_u_only)
        self._tp_plan = {}  # it splits the layers that were there
        for name in names:  # rules that look at a block, such as GPT-2's for c_proj, see its new layers
            _forget_initialised(self.get_submodule(name.rpartition(".")[0]))
        self.init_weights()


def _forget_initialised(module: nn.Module) -> None:
    if "_is_hf_initialized" in vars(module):
        del module._is_hf_initialized
