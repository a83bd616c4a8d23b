"""The ways models are used do not notice that layers are packed; here with the kernel of this machine, where it has one."""

import copy

import pytest
import torch
from transformers import pipeline

from hf_sparse import SparsityConfig, pack_for_inference, prune, save_packed
from hf_sparse.runtime.layouts import layouts_for
from hf_sparse.runtime.packed_linear import PackedLinear


@pytest.fixture
def both(tiny_model):
    """The same sparse model dense and packed, in float32: sums differ in their order only."""
    if not layouts_for(torch.device("cpu"), torch.float32):
        pytest.skip("no packed kernel on this machine")
    dense = tiny_model("llama").eval()
    prune(dense, SparsityConfig(sparsity=0.7), progress=False)
    packed = copy.deepcopy(dense)
    pack_for_inference(packed, "packed")
    assert sum(isinstance(module, PackedLinear) for module in packed.modules()) == 14
    return dense, packed


def test_generation_in_all_its_forms(both, tiny_model):
    dense, packed = both
    ids = torch.tensor([[5, 9, 17, 33], [7, 7, 70, 8]])
    forms = [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
    ]
    for form in forms:
        results = [model.generate(ids, max_new_tokens=8, pad_token_id=0, **form) for model in both]
        assert torch.equal(*results), form
    draft = copy.deepcopy(packed)
    draft.model.layers = draft.model.layers[:1]
    draft.config.num_hidden_layers = 1
    assisted = packed.generate(ids[:1], assistant_model=draft, do_sample=False, max_new_tokens=8, pad_token_id=0)
    plain = dense.generate(ids[:1], do_sample=False, max_new_tokens=8, pad_token_id=0)
    assert torch.equal(assisted, plain)


def test_pipeline(both, tiny_tokenizer):
    answers = [
        pipeline("text-generation", model=model, tokenizer=tiny_tokenizer)(
            "Once upon", max_new_tokens=6, do_sample=False
        )
        for model in both
    ]
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_lm_eval(both, tiny_tokenizer, tmp_path):
    lm = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    dense, packed = both
    save_packed(dense, tmp_path / "packed", processing_class=tiny_tokenizer)
    asked = [("Once upon", " a time"), ("The sky", " is blue"), ("one two", " three")]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(asked)]
    wrapped = [lm.HFLM(pretrained=model, tokenizer=tiny_tokenizer, device="cpu") for model in both]
    loaded = lm.HFLM(pretrained=str(tmp_path / "packed"), device="cpu", dtype="float32", sparse_runtime="packed")
    assert any(isinstance(module, PackedLinear) for module in loaded.model.modules())
    scores = [[score for score, _ in each.loglikelihood(requests, disable_tqdm=True)] for each in [*wrapped, loaded]]
    assert scores[1] == pytest.approx(scores[0], abs=1e-4) and scores[2] == pytest.approx(scores[0], abs=1e-4)


def test_compiled(both):
    dense, packed = both
    ids = torch.tensor([[5, 9, 17, 33]])
    with torch.no_grad():
        compiled = torch.compile(packed, backend="aot_eager")
        torch.testing.assert_close(compiled(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)
