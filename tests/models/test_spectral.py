"""Spectra: against a full eigendecomposition of the adjacency matrix, the released code of VITA, and graphs that are known."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hf_sparse import Masks, find_targets
from hf_sparse.models import singular_values
from hf_sparse.models.singular_values import two_largest
from hf_sparse.models.spectral import QUANTITIES, plot_checkpoints, spectral_gaps, spectrum

OFFICIAL = json.loads((Path(__file__).parent.parent / "data" / "official_ramanujan.json").read_text())["graphs"]


def random_layer(out: int, fan_in: int, density: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and its mask, with an output and an input that have no edges; one kept weight is zero."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(out, fan_in, generator=generator) < density
    mask[1], mask[:, 2] = False, False
    mask[0, 0] = True
    weight = torch.randn(out, fan_in, generator=generator) * mask
    weight[0, 0] = 0.0
    return weight, mask


def brute_force(weight: torch.Tensor, mask: torch.Tensor) -> dict[str, float]:
    """The four quantities from eigenvalues of (nL + nR) x (nL + nR) matrices, straight from their definitions."""

    def eigenvalues(matrix):
        right, left = matrix.shape
        adjacency = np.zeros((left + right, left + right))
        adjacency[:left, left:], adjacency[left:, :left] = matrix.T, matrix
        values = np.sort(np.abs(np.linalg.eigvalsh(adjacency)))[::-1]
        return values[0], values[2]  # the spectrum is symmetric: each comes twice

    def nonempty(edges, heavy):
        rows, columns = edges.any(axis=1), edges.any(axis=0)
        return edges[rows][:, columns], heavy[rows][:, columns]

    def terms(edges, heavy):
        edges, heavy = nonempty(edges, heavy)
        bound = math.sqrt(edges.sum(0).mean() - 1) + math.sqrt(edges.sum(1).mean() - 1)
        first, second = eigenvalues(heavy)
        valid = edges.sum(0).mean() >= 3 and edges.sum(1).mean() >= 3
        return valid, bound - eigenvalues(edges)[1], first - second

    edges, heavy = mask.numpy().astype(float), weight.abs().double().numpy()
    _, gap, weighted = terms(edges, heavy)
    found = []
    for degree in set(edges.sum(0)) - {0.0}:
        nodes = edges.sum(0) == degree
        if nodes.sum() >= 3:
            found.append(terms(edges[:, nodes], heavy[:, nodes]))
    found = [term for term in found if term[0]]
    return {
        "ramanujan_gap": gap,
        "iterative_mean_difference_of_bound": np.mean([term[1] for term in found]),
        "weighted_spectral_gap": weighted,
        "iterative_mean_weighted_spectral_gap": np.mean([term[2] for term in found]),
        "subgraphs": len(found),
    }


@pytest.mark.parametrize(
    ("out", "fan_in", "density"), [(30, 120, 0.5), (50, 40, 0.6), (60, 200, 0.25), (200, 150, 0.95)]
)
def test_equal_a_full_eigendecomposition(out, fan_in, density):
    weight, mask = random_layer(out, fan_in, density)
    found, expected = spectral_gaps(weight, mask), brute_force(weight, mask)
    assert found.subgraphs == expected.pop("subgraphs") > 1
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-9), name
    assert (found.right, found.left, found.edges) == (out - 1, fan_in - 1, int(mask.sum()))
    assert found.full_spectrum_magnitude == pytest.approx(math.hypot(*expected.values()))


@pytest.mark.parametrize(("full", "gram"), [(384, 1024), (16, 1024), (16, 16)])
def test_every_method_gives_the_same(full, gram, monkeypatch):
    """Lanczos on the matrix and on its Gram matrix, for the whole graph and for batches of padded sub-graphs."""
    weight, mask = random_layer(200, 450, 0.4)
    expected = brute_force(weight, mask)
    monkeypatch.setattr(singular_values, "_FULL", full)
    monkeypatch.setattr(singular_values, "_GRAM", gram)
    found = spectral_gaps(weight, mask)
    assert found.subgraphs == expected["subgraphs"] > 10
    for name in list(QUANTITIES)[:4]:
        assert getattr(found, name) == pytest.approx(expected[name], rel=1e-4), name


@pytest.mark.parametrize("density", [0.02, 0.3])
@pytest.mark.parametrize("shape", [(500, 900), (1030, 1040)])
def test_lanczos_is_known_to_a_ten_thousandth(shape, density):
    generator = torch.Generator().manual_seed(3)
    mask = (torch.rand(shape, generator=generator) < density).double()
    weight = torch.randn(shape, generator=generator).double().abs() * mask
    both = torch.stack([mask, weight])
    exact = torch.linalg.eigvalsh(both @ both.mT)[:, -2:].flip(-1).sqrt()
    assert torch.allclose(two_largest(both), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("official", OFFICIAL, ids=lambda graph: f"{graph['out']}x{graph['in']}")
def test_the_released_code_of_vita_gives_the_same(official):
    bits = f"{int(official['mask'], 16):0{official['out'] * official['in']}b}"
    mask = torch.tensor([bit == "1" for bit in bits]).view(official["out"], official["in"])
    found = spectral_gaps(mask)
    assert found.subgraphs == official["subgraphs"]
    assert found.mu_0 == pytest.approx(official["mu_0"], rel=1e-5)  # it works in float32
    assert found.mu_hat == pytest.approx(official["mu_hat"], rel=1e-5)
    assert found.ramanujan_gap == pytest.approx(official["ramanujan_gap"], rel=1e-4)
    assert found.iterative_mean_difference_of_bound == (official["imdb"] and pytest.approx(official["imdb"], rel=1e-4))


@pytest.mark.parametrize("shape", [(40, 90), (600, 900), (1100, 1200)])
def test_a_complete_graph_has_one_eigenvalue(shape):
    right, left = shape
    found = spectral_gaps(torch.ones(shape, dtype=torch.bool))
    assert found.mu_0 == pytest.approx(math.sqrt(right * left)) and found.mu_hat == 0.0
    assert found.ramanujan_gap == pytest.approx(math.sqrt(right - 1) + math.sqrt(left - 1))
    assert found.subgraphs == 1 and found.iterative_mean_difference_of_bound == found.ramanujan_gap


@pytest.mark.parametrize("side", [30, 250, 600])
def test_a_graph_in_equal_parts_has_no_gap(side):
    part = torch.ones(side, side + 5, dtype=torch.bool)
    found = spectral_gaps(torch.block_diag(part, part).bool())
    assert found.mu_hat == pytest.approx(found.mu_0, rel=1e-9) and found.mu_0 == pytest.approx(
        math.sqrt(side * (side + 5))
    )
    assert found.weighted_spectral_gap == pytest.approx(0, abs=1e-6) and found.ramanujan_gap < 0


def test_a_random_regular_graph_is_nearly_ramanujan():
    """d-regular: mu_0 = d, and mu^ = 2 sqrt(d - 1) + o(1) for almost all such graphs (Friedman)."""
    generator = torch.Generator().manual_seed(0)
    side, degree = 400, 6
    counts, columns = torch.zeros(side, side), torch.arange(side)
    for shift in range(degree):
        counts[columns, (columns + shift) % side] = 1
    ordered = spectral_gaps(counts.bool())
    for _ in range(15 * side):  # swap ends of edges: degrees stay, the structure goes
        a, b = torch.randint(side, (2,), generator=generator).tolist()
        x = int(torch.multinomial(counts[a], 1, generator=generator))
        y = int(torch.multinomial(counts[b], 1, generator=generator))
        if counts[a, y] == counts[b, x] == 0:
            counts[a, x] = counts[b, y] = 0
            counts[a, y] = counts[b, x] = 1
    found = spectral_gaps(counts.bool())
    assert found.mu_0 == pytest.approx(degree) and found.subgraphs == 1
    assert abs(found.ramanujan_gap) < 0.05 * 2 * math.sqrt(degree - 1)
    assert ordered.ramanujan_gap < -1  # a band: it takes long to get from one end to the other


def test_filters_and_the_cheeger_factor():
    weight, mask = random_layer(40, 200, 0.5)
    plain, factored = spectral_gaps(weight, mask), spectral_gaps(weight, mask, cheeger=True)
    assert plain.ramanujan_gap == factored.ramanujan_gap and plain.subgraphs == factored.subgraphs
    assert 0.5 < factored.iterative_mean_weighted_spectral_gap / plain.iterative_mean_weighted_spectral_gap < 1
    assert spectral_gaps(weight, mask, min_nodes=10).subgraphs < plain.subgraphs
    # one input has 4 edges, the right nodes it touches 1 each
    star = torch.zeros(4, 3, dtype=torch.bool)
    star[:, 0] = True
    assert spectral_gaps(star).ramanujan_gap is None and spectral_gaps(star).weighted_spectral_gap == 2.0
    assert spectral_gaps(star, min_degree=1).ramanujan_gap == pytest.approx(math.sqrt(3))
    empty = spectral_gaps(torch.zeros(4, 3))
    assert empty.weighted_spectral_gap is None and empty.full_spectrum_magnitude == 0.0 and empty.edges == 0


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 32, 3)
        self.grouped = nn.Conv2d(32, 48, 3, groups=2)
        self.linear = nn.Linear(48, 32)

    def forward(self, x):
        return self.linear(self.grouped(self.stem(x)).mean((2, 3)))


def test_a_model_layer_by_layer():
    model = Network()
    report = spectrum(model)
    assert [layer.name for layer in report.layers] == ["stem.weight", "grouped.weight", "linear.weight"]
    stem, grouped, linear = report.layers
    assert (stem.left, stem.right) == (36, 32)  # an input is a channel at a position of the kernel
    expected = brute_force(model.stem.weight.detach().flatten(1), torch.ones(32, 36, dtype=torch.bool))
    assert stem.weighted_spectral_gap == pytest.approx(expected["weighted_spectral_gap"])
    assert (grouped.left, grouped.right, grouped.mu_hat) == (288, 48, pytest.approx(grouped.mu_0))  # two parts
    mean = report.mean
    assert mean["ramanujan_gap"] == pytest.approx(
        (stem.ramanujan_gap + grouped.ramanujan_gap + linear.ramanujan_gap) / 3
    )
    assert report.metrics() == mean and set(mean) == set(QUANTITIES)
    assert [layer.name for layer in spectrum(model, ["linear"]).layers] == ["linear.weight"]
    with pytest.raises(ValueError, match="'nothing' matches no parameter"):
        spectrum(model, ["nothing"])
    with torch.no_grad():
        model.linear.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"linear\.weight: the weight holds infinities or NaN"):
        spectrum(model)


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])
def test_layouts(tiny_model, family):
    """GPT-2 stores [in, out]; experts are a layer each."""
    model = tiny_model(family)
    report = spectrum(model)
    if family == "gpt2":
        layer = next(layer for layer in report.layers if layer.name.endswith("0.attn.c_attn.weight"))
        assert layer.shape == (192, 64) and (layer.right, layer.left) == (192, 64)
    else:
        experts = [layer for layer in report.layers if layer.name.endswith("experts.down_proj[3]")]
        assert len(experts) == 2 and experts[0].shape == (64, 32)
        weight = model.model.layers[0].mlp.experts.down_proj[3].detach()
        assert experts[0].weighted_mu_0 == pytest.approx(float(torch.linalg.matrix_norm(weight.abs().double(), 2)))


def test_masks_of_a_training_decide_and_nothing_is_disturbed(tiny_llama):
    """A weight grown a moment ago is zero and an edge; weights, masks and the random state are as before."""
    name = "model.layers.0.mlp.up_proj.weight"
    generator = torch.Generator().manual_seed(0)
    parameter = tiny_llama.get_parameter(name)
    mask = torch.rand(parameter.shape, generator=generator) < 0.5
    Masks({name: mask}).attach(tiny_llama)
    Masks({name: mask}).apply(tiny_llama)
    with torch.no_grad():
        parameter[3] = 0.0
    before, state = parameter.detach().clone(), torch.get_rng_state()
    layer = spectrum(tiny_llama, [name]).layers[0]
    assert layer.edges == int(mask.sum()) and layer.right == mask.shape[0]
    assert torch.equal(parameter, before) and torch.equal(torch.get_rng_state(), state)
    Masks.detach(tiny_llama)
    assert spectrum(tiny_llama, [name]).layers[0].right == mask.shape[0] - 1


def test_report_saves_prints_and_draws(tiny_llama, tmp_path):
    from rich.console import Console

    report = spectrum(tiny_llama)
    report.save(tmp_path / "spectra.json")
    content = json.loads((tmp_path / "spectra.json").read_text())
    assert content == report.to_dict() and len(content["layers"]) == len(find_targets(tiny_llama))
    assert content["layers"][0]["full_spectrum_magnitude"] == report.layers[0].full_spectrum_magnitude
    with open(tmp_path / "table", "w") as file:
        Console(file=file, width=160).print(report.table())
    assert "model.layers.1.mlp.down_proj " in (tmp_path / "table").read_text()
    report.plot(tmp_path / "layers.png")
    plot_checkpoints([0, 100], [report, report], tmp_path / "training.png")
    assert min((tmp_path / name).stat().st_size for name in ("layers.png", "training.png")) > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": torch.ones(3)}, "a real matrix"),
        ({"weight": torch.ones(3, 3), "mask": torch.ones(3, 2, dtype=torch.bool)}, "of the weight's shape"),
        ({"weight": torch.ones(3, 3), "mask": torch.ones(3, 3)}, "boolean"),
        ({"weight": torch.ones(3, 3), "min_degree": 0}, "at least 1"),
        ({"weight": torch.full((3, 3), math.inf)}, "infinities"),
    ],
)
def test_what_is_no_graph_is_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        spectral_gaps(**arguments)


@pytest.mark.gpu
def test_an_accelerator_gives_the_same():
    weight, mask = random_layer(700, 2000, 0.25)
    here, there = spectral_gaps(weight, mask), spectral_gaps(weight.cuda(), mask.cuda())
    for name in list(QUANTITIES)[:4]:
        assert getattr(there, name) == pytest.approx(getattr(here, name), rel=1e-4)
