"""``hf-sparse compare``: what is known of several models, and what of it may not be compared."""

import json

import pytest

from hf_sparse.cli import main


@pytest.fixture(scope="module")
def models(tiny_model_dir, tmp_path_factory):
    import shutil

    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(tiny_model_dir, folder / "dense")
    assert main(["prune", str(tiny_model_dir), "--sparsity", "0.5", "--output", str(folder / "pruned"), "--json"]) == 0
    assert main(["pack", str(folder / "pruned"), "--output", str(folder / "packed"), "--json"]) == 0
    return folder


def run(capsys, *arguments):
    code = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def record(path, evaluation_file, windows):
    words = [
        "eval",
        str(path),
        "--text",
        str(evaluation_file),
        "--sequence-length",
        "32",
        "--max-windows",
        str(windows),
    ]
    assert main([*words, "--record", "--json"]) == 0


def test_size_zeros_and_quality_side_by_side(models, evaluation_file, tmp_path, capsys):
    for name in ("dense", "pruned", "packed"):
        record(models / name, evaluation_file, 3)
    capsys.readouterr()
    file = tmp_path / "comparison.json"
    code, text, err = run(
        capsys, "compare", *(models / n for n in ("dense", "pruned", "packed")), "--output", file, "--json"
    )
    assert code == 0, err
    result = json.loads(text)
    assert result == json.loads(file.read_text()) and result["notes"] == []
    dense, pruned, packed = (result["models"][name] for name in ("dense", "pruned", "packed"))
    assert dense["zeros in linear layers"]["value"] == pytest.approx(0, abs=0.1)
    assert (
        pruned["zeros in linear layers"]["value"]
        == packed["zeros in linear layers"]["value"]
        == pytest.approx(50, abs=0.1)
    )
    assert packed["weights on disk"]["value"] < pruned["weights on disk"]["value"] == dense["weights on disk"]["value"]
    assert pruned["MACs per token"]["value"] < dense["MACs per token"]["value"]
    row = f"perplexity, {evaluation_file.name}"
    assert packed[row]["value"] == pytest.approx(pruned[row]["value"]) != dense[row]["value"]


def test_other_protocols_are_marked(models, evaluation_file, capsys):
    record(models / "dense", evaluation_file, 3)
    record(models / "pruned", evaluation_file, 2)
    capsys.readouterr()
    code, text, _ = run(capsys, "compare", f"a={models / 'dense'}", f"b={models / 'pruned'}")
    assert code == 0 and "not to be compared" in text.replace("\n", " ") and "weights on disk" in text


def test_plot_and_errors(models, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plot.png"
    assert run(capsys, "compare", models / "dense", models / "pruned", "--plot", plot)[0] == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    for words, said in (
        ([models / "dense", models / "dense"], "two models are called dense"),
        ([models / "dense", tmp_path], "no model directory"),
    ):
        code, _, err = run(capsys, "compare", *words)
        assert code == 2 and said in err
