"""``hf-sparse prune --pattern layer`` as a user meets it: the layers chosen, a stock checkpoint, all kinds of bad input."""

import json
from pathlib import Path

import pytest
import torch

from hf_sparse.cli import main


@pytest.fixture(scope="module")
def deep(tiny_model, tiny_tokenizer, tmp_path_factory) -> Path:
    """Six layers, of which the third does nothing and the fifth next to nothing."""
    directory = tmp_path_factory.mktemp("models") / "deep"
    model = tiny_model("llama", num_hidden_layers=6)
    for index, factor in ((2, 0.0), (4, 0.01)):
        for linear in (model.model.layers[index].self_attn.o_proj, model.model.layers[index].mlp.down_proj):
            linear.weight.data.mul_(factor)
    model.save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


def run(capsys, *arguments):
    """(exit code, standard output, standard error)"""
    code = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def words(model, output, text, *more):
    data = ("--calibration", text, "--samples", 4, "--sequence-length", 32) if text else ()
    return ("prune", model, "--pattern", "layer", *data, "--output", output, *more)


def test_the_job(deep, calibration_file, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    out = tmp_path / "shorter"
    code, text, err = run(capsys, *words(deep, out, calibration_file, "--remove", 1, "--json"))
    assert code == 0, err
    result = json.loads(text)
    assert (
        result["dropped"] == [2]
        and result["kept"] == [0, 1, 3, 4, 5]
        and result["distance"] == pytest.approx(0, abs=1e-6)
    )
    names = {file.name for file in out.iterdir()}
    assert {"README.md", "layer_report.json", "tokenizer.json", "config.json"} <= names
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]

    whole, short = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (deep, out))
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():  # the layer that went was an identity
        torch.testing.assert_close(short(ids).logits, whole(ids).logits)
    assert result["parameters_after"] == sum(p.numel() for p in short.parameters())
    assert result["parameters_before"] - result["parameters_after"] == sum(
        p.numel() for p in whole.model.layers[2].parameters()
    )
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == 5
    assert config["hf_sparse_layers"]["kept"] == [0, 1, 3, 4, 5] and config["hf_sparse_layers"]["layers_before"] == 6
    assert config["hf_sparse_layers"]["provenance"]["command"].startswith("hf-sparse prune ")
    stored = json.loads((out / "layer_report.json").read_text())
    assert stored["dropped"] == [2] and len(stored["scores"]["influence"]) == 6
    card = (out / "README.md").read_text()
    assert "with 5 of 6 layers" in card and "Layers 2 were removed" not in card and "Layer 2 was removed" in card
    assert "4 segments of 32 tokens" in card and "2403.17887" in card


def test_a_second_run_remembers_the_first(deep, calibration_file, tmp_path, capsys):
    """What is left is told in numbers of the first model's layers."""
    first, second = tmp_path / "a", tmp_path / "b"
    assert run(capsys, *words(deep, first, calibration_file, "--remove", 1))[0] == 0
    code, text, _ = run(
        capsys, *words(first, second, calibration_file, "--remove", 1, "--saliency", "block-influence", "--json")
    )
    assert code == 0 and json.loads(text)["dropped"] == [3]  # the fifth of the first model
    record = json.loads((second / "config.json").read_text())["hf_sparse_layers"]
    assert record["kept"] == [0, 1, 3, 5] and record["layers_before"] == 6


def test_layers_by_number_need_no_data(deep, tmp_path, capsys):
    out = tmp_path / "out"
    code, text, err = run(capsys, *words(deep, out, None, "--layers", 5, 1))
    assert code == 0, err
    assert "layers 1, 5 went (as asked for)" in text and "4 of 6 are left" in text.replace("\n", " ")
    card = (out / "README.md").read_text()
    assert "Layers 1, 5 were removed" in card and "Measured" not in card and "Calibration" not in card
    report = json.loads((out / "layer_report.json").read_text())
    assert report["dropped"] == [1, 5] and report["scores"] is None and report["distance"] is None
    assert not (out / "layer_report.png").exists()


def test_the_last_layer_stays_unless_allowed(deep, tiny_tokenizer, calibration_file, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    model, last = AutoModelForCausalLM.from_pretrained(deep), tmp_path / "model"
    model.model.layers[2], model.model.layers[5] = model.model.layers[5], model.model.layers[2]
    model.save_pretrained(last), tiny_tokenizer.save_pretrained(last)
    code, text, _ = run(capsys, *words(last, tmp_path / "a", calibration_file, "--remove", 1, "--json"))
    result = json.loads(text)
    assert code == 0 and result["dropped"] == [4] and "layer 5 scored lower still" in result["notes"][0]
    code, text, _ = run(capsys, *words(last, tmp_path / "b", calibration_file, "--remove", 1, "--allow-last", "--json"))
    assert code == 0 and json.loads(text)["dropped"] == [5] and json.loads(text)["notes"] == []


@pytest.mark.parametrize(
    "flags, said",
    [
        ([], "give either --remove N"),
        (["--remove", 2, "--layers", 1], "give either --remove N"),
        (["--remove", 0], "at least 1; got 0"),
        (["--remove", 6], "from 1 to 5 of them can go, not 6"),
        (["--layers", 6], "layers 0 to 5; --layers names 6"),
        (["--layers", 1, 1], "different layer numbers"),
        (["--layers", 1, "--saliency", "angular"], "--layers says already which"),
        (["--remove", 1, "--saliency", "reap"], "angular or block-influence"),
        (["--remove", 1, "--sparsity", 0.5], "--sparsity is of no use to --pattern layer"),
        (["--remove", 1, "--keep", 3, "--packed"], "--packed, --keep are of no use"),
        (["--remove", 1, "--calibration", "another.txt"], "one calibration text is taken"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(
    flags, said, deep, calibration_file, tmp_path, capsys, monkeypatch
):
    import hf_sparse.loading

    monkeypatch.setattr(hf_sparse.loading, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    code, _, err = run(capsys, *words(deep, tmp_path / "out", calibration_file, *flags))
    assert code == 2 and said in err and not (tmp_path / "out").exists()


def test_without_data_and_with_flags_of_another_pattern(deep, tmp_path, capsys):
    out = tmp_path / "out"
    assert "looks at data: give --calibration" in run(capsys, *words(deep, out, None, "--remove", 1))[2]
    code, _, err = run(capsys, "prune", deep, "--remove", 0, "--output", out)
    assert code == 2 and "--remove chooses whole layers: add --pattern layer" in err
    code, _, err = run(capsys, "prune", deep, "--saliency", "angular", "--output", out)
    assert code == 2 and "--saliency angular chooses whole layers" in err
    code, _, err = run(capsys, "prune", deep, "--pattern", "expert", "--layers", 0, "--output", out)
    assert code == 2 and "--layers chooses whole layers; it goes with --pattern layer" in err
    assert not out.exists()


def test_the_plot(deep, calibration_file, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    assert run(capsys, *words(deep, out, calibration_file, "--remove", 2))[0] == 0
    assert (out / "layer_report.png").read_bytes().startswith(b"\x89PNG")
    assert "](layer_report.png)" in (out / "README.md").read_text()
