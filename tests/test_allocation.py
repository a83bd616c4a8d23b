"""Allocation: exact averages, and each method against a transcription of its paper or published numbers."""

import math
import random

import numpy as np
import pytest
import torch

from hf_sparse import allocation
from hf_sparse.allocation import erk, from_dict, nm_mix, outlier_ratio, owl, uniform
from hf_sparse.targets import find_targets


def pruned(sparsities: dict, sizes: dict) -> int:
    """Weights removed in all, each share rounded as a pattern rounds it."""
    return sum(round(sparsities[name] * sizes[name]) for name in sizes)


def random_sizes(seed: int, names: int = 13) -> dict[str, int]:
    rng = random.Random(seed)
    return {f"w{i}": rng.choice([7, 64, 1000, 4096, 12345]) for i in range(names)}


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.333, 0.5, 0.77, 0.999])
@pytest.mark.parametrize("seed", range(4))
def test_uniform_is_exact_to_the_last_weight(seed, sparsity):
    sizes = random_sizes(seed)
    given = uniform(sizes, sparsity)
    assert pruned(given, sizes) == round(sparsity * sum(sizes.values()))
    assert all(abs(given[name] - sparsity) <= 1 / sizes[name] for name in sizes)


# ------------------------------------------------------------------------------------------------------------------- ERK


def rigl_erk(shapes: dict[str, tuple], sparsity: float) -> dict[str, float]:
    """``get_sparsities_erdos_renyi`` of github.com/google-research/rigl (sparse_utils.py), its steps in NumPy."""
    dense: set[str] = set()
    while True:
        rhs, divisor, raw = 0.0, 0.0, {}
        for name, shape in shapes.items():
            size = int(np.prod(shape))
            zeros = int(np.floor(sparsity * size))
            if name in dense:
                rhs -= zeros
            else:
                rhs += size - zeros
                raw[name] = np.sum(shape) / np.prod(shape)
                divisor += raw[name] * size
        eps = rhs / divisor
        highest = max(raw.values())
        if highest * eps <= 1:
            return {name: 0.0 if name in dense else 1.0 - eps * raw[name] for name in shapes}
        dense.update(name for name in raw if raw[name] == highest)


@pytest.fixture(scope="module")
def resnet50():
    """``{name: (shape, multiply-accumulates at density 1)}`` of ResNet-50 for 224 x 224 images, counted by hooks."""
    from transformers import ResNetConfig, ResNetForImageClassification

    with torch.device("meta"):
        model = ResNetForImageClassification(ResNetConfig(num_labels=1000)).eval()
    assert sum(p.numel() for p in model.parameters()) == 25_557_032, "not the ResNet-50 of the papers"
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            shape = tuple(module.weight.shape)

            def count(module, args, output, name=name, shape=shape):
                found[name] = (shape, math.prod(shape) * math.prod(output.shape[2:]))

            module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert len(found) == 54
    return found


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8, 0.9, 0.95, 0.99])
def test_erk_of_resnet50_is_rigls(resnet50, sparsity):
    shapes = {name: shape for name, (shape, _) in resnet50.items()}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    given, reference = erk(sizes, sparsity, shapes), rigl_erk(shapes, sparsity)
    for name in shapes:  # ours is exact in total where RigL rounds every layer down
        assert given[name] == pytest.approx(reference[name], abs=1e-4 + 1 / sizes[name])
    assert [n for n in given if given[n] == 0.0] == [n for n in reference if reference[n] == 0.0]
    assert pruned(given, sizes) == round(sparsity * sum(sizes.values()))


@pytest.mark.parametrize("sparsity,published", [(0.8, 0.42), (0.9, 0.24), (0.95, 0.12), (0.965, 0.09)])
def test_erk_costs_the_published_flops(resnet50, sparsity, published):
    """Inference FLOPs of ERK ResNet-50 relative to dense, from the table in RigL's README (github.com/google-research/rigl).

    Its 8.2e9 for the dense network also count norms and activations (2 per weight use leaves 0.02e9 for them); these stay.
    """
    shapes = {name: shape for name, (shape, _) in resnet50.items()}
    given = erk({name: math.prod(shape) for name, shape in shapes.items()}, sparsity, shapes)
    dense = sum(macs for _, macs in resnet50.values())
    others = 8.2e9 - 2 * dense
    assert 0 < others < 0.005 * 8.2e9
    sparse = sum(macs * (1.0 - given[name]) for name, (_, macs) in resnet50.items())
    assert (2 * sparse + others) / 8.2e9 == pytest.approx(published, abs=0.0051)  # published to two digits


