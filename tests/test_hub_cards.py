"""The card says what was measured, and only that; each of its numbers stands in a file beside it."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from hf_sparse import SparsityConfig, prune
from hf_sparse.cli import main
from hf_sparse.hub_cards import SparsityCard


@pytest.fixture
def pruned(tiny_model, tiny_tokenizer, tmp_path) -> Path:
    """A 2:4 model of the Hub's someone/tiny."""
    provenance = {"base_model": "someone/tiny", "command": "hf-sparse x", "license": "apache-2.0"}
    model = tiny_model("llama")
    ids = torch.randint(3, 320, (4, 32), generator=torch.Generator().manual_seed(0))
    report = prune(model, SparsityConfig(pattern="2:4", saliency="wanda", provenance=provenance), ids)
    directory = tmp_path / "model"
    model.save_pretrained(directory), tiny_tokenizer.save_pretrained(directory)
    report.save(directory / "sparsity_report.json")
    return directory


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


def test_numbers_are_those_of_the_report(pruned):
    from hf_sparse.report import SparsityReport

    card = SparsityCard(pruned).save().read_text()
    report = SparsityReport.from_dict(json.loads((pruned / "sparsity_report.json").read_text()))
    assert "50.00% of" in card and "2306.11695" in card and "hf-sparse x" in card and "could run as 2:4" in card
    for kind, row in report.by_kind().items():
        assert f"| {kind} | {row['count']} | {row['weights'] / 1e6:.2f} M | {row['density']:.4f} | yes |" in card
    assert card.startswith("---\n") and "# someone/tiny, 50% sparse" in card and "From `sparsity_report.json`." in card


def test_metadata_is_what_the_hub_reads(pruned):
    from huggingface_hub import ModelCard

    data = ModelCard(SparsityCard(pruned).render()).data
    assert (
        data.library_name == "transformers" and data.pipeline_tag == "text-generation" and data.license == "apache-2.0"
    )
    assert data.base_model == "someone/tiny" and {"sparse", "pruned", "hf_sparse"} <= set(data.tags)
    assert front_matter(SparsityCard(pruned).render())["base_model_relation"] == "finetune"
    assert front_matter(SparsityCard(pruned, license="mit").render())["license"] == "mit"


def test_sections_without_data_are_left_out(pruned):
    content = json.loads((pruned / "sparsity_report.json").read_text())
    config = json.loads((pruned / "config.json").read_text())
    content["calibration"], content["device"], content["model"] = {}, "", "local-directory"
    config["hf_sparse"].pop("provenance")
    (pruned / "sparsity_report.json").write_text(json.dumps(content))
    (pruned / "config.json").write_text(json.dumps(config))
    card = SparsityCard(pruned).render()
    for absent in ("Calibration:", "## Quality", "## Speed", "## Training", "![", "It took", "None", "license:"):
        assert absent not in card, absent
    assert "base_model" not in front_matter(card) and "model-index" not in front_matter(card)


def test_without_a_report_zeros_are_counted(pruned):
    (pruned / "sparsity_report.json").unlink()
    card = SparsityCard(pruned).render()
    assert "50.00% of" in card and "Counted from the weights" in card and "`sparsity_report.json`" not in card
    assert "50.00%" not in SparsityCard(pruned, count=False).render()


def test_quality_speed_and_recovery_come_from_their_files(pruned):
    evaluation = {
        "perplexity": 12.345,
        "text": "wiki.txt",
        "protocol": "contiguous windows",
        "tasks": {
            "results": {"gsm8k": {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.01}},
            "protocol": {"harness": "lm_eval 0.4.13", "num_fewshot": {"gsm8k": 5}},
        },
    }
    pair = {"dense": 0.2, "packed": 0.1}
    bench = dict(device="a CPU", dtype="bfloat16", batch_size=1, prompt=128, rounds=5, bandwidth=2e10, prefill=pair)
    bench |= dict(dense_tokens_per_second=10.0, packed_tokens_per_second=25.0, dense_bytes=2e6, packed_bytes=1e6)
    measure = {"kind": "accuracy", "value": 0.5, "mean": 0.5, "stderr": 0.01, "items": 9, "chance": None}
    recovery = {
        "original": {"name": "someone/tiny", "measures": {"task": measure}},
        "models": {
            "pruned": {
                "average_recovery_percent": 90.0,
                "average_recovery_stderr": 2.0,
                "measures": {"task": measure | {"mean": 0.45, "recovery_percent": 90.0, "recovery_stderr": 2.0}},
            }
        },
        "notes": ["few items"],
    }
    for name, content in (("evaluation", evaluation), ("bench", bench), ("recovery", recovery)):
        (pruned / f"{name}.json").write_text(json.dumps(content))
    card = SparsityCard(pruned).save().read_text()
    assert "| perplexity, wiki.txt | 12.35 | contiguous windows |" in card or "| perplexity, wiki.txt | 12.34 |" in card
    assert "| gsm8k | 0.2500 ± 0.0100 | exact_match, 5 shots |" in card and "lm_eval 0.4.13" in card
    assert "| decode | 10.0 tokens/s | 25.0 tokens/s | x2.50 |" in card and "a CPU" in card
    assert "| pruned | 45.0% (90.0% ± 2.0) | 90.0% ± 2.0 |" in card and "Note: few items." in card
    results = front_matter(card)["model-index"][0]["results"]
    values = {r["dataset"]["type"]: r["metrics"][0]["value"] for r in results}
    assert values == {"wiki.txt": 12.345, "gsm8k": 0.25}
    known = yaml.safe_load((pruned / ".eval_results" / "hf_sparse.yaml").read_text())
    assert known[0]["dataset"]["id"] == "openai/gsm8k" and known[0]["value"] == 25.0


