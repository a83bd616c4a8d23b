"""ONNX: the file is run by onnxruntime and read by onnx, neither of which knows hf_sparse."""

import numpy
import pytest
import torch

from hf_sparse.export import export
from hf_sparse.export.graphs import load_for_export
from hf_sparse.export.onnx import check_onnx, verify_onnx
from hf_sparse.export.source import open_source
from hf_sparse.masks import Masks
from hf_sparse.targets import find_targets


@pytest.fixture
def runtime():
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnxruntime")


def run(session, model, ids, mask, past=None):
    """One call by the documented names; returns logits and the cache to hand to the next call."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    empty = numpy.zeros((len(ids), heads, 0, config.hidden_size // config.num_attention_heads), numpy.float32)
    names = [f"past_key_values.{i}.{kind}" for i in range(config.num_hidden_layers) for kind in ("key", "value")]
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy()}
    logits, *present = session.run(None, feed | dict(zip(names, past or [empty] * len(names), strict=True)))
    return torch.from_numpy(logits), present


def initializers(folder):
    """Every weight-sized array of the file, read by the onnx package."""
    import onnx

    arrays = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(folder / "model.onnx").graph.initializer]
    return [array for array in arrays if array.ndim >= 2 and array.size >= 1024]


@pytest.mark.parametrize(("family", "opset"), [("llama", 18), ("llama", 14), ("gpt2", 17)])
def test_onnxruntime_generates_what_the_model_does(runtime, tiny_model, zeroed, tmp_path, family, opset):
    model = zeroed(tiny_model(family), 0.6)
    model.generation_config.eos_token_id = None
    export(model, "onnx", tmp_path / "out", opset=opset, verify=False)
    session = runtime.InferenceSession(tmp_path / "out" / "model.onnx")
    prompt = torch.tensor([[0, 0, 0, 7, 9, 11], [5, 8, 13, 21, 34, 55]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    want = model.generate(prompt, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    got, fed, past = prompt, prompt, None
    for _ in range(6):
        logits, past = run(session, model, fed, mask, past)
        fed = logits[:, -1].argmax(-1, keepdim=True)
        got, mask = torch.cat([got, fed], 1), torch.cat([mask, torch.ones_like(fed)], 1)
    assert torch.equal(got, want)


def test_logits_and_zeros_in_the_file(runtime, tiny_model, zeroed, tmp_path):
    import onnx

    model = zeroed(tiny_model("llama", tie_word_embeddings=False), 0.6)
    report = export(model, "onnx", tmp_path / "out", opset=14, verify=True)
    session = runtime.InferenceSession(tmp_path / "out" / "model.onnx")
    ids = torch.tensor([[5, 8, 13, 21, 34]])
    logits, _ = run(session, model, ids, torch.ones_like(ids))
    assert (logits - model(ids).logits).abs().max() < 1e-5

    onnx.checker.check_model(str(tmp_path / "out" / "model.onnx"))
    file = onnx.load(tmp_path / "out" / "model.onnx")
    assert file.ir_version <= 9 and file.opset_import[0].version == 14
    zeros = sum(int((array == 0).sum()) for array in initializers(tmp_path / "out"))
    assert zeros == sum(int((p == 0).sum()) for p in model.parameters() if p.dim() >= 2)
    assert "16 of 16 greedy tokens equal" in report["verified"] and f"{zeros} zeros" in report["verified"]
    assert {"config.json", "model.onnx", "model.onnx.data"} <= set(report["files"])


def test_the_zeros_are_where_they_were(runtime, tiny_model, zeroed, tmp_path):
    model = zeroed(tiny_model("llama", num_hidden_layers=1), 0.6)
    export(model, "onnx", tmp_path / "out", opset=14, verify=False)
    kept = [array != 0 for array in initializers(tmp_path / "out")]
    masks = Masks.from_zeros(model, find_targets(model))
    assert len(masks) == 7
    for name, mask in masks.items():
        assert any(numpy.array_equal(k, mask.numpy()) or numpy.array_equal(k.T, mask.numpy()) for k in kept), name


def test_no_path_of_this_machine_in_the_file(runtime, tiny_model, tmp_path):
    export(tiny_model("llama", num_hidden_layers=1), "onnx", tmp_path / "out", verify=False)
    graph = (tmp_path / "out" / "model.onnx").read_bytes()
    assert b".py" not in graph and b"site-packages" not in graph


@pytest.mark.parametrize(("family", "overrides"), [("gemma3_text", {"sliding_window": 4}), ("qwen3_moe", {})])
def test_windows_and_experts(runtime, tiny_model, zeroed, tmp_path, family, overrides):
    report = export(zeroed(tiny_model(family, **overrides), 0.6), "onnx", tmp_path / "out", opset=14, verify=True)
    assert "16 of 16 greedy tokens equal" in report["verified"]


def test_a_damaged_file_is_not_verified(runtime, tiny_model, zeroed, tmp_path):
    zeroed(tiny_model("llama", num_hidden_layers=1), 0.6).save_pretrained(tmp_path / "model")
    export(tmp_path / "model", "onnx", tmp_path / "out", opset=14, verify=False)
    data = tmp_path / "out" / "model.onnx.data"
    whole = bytearray(data.read_bytes())
    middle = len(whole) // 2 // 4 * 4
    whole[middle : middle + 4000] = numpy.full(1000, 0.5, numpy.float32).tobytes()
    data.write_bytes(whole)
    with open_source(tmp_path / "model", tmp_path) as source, pytest.raises(RuntimeError, match="is not in the graph"):
        verify_onnx(source, tmp_path / "out", opset=14, dtype="float32")


def test_wrong_numbers_leave_nothing_behind(runtime, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_sparse.export.graphs._TOLERANCE", 0.0)
    with pytest.raises(RuntimeError, match="rounding allows"):
        export(tiny_model("llama", num_hidden_layers=1), "onnx", tmp_path / "out", opset=14, verify=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 13}, "opset is a number from 14 to 20"),
        ({"opset": 21}, "opset is a number from 14 to 20"),
        ({"dtype": "bfloat16"}, "bfloat16 matrix product"),
        ({"dtype": "int8"}, "dtype is one of"),
    ],
)
def test_refused_before_any_work(sparse_dir, tmp_path, options, message):
    with open_source(sparse_dir, tmp_path) as source, pytest.raises(ValueError, match=message):
        check_onnx(source, **({"opset": 18, "dtype": "float32"} | options))


def test_only_causal_language_models(tmp_path):
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path / "bert")
    with open_source(tmp_path / "bert", tmp_path) as source, pytest.raises(ValueError, match="BertModel"):
        check_onnx(source, opset=18, dtype="float32")


def test_a_model_that_does_not_remember_keys_and_values(tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    with open_source(tmp_path / "mamba", tmp_path) as source, pytest.raises(ValueError, match="keys and values"):
        load_for_export(source, "float32")
