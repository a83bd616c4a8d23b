"""The only place that touches unstable internals of other libraries.

``register()`` makes transformers read packed checkpoints, and build the sparse models of :mod:`hf_sparse.models`, after
``import hf_sparse``. It must be lazy: importing ``transformers.quantizers`` takes seconds (it pulls in torch), and
``import hf_sparse`` should cost next to nothing. So where transformers has not loaded the modules that we register with, a
finder on ``sys.meta_path`` waits for them:

    transformers.models.auto.configuration_auto   -> AutoConfig learns model_type "hf_sparse", "sparse_llama", ...
    transformers.models.auto.modeling_auto        -> AutoModel, AutoModelForCausalLM, ... learn the sparse models
    transformers.quantizers.auto                  -> the "hf_sparse", "sparse_ift" and "uneven_experts" quantizers
    lm_eval.models                                -> lm-eval learns the model type "hf-sparse"

The models are written into the tables that transformers keeps of its own, by name: ``AutoModel.register`` takes classes, and
importing those would load all modeling code for whoever wants a config, and in a circle where it is being loaded already.

It lets the normal import machinery find the module, wraps the loader, and registers right after the module has run.
transformers has no plugin entry point, or this file would be one line of pyproject.toml.
"""

import importlib
import importlib.abc
import importlib.util
import sys
import types
import warnings

__all__ = ["register"]

# model_type -> where its classes are, the config, and the model of each table of transformers' modeling_auto
_MODELS = {
    "sparse_llama": (
        "hf_sparse.models.sparse_llama",
        "SparseLlamaConfig",
        {"MODEL_MAPPING": "SparseLlamaModel", "MODEL_FOR_CAUSAL_LM_MAPPING": "SparseLlamaForCausalLM"},
    ),
    "sparse_gpt2": (
        "hf_sparse.models.sparse_gpt2",
        "SparseGPT2Config",
        {"MODEL_MAPPING": "SparseGPT2Model", "MODEL_FOR_CAUSAL_LM_MAPPING": "SparseGPT2ForCausalLM"},
    ),
    "sparse_resnet": (
        "hf_sparse.models.sparse_resnet",
        "SparseResNetConfig",
        {
            "MODEL_MAPPING": "SparseResNetModel",
            "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING": "SparseResNetForImageClassification",
        },
    ),
}


class _Later(types.ModuleType):
    """Stands for a module until something is asked of it."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(importlib.import_module(self.__name__), name)


def _register_config() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

    from hf_sparse.integrations.packed_config import HfSparseConfig

    if HfSparseConfig.model_type not in CONFIG_MAPPING:
        AutoConfig.register(HfSparseConfig.model_type, HfSparseConfig)
    for model_type, (_, config, _) in _MODELS.items():
        CONFIG_MAPPING._mapping[model_type] = config
        CONFIG_MAPPING._modules[model_type] = _Later("hf_sparse.models.sparse_configs")


def _register_models() -> None:
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    for model_type, (where, config, models) in _MODELS.items():
        for table, model in models.items():
            mapping = getattr(auto, table)
            mapping._reverse_config_mapping[config] = model_type
            mapping._model_mapping[model_type] = model
            mapping._modules[model_type] = _Later(where)


def _register_quantizer() -> None:
    importlib.import_module("hf_sparse.integrations.quantizer")  # registers itself, as it does as remote code
    importlib.import_module("hf_sparse.integrations.replaced_layers")
    importlib.import_module("hf_sparse.integrations.uneven_experts")


def _register_lm_eval() -> None:
    from lm_eval.api.registry import model_registry

    if "hf-sparse" not in model_registry:
        model_registry.register("hf-sparse", target="hf_sparse.integrations.lm_eval_model:SparseLM")


_AFTER = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_models,
    "transformers.quantizers.auto": _register_quantizer,
    "lm_eval.models": _register_lm_eval,
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
        except Exception as error:  # transformers itself must still import; what needs us will fail loudly
            warnings.warn(
                f"hf_sparse cannot register with this transformers, packed checkpoints or sparse models: {error!r}",
                stacklevel=2,
            )