def test_erk_by_hand():
    """Two matrices 4x4 and 8x2: raw densities 8/16 and 10/16; 16 of 32 kept = scale * (8 + 10)."""
    shapes = {"a": (4, 4), "b": (8, 2)}
    given = erk({"a": 16, "b": 16}, 0.5, shapes)
    assert given == {"a": 9 / 16, "b": 7 / 16}  # kept 7.1 and 8.9, to whole weights


def test_erk_caps_density_at_one_and_rebalances():
    shapes = {"small": (2, 2), "large": (64, 64)}
    sizes = {"small": 4, "large": 4096}
    given = erk(sizes, 0.5, shapes)
    assert given["small"] == 0.0 and pruned(given, sizes) == 2050
    assert erk(sizes, 0.0, shapes) == {"small": 0.0, "large": 0.0}


def test_erk_of_fused_experts_looks_at_one_expert():
    shapes = {"experts": (32, 16), "plain": (32, 16)}
    given = erk({"experts": 8 * 512, "plain": 512}, 0.5, shapes)
    assert given == {"experts": 0.5, "plain": 0.5}


# ------------------------------------------------------------------------------------------------------------------- OWL


def owl_reference(ratios: list[float], sparsity: float, lam: float) -> list[float]:
    """Sparsities as github.com/luuyin/OWL (lib/prune_all.py) computes them, for layers of one size."""
    density = np.array(ratios, dtype=np.float64)
    density = (density - density.min()) * (1 / (density.max() - density.min()) * lam * 2)
    density = density - density.mean() + (1 - sparsity)
    return (1 - density).tolist()


def test_owl_by_hand():
    """Outliers 1, 2, 5 %, lam 0.1: scaled to 0, 0.05, 0.2, mean 0.25 / 3, densities 0.5 + scaled - mean."""
    sizes = {"l0": 3000, "l1": 3000, "l2": 3000}
    given = owl(sizes, 0.5, {"l0": 0, "l1": 1, "l2": 2}, {0: 1.0, 1: 2.0, 2: 5.0}, lam=0.1)
    assert [round(given[name], 9) for name in sizes] == [round(n / 3000, 9) for n in (1750, 1600, 1150)]
    assert list(given.values()) == pytest.approx(owl_reference([1.0, 2.0, 5.0], 0.5, 0.1), abs=1 / 3000)


@pytest.mark.parametrize("sparsity,lam", [(0.5, 0.08), (0.7, 0.08), (0.6, 0.2)])
def test_owl_is_the_reference_where_layers_have_one_size(sparsity, lam):
    ratios = [random.Random(layer).random() * 6 for layer in range(12)]
    names = [f"layers.{layer}.{kind}" for layer in range(12) for kind in ("q", "up")]
    sizes = {name: 4096 if name.endswith("q") else 12288 for name in names}
    groups = {name: int(name.split(".")[1]) for name in names}
    given = owl(sizes, sparsity, groups, dict(enumerate(ratios)), lam=lam)
    reference = owl_reference(ratios, sparsity, lam)
    for name in names:
        assert given[name] == pytest.approx(reference[groups[name]], abs=2 / 4096)
    assert pruned(given, sizes) == round(sparsity * sum(sizes.values()))


def test_owl_without_spread_or_width_is_uniform():
    sizes, groups = {"a": 100, "b": 300}, {"a": 0, "b": 1}
    assert owl(sizes, 0.6, groups, {0: 3.0, 1: 3.0}) == uniform(sizes, 0.6)
    assert owl(sizes, 0.6, groups, {0: 1.0, 1: 3.0}, lam=0.0) == uniform(sizes, 0.6)
    assert owl({"a": 100}, 0.6, {"a": 0}, {0: 2.0}) == {"a": 0.6}


def test_owl_stays_within_zero_and_one_and_keeps_the_average():
    sizes = {"a": 1000, "b": 1000, "c": 1000}
    for sparsity in (0.05, 0.95):
        given = owl(sizes, sparsity, {"a": 0, "b": 1, "c": 2}, {0: 0.0, 1: 1.0, 2: 9.0}, lam=0.4)
        assert all(0.0 <= value <= 1.0 for value in given.values())
        assert pruned(given, sizes) == round(sparsity * 3000)


