"""Saliencies against their formulas written as loops over literal numbers."""

import hashlib
import math

import numpy
import pytest
import torch

from hf_sparse import saliency
from hf_sparse.saliency import SALIENCIES, Statistics

WEIGHT = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -4.0]])
INPUTS = torch.tensor([[1.0, 0.0, 2.0], [2.0, 1.0, -2.0], [0.0, 3.0, 1.0], [1.0, 1.0, 1.0]])


def seen(**others) -> Statistics:
    return Statistics(tokens=4, sum_squares=INPUTS.square().sum(0), hessian=INPUTS.T @ INPUTS, **others)


def test_magnitude():
    assert SALIENCIES["magnitude"](WEIGHT, Statistics()).tolist() == [[1.0, 2.0, 0.5], [0.0, 3.0, 4.0]]


def test_wanda_is_size_times_input_norm():
    scores = SALIENCIES["wanda"](WEIGHT, seen())
    for i in range(2):
        for j in range(3):
            norm = math.sqrt(sum(float(x[j]) ** 2 for x in INPUTS))
            assert float(scores[i, j]) == pytest.approx(abs(float(WEIGHT[i, j])) * norm, rel=1e-6)


def test_ria_is_relative_importance_times_the_root_of_the_input_norm():
    scores = SALIENCIES["ria"](WEIGHT, seen())
    size = WEIGHT.abs().tolist()
    for i in range(2):
        for j in range(3):
            column, row = sum(size[k][j] for k in range(2)), sum(size[i])
            norm = math.sqrt(sum(float(x[j]) ** 2 for x in INPUTS))
            assert float(scores[i, j]) == pytest.approx((size[i][j] / column + size[i][j] / row) * norm**0.5, rel=1e-6)


def test_ria_of_an_all_zero_row_and_column_is_zero_not_nan():
    weight = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    statistics = Statistics(tokens=1, sum_squares=torch.tensor([1.0, 16.0]))
    assert SALIENCIES["ria"](weight, statistics).tolist() == [[0.0, 0.0], [0.0, 4.0]]


def test_obs_divides_by_the_diagonal_of_the_damped_inverse():
    scores = SALIENCIES["obs"](WEIGHT, seen())
    hessian = (INPUTS.T @ INPUTS).double().numpy()
    inverse = numpy.linalg.inv(hessian + 0.01 * numpy.trace(hessian) / 3 * numpy.eye(3))
    wanted = WEIGHT.double().numpy() ** 2 / numpy.diag(inverse)
    assert numpy.allclose(scores.numpy(), wanted, rtol=1e-4)


