"""``hf-sparse prune --pattern expert`` as a user meets it: a mix of domains, rankings in and out, every kind of bad input."""

import json
from pathlib import Path

import pytest
import torch

from hf_sparse.cli import main

EXPERTS = 8


@pytest.fixture(scope="module")
def moe(tiny_model, tiny_tokenizer, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny-moe"
    tiny_model("qwen3_moe", num_experts=EXPERTS).save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def domains(tmp_path_factory, calibration_file) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("domains")
    code = directory / "code.txt"
    code.write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    math = directory / "math.jsonl"
    lines = [{"text": f"The sum of {i} and {i * i} is {i + i * i}."} for i in range(200)]
    math.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return {"code": code, "math": math, "prose": calibration_file}


def run(capsys, *arguments):
    """(exit code, standard output, standard error)"""
    code = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def prune_words(model, domains, output, *more, names=("code", "math")):
    data = ("--calibration", *(f"{name}={domains[name]}" for name in names), "--samples", 5, "--sequence-length", 32)
    return ("prune", model, "--pattern", "expert", *data, "--output", output, *more)


def test_the_job(moe, domains, evaluation_file, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    from hf_sparse import ExpertScores, load_model, load_segments, load_tokenizer, prune_experts, score_experts

    out = tmp_path / "pruned"
    code, text, err = run(capsys, *prune_words(moe, domains, out, "--sparsity", 0.5, "--json"))
    assert code == 0, err
    result = json.loads(text)
    assert {"README.md", "expert_report.json", "expert_scores.jsonl", "expert_scores.code.jsonl", "tokenizer.json"} <= {
        file.name for file in out.iterdir()
    }
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]

    model, tokenizer = load_model(str(moe)), load_tokenizer(str(moe))
    by_hand = {
        name: score_experts(model, load_segments(str(domains[name]), tokenizer, samples, 32).ids)
        for name, samples in (("code", 3), ("math", 2))
    }
    report = prune_experts(model, by_hand["code"] + by_hand["math"], 0.5)
    assert result["kept"] == report.kept and result["experts_before"] == dict.fromkeys(report.kept, EXPERTS)
    saved = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(saved(ids).logits, model(ids).logits)
    for name, statistics in by_hand["code"].statistics.items():
        stored = ExpertScores.load(out / "expert_scores.code.jsonl").statistics[name]
        assert all(torch.equal(stored[key], value) for key, value in statistics.items())

    rows = {row["domain"]: row for row in result["retention"]}
    assert list(rows) == ["code", "math"] and rows["code"]["tokens"] == 96 and rows["math"]["tokens"] == 64
    first, kept = by_hand["code"].statistics, report.kept
    share = [float(first[name]["gate"][kept[name]].sum() / first[name]["gate"].sum()) for name in kept]
    assert rows["code"]["routed_mass"] == pytest.approx(sum(share) / 2)
    stored = json.loads((out / "expert_report.json").read_text())
    assert stored["retention"] == result["retention"] and stored["calibration"]["math"]["samples"] == 2
    card = (out / "README.md").read_text()
    assert f"with {EXPERTS} of {2 * EXPERTS} experts" in card and "| math | 64 |" in card and "2510.13999" in card
    assert "Calibration for math: 2 segments of 32 tokens of math.jsonl" in card and "import hf_sparse" not in card
    config = json.loads((out / "config.json").read_text())
    assert config["num_experts"] == EXPERTS // 2
    assert config["hf_sparse_experts"]["kept"] == report.kept
    assert config["hf_sparse_experts"]["provenance"]["command"].startswith("hf-sparse prune ")

    limits = ("--sequence-length", 64, "--max-windows", 2, "--json")
    code, text, _ = run(capsys, "eval", out, "--text", evaluation_file, *limits)
    assert code == 0 and json.loads(text)["perplexity"] > 1
    code, text, _ = run(capsys, "inspect", out, "--json")
    seen = json.loads(text)
    assert code == 0 and seen["sparsity"] == 0 and seen["total_parameters"] == result["parameters_after"]
    assert seen["total_parameters"] == sum(p.numel() for p in saved.parameters())


def test_any_sparsity_from_one_calibration(moe, domains, tmp_path, capsys):
    """Scores written by one run are read by the next, domain by domain, for another amount and another saliency."""
    first, second, third = (tmp_path / name for name in "abc")
    assert run(capsys, *prune_words(moe, domains, first, "--sparsity", 0.25))[0] == 0
    files = [f"{name}={first / f'expert_scores.{name}.jsonl'}" for name in ("code", "math")]
    words = ("prune", moe, "--pattern", "expert", "--scores", *files, "--keep", 3, "--output", second, "--json")
    code, text, err = run(capsys, *words)
    assert code == 0, err
    again = json.loads(text)
    assert {len(kept) for kept in again["kept"].values()} == {3} and again["scores"] == [Path(f).name for f in files]
    code, text, _ = run(capsys, *prune_words(moe, domains, third, "--keep", 3, "--saliency", "frequency", "--json"))
    measured = json.loads(text)
    assert code == 0 and measured["saliency"] == "frequency"
    words = (*words[:-3], "--saliency", "frequency", "--output", tmp_path / "d", "--json")
    read = json.loads(run(capsys, *words)[1])
    assert read["kept"] == measured["kept"] and read["retention"] == measured["retention"]
    assert again["retention"] != read["retention"]


def test_the_rest_is_pruned_afterwards(moe, domains, tmp_path, capsys):
    """Experts first, then 2:4 zeros in what is left, then packed: each command takes the result of the one before."""
    from transformers import AutoModelForCausalLM

    experts, zeros, packed = (tmp_path / name for name in ("experts", "zeros", "packed"))
    assert run(capsys, *prune_words(moe, domains, experts))[0] == 0
    words = ("--saliency", "wanda", "--pattern", "2:4", "--calibration", domains["code"])
    code, text, err = run(
        capsys, "prune", experts, *words, "--samples", 4, "--sequence-length", 32, "--output", zeros, "--json"
    )
    assert code == 0 and json.loads(text)["two_four"], err
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (experts, zeros))
    assert after.config.num_experts == EXPERTS // 2 and after.config.hf_sparse_experts["saliency"] == "reap"
    weights, sparse = (model.model.layers[0].mlp.experts.gate_up_proj for model in (before, after))
    assert weights.shape == sparse.shape and (sparse == 0).float().mean() == 0.5
    assert torch.equal(sparse, weights * (sparse != 0))
    assert torch.equal(before.model.layers[0].mlp.gate.weight, after.model.layers[0].mlp.gate.weight)
    assert run(capsys, "pack", zeros, "--output", packed)[0] == 0
    assert json.loads(run(capsys, "inspect", packed, "--json")[1])["two_four"]
    words = ("--pattern", "expert", "--keep", 2, "--scores", experts / "expert_scores.jsonl")
    code, _, err = run(capsys, "prune", zeros, *words, "--output", tmp_path / "more")
    assert code == 2 and "4 experts, but 8 scores" in err  # rankings are of the model they were made of


