"""The config class of packed checkpoints: a signpost that hands out the stock config.

A packed config.json says ``model_type: hf_sparse`` so that a loader without our code stops. With our code this class
answers to that name, and gives back the config of ``base_model_type``, so that the Auto classes build the stock model.

``from_pretrained(..., sparse_runtime="auto")`` arrives here as well: transformers sets a keyword that the config has an
attribute for, so the config has one until the model is built.
"""

import copy

from transformers.configuration_utils import PreTrainedConfig

from hf_sparse.formats.unpack import FORMAT_VERSION

RUNTIME_KEY = "sparse_runtime"


def check_format_version(version: int) -> None:
    """Raises ValueError for a checkpoint written by a newer hf_sparse."""
    if version > FORMAT_VERSION:
        raise ValueError(
            f"this checkpoint is packed in hf_sparse format {version}, the code at hand reads up to {FORMAT_VERSION}: "
            "upgrade hf_sparse (pip install -U hf-sparse)"
        )


class HfSparseConfig(PreTrainedConfig):
    """Stands for the config of a packed checkpoint; never instantiated. ``from_dict`` and ``from_pretrained`` return the
    stock config that ``base_model_type`` names, with the ``quantization_config`` that makes transformers unpack."""

    model_type = "hf_sparse"

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Raises ValueError: a newer format, or a ``base_model_type`` that this transformers does not know."""
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        stock = copy.deepcopy(dict(config_dict))
        check_format_version((stock.get("quantization_config") or {}).get("format_version", 1))
        base = stock.pop("base_model_type", None)
        if base is None:
            raise ValueError("a packed config.json names its architecture in base_model_type; this one does not")
        if base not in CONFIG_MAPPING:
            raise ValueError(
                f"the packed checkpoint is a {base!r} model, which this transformers does not know: upgrade transformers, "
                "or first import the package that registers it"
            )
        stock["model_type"] = base
        stock.pop("auto_map", None)
        if "base_auto_map" in stock:
            stock["auto_map"] = stock.pop("base_auto_map")
        stock.setdefault(RUNTIME_KEY, None)
        return CONFIG_MAPPING[base].from_dict(stock, **kwargs)
