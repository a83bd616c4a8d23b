"""Self-data distillation end to end: a scripted teacher behind a server, crashes, and TRL as the consumer."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

datasets = pytest.importorskip("datasets")

from hf_sparse.distillation.answers import passes_tests  # noqa: E402
from hf_sparse.distillation.rows import row_reader  # noqa: E402
from hf_sparse.distillation.self_data import self_distill, verdict  # noqa: E402
from hf_sparse.distillation.templates import load_template  # noqa: E402

GSM = [
    {"question": "2 and 2?", "answer": "2+2=<<2+2=4>>4\n#### 4"},
    {"question": "3 and 3?", "answer": "3+3=<<3+3=6>>6\n#### 6"},
    {"question": "4 and 4?", "answer": "4+4=<<4+4=8>>8\n#### 8"},
    {"question": "5 and 5?", "answer": "5+5=<<5+5=10>>10\n#### 10"},
    {"question": "6 and 6?", "answer": "6+6=<<6+6=12>>12\n#### 12"},
]
SCRIPT = {
    "2 and 2?": ("Two twos make four. The answer is 4.", "stop"),
    "3 and 3?": ("That is seven. The answer is 7.", "stop"),
    "4 and 4?": ("As the known solution says, 8.", "stop"),
    "5 and 5?": ("Well, five and five and", "length"),
    "6 and 6?": ("I cannot say.", "stop"),
}


@pytest.fixture
def teacher(server, said):
    def scripted(content, number):
        user = next(turn["content"] for turn in content["messages"] if turn["role"] == "user")
        return said(*SCRIPT[user.partition("\n")[0]])

    with server(scripted) as (url, seen):
        yield url, seen


def test_a_response_is_taken_or_the_reference_stays_and_each_row_says_why(teacher):
    url, seen = teacher
    result = self_distill(url, datasets.Dataset.from_list(GSM), template="math", extractor="number", progress=False)
    assert [row["prompt"][-1]["content"] for row in result] == [row["question"] for row in GSM]
    assert result["source"] == ["model", "reference", "reference", "reference", "reference"]
    assert result["reason"] == ["", "another answer", "says 'known solution'", "cut off", "no answer"]
    texts = [row["completion"][0]["content"] for row in result]
    assert texts[0] == "Let us work it out step by step. Two twos make four. The answer is 4."
    assert texts[1] == "3+3=6\n#### 6"  # the reference, without its calculator notes
    assert all(row["completion"][0]["role"] == "assistant" for row in result)
    assert set(result["model"]) == {url} and json.loads(result["settings"][0])["extractor"] == "number"
    # the teacher was shown the reference; what is trained on never is
    assert all("#### " in str(content["messages"]) for content in seen)
    assert not any("####" in json.dumps(row["prompt"]) for row in result)


def test_without_an_extractor_any_whole_answer_is_taken(teacher):
    result = self_distill(teacher[0], datasets.Dataset.from_list(GSM), progress=False)
    assert result["source"] == ["model", "model", "reference", "reference", "model"]


def test_code_is_checked_by_its_tests(server, said):
    rows = [{"prompt": "add", "completion": "def add(a, b): return a + b", "test": "assert add(1, 2) == 3"}] * 2
    answers = iter(
        ["```python\ndef add(a, b):\n    return b + a\n```", "```python\ndef add(a, b):\n    return b - a\n```"]
    )
    with server(lambda content, number: said(next(answers))) as (url, _):
        check = lambda response, row: passes_tests(response, row["test"])  # noqa: E731
        result = self_distill(
            url, datasets.Dataset.from_list(rows), template="code", check=check, progress=False, requests_in_flight=1
        )
    assert sorted(result["reason"]) == ["", "fails its check"]


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("The REFERENCE ANSWER is 4", "says 'reference answer'"),
        ("Your turn: 4", "begins with 'Your turn'"),
        ("It is now your turn, 4", None),
        ("  ", "empty"),
        ("4", None),
    ],
)
def test_what_gives_a_rewritten_answer_away(response, reason):
    assert verdict(response, "4") == reason


def test_a_reference_without_an_answer_stays():
    from hf_sparse.distillation.answers import number

    assert verdict("4", "four", extractor=number) == "the reference gives no answer"


# ------------------------------------------------------------------------------------------------------ rows, templates


@pytest.mark.parametrize(
    ("row", "prompt", "response"),
    [
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, "Add.\n\n1 2", "3"),
        ({"instruction": "Say hi.", "input": "", "output": "hi"}, "Say hi.", "hi"),
        (
            {"instruction": "Sum up.", "context": "A b c.", "response": "abc", "category": "x"},
            "Sum up.\n\nA b c.",
            "abc",
        ),
        ({"question": "q?", "answer": "a"}, "q?", "a"),
        ({"prompt": "p", "completion": " c "}, "p", "c"),
        (
            {"prompt": [{"role": "user", "content": "p"}], "completion": [{"role": "assistant", "content": "c"}]},
            "p",
            "c",
        ),
        ({"problem": "p", "solution": "s"}, "p", "s"),
    ],
)
def test_forms_of_rows(row, prompt, response):
    assert row_reader(row)(row) == ([{"role": "user", "content": prompt}], response)


def test_chats_keep_their_earlier_turns():
    turns = [("system", "Be brief."), ("human", "hi"), ("gpt", "hello"), ("human", "bye"), ("gpt", "ciao")]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    prompt, response = row_reader(row)(row)
    assert [turn["role"] for turn in prompt] == ["system", "user", "assistant", "user"] and response == "ciao"
    chat = load_template("instruction").messages(prompt, response)
    assert [turn["role"] for turn in chat] == ["system", "user", "assistant", "user"]
    assert chat[0]["content"].startswith("Be brief.\n\n") and chat[1]["content"] == "hi"
    assert "bye" in chat[-1]["content"] and "ciao" in chat[-1]["content"]


def test_bad_rows_and_columns():
    with pytest.raises(ValueError, match="cannot tell which of the columns x, y"):
        row_reader(["x", "y"])
    with pytest.raises(ValueError, match="no column 'z'"):
        row_reader(["x", "y"], {"prompt": "x", "response": "z"})
    assert row_reader(["x", "y"], {"prompt": "x", "response": "y"})({"x": "a", "y": "b"})[1] == "b"
    for row in ({"question": "", "answer": "a"}, {"question": "q", "answer": ""}, {"question": "q", "answer": None}):
        with pytest.raises(ValueError, match="not empty"):
            row_reader(row)(row)
    data = datasets.Dataset.from_list([{"question": "q", "answer": "a"}, {"question": "q", "answer": " "}])
    with pytest.raises(ValueError, match="row 1: a response"):
        self_distill("http://nowhere", data, progress=False)
    with pytest.raises(ValueError, match="unknown extractor 'numbers'; known are number"):
        self_distill("http://nowhere", data, extractor="numbers", progress=False)


def test_without_a_template_the_model_answers_for_itself(server, said, tiny_tokenizer):
    import datasets

    rows = datasets.Dataset.from_list([{"question": "Why?", "answer": "Because."}])
    with server(lambda request, number: said("So.")) as (url, seen):
        result = self_distill(url, rows, template=None, progress=False)
    assert seen[0]["messages"] == [{"role": "user", "content": "Why?"}]
    assert result[0]["completion"][0]["content"] == "So." and '"template": "answer"' in result[0]["settings"]


def test_templates_are_files_that_a_user_can_replace(tmp_path):
    prompt = [{"role": "user", "content": "What is {reference}?"}]  # braces in the data are data
    chat = load_template("math").messages(prompt, "forty-two {prompt}")
    assert chat[-1]["role"] == "assistant" and chat[0]["role"] == "system"
    assert "What is {reference}?" in chat[1]["content"] and "forty-two {prompt}" in chat[1]["content"]
    own = tmp_path / "own.txt"
    own.write_text("[user]\n{prompt} ({level}) -> {reference}\n")
    assert load_template(own).messages(prompt[:0] + [{"role": "user", "content": "p"}], "r", {"level": "easy"}) == [
        {"role": "user", "content": "p (easy) -> r"}
    ]
    with pytest.raises(KeyError, match="asks for {level}"):
        load_template(own).messages(prompt, "r", {})
    own.write_text("[user]\n{prompt}\n")
    with pytest.raises(ValueError, match=r"must have \{reference\}"):
        load_template(own)
    own.write_text("hello\n[user]\n{prompt}{reference}")
    with pytest.raises(ValueError, match="outside its sections"):
        load_template(own)
    with pytest.raises(FileNotFoundError, match="did you mean 'math'"):
        load_template("maths")


# -------------------------------------------------------------------------------------------------------------- crashes

WORKER = """
import sys, time
import datasets
from hf_sparse.distillation.self_data import self_distill

