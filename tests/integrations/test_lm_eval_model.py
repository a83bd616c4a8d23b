"""The stock lm_eval command, our model type and our own command give the same numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

ROOT = Path(__file__).resolve().parents[2]
TASKS = {
    "choose": """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list: [{metric: acc}, {metric: acc_norm}]""",
    "text": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]""",
    "write": """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": f"{n} and one is", "choices": [f" {n + 1}", f" {n + 2} or so", " no"], "gold": n % 3}
        for n in range(8)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = "task: {}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {}}}}}\ntest_split: test\n"
    for name, body in TASKS.items():
        content = head.format(name, folder / "rows.jsonl") + body + "\nmetadata: {version: 1.0}\n"
        (folder / f"{name}.yaml").write_text(content)
    return folder


@pytest.fixture(scope="module")
def pruned(tiny_model_dir, tmp_path_factory) -> Path:
    from hf_sparse.cli import main

    out = tmp_path_factory.mktemp("models") / "pruned"
    assert main(["prune", str(tiny_model_dir), "--sparsity", "0.5", "--output", str(out), "--json"]) == 0
    assert main(["pack", str(out), "--output", str(out.with_name("packed")), "--json"]) == 0
    return out


def harness(command: list[str], model: str, arguments: str, tasks: Path, output: Path) -> dict:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    words = [
        *command,
        "run",
        "--model",
        model,
        "--model_args",
        *arguments.split(","),
        "--tasks",
        *TASKS,
        "--include_path",
        str(tasks),
    ]
    words += ["--device", "cpu", "--batch_size", "1", "--output_path", str(output)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, cwd=tasks)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(output.rglob("results_*.json")).read_text())["results"]
    return {
        task: {k: v for k, v in row.items() if isinstance(v, float) and "stderr" not in k}
        for task, row in found.items()
    }


@pytest.mark.slow
def test_stock_and_ours_give_the_same_numbers(pruned, tasks, tiny_model_dir, tmp_path):
    from hf_sparse import load_model, load_tokenizer
    from hf_sparse.integrations.lm_eval import evaluate_tasks

    stock = harness(
        [sys.executable, "-m", "lm_eval"], "hf", f"pretrained={pruned},dtype=float32", tasks, tmp_path / "stock"
    )
    own = [sys.executable, "-m", "hf_sparse.cli", "lm-eval"]
    packed = f"pretrained={pruned.with_name('packed')},dtype=float32"
    found = {"packed": harness(own, "hf-sparse", packed, tasks, tmp_path / "packed")}
    drafted = f"{packed},draft={tiny_model_dir},policy=static:3"
    found["drafted"] = harness(own, "hf-sparse", drafted, tasks, tmp_path / "drafted")
    for name, results in found.items():
        for task, row in stock.items():
            assert results[task] == pytest.approx(row), (name, task)
    ours = evaluate_tasks(load_model(str(pruned)), load_tokenizer(str(pruned)), list(TASKS), str(tasks))["results"]
    for task, row in stock.items():
        for metric, value in row.items():
            assert ours[task][metric] == pytest.approx(value, rel=1e-5), (task, metric)


def test_the_type_is_there_after_import_hf_sparse():
    program = (
        "import hf_sparse, lm_eval\nfrom lm_eval.api.registry import get_model\nprint(get_model('hf-sparse').__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stdout.strip().endswith("SparseLM"), done.stderr


def test_errors(pruned):
    from hf_sparse.integrations.lm_eval_model import SparseLM

    with pytest.raises(ValueError, match="batch_size=1"):
        SparseLM(str(pruned), draft=str(pruned), batch_size=4, device="cpu")
    with pytest.raises(ValueError, match="unknown policy 'tapuot'"):
        SparseLM(str(pruned), draft=str(pruned), policy="tapuot", device="cpu")
