"""OpenVINO: the IR is read, compiled and run by the openvino package."""

import json

import numpy
import pytest
import torch

from hf_sparse.export import export
from hf_sparse.export.openvino import PROPERTIES, check_openvino, verify_openvino
from hf_sparse.export.source import open_source


@pytest.fixture
def openvino():
    return pytest.importorskip("openvino")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_openvino_generates_what_the_model_does(openvino, tiny_model, zeroed, tmp_path, family):
    model = zeroed(tiny_model(family), 0.6)
    model.generation_config.eos_token_id = None
    report = export(model, "openvino", tmp_path / "out", verify=True)
    assert "16 of 16 greedy tokens equal" in report["verified"]
    assert {"openvino_model.xml", "openvino_model.bin", PROPERTIES, "config.json"} <= set(report["files"])

    properties = json.loads((tmp_path / "out" / PROPERTIES).read_text())
    compiled = openvino.Core().compile_model(tmp_path / "out" / "openvino_model.xml", "CPU", properties)
    assert compiled.get_property("CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE") == 0.5
    assert compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32
    request = compiled.create_infer_request()
    prompt = torch.tensor([[0, 0, 0, 7, 9, 11], [5, 8, 13, 21, 34, 55]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    want = model.generate(prompt, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    got, fed = prompt, prompt
    for _ in range(6):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -fed.shape[1] :]
        feed = {"input_ids": fed, "attention_mask": mask, "position_ids": positions}
        feed = {name: tensor.numpy() for name, tensor in feed.items()} | {
            "beam_idx": numpy.arange(2, dtype=numpy.int32)
        }
        logits = torch.from_numpy(numpy.array(request.infer(feed)["logits"]))
        fed = logits[:, -1].argmax(-1, keepdim=True)
        got, mask = torch.cat([got, fed], 1), torch.cat([mask, torch.ones_like(fed)], 1)
    assert torch.equal(got, want)


def test_zeros_in_the_file_and_16_bits(openvino, tiny_model, zeroed, tmp_path):
    from transformers.exporters import OpenVINOExporter

    model = zeroed(tiny_model("llama", num_hidden_layers=1, tie_word_embeddings=False), 0.6).to(torch.bfloat16)
    if not hasattr(OpenVINOExporter, "export_program"):
        with pytest.raises(ValueError, match="transformers before 5.23"):
            export(model, "openvino", tmp_path / "out")
        return
    report = export(model, "openvino", tmp_path / "out", sparse_rate=0.3, verify=True)
    graph = openvino.Core().read_model(tmp_path / "out" / "openvino_model.xml")
    constants = [node for node in graph.get_ops() if node.get_type_name() == "Constant"]
    weights = [node for node in constants if numpy.prod(node.get_output_shape(0)) >= 1024]
    assert {node.get_element_type() for node in weights} == {openvino.Type.bf16}
    zeros = sum(int((node.get_data(dtype=numpy.float32) == 0).sum()) for node in weights)
    assert zeros == sum(int((p == 0).sum()) for p in model.parameters() if p.dim() >= 2)
    assert f"{zeros} zeros" in report["verified"]
    assert json.loads((tmp_path / "out" / PROPERTIES).read_text()) == {
        "INFERENCE_PRECISION_HINT": "bf16",
        "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": 0.3,
    }


def test_a_damaged_file_is_not_verified(openvino, tiny_model, zeroed, tmp_path):
    zeroed(tiny_model("llama", num_hidden_layers=1), 0.6).save_pretrained(tmp_path / "model")
    export(tmp_path / "model", "openvino", tmp_path / "out", verify=False)
    weights = tmp_path / "out" / "openvino_model.bin"
    whole = bytearray(weights.read_bytes())
    middle = len(whole) // 2 // 4 * 4
    whole[middle : middle + 4000] = numpy.full(1000, 0.5, numpy.float32).tobytes()
    weights.write_bytes(whole)
    with open_source(tmp_path / "model", tmp_path) as source, pytest.raises(RuntimeError, match="is not in the graph"):
        verify_openvino(source, tmp_path / "out", dtype="auto", sparse_rate=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"sparse_rate": 1.5}, "fraction of zeros from 0 to 1"), ({"dtype": "int8"}, "dtype is one of float32")],
)
def test_refused_before_any_work(sparse_dir, tmp_path, options, message):
    with open_source(sparse_dir, tmp_path) as source, pytest.raises(ValueError, match=message):
        check_openvino(source, **({"dtype": "auto", "sparse_rate": 0.5} | options))