rows = [{"question": f"{i} and {i}?", "answer": f"#### {2 * i}"} for i in range(40)]
check = lambda response, row: time.sleep(0.05) or True
result = self_distill(sys.argv[1], datasets.Dataset.from_list(rows), template="question", extractor="number", check=check,
                      output_dir=sys.argv[2], progress=False, requests_in_flight=2)
result.to_json(sys.argv[3])
"""


@pytest.fixture
def doubled(server, said):
    def double(content, number):
        value = int(re.match(r"\d+", content["messages"][-1]["content"])[0])
        return said(f"The answer is {2 * value}.")

    with server(double) as (url, seen):
        yield url, seen


def run_worker(url, *paths, **environment):
    code = [sys.executable, "-c", WORKER, url, *map(str, paths)]
    return subprocess.Popen(code, env=os.environ | environment, stderr=subprocess.PIPE)


def lines(folder):
    return [line for file in folder.glob("rows-*.jsonl") for line in file.read_text().splitlines()]


def test_a_killed_run_goes_on_and_no_row_is_lost_or_doubled(doubled, tmp_path):
    url, seen = doubled
    worker = run_worker(url, tmp_path / "rows", tmp_path / "a.json")
    deadline = time.time() + 60
    while (not (tmp_path / "rows").is_dir() or len(lines(tmp_path / "rows")) < 5) and time.time() < deadline:
        time.sleep(0.02)
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    before = len(lines(tmp_path / "rows"))
    assert 5 <= before < 40
    with open(tmp_path / "rows" / "rows-00000.jsonl", "a") as file:
        file.write('{"index": 39, "pro')  # what a kill in the midst of a write leaves
    asked = len(seen)
    worker = run_worker(url, tmp_path / "rows", tmp_path / "b.json")
    assert worker.wait(60) == 0, worker.stderr.read().decode()
    assert len(seen) - asked == 40 - before  # nothing done was asked for again
    again = run_worker(url, tmp_path / "fresh", tmp_path / "c.json")
    assert again.wait(60) == 0
    kept = [json.loads(line)["index"] for line in lines(tmp_path / "rows")]
    assert sorted(kept) == list(range(40))
    assert (tmp_path / "b.json").read_text() == (tmp_path / "c.json").read_text().replace("fresh", "rows")


def test_processes_share_the_rows(doubled, tmp_path):
    pytest.importorskip("accelerate")
    url, seen = doubled
    port = str(29500 + os.getpid() % 1000)
    together = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, ACCELERATE_USE_CPU="1")
    workers = [
        run_worker(url, tmp_path / "rows", tmp_path / f"{rank}.json", RANK=str(rank), LOCAL_RANK=str(rank), **together)
        for rank in range(2)
    ]
    for worker in workers:
        assert worker.wait(120) == 0, worker.stderr.read().decode()[-2000:]
    assert len(seen) == 40
    assert sorted(file.name for file in (tmp_path / "rows").glob("rows-*")) == ["rows-00000.jsonl", "rows-00001.jsonl"]
    assert (tmp_path / "0.json").read_text() == (tmp_path / "1.json").read_text()
    assert len((tmp_path / "0.json").read_text().splitlines()) == 40


def test_rows_of_another_run_are_not_mixed_in(teacher, tmp_path):
    data = datasets.Dataset.from_list(GSM)
    options = dict(template="math", extractor="number", progress=False)
    first = self_distill(teacher[0], data, output_dir=tmp_path / "rows", **options)
    asked = len(teacher[1])
    assert self_distill(teacher[0], data, output_dir=tmp_path / "rows", **options).to_list() == first.to_list()
    assert len(teacher[1]) == asked
    with pytest.raises(ValueError, match="another run: its settings differ"):
        self_distill(teacher[0], data, output_dir=tmp_path / "rows", **options | {"max_new_tokens": 7})
    with pytest.raises(ValueError, match="data and template differ"):
        self_distill(teacher[0], data.select([1, 0]), output_dir=tmp_path / "rows", **options)


def test_trl_trains_on_the_completion_alone(teacher, tiny_llama, tiny_tokenizer, tmp_path):
    """The reference of a row whose rewritten answer was taken is nowhere in what SFTTrainer trains on."""
    trl = pytest.importorskip("trl")
    rows = [dict(row, answer=row["answer"] + " (zebra)") for row in GSM[:1]]
    data = self_distill(
        teacher[0], datasets.Dataset.from_list(rows), template="math", extractor="number", progress=False
    )
    assert data["source"] == ["model"]
    arguments = trl.SFTConfig(str(tmp_path), max_steps=1, per_device_train_batch_size=1, report_to=[], use_cpu=True)
    trainer = trl.SFTTrainer(tiny_llama, arguments, train_dataset=data, processing_class=tiny_tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    whole = tiny_tokenizer.decode(batch["input_ids"][0])
    labels = batch["labels"][0]
    trained = tiny_tokenizer.decode(batch["input_ids"][0][labels != -100])
    assert "zebra" not in whole and "2 and 2?" in whole
    assert "2 and 2?" not in trained and "Two twos make four. The answer is 4." in trained
    trainer.train()
