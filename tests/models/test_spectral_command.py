"""``hf-sparse spectral`` as a user meets it."""

import json

import pytest
import torch

from hf_sparse import SparsityConfig, prune, sparsify
from hf_sparse.cli import main
from hf_sparse.models.spectral import spectrum


def test_one_model(tiny_model, tmp_path, capsys):
    model = tiny_model("gpt2")
    prune(model, SparsityConfig(sparsity=0.5), progress=False)
    model.save_pretrained(tmp_path / "model")
    output, plot = tmp_path / "spectra.json", tmp_path / "spectra.png"
    flags = ["--output", str(output), "--plot", str(plot), "--ignore", "c_proj"]
    assert main(["spectral", str(tmp_path / "model"), *flags, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads(output.read_text()) and plot.stat().st_size > 10_000
    (entry,) = result["checkpoints"]
    expected = spectrum(model, ignore=["c_proj"])
    assert entry["mean"] == pytest.approx(expected.mean) and len(entry["layers"]) == len(expected.layers) == 4
    assert main(["spectral", str(tmp_path / "model")]) == 0
    assert "transformer.h.1.mlp.c_fc " in capsys.readouterr().out


def test_checkpoints_of_a_training_in_the_order_of_their_steps(tiny_model, tmp_path, capsys):
    """Saved with their masks, which count: a weight that was grown is zero still."""
    for step in (10, 100, 20):
        model = tiny_model("llama", seed=step)
        training = sparsify(model, SparsityConfig(sparsity=0.5, method="rigl", saliency="random"))
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0] = 0.0
        model.save_pretrained(tmp_path / "run" / f"checkpoint-{step}")
        del training
    plot = tmp_path / "spectra.png"
    assert main(["spectral", str(tmp_path / "run"), "--plot", str(plot), "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [entry["step"] for entry in entries] == [10, 20, 100] and plot.stat().st_size > 10_000
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in entries[2]["layers"])
    assert entries[2]["edges"] == pytest.approx(weights / 2, abs=8)
    assert main(["spectral", *(str(tmp_path / "run" / f"checkpoint-{step}") for step in (100, 20))]) == 0
    out = capsys.readouterr().out
    assert out.index("checkpoint-20") < out.index("checkpoint-100")


def test_a_model_that_makes_no_text(tmp_path, capsys):
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=10)
    ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    assert main(["spectral", str(tmp_path / "resnet"), "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["checkpoints"][0]["layers"]
    assert [16, 147] in [layer["shape"] for layer in layers]  # the stem: 3 channels x 49


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./nowhere"], "no such directory: ./nowhere"),
        (["EMPTY"], "has no config.json and no checkpoint-N directories"),
        (["MODEL/config.json"], "is a file; give the directory"),
        (["MODEL", "--output", "nowhere/spectra.json"], "no such directory for"),
        (["MODEL", "--plot", "nowhere/spectra.png"], "no such directory for"),
        (["MODEL", "--device", "abacus"], "unknown device"),
        (["MODEL", "--targets", "q_prj"], "near matches: q_proj"),
    ],
)
def test_bad_arguments(tiny_model_dir, tmp_path, capsys, arguments, message):
    words = [word.replace("MODEL", str(tiny_model_dir)).replace("EMPTY", str(tmp_path)) for word in arguments]
    assert main(["spectral", *words]) == 2
    assert message in capsys.readouterr().err


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["spectral", "--help"])
    assert "example: hf-sparse spectral" in " ".join(capsys.readouterr().out.split())
