"""A model with a drafter attached gives lm-eval the answers it gives without one."""

import json

import pytest

from hf_sparse.speculative.attach import attach_drafter, detach_drafter
from hf_sparse.speculative.tapout import TapOut

TASK = """task: echo
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n", "e"], max_gen_toks: 24, do_sample: false}}
metric_list: [{{metric: exact_match}}]
metadata: {{version: 1.0}}
"""


def test_generate_until(tiny_model, tiny_tokenizer, tmp_path):
    pytest.importorskip("lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows = [{"question": f"What comes after {n}? ", "answer": str(n + 1)} for n in range(6)]
    (tmp_path / "echo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "echo.yaml").write_text(TASK.format(file=tmp_path / "echo.jsonl"))
    model, drafter = tiny_model("llama", num_hidden_layers=3), tiny_model("llama")

    def answers():
        harness = HFLM(pretrained=model, tokenizer=tiny_tokenizer, batch_size=1)
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        output = simple_evaluate(harness, tasks=["echo"], task_manager=manager, log_samples=True, bootstrap_iters=0)
        return [sample["resps"] for sample in output["samples"]["echo"]]

    plain = answers()
    decoding = attach_drafter(model, drafter, TapOut(max_draft=6))
    try:
        assert answers() == plain
    finally:
        detach_drafter(model)
    assert decoding.total.rounds > 6
