"""Every command as somebody meets it for the first time: its help, a typo, a missing file, no GPU, Ctrl-C in the middle."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_sparse import cli

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = sorted(next(a for a in cli._parser()._actions if a.dest == "command").choices)
# what a first use needs, with MODEL and FILE for what is there and MISSING for what is not
MISSING = {
    "prune": ["MISSING", "--output", "out"],
    "distill": ["MODEL", "MISSING.jsonl", "--output", "out"],
    "merge": ["MODEL", "MISSING", "--output", "out"],
    "recovery": ["MODEL", "a=MISSING", "--text", "FILE"],
    "inspect": ["MISSING"],
    "eval": ["MODEL", "--text", "MISSING.txt"],
    "bench": ["MISSING"],
    "bench-speculative": ["MODEL", "--drafter", "MODEL", "--prompts", "MISSING.jsonl"],
    "pack": ["MISSING", "--output", "out"],
    "unpack": ["MISSING", "--output", "out"],
    "export": ["MISSING", "--to", "masks", "--output", "out"],
    "push": ["MISSING", "me/model"],
    "card": ["MISSING"],
    "compare": ["MODEL", "MISSING"],
    "spectral": ["MISSING"],
}
CUDA = {
    "prune": ["MODEL", "--output", "out", "--saliency", "wanda", "--calibration", "FILE"],
    "distill": ["MODEL", "ROWS", "--output", "out"],
    "recovery": ["MODEL", "a=MODEL", "--text", "FILE"],
    "eval": ["MODEL", "--text", "FILE"],
    "bench": ["MODEL"],
    "bench-speculative": ["MODEL", "--drafter", "MODEL", "--prompts", "ROWS"],
    "spectral": ["MODEL"],
}


@pytest.fixture
def words(tiny_model_dir, calibration_file, tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "Why?", "answer": "So."}\n')
    known = {"MODEL": str(tiny_model_dir), "FILE": str(calibration_file), "ROWS": str(rows)}
    monkeypatch.chdir(tmp_path)

    def fill(given):
        return [
            re.sub(r"\b(MODEL|FILE|ROWS)\b", lambda m: known[m[1]], word).replace("MISSING", "./missing")
            for word in given
        ]

    return fill


def test_every_command_is_tried_here():
    assert set(MISSING) | {"lm-eval"} == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_begins_with_the_command(command, capsys):
    if command == "lm-eval":  # its help is lm-eval's own
        return
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    shown = command.replace("bench-speculative", "bench speculative")
    assert ended.value.code == 0 and f"example: hf-sparse {shown} " in said


def test_typos_are_told_what_was_perhaps_meant(capsys):
    for given, said in (
        (["prun", "x"], "did you mean prune?"),
        (["prune", "x", "--output", "y", "--sparcity", "0.5"], "--sparcity (did you mean --sparsity?)"),
        (["xyz"], "there are "),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(given)
        assert ended.value.code == 2 and said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("command", MISSING)
def test_a_missing_file_is_named(command, words, capsys, tmp_path):
    code = cli.main([command, *words(MISSING[command])])
    err = capsys.readouterr().err
    assert code == 2 and "missing" in err and "Traceback" not in err, err
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl"}  # nothing was begun


@pytest.mark.parametrize("command", CUDA)
def test_no_gpu_is_said(command, words, capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code = cli.main([command, *words(CUDA[command]), "--device", "cuda"])
    err = capsys.readouterr().err
    assert code == 2 and "torch sees no CUDA device here; use --device cpu" in err


@pytest.mark.slow
@pytest.mark.parametrize("command", ["prune", "distill", "recovery"])
def test_ctrl_c_leaves_nothing_half_written(command, tiny_model, tiny_tokenizer, calibration_file, tmp_path):
    """The interrupt comes while the work is under way."""
    model = tmp_path / "model"
    tiny_model("llama", num_hidden_layers=24).save_pretrained(model)
    tiny_tokenizer.save_pretrained(model)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"question": "What is {n}?", "answer": "It is {n}."}}\n' for n in range(4000)))
    given = {
        "prune": [
            "--saliency",
            "sparsegpt",
            "--calibration",
            calibration_file,
            "--samples",
            64,
            "--sequence-length",
            256,
        ],
        "distill": [rows, "--tokens-per-batch", 512, "--max-new-tokens", 64],
        "recovery": [f"a={model}", "--responses", rows, "--text", calibration_file, "--sequence-length", 256],
    }[command]
    output = tmp_path / ("out.json" if command == "recovery" else "out")
    run = [sys.executable, "-m", "hf_sparse.cli", command, str(model), *map(str, given), "--output", str(output)]
    process = subprocess.Popen(run, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True)
    begun = {
        "prune": ".out.progress/layer-*",
        "distill": ".out.progress/rows-*.jsonl",
        "recovery": ".out.json.progress/arguments",
    }
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None and not list(tmp_path.glob(begun[command])):
        time.sleep(0.05)
    time.sleep(4 if command == "recovery" else 0.5)  # the first model is being measured
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said[-2000:]
    assert "interrupted, nothing was written" in said and "Traceback" not in said
    assert not output.exists() and not list(tmp_path.glob(".*tmp-*"))
