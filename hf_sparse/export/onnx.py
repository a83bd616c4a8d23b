"""ONNX: the model as one graph with its zeros, for onnxruntime, and for every other tool that reads ONNX.

    export("smollm2-50", "onnx", "smollm2-onnx")                 for onnxruntime
    export("smollm2-50", "onnx", "smollm2-onnx", opset=14)       for older tools; DeepSparse 1.8 reads both

A directory: ``model.onnx`` (the graph), ``model.onnx.data`` (the weights, raw), and config, tokenizer and generation config
as they were. The graph takes ``input_ids``, ``attention_mask``, ``position_ids``, ``past_key_values.{layer}.key`` and
``.value``, and gives ``logits``, ``present.{layer}.key`` and ``.value``: the names that Optimum gave them and its
``ORTModelForCausalLM`` reads. Every size but the widths is dynamic, and past = 0 is prefill (see ``graphs``).

Zeros stay zeros: an initializer is a dense array. ONNX can also store tensors as coordinates (``sparse_initializer``), but
with 64-bit indices that is larger than dense below 80% in float32, and onnxruntime makes it dense again on loading.

Opset 18 and up is written by torch's exporter over ``torch.export``; 14 to 17 by its older one, which traces. The file
states IR version 9 at most, so that DeepSparse's onnx 1.14 opens it.
"""

import contextlib
import logging
import tempfile
import warnings
from pathlib import Path

import torch

from hf_sparse.export import Exporter
from hf_sparse.export.graphs import (
    check_causal_lm,
    compare_answers,
    compare_weights,
    example_inputs,
    load_for_export,
    read_dtype,
)
from hf_sparse.export.source import Source

__all__ = ["ONNX", "write_onnx"]

_FILE, _IR_VERSION = "model.onnx", 9
_OLDEST, _TRACED_UNTIL, _NEWEST = 14, 17, 20


class _Flat(torch.nn.Module):
    """The model with its cache as plain tensors: keys and values of layer 0, of layer 1, ..."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, position_ids, past):
        from transformers import DynamicCache

        # Layers without a window: the mask keeps a sliding layer to its window, and the graph keeps all keys.
        cache = DynamicCache([(past[i], past[i + 1]) for i in range(0, len(past), 2)])
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        layers = output.past_key_values.layers
        return output.logits, *[tensor for layer in layers for tensor in (layer.keys, layer.values)]


def check_onnx(source: Source, *, opset: int, dtype: str) -> None:
    check_causal_lm(source)
    if not isinstance(opset, int) or not _OLDEST <= opset <= _NEWEST:
        raise ValueError(f"opset is a number from {_OLDEST} to {_NEWEST}, got {opset!r}")
    if read_dtype(source, dtype) == "bfloat16":
        raise ValueError("onnxruntime has no bfloat16 matrix product on CPUs; choose dtype float32 or float16")


def write_onnx(source: Source, output: Path, *, opset: int = 18, dtype: str = "float32") -> dict:
    """Writes ``model.onnx`` and what belongs to it into the directory ``output``.

    Args:
        opset: version of ONNX's operators, 14 to 20.
        dtype: of weights and arithmetic: ``float32``, ``float16``, or ``auto``: as stored.
    """
    import onnx_ir

    model = load_for_export(source, read_dtype(source, dtype))
    model.set_attn_implementation("eager")  # the plainest operations: no guards of a fused kernel to carry over
    inputs, pairs = example_inputs(model)
    past = [tensor for pair in pairs for tensor in pair]
    arguments = (*inputs.values(), past)
    kinds = [f"{layer}.{kind}" for layer in range(len(pairs)) for kind in ("key", "value")]
    names = [*inputs, *(f"past_key_values.{kind}" for kind in kinds)]
    outputs = ["logits", *(f"present.{kind}" for kind in kinds)]
    export = _export_traced if opset <= _TRACED_UNTIL else _export_program
    with tempfile.TemporaryDirectory(dir=output) as folder, _quiet():
        graph = export(_Flat(model).eval(), arguments, names, outputs, opset, Path(folder))
        graph.ir_version = min(graph.ir_version, _IR_VERSION)
        for node in graph.graph.all_nodes():  # stack traces, which name files of this machine
            node.metadata_props.clear()
            node.doc_string = None
        onnx_ir.save(graph, output / _FILE, external_data=f"{_FILE}.data", size_threshold_bytes=1024)
    source.copy_other_files(output)
    large = sum(1 for value in graph.graph.initializers.values() if value.const_value.size > 1024)
    return {"tensors": large, "notes": [f"opset {opset}, IR version {graph.ir_version}, {dtype}"]}


def _export_program(module, arguments, names, outputs, opset, folder):
    """Through torch.export: the graph, its weights still torch's."""
    new, all_tokens = {0: "batch", 1: "new"}, {0: "batch", 1: "total"}
    shapes = (new, all_tokens, new, [{0: "batch", 2: "past"} for _ in arguments[3]])
    program = torch.onnx.export(
        module,
        arguments,
        input_names=names,
        output_names=outputs,
        dynamic_shapes=shapes,
        opset_version=opset,
        dynamo=True,
        verbose=False,
    )
    return program.model


