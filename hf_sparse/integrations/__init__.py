"""The only place that touches unstable internals of other libraries.

``register()`` makes transformers read packed checkpoints after ``import hf_sparse``. It must be lazy: importing
``transformers.quantizers`` takes seconds (it pulls in torch), and ``import hf_sparse`` should cost next to nothing. So
where transformers has not loaded the two modules that we register with, a finder on ``sys.meta_path`` waits for them:

    transformers.models.auto.configuration_auto   -> AutoConfig learns model_type "hf_sparse"
    transformers.quantizers.auto                  -> the "hf_sparse" quantizer is registered

It lets the normal import machinery find the module, wraps the loader, and registers right after the module has run.
transformers has no plugin entry point, or this file would be one line of pyproject.toml.
"""

import importlib
import importlib.abc
import importlib.util
import sys
import warnings

__all__ = ["register"]


def _register_config() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

    from hf_sparse.integrations.packed_config import HfSparseConfig

    if HfSparseConfig.model_type not in CONFIG_MAPPING:
        AutoConfig.register(HfSparseConfig.model_type, HfSparseConfig)


def _register_quantizer() -> None:
    importlib.import_module("hf_sparse.integrations.quantizer")  # registers itself, as it does as remote code


_AFTER = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.quantizers.auto": _register_quantizer,
}


def register() -> None:
    """Register with transformers now, or as soon as it loads the modules concerned. May be called again."""
    waiting = set()
    for name, action in _AFTER.items():
        module = sys.modules.get(name)
        if module is None or getattr(getattr(module, "__spec__", None), "_initializing", False):
            waiting.add(name)
        else:
            action()
    if waiting and not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(waiting))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Runs an action once after each module of ``waiting`` has been executed, then leaves ``sys.meta_path``."""

    def __init__(self, waiting: set[str]):
        self.waiting = waiting

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in self.waiting:
            return None
        self.waiting.discard(fullname)  # before asking the others, or this would find itself
        if not self.waiting:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenAct(spec.loader, _AFTER[fullname])
        return spec


class _ThenAct(importlib.abc.Loader):
    def __init__(self, loader, action):
        self.loader, self.action = loader, action

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self.loader  # inspect and pickle see the real one
        self.loader.exec_module(module)
        try:
            self.action()
        except Exception as error:  # transformers itself must still import; packed checkpoints will fail loudly
            warnings.warn(f"hf_sparse cannot read packed checkpoints with this transformers: {error!r}", stacklevel=2)