def test_one_text_without_a_domain_is_warned_about(moe, domains, tmp_path, capsys):
    words = ("--samples", 2, "--sequence-length", 32, "--output")
    plain = ("prune", moe, "--pattern", "expert", "--calibration", domains["prose"], *words, tmp_path / "a")
    code, shown, _ = run(capsys, *plain)
    shown = " ".join(shown.split())
    assert code == 0 and "mix the domains you need" in shown and "arXiv 2510.13999" in shown
    assert "4 of 8 experts stay in each of 2 layers (reap, uniform)" in shown and "routed mass" in shown
    assert not list((tmp_path / "a").glob("expert_scores.*.jsonl"))
    named = (f"prose={word}" if word == domains["prose"] else word for word in plain[:-1])
    code, shown, _ = run(capsys, *named, tmp_path / "b")
    assert code == 0 and "mix the domains" not in shown and "prose" in shown


def test_experts_never_routed_to_are_told(moe, domains, tmp_path, capsys):
    words = ("--samples", 1, "--sequence-length", 2, "--output", tmp_path / "out", "--json")
    code, text, _ = run(capsys, "prune", moe, "--pattern", "expert", "--calibration", f"code={domains['code']}", *words)
    result = json.loads(text)  # two tokens, two experts each: at most four of a layer's eight are seen
    assert code == 0 and result["retention"][0]["never_routed"] >= 8
    assert any(
        f"{result['retention'][0]['never_routed']} of 16 experts were sent no token" in n for n in result["notes"]
    )


def test_a_domain_may_have_a_number_of_its_own(moe, domains, tmp_path, capsys):
    entries = (f"code:3={domains['code']}", f"math={domains['math']}", f"prose={domains['prose']}")
    words = ("--samples", 5, "--sequence-length", 16, "--output", tmp_path / "out", "--json")
    code, text, err = run(capsys, "prune", moe, "--pattern", "expert", "--calibration", *entries, *words)
    assert code == 0, err
    assert {d: c["samples"] for d, c in json.loads(text)["calibration"].items()} == {"code": 3, "math": 3, "prose": 2}


