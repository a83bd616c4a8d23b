"""``hf-sparse bench speculative`` and the names of policies, as a user meets them."""

import json
from pathlib import Path

import pytest

from hf_sparse.cli import main
from hf_sparse.speculative.policies import POLICIES, parse_policies, parse_policy
from hf_sparse.speculative.rules import SVIP, StaticLength
from hf_sparse.speculative.tapout import TapOut


@pytest.fixture(scope="module")
def models(tiny_model, tiny_tokenizer, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for name, options in (
        ("target", dict(num_hidden_layers=3)),
        ("copy", dict(num_hidden_layers=3)),
        ("other", dict(seed=1)),
    ):
        tiny_model("llama", **options).save_pretrained(folder / name)
        tiny_tokenizer.save_pretrained(folder / name)
        made[name] = folder / name
    return made


@pytest.fixture
def prompts(tmp_path) -> Path:
    file = tmp_path / "prompts.jsonl"
    rows = [{"question": "Why?"}, {"prompt": "Once upon"}, {"messages": [{"role": "user", "content": "Hello"}]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run(capsys, *arguments):
    code = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_job(models, prompts, tmp_path, capsys):
    report, other = tmp_path / "bench.json", tmp_path / "other.txt"
    other.write_text("One line.\nAnother line.\n")
    words = ["bench", "speculative", models["target"], "--drafter", f"same={models['copy']}", models["other"]]
    words += [
        "--prompts",
        prompts,
        f"lines={other}",
        "--policies",
        "static:2-3",
        "tapout",
        "--max-new-tokens",
        12,
        "--max-draft",
        6,
    ]
    code, text, err = run(capsys, *words, "--output", report, "--json")
    assert code == 0, err
    result = json.loads(text)
    assert result == json.loads(report.read_text())
    assert result["texts"] == 5 and result["groups"] == ["prompts"] * 3 + ["lines"] * 2
    runs = result["runs"]
    assert set(runs) == {"target alone"} | {
        f"{d}, {p}" for d in ("same", "other") for p in ("static:2", "static:3", "tapout")
    }
    same = runs["same, static:3"]
    assert same["acceptance"] == 1 and same["mean_accepted_length"] == pytest.approx(4) and same["equal_texts"] == 5
    assert runs["other, static:3"]["acceptance"] < 0.5 and runs["other, static:3"]["equal_texts"] == 5
    assert same["lengths"] == {"3": 15} and set(same["groups"]) == {"prompts", "lines"}
    low, high = same["speed_up_95"]
    assert low <= same["speed_up"] <= high and same["tokens_per_second"] > 0
    assert len(runs["same, tapout"]["learned"]) == 5 and "MaxConfidence(0.8)" in runs["same, tapout"]["learned"][0]


def test_table_and_plot(models, prompts, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    words = ["bench", "speculative", models["target"], "--drafter", models["copy"], "--prompts", prompts, "--limit", 2]
    words += ["--policies", "static:1-2", "svip", "tapout", "--max-new-tokens", 8, "--plot", tmp_path / "plot.png"]
    code, text, err = run(capsys, *words)
    assert code == 0, err
    assert "target alone" in text and "speed-up" in text and "copy, svip" in text.replace("\n", " ")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    code, text, _ = run(capsys, *words[:-4], "--temperature", 0.7, "--max-new-tokens", 4, "--json")
    assert code == 0 and json.loads(text)["runs"]["copy, tapout"]["equal_texts"] is None


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--policies", "statc:3"], "unknown policy 'statc:3'; known are static"),
        (["--policies", "tapuot"], "did you mean 'tapout'?"),
        (["--policies", "static:x"], "after the colon comes a whole number"),
        (["--policies", "tapout:3"], "tapout takes no number"),
        (["--policies", "static:2", "static:1-3"], "policy static:2 is given twice"),
        (["--max-new-tokens", 0], "--max-new-tokens is at least 1"),
        (["--temperature", -1], "0 (greedy) or more"),
        (["--prompts", "no.jsonl"], "no such file: no.jsonl"),
        (["--drafter", "=x"], "NAME=PATH or PATH is expected"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(more, said, models, prompts, capsys, monkeypatch):
    import hf_sparse.loading

    monkeypatch.setattr(hf_sparse.loading, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    words = ["bench", "speculative", models["target"], "--drafter", models["copy"], "--prompts", prompts]
    code, _, err = run(capsys, *words, *more)
    assert code == 2 and said in err


def test_prompts_that_are_none(models, tmp_path, capsys):
    for content, said in (
        ("", "has no prompts"),
        ('{"x": 1}\n', "the row has x"),
        ("no json\n", "line 1: not a JSON object"),
    ):
        file = tmp_path / "bad.jsonl"
        file.write_text(content)
        code, _, err = run(
            capsys, "bench", "speculative", models["target"], "--drafter", models["copy"], "--prompts", file
        )
        assert code == 2 and said in err


def test_policies_by_name(tmp_path):
    assert parse_policy("static:40").max_draft == 40 and parse_policy("static:3") == StaticLength(3)
    assert parse_policy("svip:0.5", 8) == SVIP(0.5, max_draft=8)
    assert list(parse_policies(["static:1-3", "adaedl"])) == ["static:1", "static:2", "static:3", "adaedl"]
    for name in POLICIES:
        assert parse_policy(name, 9).max_draft == 9
    policy = TapOut(max_draft=5)
    policy.save(tmp_path / "learned.json")
    assert parse_policy(str(tmp_path / "learned.json")).to_dict() == policy.to_dict()
