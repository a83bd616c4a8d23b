"""The command line as a user meets it: the main job end to end, JSON, and every kind of bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hf_sparse.cli import main

ROOT = Path(__file__).resolve().parent.parent


def run(capsys, *arguments):
    """(exit code, standard output, standard error)"""
    code = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def prune_arguments(model, calibration, output, *more):
    data = ("--calibration", calibration, "--samples", 4, "--sequence-length", 32)
    return ("prune", model, "--saliency", "sparsegpt", *data, "--output", output, *more)


def test_the_main_job(tiny_model_dir, calibration_file, evaluation_file, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "pruned"
    code, text, _ = run(capsys, *prune_arguments(tiny_model_dir, calibration_file, out, "--sparsity", 0.5, "--json"))
    report = json.loads(text)  # one JSON object and nothing else
    assert code == 0 and report["sparsity"] == 0.5 and report["output"] == str(out)
    assert {"README.md", "config.json", "model.safetensors", "sparsity_report.json", "tokenizer.json"} <= {
        p.name for p in out.iterdir()
    }
    assert json.loads((out / "sparsity_report.json").read_text())["by_kind"] == report["by_kind"]
    provenance = json.loads((out / "config.json").read_text())["hf_sparse"]["provenance"]
    assert provenance["calibration"]["samples"] == 4 and provenance["command"].startswith("hf-sparse prune ")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]  # no progress, no temporary directory left

    code, text, _ = run(capsys, "pack", out, "--output", tmp_path / "packed", "--json")
    packing = json.loads(text)
    assert code == 0 and packing["packed_bytes"] < packing["dense_bytes"]
    code, _, _ = run(capsys, "unpack", tmp_path / "packed", "--output", tmp_path / "again")
    assert code == 0
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("pruned", "packed", "again")]
    for other in models[1:]:
        for (name, a), b in zip(models[0].named_parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b), name
    AutoTokenizer.from_pretrained(tmp_path / "packed")

    perplexities = []
    for name in ("pruned", "packed"):
        limits = ("--sequence-length", 64, "--max-windows", 4)
        code, text, _ = run(capsys, "eval", tmp_path / name, "--text", evaluation_file, *limits, "--json")
        result = json.loads(text)
        assert code == 0 and result["windows"] == 4 and "4 contiguous windows of 64 tokens" in result["protocol"]
        perplexities.append(result["perplexity"])
    assert perplexities[0] == perplexities[1] > 1

    code, text, _ = run(capsys, "inspect", tmp_path / "packed", "--json")
    seen = json.loads(text)
    assert code == 0 and seen["sparsity"] == 0.5 and seen["by_kind"].keys() == report["by_kind"].keys()


def test_equals_the_python_call(tiny_model_dir, calibration_file, tmp_path, capsys):
    from hf_sparse import SparsityConfig, load_model, load_segments, load_tokenizer, prune

    out = tmp_path / "pruned"
    arguments = prune_arguments(tiny_model_dir, calibration_file, out, "--pattern", "2:4", "--ignore", "v_proj")
    assert run(capsys, *arguments)[0] == 0
    model, tokenizer = load_model(str(tiny_model_dir)), load_tokenizer(str(tiny_model_dir))
    ids = load_segments(str(calibration_file), tokenizer, 4, 32).ids
    prune(model, SparsityConfig(pattern="2:4", saliency="sparsegpt", ignore=["v_proj"]), ids)
    saved = load_model(str(out))
    for (name, a), b in zip(model.named_parameters(), saved.named_parameters(), strict=True):
        assert torch.equal(a, b[1]), name


def test_packed_output_config_file_and_overrides(tiny_model_dir, calibration_file, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("sparsity: 0.6\nsaliency: wanda\nignore: [q_proj]\n")
    out = tmp_path / "out"
    data = ("--calibration", calibration_file, "--samples", 4, "--sequence-length", 32)
    options = ("--config", tmp_path / "config.yaml", "--sparsity", 0.75, "--override", "re:.*o_proj=0.25", "--packed")
    code, text, _ = run(capsys, "prune", tiny_model_dir, *data, *options, "--output", out, "--json")
    report = json.loads(text)
    assert code == 0 and (out / "configuration_hf_sparse.py").is_file()
    assert report["by_kind"]["o_proj"]["density"] == 0.75 and report["by_kind"]["up_proj"]["density"] == 0.25
    assert "q_proj" not in report["by_kind"] and report["config"]["saliency"] == "wanda"


def test_flags_over_a_config_file_leave_the_rest_of_it(tmp_path):
    """What the file says holds unless a flag says otherwise; what it leaves open follows the flags."""
    from hf_sparse.cli import _parser
    from hf_sparse.commands.prune import _config

    file = tmp_path / "config.yaml"

    def config(content: str, *flags):
        file.write_text(content)
        return _config(_parser().parse_args(["prune", "MODEL", "--output", "out", "--config", str(file), *flags]))

    assert config("sparsity: 0.7", "--pattern", "row").sparsity == 0.7
    assert config("sparsity: 0.7", "--pattern", "2:4").sparsity == 0.5
    assert config("pattern: '1:4'", "--pattern", "row").sparsity == 0.5
    assert config("saliency: wanda").pattern == "row"
    assert config("saliency: wanda", "--saliency", "sparsegpt").pattern == "unstructured"
    assert config("{saliency: wanda, pattern: row}", "--saliency", "sparsegpt").pattern == "row"
    assert config("ignore:", "--ignore", "q_proj").ignore == ["q_proj"]
    assert config("provenance: {note: mine}").provenance == {"note": "mine"}


def test_places_for_results_are_there_before_the_work(tiny_model_dir, evaluation_file, tmp_path, capsys):
    for words in (
        ("eval", tiny_model_dir, "--text", evaluation_file, "--output"),
        ("inspect", tiny_model_dir, "--plot"),
    ):
        code, _, err = run(capsys, *words, tmp_path / "absent" / "file.png")
        assert code == 2 and "no such directory for" in err
    code, _, err = run(capsys, "eval", tiny_model_dir, "--text", "wikitext")  # no Hub dataset is read to evaluate on
    assert code == 2 and "no such file: wikitext" in err


def test_resume_says_when_there_is_nothing_to_resume(tiny_model_dir, tmp_path, capsys):
    arguments = ("prune", tiny_model_dir, "--saliency", "magnitude", "--output", tmp_path / "out", "--resume")
    code, _, err = run(capsys, *arguments)
    assert code == 0 and "no interrupted run" in err


def test_tables_are_for_people(tiny_model_dir, tmp_path, capsys):
    out = tmp_path / "out"
    code = main(["prune", str(tiny_model_dir), "--saliency", "magnitude", "--output", str(out)])
    shown = capsys.readouterr().out
    assert code == 0 and "down_proj" in shown and "50.00% of" in shown and f"saved {out}" in shown.replace("\n", "")
    assert (out / "sparsity_report.json").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--sparsity": 50}, "did you mean 0.5"),
        ({"--sparsity": -0.1}, r"lies in [0, 1)"),
        ({"--sparsity": 1}, r"lies in [0, 1)"),
        ({"--pattern": "2:5"}, "not a multiple of 5"),
        ({"--pattern": "2:4", "--sparsity": 0.7}, "always has sparsity 0.5"),
        ({"--pattern": "3:2"}, "n of m"),
        ({"--pattern": "diagonal"}, "unknown pattern 'diagonal'"),
        ({"--saliency": "spargegpt"}, "did you mean 'sparsegpt'"),
        ({"--allocation": "owls"}, "unknown allocation 'owls'"),
        ({"--targets": "q_prj"}, "near matches: "),
        ({"--ignore": "re:["}, "not a valid regular expression"),
        ({"--override": "down_proj"}, "NAME=VALUE"),
        ({"--calibration": "absent.txt"}, "no such file: absent.txt"),
        ({"--calibration": "EMPTY"}, "is empty"),
        ({"--calibration": "BINARY"}, "binary file"),
        ({"--calibration": "FOLDER"}, "is a directory"),
        ({"--calibration": None}, "give --calibration"),
        ({"--samples": 100000}, "were asked for; lower --samples to"),
        ({"--sequence-length": 10**7}, "fewer than one segment"),
        ({"--samples": 0}, "at least 1"),
        ({"--dtype": "int3"}, "dtype is auto"),
        ({"--device": "cuda:77" if torch.cuda.is_available() else "cuda"}, "cuda"),
        ({"--device": "gpu"}, "unknown device"),
        ({"--max-shard-size": "5 apples"}, "'5 apples' is no size"),
        ({"--allocation": "owl", "--allocation-option": "lam=wide"}, "is a number >= 0"),
        ({"--sequence-length": 600}, "the model has 512 positions"),
        ({"--config": "absent.yaml"}, "no sparsity config at absent.yaml"),
        ({"MODEL": "./absent"}, "no such directory: ./absent"),
        ({"MODEL": "absent.gguf"}, "no such file: absent.gguf"),
        ({"MODEL": "FOLDER"}, "no config.json"),
    ],
)
def test_bad_input_is_answered_before_anything_is_written(
    change, message, tiny_model_dir, calibration_file, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").write_bytes(b"")
    (tmp_path / "BINARY").write_bytes(b"GGUF\0\0\1\2" * 100)
    (tmp_path / "FOLDER").mkdir()
    before = sorted(tmp_path.rglob("*"))
    flags = {
        "--saliency": "sparsegpt",
        "--calibration": calibration_file,
        "--samples": 4,
        "--sequence-length": 32,
        "--output": tmp_path / "out",
    } | change
    model = flags.pop("MODEL", tiny_model_dir)
    words = [word for flag, value in flags.items() if value is not None for word in (flag, value)]
    code, out, err = run(capsys, "prune", model, *words, "--json")
    assert code in (1, 2) and message in err
    assert message in json.loads(out)["error"]
    assert sorted(tmp_path.rglob("*")) == before


def test_an_existing_output_is_not_touched(tiny_model_dir, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    arguments = ("prune", tiny_model_dir, "--saliency", "magnitude", "--output", out)
    code, _, err = run(capsys, *arguments)
    assert code == 2 and "not empty" in err and [p.name for p in out.iterdir()] == ["precious.txt"]
    assert run(capsys, *arguments, "--overwrite")[0] == 0
    assert (out / "model.safetensors").is_file() and not (out / "precious.txt").exists()


def test_a_full_disk_leaves_nothing(tiny_model_dir, tmp_path, capsys, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    code, _, err = run(capsys, "prune", tiny_model_dir, "--saliency", "magnitude", "--output", tmp_path / "out")
    assert code == 1 and "space" in err
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_fails_keeps_the_work(tiny_model_dir, calibration_file, tmp_path, capsys, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    arguments = prune_arguments(tiny_model_dir, calibration_file, tmp_path / "out")
    code, _, err = run(capsys, *arguments)
    assert code == 1 and "space" in err and "--resume" in err and not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert run(capsys, *arguments, "--resume")[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_nan_weights_are_named(tiny_model, tiny_tokenizer, tmp_path, capsys):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    code, _, err = run(capsys, "prune", tmp_path / "model", "--saliency", "magnitude", "--output", tmp_path / "out")
    assert code == 2 and "model.layers.0.mlp.up_proj.weight holds 1 values that are NaN" in err
    assert not (tmp_path / "out").exists()


def test_a_config_from_a_newer_version(tiny_model_dir, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"version": 99, "sparsity": 0.5}')
    arguments = ("--config", tmp_path / "config.json", "--output", tmp_path / "out")
    code, _, err = run(capsys, "prune", tiny_model_dir, *arguments)
    assert code == 2 and "version 99" in err and "upgrade" in err


@pytest.mark.parametrize("command", ["pack", "unpack"])
def test_packing_the_wrong_way_round(command, tiny_model_dir, tmp_path, capsys):
    packed = tmp_path / "packed"
    assert run(capsys, "pack", tiny_model_dir, "--output", packed)[0] == 0
    wrong = packed if command == "pack" else tiny_model_dir
    code, _, err = run(capsys, command, wrong, "--output", tmp_path / "out")
    assert code == 2 and "packed" in err and not (tmp_path / "out").exists()


def test_a_truncated_packed_file(tiny_model_dir, tmp_path, capsys):
    out = tmp_path / "pruned"
    assert run(capsys, "prune", tiny_model_dir, "--saliency", "magnitude", "--packed", "--output", out)[0] == 0
    file = out / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-500])
    for command in (("unpack", out, "--output", tmp_path / "x"), ("inspect", out), ("eval", out, "--text", __file__)):
        code, _, err = run(capsys, *command)
        assert code in (1, 2) and err.strip(), command
    assert not (tmp_path / "x").exists()


def test_eval_wants_something_to_do(tiny_model_dir, capsys):
    code, _, err = run(capsys, "eval", tiny_model_dir)
    assert code == 2 and "--text" in err and "--tasks" in err


def test_help_has_examples(capsys):
    for command in ([], ["prune"], ["inspect"], ["eval"], ["pack"], ["unpack"]):
        with pytest.raises(SystemExit) as stop:
            main([*command, "--help"])
        text = capsys.readouterr().out
        assert stop.value.code == 0 and "example: hf-sparse" in text.replace("\n", " ")


def test_help_is_quick():
    """--help must not wait for torch."""
    code = (
        "import sys\nfrom hf_sparse.cli import main\n"
        "try: main(['prune', '--help'])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_killed_and_resumed(tiny_model, tiny_tokenizer, calibration_file, tmp_path, capsys):
    """SIGINT after some layers: nothing at the output, progress kept; --resume ends with the uninterrupted result."""
    model = tiny_model("llama", num_hidden_layers=12, hidden_size=128, intermediate_size=256)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    out, progress = tmp_path / "out", tmp_path / ".out.progress"
    data = ("--calibration", calibration_file, "--samples", 48, "--sequence-length", 256)
    words = ["prune", tmp_path / "model", "--saliency", "sparsegpt", *data, "--output", out]
    program = "import sys; from hf_sparse.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a test run started in the background inherits SIGINT ignored, and so would this process
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 240
    while not (progress / "layer-00002").is_dir() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "--resume" in err, err
    assert not out.exists() and (progress / "layer-00002").is_dir()

    code, _, err = run(capsys, *words)
    assert code == 2 and "--resume" in err  # a run anew would throw finished work away: it has to be said
    assert run(capsys, *words, "--resume")[0] == 0
    assert not progress.exists()
    words[-1] = tmp_path / "whole"
    assert run(capsys, *words)[0] == 0
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_lm_eval_tasks_from_local_files(tiny_model_dir, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    rows = [{"q": f"{a} plus {b} is", "choices": [str(a + b), str(a - b)], "gold": 0} for a in (3, 4) for b in (1, 2)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "sums.yaml").write_text(
        f"""task: sums
dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path / "data.jsonl"}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list:
  - metric: acc
metadata:
  version: 1.0
"""
    )
    tasks = ("--tasks", "sums", "--task-path", tmp_path)
    code, text, err = run(capsys, "eval", tiny_model_dir, *tasks, "--json")
    assert code == 0, err
    result = json.loads(text)["tasks"]
    assert 0 <= result["results"]["sums"]["acc,none"] <= 1
    assert result["protocol"]["harness"].startswith("lm_eval ") and result["protocol"]["task_versions"] == {"sums": 1.0}
    code, _, err = run(capsys, "eval", tiny_model_dir, "--tasks", "summs", "--task-path", tmp_path)
    assert code == 2 and "unknown task 'summs'" in err and "sums" in err