def test_super_experts_stay(moe, tmp_path, capsys):
    """The worst-ranked expert of the first layer has a huge activation: 50 is above a tenth of the largest and all others."""
    header = {"format": "hf_sparse expert scores", "saliency": "reap", "tokens": 100}
    lines = [
        {"layer": f"model.layers.{layer}.mlp", "expert": expert, "count": 10, "gate": 1, "norm": 1, "gated": 8 - expert}
        | {"peak": 50 if (layer, expert) == (0, 7) else 1}
        for layer in (0, 1)
        for expert in range(8)
    ]
    (tmp_path / "scores.jsonl").write_text("\n".join(map(json.dumps, [header, *lines])))
    words = ("prune", moe, "--pattern", "expert", "--scores", tmp_path / "scores.jsonl", "--json", "--overwrite")
    kept = {}
    for flag in ((), ("--keep-super",)):
        code, text, err = run(capsys, *words, *flag, "--output", tmp_path / "out")
        assert code == 0, err
        kept[flag] = list(json.loads(text)["kept"].values())
    assert kept[()] == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert kept[("--keep-super",)] == [[0, 1, 2, 7], [0, 1, 2, 3]]


def test_random_needs_no_data(moe, tmp_path, capsys):
    kept = []
    for seed in (0, 0, 1):
        words = ("--saliency", "random", "--seed", seed, "--output", tmp_path / "out", "--overwrite", "--json")
        code, text, err = run(capsys, "prune", moe, "--pattern", "expert", *words)
        assert code == 0, err
        kept.append(json.loads(text)["kept"])
    assert kept[0] == kept[1] != kept[2] and json.loads(text)["retention"] == []


def test_an_interrupted_run_continues(moe, domains, tmp_path, capsys, monkeypatch):
    import hf_sparse.pruning.expert_scores as module

    out, score, calls = tmp_path / "out", module._score_layer, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:  # the second layer of the second domain
            raise KeyboardInterrupt
        return score(*arguments, **options)

    monkeypatch.setattr(module, "_score_layer", interrupted)
    words = prune_words(moe, domains, out, "--json")
    code, _, err = run(capsys, *words)
    assert code == 130 and "--resume" in err and not out.exists()
    code, _, err = run(capsys, *words)
    assert code == 2 and "continue it with --resume" in err
    code, text, err = run(capsys, *words, "--resume")
    assert code == 0, err
    assert len(calls) == 5 and [path.name for path in tmp_path.iterdir()] == ["out"]
    whole = run(capsys, *prune_words(moe, domains, tmp_path / "whole", "--json"))[1]
    assert json.loads(text)["retention"] == json.loads(whole)["retention"]