def test_obs_is_the_loss_of_removing_one_weight_and_refitting_the_others():
    """Hassibi & Stork: the least-squares error left after fixing w_j = 0 is w_j^2 / [H^-1]_jj."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(1, 4, generator=generator, dtype=torch.float64)
    ridge = 0.01 * (x.T @ x).diagonal().mean()
    x = torch.cat([x, ridge.sqrt() * torch.eye(4, dtype=torch.float64)])  # damping is four more rows of data
    plain = Statistics(hessian=(x[:50].T @ x[:50]).float())
    scores = SALIENCIES["obs"](weight.float(), plain)
    for j in range(4):
        others = [k for k in range(4) if k != j]
        fit = torch.linalg.lstsq(x[:, others], x @ weight[0]).solution
        loss = (x @ weight[0] - x[:, others] @ fit).square().sum()
        assert float(scores[0, j]) == pytest.approx(float(loss), rel=1e-4)


def test_gradient_and_taylor():
    gradient = torch.tensor([[0.5, 1.0, 0.0], [2.0, 1.0, 0.25]])
    assert torch.equal(SALIENCIES["gradient"](WEIGHT, seen(gradient=gradient)), gradient)
    taylor = SALIENCIES["taylor"](WEIGHT, seen(gradient=gradient))
    assert taylor.tolist() == [[0.5, 2.0, 0.0], [0.0, 3.0, 1.0]]


def test_random_is_seeded_by_seed_and_name():
    def draw(name, seed):
        return SALIENCIES["random"](WEIGHT, Statistics(name=name, seed=seed))

    state = torch.random.get_rng_state()
    first = draw("a", 0)
    torch.manual_seed(99)
    assert torch.equal(first, draw("a", 0))
    assert not torch.equal(first, draw("b", 0)) and not torch.equal(first, draw("a", 1))
    assert bool(((first >= 0) & (first < 1)).all())
    torch.random.set_rng_state(state)
    draw("a", 0)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is left alone"


@pytest.mark.parametrize("name", SALIENCIES)
def test_scores_have_the_shape_of_the_weight_and_leave_it_alone(name):
    weight = WEIGHT.clone()
    scores = SALIENCIES[name](weight, seen(gradient=torch.ones(2, 3), name="w"))
    assert scores.shape == weight.shape and torch.equal(weight, WEIGHT) and bool(scores.isfinite().all())
    assert SALIENCIES[name].__name__ == name and saliency.get(name) is SALIENCIES[name]


def test_what_each_one_needs():
    wanted = {"magnitude": "nothing", "random": "nothing", "wanda": "inputs", "ria": "inputs", "obs": "hessian"}
    wanted |= {"gradient": "gradient", "taylor": "gradient", "sparsegpt": "hessian", "alps": "hessian"}
    assert {name: saliency.needs(name) for name in wanted} == wanted


def test_any_callable_is_a_saliency():
    def mine(weight, statistics):
        return weight.square()

    assert saliency.get(mine) is mine and saliency.needs(mine) == "inputs"
    mine.needs = "nothing"
    assert saliency.needs(mine) == "nothing"
    assert saliency.default_pattern(mine) == "unstructured"


def test_unknown_names():
    with pytest.raises(ValueError, match=r"unknown saliency 'wandaa'; did you mean 'wanda'\?"):
        saliency.get("wandaa")
    with pytest.raises(ValueError, match=r"unknown saliency 'sparse_gpt'; did you mean 'sparsegpt'\?"):
        saliency.needs("sparse_gpt")
    with pytest.raises(
        ValueError, match="known are magnitude, random, wanda, ria, obs, gradient, taylor, sparsegpt, alps"
    ):
        saliency.get("zzzzzz")
    with pytest.raises(ValueError, match="unknown saliency None"):
        saliency.get(None)


def test_a_solver_is_not_a_function():
    with pytest.raises(ValueError, match="'sparsegpt' is a solver .* not a function"):
        saliency.get("sparsegpt")


def test_noise_equals_splitmix64():
    """Against SplitMix64 in Python's whole numbers (Steele et al. 2014, the finaliser of java.util.SplittableRandom)."""
    key = "7/some.weight"
    start = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
    expected = []
    for index in range(1000):
        z = (start + index * 0x9E3779B97F4A7C15) % 2**64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        z ^= z >> 31
        expected.append(((z >> 41) + 0.5) / 2**23)
    assert saliency.noise((10, 100), key).flatten().tolist() == expected


def test_noise_of_a_shard_is_a_shard_of_the_noise(monkeypatch):
    monkeypatch.setattr(saliency, "_NOISE_CHUNK", 64)
    whole = saliency.noise((30, 17), "a")
    assert torch.equal(saliency.noise((11, 17), "a", first=19 * 17), whole[19:])
    assert bool(((whole > 0) & (whole < 1)).all())


def test_noise_is_uniform_and_streams_are_independent():
    a, b = (saliency.noise((1000, 1000), key).double() for key in ("0/x", "0/y"))
    counts = torch.histc(a, 100, 0, 1)
    chi_square = float(((counts - 10_000) ** 2 / 10_000).sum())
    assert 50 < chi_square < 160  # 99 degrees of freedom: outside one time in 10^4
    for first, second in ((a, b), (a[:, 1:], a[:, :-1]), (a[1:], a[:-1])):
        assert abs(float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])) < 0.005