def test_owl_average_is_by_parameters_when_layers_differ_in_size():
    sizes = {"a": 100, "b": 10_000}
    given = owl(sizes, 0.5, {"a": 0, "b": 1}, {0: 1.0, 1: 3.0}, lam=0.1)
    assert pruned(given, sizes) == 5050 and given["a"] > given["b"]  # more outliers, denser
    assert given["a"] - given["b"] == pytest.approx(0.2, abs=0.02)


def test_outlier_ratio_is_the_percentage_above_a_multiple_of_the_mean():
    scores = [torch.tensor([[1.0, 1.0, 1.0, 1.0]]), torch.tensor([[1.0, 1.0, 1.0, 93.0]])]  # mean 12.5 over both
    assert outlier_ratio(scores, 5.0) == 12.5
    assert outlier_ratio(scores, 8.0) == 0.0
    assert outlier_ratio(scores, 0.05) == 100.0
    assert outlier_ratio([]) == 0.0


# --------------------------------------------------------------------------------------------------------- dict, n:m mix


def test_a_dict_names_every_target_and_the_first_match_wins(tiny_llama):
    targets = find_targets(tiny_llama)
    given = from_dict({"q_proj": 0.9, r"re:.*\.0\.": 0.1, "re:.*": 0.5}, targets)
    assert list(given.values()).count(0.9) == 2 and set(given) == set(targets)
    assert given["model.layers.0.self_attn.q_proj.weight"] == 0.9
    assert given["model.layers.0.mlp.up_proj.weight"] == 0.1 and given["model.layers.1.mlp.up_proj.weight"] == 0.5


def test_a_dict_with_gaps_or_unknown_names_is_an_error(tiny_llama):
    targets = find_targets(tiny_llama)
    with pytest.raises(
        ValueError, match=r"says nothing about 12 of 14 targets, e.g. 'model.layers.0.*'; add an entry such as"
    ):
        from_dict({"q_proj": 0.5}, targets)
    with pytest.raises(ValueError, match="'q_prj' matches no parameter .* q_proj"):
        from_dict({"q_prj": 0.5, "re:.*": 0.5}, targets)


@pytest.mark.parametrize("m", [4, 8, 16])
@pytest.mark.parametrize("seed", range(3))
def test_an_nm_mix_meets_the_average_to_half_the_smallest_step(seed, m):
    rng = random.Random(seed)
    sizes = {f"w{i}": 4096 for i in range(20)}
    sparsities = {name: rng.uniform(0.3, 0.7) for name in sizes}
    counts = nm_mix(sparsities, sizes, m)
    assert set(counts) == set(sizes) and all(isinstance(n, int) and 1 <= n <= m for n in counts.values())
    kept = sum(counts[name] / m * sizes[name] for name in sizes)
    wanted = sum((1 - sparsities[name]) * sizes[name] for name in sizes)
    assert abs(kept - wanted) <= 0.5 * 4096 / m + 1e-6
    assert all(abs(counts[name] - (1 - sparsities[name]) * m) <= 1 for name in sizes)


def test_an_nm_mix_of_whole_densities_is_those_densities():
    sparsities = {"a": 0.5, "b": 0.25, "c": 0.75}
    assert nm_mix(sparsities, dict.fromkeys(sparsities, 100), 4) == {"a": 2, "b": 3, "c": 1}


def test_an_nm_mix_keeps_at_least_one_of_m_and_takes_it_from_another():
    assert nm_mix({"a": 0.99, "b": 0.01}, {"a": 8, "b": 8}, 4) == {"a": 1, "b": 3}
    assert nm_mix({"a": 0.99, "b": 0.99}, {"a": 8, "b": 8}, 4) == {"a": 1, "b": 1}


def test_names():
    assert set(allocation.ALLOCATIONS) == {"uniform", "erk", "owl"}


@pytest.mark.parametrize("text", ["16x16", "constant-fan-in", "channel", "unstructured"])
def test_coarse_patterns_meet_the_average_to_half_a_unit(text, tiny_model):
    """Ten layers of blocks: each rounds to whole units, and what one loses the next makes up for."""
    from hf_sparse import SparsityConfig, prune

    model = tiny_model("llama", num_hidden_layers=4)
    report = prune(model, SparsityConfig(sparsity=0.55, pattern=text, saliency="magnitude"))
    total = sum(p.numel for p in report.parameters)
    unit = {"16x16": 256, "constant-fan-in": 128, "channel": 128, "unstructured": 1}[text]
    assert abs(report.sparsity - 0.55) * total <= unit / 2 + 1e-6
    assert report.conforms