def test_a_save_that_fails_leaves_nothing_half_written(moe, domains, tmp_path, capsys, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    words = prune_words(moe, domains, tmp_path / "out")
    code, _, err = run(capsys, *words)
    assert code == 1 and "space" in err and "--resume" in err and not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert run(capsys, *words, "--resume")[0] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--sparsity": 50}, "did you mean 0.5"),
        ({"--sparsity": 1}, "lies in [0, 1)"),
        ({"--sparsity": 0.9}, "needs at least 2 experts (every token goes to 2 of them)"),
        ({"--keep": 1}, "needs at least 2 experts"),
        ({"--keep": 0}, "at least 1; got 0"),
        ({"--keep": 9}, "from 1 to 8"),
        ({"--keep": 4, "--sparsity": 0.5}, "either --sparsity"),
        ({"--saliency": "wanda"}, "unknown expert saliency 'wanda'; known are reap"),
        ({"--saliency": "frequence"}, "did you mean 'frequency'"),
        ({"--allocation": "owl"}, "uniform or global"),
        ({"--permute": True}, "--permute shapes zeros within weights"),
        ({"--targets": "q_proj", "--repair": True, "--packed": True}, "--targets, --repair, --packed shape zeros"),
        ({"--calibration": None}, "--saliency reap looks at data: give --calibration NAME=FILE"),
        ({"--calibration": None, "--saliency": "random", "--keep-super": True}, "--keep-super looks at data"),
        ({"--calibration": ["code=EMPTY"]}, "--calibration code: EMPTY is empty"),
        ({"--calibration": ["a=CODE", "b=BLANK"]}, "--calibration b: BLANK holds only white space"),
        ({"--calibration": ["a=CODE", "b=SHORT"]}, "--calibration b: SHORT has only"),
        ({"--calibration": ["code=CODE", "code=SHORT"]}, "names 'code' twice"),
        (
            {"--calibration": ["code=CODE", "SHORT"]},
            "several files need names, --calibration NAME=FILE: SHORT has none",
        ),
        ({"--calibration": ["code=absent.txt"]}, "--calibration code: no such file: absent.txt"),
        ({"--calibration": ["../code=CODE"]}, "takes FILE, NAME=FILE or NAME:SEGMENTS=FILE"),
        ({"--calibration": ["code:0=CODE"]}, "at least 1"),
        ({"--calibration": ["a=CODE", "b=CODE"], "--samples": 1}, "give at least 2"),
        ({"--scores": ["SCORES"]}, "either --calibration"),
        ({"--scores": ["absent.jsonl"], "--calibration": None}, "no such file: absent.jsonl"),
        ({"--scores": ["SHORT"], "--calibration": None}, "SHORT holds no expert scores: line 1"),
        ({"--scores": ["SCORES"], "--calibration": None}, "8 experts, but 3 scores"),
        ({"MODEL": "LLAMA"}, "LlamaForCausalLM has no mixture of experts"),
        ({"MODEL": "./absent"}, "no such directory: ./absent"),
        ({"--device": "gpu"}, "unknown device"),
        ({"--max-shard-size": "5 apples"}, "'5 apples' is no size"),
        ({"--pattern": None}, "--saliency reap ranks or keeps whole experts of a mixture: add --pattern expert"),
        ({"--pattern": "2:4", "--saliency": "magnitude", "--keep": 4}, "add --pattern expert"),
        (
            {"--pattern": None, "--saliency": "wanda", "--calibration": ["CODE", "SHORT"]},
            "one calibration text is taken",
        ),
    ],
)
def test_bad_input_is_answered_before_the_weights_are_loaded(
    change, message, moe, tiny_model_dir, domains, tmp_path, capsys, monkeypatch
):
    from safetensors.torch import load_file  # noqa: F401  (imported before it is forbidden to read)
    from transformers import AutoModelForCausalLM

    def refuse(*arguments, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.chdir(tmp_path)
    Path("EMPTY").write_bytes(b"")
    Path("BLANK").write_text(" \n\n")
    Path("SHORT").write_text("so short\n")
    Path("CODE").write_bytes(domains["code"].read_bytes())
    three = {"count": 1, "gate": 1, "norm": 1, "gated": 1, "peak": 1}
    lines = [{"format": "hf_sparse expert scores", "saliency": "reap", "tokens": 5}]
    lines += [
        {"layer": f"model.layers.{layer}.mlp", "expert": expert} | three for layer in (0, 1) for expert in range(3)
    ]
    Path("SCORES").write_text("\n".join(map(json.dumps, lines)))
    before = sorted(tmp_path.rglob("*"))
    flags = {
        "--pattern": "expert",
        "--saliency": None if "--scores" in change else "reap",
        "--calibration": ["code=CODE"],
        "--samples": 4,
        "--sequence-length": 32,
        "--output": tmp_path / "out",
    } | change
    model = flags.pop("MODEL", moe)
    words: list = []
    for flag, value in flags.items():
        if value is not None:
            words += [flag, *([] if value is True else value if isinstance(value, list) else [value])]
    code, out, err = run(capsys, "prune", tiny_model_dir if model == "LLAMA" else model, *words, "--json")
    assert code in (1, 2) and message in err, err
    assert message in json.loads(out)["error"]
    assert sorted(tmp_path.rglob("*")) == before


def test_layers_that_keep_different_numbers(moe, domains, evaluation_file, tmp_path, capsys):
    """One ranking of all layers takes most from the layer in which one expert does nearly everything."""
    header = {"format": "hf_sparse expert scores", "saliency": "gate_sum", "tokens": 100}
    gates = {"model.layers.0.mlp": [90, 4, 1, 1, 1, 1, 1, 1], "model.layers.1.mlp": [13, 13, 13, 13, 12, 12, 12, 12]}
    lines = [
        {"layer": layer, "expert": expert, "count": 10, "gate": gate, "norm": 1, "gated": gate, "peak": 1}
        for layer, values in gates.items()
        for expert, gate in enumerate(values)
    ]
    (tmp_path / "scores.jsonl").write_text("\n".join(map(json.dumps, [header, *lines])))
    out = tmp_path / "uneven"
    words = ("--allocation", "global", "--sparsity", 0.375, "--output", out, "--json")
    code, text, err = run(capsys, "prune", moe, "--pattern", "expert", "--scores", tmp_path / "scores.jsonl", *words)
    assert code == 0, err
    result = json.loads(text)
    assert [len(kept) for kept in result["kept"].values()] == [2, 8]
    assert result["retention"][0]["routed_mass"] == pytest.approx((0.94 + 1) / 2)
    assert "import hf_sparse" in (out / "README.md").read_text()
    code, text, err = run(capsys, "inspect", out, "--json")
    assert code == 0 and json.loads(text)["total_parameters"] == result["parameters_after"], err
    pytest.importorskip("hf_sparse.integrations.uneven_experts")
    limits = ("--sequence-length", 64, "--max-windows", 2, "--json")
    code, text, err = run(capsys, "eval", out, "--text", evaluation_file, *limits)
    assert code == 0 and json.loads(text)["perplexity"] > 1, err
    code, text, err = run(capsys, *prune_words(out, domains, tmp_path / "again", "--keep", 2, "--json"))
    assert code == 0 and {len(kept) for kept in json.loads(text)["kept"].values()} == {2}, err
