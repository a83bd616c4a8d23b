"""``hf-sparse distill``, ``merge`` and ``recovery`` as a user meets them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_sparse.cli import main

ROOT = Path(__file__).resolve().parents[2]


def run(capsys, *arguments):
    """(exit code, standard output, standard error)"""
    code = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def sums(tmp_path) -> Path:
    file = tmp_path / "sums.jsonl"
    rows = [
        {"question": f"What is {n} plus 1?", "answer": f"{n} + 1 = <<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"}
        for n in range(6)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def rows_of(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "train.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------------ distill


def test_rows_come_back_with_their_provenance(server, said, sums, tmp_path, capsys):
    """Three of the six answers are right: those are taken, the others stay the reference's."""

    def answer(request, number):
        n = int(str(request["messages"]).split("What is ")[1].split(" ")[0])
        return said(f"It is {n + 1 if n % 2 else 100}.")

    out = tmp_path / "out"
    with server(answer) as (url, seen):
        code, text, err = run(
            capsys,
            "distill",
            url,
            sums,
            "--template",
            "rewrite_math",
            "--extractor",
            "number",
            "--output",
            out,
            "--json",
        )
    assert code == 0, err
    result = json.loads(text)
    assert result["rows"] == 6 and result["taken"] == 3 and result["reasons"] == {"taken": 3, "another answer": 3}
    assert len(seen) == 6 and all(
        "####" in str(request["messages"]) for request in seen
    )  # the reference is shown to the model
    rows = rows_of(out)
    assert [row["source"] for row in rows] == ["reference", "model"] * 3
    assert (
        rows[1]["completion"][0]["content"] == "It is 2." and rows[0]["completion"][0]["content"] == "0 + 1 = 1\n#### 1"
    )
    assert rows[1]["prompt"] == [{"role": "user", "content": "What is 1 plus 1?"}]  # and never in what is trained on
    report = json.loads((out / "self_data_report.json").read_text())
    assert (
        report["tokens"] == 42
        and report["command"].startswith("hf-sparse distill ")
        and report["dataset"] == "sums.jsonl"
    )
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_model_here_answers_and_trl_reads_the_rows(tiny_model_dir, sums, tmp_path, capsys):
    import datasets

    out = tmp_path / "out"
    code, text, err = run(capsys, "distill", tiny_model_dir, sums, "--limit", 3, "--max-new-tokens", 4, "--output", out)
    assert code == 0, err
    assert "the reference: cut off" in text and "tokens/s" in text
    loaded = datasets.Dataset.from_list(rows_of(out))
    assert len(loaded) == 3 and {"prompt", "completion", "source", "reason", "settings"} <= set(loaded.column_names)