def test_every_number_stands_in_a_file(pruned, evaluation_file, capsys):
    """Measured by the commands themselves, then each number of the tables is looked for in the JSON files."""
    words = [
        "eval",
        str(pruned),
        "--text",
        str(evaluation_file),
        "--sequence-length",
        "32",
        "--max-windows",
        "3",
        "--record",
    ]
    assert main([*words, "--json"]) == 0
    assert main(["bench", str(pruned), "--new-tokens", "2", "--prompt", "4", "--rounds", "1", "--runtime", "packed",
                 "--output", str(pruned / "bench.json"), "--json"]) == 0  # fmt: skip
    capsys.readouterr()
    card = SparsityCard(pruned).render()

    def numbers(value):
        if isinstance(value, dict):
            return {n for v in value.values() for n in numbers(v)}
        if isinstance(value, list):
            return {n for v in value for n in numbers(v)}
        return {float(value)} if isinstance(value, (int, float)) and not isinstance(value, bool) else set()

    known = {
        n
        for file in pruned.glob("*.json")
        if "tokenizer" not in file.name
        for n in numbers(json.loads(file.read_text()))
    }
    known |= {100 * n for n in known} | {n / 1e6 for n in known} | {n / 1e9 for n in known} | {1e3 * n for n in known}
    tables = [line for line in card.splitlines() if line.startswith("|") and not set(line) <= set("|-: ")]
    checked = 0
    for line in tables:
        for cell in line.split("|"):
            found = re.search(r"(?<![\w.:x])\d+\.\d+", cell)
            if found and not cell.strip().startswith("x"):
                shown, digits = float(found[0]), len(found[0].split(".")[1])
                assert any(abs(round(n, digits) - shown) < 1.01 * 10**-digits for n in known), (cell, line)
                checked += 1
    assert checked > 20


def test_a_packed_model_names_the_import(pruned, tmp_path):
    assert "import hf_sparse" not in SparsityCard(pruned).render()
    SparsityCard(pruned).save()
    assert main(["pack", str(pruned), "--output", str(tmp_path / "packed"), "--json"]) == 0
    card = (tmp_path / "packed" / "README.md").read_text()
    assert (
        "import hf_sparse  # reads packed weights" in card and front_matter(card)["base_model_relation"] == "quantized"
    )
    assert main(["unpack", str(tmp_path / "packed"), "--output", str(tmp_path / "dense"), "--json"]) == 0
    assert "import hf_sparse" not in (tmp_path / "dense" / "README.md").read_text()


def test_folders_of_the_machine_are_left_out(pruned):
    config = json.loads((pruned / "config.json").read_text())
    command = (
        "hf-sparse prune /srv/me/models/tiny --calibration code=/data/a.txt ./b.txt https://hub.co/x --output ../out/"
    )
    config["hf_sparse"]["provenance"]["command"] = command
    (pruned / "config.json").write_text(json.dumps(config))
    card = SparsityCard(pruned).render()
    assert (
        "hf-sparse prune tiny --calibration code=a.txt b.txt https://hub.co/x --output out" in card
        and "/srv" not in card
    )


def test_a_card_written_by_hand_is_kept_by_packing(pruned, tmp_path):
    (pruned / "README.md").write_text("mine\n")
    assert main(["pack", str(pruned), "--output", str(tmp_path / "packed"), "--json"]) == 0
    assert (tmp_path / "packed" / "README.md").read_text() == "mine\n"


def test_sparse_training_and_sparse_ift(tiny_model, tmp_path):
    from hf_sparse import sparse_ift, sparsify

    trained = tiny_model("llama")
    sparsify(trained, SparsityConfig(sparsity=0.75, method="rigl"))
    trained.save_pretrained(tmp_path / "trained")
    card = SparsityCard(tmp_path / "trained").render()
    assert "trained with its zeros:\nRigL" in card and "arXiv:1911.11134" in card and "sparse-training" in card
    wide = tiny_model("gpt2")
    sparse_ift(wide, "parallel", sparsity=0.5, method="static")
    wide.save_pretrained(tmp_path / "ift")
    card = SparsityCard(tmp_path / "ift").render()
    assert "2303.11525" in card and "`parallel`" in card and "import hf_sparse" in card


def test_a_drafter(pruned):
    report = dict(path="x", macs=1.8e9, dense_macs=3.2e9, layers=2, zeros=0.5, rows=100, taken=90, losses=[2.0, 1.0])
    (pruned / "drafter_report.json").write_text(json.dumps(report))
    card = SparsityCard(pruned).render()
    assert (
        "1800.0 of\n3200.0 million multiply-accumulates" in card
        and "-43.75%" in card
        and "90 of them in the words" in card
    )
    assert "speculative-decoding" in front_matter(card)["tags"] and "Nothing was trained" not in card


def test_errors(tmp_path, pruned):
    with pytest.raises(FileNotFoundError, match="no config.json"):
        SparsityCard(tmp_path)
    (pruned / "bench.json").write_text("{")
    with pytest.raises(ValueError, match="bench.json is no JSON"):
        SparsityCard(pruned)
