"""OpenVINO: the model as IR (``openvino_model.xml`` and ``.bin``) with its zeros.

    export("smollm2-50", "openvino", "smollm2-ov")

    properties = json.load(open("smollm2-ov/openvino_properties.json"))
    compiled = openvino.Core().compile_model("smollm2-ov/openvino_model.xml", "CPU", properties)

The graph is converted by transformers' own exporter. It takes ``input_ids``, ``attention_mask``, ``position_ids`` and
``beam_idx`` (int32 ``[batch]``: which row each row continues; 0, 1, 2 ... without beam search) and gives ``logits``; keys
and values are state inside the runtime, emptied by ``reset_state()``. These names are what OpenVINO GenAI and
optimum-intel read.

``openvino_properties.json`` holds what a compilation should be given, because the runtime does not read it from the IR:

    INFERENCE_PRECISION_HINT                  the dtype of the export (float32 would otherwise run as bfloat16 where a CPU
                                              has it)
    CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE     weights with at least this fraction of zeros are kept packed in memory and
                                              expanded as they are multiplied

The second acts on little today. In OpenVINO's sources (``fullyconnected.cpp``, useSparseWeightsDecompression) it needs a
CPU with AMX (Sapphire Rapids and later), int8 weights and int8 activations, and both widths divisible by 64. This export
writes float weights: it takes effect once the IR is quantized to int8, for instance by NNCF.
"""

import json
import logging
import warnings
from pathlib import Path

import numpy

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

__all__ = ["OPENVINO", "PROPERTIES", "write_openvino"]

_FILE, PROPERTIES = "openvino_model.xml", "openvino_properties.json"
_HINTS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def check_openvino(source: Source, *, dtype: str, sparse_rate: float) -> None:
    check_causal_lm(source)
    dtype = read_dtype(source, dtype)
    if not 0 <= sparse_rate <= 1:
        raise ValueError(f"sparse_rate is a fraction of zeros from 0 to 1 (1: off), got {sparse_rate}")
    if dtype != "float32":
        from transformers.exporters import OpenVINOExporter

        if not hasattr(OpenVINOExporter, "export_program"):  # came with the right conversion of 16-bit models
            raise ValueError(
                f"transformers before 5.23 converts {dtype} models wrongly; choose dtype float32, or upgrade it"
            )


def write_openvino(source: Source, output: Path, *, dtype: str = "auto", sparse_rate: float = 0.5) -> dict:
    """Writes the IR, the properties to compile it with and the files beside the weights into the directory ``output``.

    Args:
        dtype: of the weights: ``float32``, ``bfloat16``, ``float16``, or ``auto``: as stored.
        sparse_rate: CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE, in [0, 1]; 1 switches it off.
    """
    import openvino
    from transformers import DynamicCache
    from transformers.exporters import OpenVINOConfig, OpenVINOExporter

    dtype = read_dtype(source, dtype)
    model = load_for_export(source, dtype)
    inputs, pairs = example_inputs(model)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # of the tracing and of versions other than those transformers names
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exporter, config = OpenVINOExporter(), OpenVINOConfig(dynamic=True, stateful=True)
            # Before 5.23 it is export and returns the graph; since then, what was recorded comes with it.
            convert = getattr(exporter, "export_program", exporter.export)
            graph = convert(model, inputs | {"past_key_values": DynamicCache(pairs)}, config)
    finally:
        logging.disable(before)
    graph = graph[0] if isinstance(graph, tuple) else graph
    openvino.save_model(graph, output / _FILE, compress_to_fp16=False)
    properties = {"INFERENCE_PRECISION_HINT": _HINTS[dtype], "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": sparse_rate}
    (output / PROPERTIES).write_text(json.dumps(properties, indent=2) + "\n", encoding="utf-8")
    source.copy_other_files(output)
    large = sum(1 for shape, _ in _constants(graph) if numpy.prod(shape) > 1024)
    return {"tensors": large, "notes": [f"weights in {dtype}; compile with {PROPERTIES}"]}


def _constants(graph) -> list:
    """(shape, read as float32) of every constant with two axes or more."""
    found = [node for node in graph.get_ops() if node.get_type_name() == "Constant"]
    return [
        (tuple(node.get_output_shape(0)), lambda node=node: node.get_data(dtype=numpy.float32))
        for node in found
        if len(node.get_output_shape(0)) >= 2 and node.get_element_type().is_real()
    ]


def verify_openvino(source: Source, output: Path, *, dtype: str, sparse_rate: float) -> str:
    """Opens the IR in OpenVINO: the weights are looked up, logits and greedy tokens compared with the model's."""
    import openvino

    dtype = read_dtype(source, dtype)
    core = openvino.Core()
    graph = core.read_model(output / _FILE)
    weights = compare_weights(source.model(dtype), _constants(graph))
    properties = json.loads((output / PROPERTIES).read_text(encoding="utf-8"))
    compiled = core.compile_model(graph, "CPU", properties)
    if (rate := compiled.get_property("CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE")) != numpy.float32(sparse_rate):
        raise RuntimeError(f"OpenVINO took {rate} for CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE, not {sparse_rate}")
    exact = core.compile_model(graph, "CPU", properties | {"INFERENCE_PRECISION_HINT": "f32"})
    answers = compare_answers(source, dtype, "float32", _stepper(exact))
    if dtype != "float32":
        answers += "; " + compare_answers(source, dtype, dtype, _stepper(compiled))
    version = openvino.__version__.partition("-")[0]
    return f"OpenVINO {version} on this CPU: {answers}; {weights}"


def _stepper(compiled):
    """``step`` of :func:`compare_answers`: a request with an empty state."""
    request = compiled.create_infer_request()
    taken = {name for entry in compiled.inputs for name in entry.get_names()}

    def step(input_ids, attention_mask, position_ids):
        feed = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        feed["beam_idx"] = numpy.arange(len(input_ids), dtype=numpy.int32)
        results = request.infer({name: value for name, value in feed.items() if name in taken})
        return numpy.array(results["logits"], dtype=numpy.float32)

    return step


OPENVINO = Exporter(
    what="A directory with OpenVINO IR: one graph for prefill and decode, keys and values as state, weights dense with zeros.",
    zeros="OpenVINO multiplies the zeros like any other number, except int8 weights with int8 activations on CPUs with AMX, "
    "which it can keep packed (CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE, set in openvino_properties.json).",
    checked="2026-11-23, OpenVINO 2026.4.1; measured without AMX: no difference; fullyconnected.cpp of its CPU plugin",
    write=write_openvino,
    check=check_openvino,
    verify=verify_openvino,
    output="directory",
    options={
        "dtype": "of the weights: float32, bfloat16, float16, or auto: as stored",
        "sparse_rate": "fraction of zeros from which OpenVINO may keep a weight packed, 0 to 1 (1: off)",
    },
    consumer="openvino",
    requires="openvino",
    install="pip install openvino",
)
