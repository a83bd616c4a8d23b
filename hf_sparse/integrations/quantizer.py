"""How transformers reads a packed checkpoint: the ``hf_sparse`` quantizer.

A loader of transformers 5 takes checkpoint tensors through ``ConversionOps`` before they become parameters (experts are
merged, fused projections split). Unpacking is one more op, put in front of every other:

    packed uint8 tensor -> UnpackWeight -> dense tensor -> the family's own ops, if any -> parameter

Since a packed weight is one tensor under its own name, the family's renames and merges apply as they are. A tensor that
no op of the family takes goes through a catch-all converter (source pattern ``^``), which also lets dense tensors pass.

Once loaded, nothing of us remains: the quantization config goes (``dequantize`` is how transformers calls that) and our
op leaves ``model._weight_conversions``, so the model is a stock, trainable one that saves stock dense checkpoints.

With ``from_pretrained(..., sparse_runtime="auto")`` (or ``packed``, ``int8``) the weights of plain linear layers never
become dense: the op lets their packed bytes pass, and once all is loaded each layer is repacked in the layout its kernel
takes (``runtime.load``), a few rows at a time.
"""

import importlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_sparse.formats.unpack import FORMAT_VERSION, PackedTensorError, check_packed, is_packed, unpack_tensor
from hf_sparse.integrations.packed_config import RUNTIME_KEY, check_format_version

EVERY_NAME = "^"  # a regular expression that matches at the start of any name and changes nothing


class HfSparseQuantizationConfig(QuantizationConfigMixin):
    """``quantization_config`` of a packed config.json: the method and the version of the format.

    Raises:
        ValueError: the checkpoint is in a newer format than this code reads.
    """

    def __init__(self, format_version: int = FORMAT_VERSION, **kwargs):
        check_format_version(format_version)
        self.quant_method = "hf_sparse"
        self.format_version = format_version
        self.dequantize = True  # transformers then forgets the quantization once the weights are in place


class UnpackWeight(ConversionOps):
    """Packed tensors become dense; others pass. ``dtype`` is set by the quantizer to what the parameter shall have."""

    def __init__(self, kept: frozenset[str] = frozenset()):
        self.dtype: torch.dtype | None = None
        self.kept = kept  # parameters that stay packed

    def convert(self, input_dict, source_patterns=None, target_patterns=None, *, full_layer_name=None, **kwargs):
        if full_layer_name in self.kept and EVERY_NAME in input_dict:
            tensors = input_dict[EVERY_NAME]
            packed = tensors[0] if isinstance(tensors, list) else tensors
            if is_packed(packed):
                return {full_layer_name: packed}
        dense = {name: self._dense(tensors) for name, tensors in input_dict.items()}
        if EVERY_NAME in dense:
            return {full_layer_name: dense[EVERY_NAME]}
        return dense

    def _dense(self, tensors):
        if isinstance(tensors, list):
            return [self._dense(tensor) for tensor in tensors]
        if is_packed(tensors):  # the quantizer has verified the checksums of all files
            return unpack_tensor(tensors, self.dtype, verify=False)
        if tensors.dtype == torch.uint8 and self.dtype is not None and self.dtype.is_floating_point:
            raise PackedTensorError(
                f"expected a packed weight, got {tuple(tensors.shape)} bytes without its header. Tensor parallel "
                "loading cuts packed tensors apart: make the checkpoint dense first (hf_sparse unpack_checkpoint)"
            )
        return tensors

    @property
    def reverse_op(self):
        raise NotImplementedError("a packed checkpoint is written from a saved dense one (hf_sparse pack_checkpoint)")


