"""The card says what was measured, and only that."""

import json

import pytest
import torch
import yaml

from hf_sparse import SparsityConfig, prune
from hf_sparse.hub_cards import render_card, write_card


@pytest.fixture
def report(tiny_model):
    config = SparsityConfig(
        pattern="2:4", saliency="wanda", provenance={"base_model": "someone/tiny", "command": "hf-sparse x"}
    )
    ids = torch.randint(3, 320, (4, 32), generator=torch.Generator().manual_seed(0))
    return prune(tiny_model("llama"), config, ids)


def front_matter(card):
    return yaml.safe_load(card.split("---")[1])


def test_numbers_are_those_of_the_report(report):
    card = render_card(report)
    assert "50.00% of" in card and "2306.11695" in card and "hf-sparse x" in card and "could run as 2:4" in card
    for kind, row in report.by_kind().items():
        assert f"| {kind} | {row['count']} | {row['weights'] / 1e6:.2f} M | {row['density']:.4f} |" in card
    assert front_matter(card)["base_model"] == "someone/tiny"
    assert {"sparse", "hf_sparse"} <= set(front_matter(card)["tags"])


def test_sections_without_data_are_left_out(report):
    report.calibration, report.config["provenance"] = {}, {}
    report.model = "local-directory"
    card = render_card(report)
    assert "Calibration:" not in card and "```\n\n```" not in card and "![density" not in card
    assert "base_model" not in front_matter(card)


def test_a_packed_model_names_the_import(report, tmp_path):
    assert "import hf_sparse" not in render_card(report)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "hf_sparse"}))
    (tmp_path / "configuration_hf_sparse.py").write_text("")
    path = write_card(tmp_path, report, plot="sparsity_report.png")
    assert "import hf_sparse" in path.read_text() and "](sparsity_report.png)" in path.read_text()


def test_huggingface_hub_reads_the_metadata(report):
    from huggingface_hub import ModelCard

    card = ModelCard(render_card(report))
    assert card.data.library_name == "transformers" and card.data.base_model == "someone/tiny"