def test_a_killed_run_goes_on(server, said, sums, tmp_path, capsys):
    """SIGKILL in the middle; the same command with --resume asks only for what is missing."""
    out, progress = tmp_path / "out", tmp_path / ".out.progress"

    pause = [0.3]

    def slow(request, number):
        time.sleep(pause[0] * number)
        return said("1")

    with server(slow) as (url, seen):
        words = ["distill", url, str(sums), "--output", str(out), "--requests-in-flight", "1"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, "-m", "hf_sparse.cli", *words], env=environment, stderr=subprocess.DEVNULL
        )
        file = progress / "rows-00000.jsonl"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (file.is_file() and file.read_text().count("\n") >= 2):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        done = [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        assert 2 <= len(done) < 6 and not out.exists()
        code, _, err = run(capsys, *words)
        assert code == 2 and "an earlier run" in err
        pause[0], asked = 0, len(seen)
        code, _, err = run(capsys, *words, "--resume")
    assert code == 0, err
    assert len(seen) - asked == 6 - len(done) and len(rows_of(out)) == 6 and not progress.exists()


def test_files_of_other_kinds(server, said, tmp_path, capsys):
    csv, listed = tmp_path / "rows.csv", tmp_path / "rows.json"
    csv.write_text("q,a\nwho?,me\nwhy?,so\n")
    listed.write_text(json.dumps([{"q": "who?", "a": "me"}, {"q": "why?", "a": "so"}]))
    with server(lambda request, number: said("well")) as (url, _):
        for file in (csv, listed):
            out = tmp_path / file.suffix[1:]
            columns = ("--columns", "prompt=q", "response=a")
            assert run(capsys, "distill", url, file, *columns, "--output", out)[0] == 0
            assert [row["prompt"][0]["content"] for row in rows_of(out)] == ["who?", "why?"]


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--template", "mth"], "did you mean 'math'?"),
        (["--extractor", "num"], "known are number, choice, yes_no, exact"),
        (["--columns", "prompt=q", "response=answer"], "no column 'q'; it has question, answer"),
        (["--columns", "question", "answer"], "--columns takes prompt=COLUMN response=COLUMN"),
        (["--tests", "test"], "has the columns question, answer"),
        (["--limit", 0], "at least 1; got 0"),
        (["--temperature", -1], "0 (greedy) or more"),
        (["--top-p", 0], "lies in (0, 1]"),
        (["--max-new-tokens", 0], "--max-new-tokens is at least 1"),
        (["--backend", "server"], "a server is given by its address"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(
    flags, said, tiny_model_dir, sums, tmp_path, capsys, monkeypatch
):
    import hf_sparse.loading

    monkeypatch.setattr(hf_sparse.loading, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    code, _, err = run(capsys, "distill", tiny_model_dir, sums, "--output", tmp_path / "out", *flags)
    assert code == 2 and said in err and not (tmp_path / "out").exists()


def test_a_dataset_that_is_none(tiny_model_dir, tmp_path, capsys):
    broken, empty = tmp_path / "broken.jsonl", tmp_path / "empty.jsonl"
    broken.write_text('{"question": "a", "answer": "b"}\nno json\n')
    empty.write_text("")
    for file, what in (
        (broken, "line 2: not a JSON object"),
        (empty, "is empty"),
        (tmp_path / "no.jsonl", "no such file"),
    ):
        code, _, err = run(capsys, "distill", tiny_model_dir, file, "--output", tmp_path / "out")
        assert code == 2 and what in err
    code, _, err = run(capsys, "distill", broken, tiny_model_dir, "--output", tmp_path / "out")
    assert code == 2 and "MODEL comes first" in err


# ----------------------------------------------------------------------------------------------------- merge, recovery


@pytest.fixture(scope="module")
def siblings(tiny_model, tiny_tokenizer, tmp_path_factory) -> list[Path]:
    import torch

    made = []
    for seed in range(3):
        directory = tmp_path_factory.mktemp("siblings") / f"model-{seed}"
        model = tiny_model("llama")
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.data.add_(0.02 * seed * torch.randn_like(parameter))
        model.save_pretrained(directory), tiny_tokenizer.save_pretrained(directory)
        made.append(directory)
    return made


def test_merge(siblings, tmp_path, capsys):
    from safetensors.torch import load_file

    out = tmp_path / "merged"
    code, text, err = run(
        capsys, "merge", *siblings[:2], "--method", "lerp", "--weights", 1, 3, "--output", out, "--json"
    )
    assert code == 0, err
    assert json.loads(text)["weights"] == [0.25, 0.75]
    a, b, merged = (load_file(path / "model.safetensors") for path in (*siblings[:2], out))
    for name, tensor in merged.items():
        assert tensor.sub(0.25 * a[name] + 0.75 * b[name]).abs().max() < 1e-6
    code, text, err = run(
        capsys, "merge", *siblings[1:], "--method", "task-slerp", "--base", siblings[0], "--output", tmp_path / "b"
    )
    assert code == 0 and "turned on a sphere" in text.replace("\n", " ")
    code, _, err = run(capsys, "merge", *siblings, "--method", "task-slerp", "--output", tmp_path / "c")
    assert code == 2 and "give base" in err and not (tmp_path / "c").exists()


def test_recovery(siblings, sums, evaluation_file, tmp_path, capsys):
    from hf_sparse import load_model, load_tokenizer, perplexity
    from hf_sparse.data import load_tokens

    report, flags = tmp_path / "report.json", ("--sequence-length", 64, "--max-windows", 3, "--text", evaluation_file)
    original, same, other = siblings[0], f"same={siblings[0]}", f"other={siblings[2]}"
    responses = ("--responses", f"sums={sums}")
    code, text, err = run(capsys, "recovery", original, same, other, *flags, *responses, "--output", report, "--json")
    assert code == 0, err
    result = json.loads(text)
    assert result == json.loads(report.read_text()) and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    name = evaluation_file.stem
    same, other = (result["models"][label]["measures"] for label in ("same", "other"))
    assert same[name]["recovery_percent"] == pytest.approx(100) and same["KL: sums"]["value"] == pytest.approx(
        0, abs=1e-6
    )
    assert other["KL: sums"]["value"] > 0.001 and other["KL: sums"]["items"] == 6
    tokenizer = load_tokenizer(str(siblings[2]))
    expected = perplexity(load_model(str(siblings[2])), load_tokens(str(evaluation_file), tokenizer), 64, 3)
    assert other[name]["value"] == pytest.approx(expected["perplexity"], rel=1e-5)
    pytest.importorskip("matplotlib")
    code, text, _ = run(capsys, "recovery", original, siblings[2], *flags, "--plot", tmp_path / "plot.png")
    assert code == 0 and "model-2" in text and (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_recovery_goes_on_with_the_models_that_are_missing(siblings, evaluation_file, tmp_path, capsys, monkeypatch):
    import hf_sparse.integrations.assessment as assessment

    words = ["recovery", siblings[0], siblings[1], siblings[2], "--text", evaluation_file, "--sequence-length", 64]
    words += ["--max-windows", 2, "--output", tmp_path / "report.json"]
    assess, calls = assessment.assess, []

    def interrupted(model, *arguments, **options):
        calls.append(model)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return assess(model, *arguments, **options)

    monkeypatch.setattr(assessment, "assess", interrupted)
    code, _, err = run(capsys, *words)
    assert code == 130 and "finished models are kept" in err and not (tmp_path / "report.json").exists()
    assert run(capsys, *words)[0] == 2
    code, _, err = run(capsys, *words, "--limit", 5, "--resume")
    assert code == 2 and "other arguments" in err
    code, text, err = run(capsys, *words, "--resume", "--json")
    assert code == 0, err
    assert len(calls) == 4 and set(json.loads(text)["models"]) == {"model-1", "model-2"}


def test_recovery_errors(siblings, sums, evaluation_file, tmp_path, capsys):
    for words, said in (
        ([f"a={siblings[1]}"], "give --text FILE, --tasks NAMES, --responses FILE"),
        ([f"a={siblings[1]}", f"a={siblings[2]}", "--text", evaluation_file], "two models are called a"),
        ([tmp_path / "nothing", "--text", evaluation_file], "no such directory"),
        ([siblings[1], "--text", tmp_path / "no.txt"], "no such file"),
        ([siblings[1], "--responses", "=x"], "responses are given as NAME=PATH"),
        ([siblings[1], "--text", evaluation_file, "--output", tmp_path / "a" / "b.json"], "no such directory"),
    ):
        code, _, err = run(capsys, "recovery", siblings[0], *words)
        assert code == 2 and said in err, err
