"""One call for text, responses and lm-eval tasks, against the single functions and the harness's own totals."""

import json

import pytest
import torch

from hf_sparse.evaluation import perplexity, response_losses
from hf_sparse.integrations.assessment import assess, response_rows
from hf_sparse.recovery import recovery

TASK = """task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 1.0}}
"""


@pytest.fixture
def task(tmp_path):
    rows = [
        {"question": f"{n} + 1 =", "choices": [f" {n + 1}", f" {n + 2} it is", " no"], "gold": n % 3} for n in range(12)
    ]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yaml").write_text(TASK.format(file=tmp_path / "sums.jsonl"))
    return tmp_path


ROWS = [
    {"question": "What is two and two?", "answer": "Four."},
    {"question": "And one more?", "answer": "Five, if the others were four."},
]


def test_everything_in_one_call(tiny_model, tiny_tokenizer, task):
    pytest.importorskip("lm_eval")
    from hf_sparse.integrations.lm_eval import evaluate_tasks

    model, original = tiny_model("llama"), tiny_model("llama", seed=1)
    tokens = torch.arange(200) % 300
    rows = response_rows(ROWS, tiny_tokenizer)
    given = dict(texts={"text": tokens}, sequence_length=32, max_windows=4, tasks=["sums"], task_path=str(task))
    measures = assess(model, tiny_tokenizer, responses={"sums answers": rows}, reference=original, **given)
    assert list(measures) == ["text", "sums answers", "KL: sums answers", "sums"]
    assert measures["text"].shown == pytest.approx(perplexity(model, tokens, 32, 4)["perplexity"], rel=1e-6)
    assert len(measures["text"].values) == 4 and "4 contiguous windows of 32" in measures["text"].facts["windows"]
    scores = response_losses(model, rows, original)
    assert measures["sums answers"].values == pytest.approx(scores["loss"])
    assert measures["KL: sums answers"].values == pytest.approx(scores["kl"], abs=1e-6)
    harness = evaluate_tasks(model, tiny_tokenizer, ["sums"], str(task))["results"]["sums"]
    assert measures["sums"].mean == pytest.approx(harness["acc_norm,none"])
    assert measures["sums"].stderr == pytest.approx(harness["acc_norm_stderr,none"])
    assert measures["sums"].chance == pytest.approx(1 / 3) and measures["sums"].facts["num_fewshot"] == 0
    alone = assess(original, tiny_tokenizer, responses={"sums answers": rows}, **given)
    assert list(alone) == ["text", "sums answers", "sums"]
    assert recovery(alone["sums"], alone["sums"]) == (100.0, 0.0)


def test_rows_are_the_chat_and_where_the_response_begins(tiny_tokenizer):
    whole = tiny_tokenizer.apply_chat_template(
        [{"role": "user", "content": ROWS[0]["question"]}, {"role": "assistant", "content": "Four."}], tokenize=False
    )
    (ids, prompt), _ = response_rows(ROWS, tiny_tokenizer)
    assert whole.startswith(tiny_tokenizer.decode(ids))  # the template's end of the turn is no part of a response
    assert tiny_tokenizer.decode(ids[prompt:]) == "Four."
    cut = response_rows(ROWS, tiny_tokenizer, max_length=prompt + 2)
    assert cut[0] == (ids[: prompt + 2], prompt)
    assert len(response_rows(ROWS, tiny_tokenizer, max_length=prompt)) < 2  # no room for a response: left out
    with pytest.raises(ValueError, match="no rows"):
        response_rows([], tiny_tokenizer)