def _export_traced(module, arguments, names, outputs, opset, folder):
    """Through torch's tracing exporter, which writes older opsets: the graph, its weights in ``folder``."""
    import onnx_ir

    axes = {name: {0: "batch", 2: "past"} for name in names} | {name: {0: "batch", 2: "total"} for name in outputs}
    axes |= {"input_ids": {0: "batch", 1: "new"}, "position_ids": {0: "batch", 1: "new"}}
    axes |= {"attention_mask": {0: "batch", 1: "total"}, "logits": {0: "batch", 1: "new"}}
    torch.onnx.export(
        module,
        arguments,
        str(folder / "traced.onnx"),
        input_names=names,
        output_names=outputs,
        dynamic_axes=axes,
        opset_version=opset,
        dynamo=False,
    )
    return onnx_ir.load(folder / "traced.onnx")


@contextlib.contextmanager
def _quiet():
    """The exporters report progress and deprecations of their own making; errors still come through."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def verify_onnx(source: Source, output: Path, *, opset: int, dtype: str) -> str:
    """Opens the file in onnxruntime: the weights are looked up, logits and greedy tokens compared with the model's."""
    import onnx_ir
    import onnxruntime

    dtype = read_dtype(source, dtype)
    stored = onnx_ir.load(output / _FILE).graph.initializers.values()
    arrays = [(tuple(v.const_value.shape), v.const_value.numpy) for v in stored]
    weights = compare_weights(source.model(dtype), arrays)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(output / _FILE, options, providers=["CPUExecutionProvider"])
    answers = compare_answers(source, dtype, dtype, _stepper(session))
    return f"onnxruntime {onnxruntime.__version__} on this CPU: {answers}; {weights}"


def _stepper(session):
    """``step`` of :func:`compare_answers`: the session with its cache in numpy arrays."""
    taken = {entry.name: entry for entry in session.get_inputs()}
    given = [entry.name for entry in session.get_outputs()]
    past: dict = {}

    def step(input_ids, attention_mask, position_ids):
        import numpy

        feed = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids} | past
        for name, entry in taken.items():
            if name not in feed:  # the empty cache
                kind = numpy.float16 if entry.type == "tensor(float16)" else numpy.float32
                feed[name] = numpy.zeros((len(input_ids), entry.shape[1], 0, entry.shape[3]), kind)
        results = dict(zip(given, session.run(None, {name: feed[name] for name in taken}), strict=True))
        past.update({n.replace("present.", "past_key_values."): v for n, v in results.items() if n != "logits"})
        return results["logits"].astype(numpy.float32)

    return step


ONNX = Exporter(
    what="A directory with model.onnx: one graph for prefill and decode with a key-value cache, weights dense with zeros.",
    zeros="onnxruntime multiplies the zeros like any other number: no gain in time or memory (it turns sparse initializers "
    "into dense ones on loading). DeepSparse 1.8, no longer maintained, skips them in float32 on x86 CPUs.",
    checked="2026-11-23, onnxruntime 1.32.0 (its PR 5540, issue 31730); DeepSparse 1.8.0 ran opset 14 to 18, IR version 9 at "
    "most",
    write=write_onnx,
    check=check_onnx,
    verify=verify_onnx,
    output="directory",
    options={"opset": "version of ONNX's operators, 14 to 20", "dtype": "float32, float16, or auto: as stored"},
    consumer="onnxruntime",
    requires="onnxscript",
    install="pip install onnxscript onnxruntime",
)
