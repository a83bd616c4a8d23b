"""Retention of domains counted by hand, and pictures that show which experts stayed."""

import pytest
import torch

from hf_sparse.pruning.expert_plots import heat_map, retention, retention_table
from hf_sparse.pruning.expert_scores import ExpertScores
from hf_sparse.pruning.experts import ExpertReport


def scores_of(*layers, saliency="reap", tokens=100) -> ExpertScores:
    """One layer per argument: ``(gates, norms)`` of its experts; every expert has 10 tokens, or none if its gate is 0."""
    statistics = {}
    for index, (gates, norms) in enumerate(layers):
        gate, norm = torch.tensor(gates, dtype=torch.float64), torch.tensor(norms, dtype=torch.float64)
        count = 10.0 * (gate > 0)
        statistics[f"model.layers.{index}.mlp"] = {
            "count": count,
            "gate": gate,
            "norm": norm * count,
            "gated": gate * norm,
            "peak": norm,
        }
    return ExpertScores(statistics, saliency, tokens, dict.fromkeys(statistics, 2))


def test_retention_by_hand():
    code = scores_of(([6, 2, 1, 1], [1, 1, 1, 9]), ([5, 5, 0, 0], [1, 2, 1, 1]))
    kept = {"model.layers.0.mlp": [0, 1], "model.layers.1.mlp": [1, 2]}
    (row,) = retention({"code": code}, kept)
    assert row["routed_mass"] == pytest.approx((8 / 10 + 5 / 10) / 2)
    assert row["least_routed_mass"] == 0.5 and row["least_layer"] == "model.layers.1.mlp"
    # gate x norm over ten tokens: (6, 2, 1, 9) and (5, 10, 0, 0), so the domain alone keeps {3, 0} and {1, 0}
    assert row["reap_mass"] == pytest.approx((8 / 18 + 10 / 15) / 2)
    assert (row["own_top_kept"], row["own_top"]) == (2, 4)
    assert row["never_routed"] == 2 and row["kept_share"] == 0.5 and row["tokens"] == 100


def test_own_experts_follow_the_saliency_of_the_decision():
    layers = (([6, 2, 1, 1], [1, 1, 1, 9]),)
    kept = {"model.layers.0.mlp": [0, 1]}
    own = {
        saliency: retention({"d": scores_of(*layers, saliency=saliency)}, kept)[0]["own_top_kept"]
        for saliency in ("reap", "gate_sum", "random")
    }
    assert own == {"reap": 1, "gate_sum": 2, "random": 1}  # random says nothing about a domain: REAP does


def test_a_domain_that_was_calibrated_for_keeps_more():
    generator = torch.Generator().manual_seed(0)
    domains = {
        name: scores_of(
            *(
                (torch.rand(16, generator=generator).tolist(), torch.rand(16, generator=generator).tolist())
                for _ in "ab"
            )
        )
        for name in ("wanted", "other")
    }
    kept = {n: s.argsort(descending=True)[:8].tolist() for n, s in domains["wanted"].scores().items()}
    wanted, other = retention(domains, kept)
    assert wanted["own_top_kept"] == wanted["own_top"] == 16 and wanted["reap_mass"] > other["reap_mass"]
    everything = {n: list(range(16)) for n in kept}
    for row in retention(domains, everything):
        assert row["routed_mass"] == row["reap_mass"] == 1 == row["kept_share"]
        assert row["own_top_kept"] == row["own_top"] == 32


def test_layers_of_different_sizes():
    uneven = scores_of(([1, 1, 2, 4], [1] * 4), ([3, 1], [1] * 2))
    (row,) = retention({"d": uneven}, {"model.layers.0.mlp": [3], "model.layers.1.mlp": [0, 1]})
    assert row["routed_mass"] == pytest.approx((4 / 8 + 1) / 2) and row["kept_share"] == 3 / 6


def test_what_cannot_be_counted_is_an_error():
    kept = {"model.layers.0.mlp": [0]}
    with pytest.raises(ValueError, match="'math' are of other blocks"):
        retention({"math": scores_of(([1], [1]), ([1], [1]))}, kept)
    with pytest.raises(ValueError, match="'math' have seen no data"):
        retention({"math": scores_of(([1], [1]), tokens=0)}, kept)


def test_the_table_fits_a_terminal():
    rows = retention({"biomedicine": scores_of(([3, 1], [1, 1]), tokens=10**6)}, {"model.layers.0.mlp": [0]})
    lines = retention_table(rows).splitlines()
    assert lines[1].split() == ["biomedicine", "1,000,000", "75.0%", "75.0%", "75.0%", "1/1", "0"]
    assert len(lines[0]) == len(lines[1]) <= 88 and "50.0% if all experts were alike" in lines[2]
    assert retention_table([]).startswith("domain")


def coloured(picture) -> list[list[bool]]:
    """Which cells of the heat map are in colour, as drawn: what the image on top shows is grey."""
    import numpy as np

    below, above = (image.to_rgba(image.get_array())[..., :4] for image in picture.axes[0].images)
    seen = np.where(above[..., 3:] > 0, above, below)[..., :3]
    return (seen.max(-1) - seen.min(-1) > 0.1).tolist()


def test_the_picture_shows_what_was_kept(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda picture, path, **options: drawn.append(picture))
    scores = scores_of(([6, 5, 2, 1], [1] * 4), ([1, 2, 5, 6], [1] * 4))
    kept = {"model.layers.0.mlp": [0, 1], "model.layers.1.mlp": [2, 3]}
    report = ExpertReport("reap", "uniform", 0.5, kept, dict.fromkeys(kept, 4), 10, 5)
    heat_map(scores, tmp_path / "by_index.png", report)
    assert coloured(drawn[0]) == [[True, True, False, False], [False, False, True, True]]
    assert "4 of 8 experts kept" in drawn[0].axes[0].get_title("left")
    heat_map(scores, tmp_path / "ranked.png", report, retention({"d": scores}, kept), ranked=True)
    assert coloured(drawn[1]) == [[True, True, False, False]] * 2
    bars = [round(float(bar.get_width()), 6) for bar in drawn[1].axes[1].patches]
    assert bars == [round(11 / 14, 6), round(11 / 14, 6), 1.0]


@pytest.mark.parametrize("with_rows", [False, True])
def test_pictures_of_odd_models(with_rows, tmp_path):
    """Layers of different sizes, a layer that saw nothing, no report, many layers: no warning and no error."""
    pytest.importorskip("matplotlib")
    scores = scores_of(([0, 0, 0], [0, 0, 0]), *[([3, 1], [1, 1])] * 40)
    kept = {name: [0] for name in scores.statistics}
    rows = retention({"a": scores, "b": scores}, kept) if with_rows else None
    heat_map(scores, tmp_path / "odd.png", rows=rows)
    assert (tmp_path / "odd.png").stat().st_size > 5000