class HfSparseQuantizer(HfQuantizer):
    """Reads packed checkpoints into stock models."""

    requires_calibration = False
    kept: frozenset[str] = frozenset()
    runtime: str | None = None

    def validate_environment(self, *args, **kwargs):
        if not self.pre_quantized:
            raise ValueError(
                "hf_sparse packs a model after it is pruned, not while it loads: use hf_sparse.save_packed(model, out_dir)"
            )

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        # A damaged tensor found during the conversion would only be a line in transformers' load report.
        for file in checkpoint_files or []:
            if str(file).endswith(".safetensors"):
                verify_file(file)
        # A stock class called directly (LlamaForCausalLM.from_pretrained) read the packed config.json as its own.
        self.runtime = getattr(model.config, RUNTIME_KEY, None)
        for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
            restore_stock_config(config)
        if self.runtime is not None:
            self.kept = frozenset(_runtime(self.runtime).linear_weights(model))
        return model

    def param_needs_quantization(self, model, param_name, **kwargs) -> bool:
        return param_name in self.kept  # its packed bytes do not have the shape of the parameter

    def get_new_dtype(self, converter, param, dtype):
        """The dtype a checkpoint tensor is cast to as it is read; None leaves it. Packed bytes must not be cast, so the
        op is told the dtype instead (it has its own copy for every parameter)."""
        for op in getattr(converter, "operations", ()):
            if isinstance(op, UnpackWeight):
                op.dtype = dtype
        return super().get_new_dtype(converter, param, dtype)

    def update_weight_conversions(self, weight_conversions, model):
        for conversion in weight_conversions:
            if isinstance(conversion, WeightConverter):
                conversion.operations = [UnpackWeight(), *conversion.operations]
        return [*weight_conversions, WeightConverter(EVERY_NAME, "", [UnpackWeight(self.kept)])]

    def _process_model_after_weight_loading(self, model, **kwargs):
        kept = []
        for conversion in getattr(model, "_weight_conversions", None) or []:
            if isinstance(conversion, WeightConverter):
                operations = [op for op in conversion.operations if not isinstance(op, UnpackWeight)]
                if not operations:
                    continue
                conversion.operations = operations
            kept.append(conversion)
        if hasattr(model, "_weight_conversions"):
            model._weight_conversions = kept
        if self.runtime is not None:
            _runtime(self.runtime).to_packed_layers(model, sorted(self.kept), self.runtime)
        return model

    def is_serializable(self):
        return True

    @property
    def is_trainable(self):
        return True

    @property
    def is_compileable(self):
        return True


def _runtime(name: str):
    """The module that builds packed layers. Not an import statement: where a repository's copy of this file is used,
    transformers would take it for a package that has to be installed, and only ``sparse_runtime`` needs it."""
    try:
        module = importlib.import_module("hf_sparse.runtime.load")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"sparse_runtime={name!r} needs hf_sparse: pip install hf-sparse") from error
    module.check_runtime(name)
    return module


def restore_stock_config(config) -> None:
    """Take the packed checkpoint's own keys out of a stock config object."""
    fields = vars(config)
    fields.pop(RUNTIME_KEY, None)
    if fields.pop("base_model_type", None) is None:
        return
    fields.pop("model_type", None)  # "hf_sparse" on the instance hid that of the class
    fields.pop("auto_map", None)
    if "base_auto_map" in fields:
        fields["auto_map"] = fields.pop("base_auto_map")


def verify_file(file) -> None:
    """Check every packed tensor of a safetensors file against its checksum.

    Raises:
        PackedTensorError: naming the file and the tensor.
    """
    try:
        reader = safe_open(file, framework="pt")
    except SafetensorError as error:
        raise PackedTensorError(f"{file} is truncated or damaged: {error}") from None
    with reader:
        for name in reader.offset_keys():
            view = reader.get_slice(name)
            if view.get_dtype() != "U8" or len(view.get_shape()) != 1:
                continue
            tensor = reader.get_tensor(name)
            try:
                if is_packed(tensor):
                    check_packed(tensor)
            except PackedTensorError as error:
                raise PackedTensorError(f"{Path(file)}: tensor {name}: {error}") from None


# Both the package and a repository's copy of this code may be loaded, in either order: the first one stays.
if "hf_sparse" not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config("hf_sparse")(HfSparseQuantizationConfig)
if "hf_sparse" not in AUTO_QUANTIZER_MAPPING:
    register_quantizer("hf_sparse")(HfSparseQuantizer)
