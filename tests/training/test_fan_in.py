"""Constant fan-in against the authors' code, against the definition written as loops, and on its own promises.

``tests/data/official_srigl.json`` was recorded from a run of calgaryml/condensed-sparsity (``RigLConstFanScheduler``) on a
network of three layers with real losses: weights, gradients and masks of every update. The masks must be the same, except
where the record says that the official code decided by position instead of by score (the module's docstring says how); there
the ablated rows and the fan-in must be the same.
"""

import base64
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_sparse.patterns import ConstantFanIn
from hf_sparse.training.fan_in import constant_fan_in_start, constant_fan_in_update

RECORD = json.loads((Path(__file__).parents[1] / "data" / "official_srigl.json").read_text(encoding="utf-8"))


def floats(text: str, shape) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f4").reshape(shape).copy())


def mask(text: str, shape) -> torch.Tensor:
    packed = np.frombuffer(bytes.fromhex(text), dtype=np.uint8)
    return torch.from_numpy(np.unpackbits(packed, count=math.prod(shape)).reshape(shape).astype(bool))


def recorded():
    for run in RECORD["runs"]:
        last = len(run["shapes"]) - 1
        for update in run["updates"]:
            for i, (layer, shape) in enumerate(zip(update["layers"], run["shapes"], strict=True)):
                ours = constant_fan_in_update(
                    floats(layer["weight"], shape),
                    mask(layer["mask"], shape),
                    floats(layer["gradient"], shape),
                    update["fraction"],
                    density=run["density"],
                    gamma_sal=run["gamma_sal"],
                    ablate=i != last,
                )
                yield layer, mask(layer["mask"], shape), mask(layer["after"], shape), ours


def test_every_update_gives_the_official_mask():
    same = moved = ablated = 0
    for layer, before, official, ours in recorded():
        if layer["overflow"] or layer["fills"]:
            continue
        assert torch.equal(ours, official), (layer["ablated"], layer["fan_in"])
        same += 1
        moved += int((before & ~official).sum())
        ablated += len(layer["ablated"])
    assert same >= 35 and moved > 100 and ablated > 20  # the record covers what it should


def test_where_the_official_code_goes_by_position_the_shape_of_the_mask_is_the_same():
    seen = 0
    for layer, _, official, ours in recorded():
        if layer["overflow"] or layer["fills"]:
            seen += 1
            assert torch.equal(ours.sum(dim=1), official.sum(dim=1))
            assert sorted(layer["ablated"]) == (~ours.any(dim=1)).nonzero().flatten().tolist()
            assert int(ours.sum(dim=1).max()) == layer["fan_in"]
    assert seen >= 1


def by_loops(weight, mask, gradient, fraction, density, gamma_sal, ablate):
    """The definition, one entry at a time; scores are distinct."""
    out, inp = weight.shape
    entries = [(i, j) for i in range(out) for j in range(inp)]
    active = [e for e in entries if mask[e]]
    prune = int(len(active) * fraction)
    by_size = sorted(active, key=lambda e: -abs(weight[e]))
    by_slope = sorted(entries, key=lambda e: -abs(gradient[e]))
    budget = int(out * inp * density)
    rows = set(range(out))
    if ablate:
        salient = set(by_size[: len(active) - prune]) | set(by_slope[:prune])
        counts = [sum(e[0] == i for e in salient) for i in range(out)]
        enough = max(1, int(gamma_sal * (budget // out)))
        enough = min(enough, sorted(counts, reverse=True)[min(budget // inp, out - 1)])
        rows = {i for i in range(out) if counts[i] >= enough}
    fan_in = budget // len(rows)
    new = torch.zeros(out, inp, dtype=torch.bool)
    keep = [e for e in by_size if e[0] in rows][: len(active) - prune]
    for i in rows:
        row = [e for e in keep if e[0] == i][:fan_in]
        row += [e for e in by_slope if e[0] == i and e not in row][: fan_in - len(row)]
        for e in row:
            new[e] = True
    return new


@pytest.mark.parametrize("seed", range(12))
def test_equals_the_definition(seed):
    generator = torch.Generator().manual_seed(seed)
    shape = [(9, 14), (16, 8), (5, 30)][seed % 3]
    density, gamma_sal, fraction = [(0.5, 0.95, 0.3), (0.25, 0.6, 0.2), (0.15, 0.3, 0.4), (0.8, 1.0, 0.5)][seed % 4]
    start = torch.rand(shape, generator=generator) < density  # rows of unequal fan-in, as after another method
    weight, gradient = torch.randn((2, *shape), generator=generator) * torch.rand(shape[0], 1, generator=generator)
    for ablate in (True, False):
        ours = constant_fan_in_update(
            weight, start, gradient, fraction, density=density, gamma_sal=gamma_sal, ablate=ablate
        )
        assert torch.equal(ours, by_loops(weight, start, gradient, fraction, density, gamma_sal, ablate))


def test_the_budget_of_an_ablated_neuron_goes_to_the_others():
    start = constant_fan_in_start(torch.rand(8, 16, generator=torch.Generator().manual_seed(0)), 0.25)
    weight, gradient = torch.ones(8, 16) + torch.arange(16), torch.ones(8, 16) + torch.arange(16)
    weight[3] *= 1e-3
    gradient[3] *= 1e-3
    after = constant_fan_in_update(weight, start, gradient, 0.3, density=0.25)
    assert after.sum(dim=1).tolist() == [4, 4, 4, 0, 4, 4, 4, 4]  # 32 // 7
    kept = constant_fan_in_update(weight, start, gradient, 0.3, density=0.25, ablate=False)
    assert kept.sum(dim=1).tolist() == [4] * 8
    weight[:5] = gradient[:5] = 1e-3
    after = constant_fan_in_update(weight, start, gradient, 0.65, density=0.25)  # 12 kept, 20 dropped
    assert after.sum(dim=1).tolist() == [0, 0, 0, 0, 0, 10, 10, 10]  # 32 // 3


def test_enough_rows_stay_for_the_budget():
    """Everything salient lies in one row of 16 inputs, the budget is 32: rows that tie for second place stay."""
    weight, gradient = torch.full((8, 16), 1e-6), torch.zeros(8, 16)
    start = torch.zeros(8, 16, dtype=torch.bool)
    start[0] = True
    start[1:, 0] = True
    weight[0] = torch.arange(1.0, 17.0)
    after = constant_fan_in_update(weight, start, gradient, 0.0, density=0.25, gamma_sal=1.0)
    assert after.sum(dim=1).tolist() == [4] * 8
    after = constant_fan_in_update(weight, start, torch.eye(8, 16), 0.3, density=0.25, gamma_sal=1.0)
    assert (after.sum(dim=1) <= 16).all() and after.sum() <= 32


def test_a_weight_still_zero_is_not_kept_for_its_size():
    """A weight grown in the last update and never moved by the optimizer competes by its gradient like any other."""
    start = torch.ones(1, 4, dtype=torch.bool)
    weight, gradient = torch.tensor([[0.0, 0.0, 3.0, 4.0]]), torch.tensor([[2.0, 1.0, 0.0, 0.0]])
    after = constant_fan_in_update(weight, start, gradient, 0.0, density=0.75, ablate=False)
    assert after.tolist() == [[True, False, True, True]]


@pytest.mark.parametrize("density", [0.1, 1 - 0.9, 0.33, 0.5, 1.0])
def test_start_has_the_highest_of_every_row(density):
    noise = torch.rand(30, 40, generator=torch.Generator().manual_seed(1))
    start = constant_fan_in_start(noise, density)
    fan_in = {0.1: 4, 0.33: 13, 0.5: 20, 1.0: 40}[round(density, 6)]
    for scores, kept in zip(noise, start, strict=True):
        assert set(kept.nonzero().flatten().tolist()) == set(scores.argsort(descending=True)[:fan_in].tolist())
    assert ConstantFanIn().check(start.float())


def test_start_needs_an_input_for_every_row():
    with pytest.raises(ValueError, match=r"density of at least 0\.0625"):
        constant_fan_in_start(torch.rand(8, 16), 0.05)
    with pytest.raises(ValueError, match="matrix"):
        constant_fan_in_start(torch.rand(2, 8, 16), 0.5)
    with pytest.raises(ValueError, match="one shape"):
        constant_fan_in_update(torch.rand(8, 16), torch.ones(8, 16) > 0, torch.rand(16, 8), 0.3, density=0.5)


def test_bfloat16_is_ranked_like_its_float32_values():
    generator = torch.Generator().manual_seed(5)
    weight, gradient = torch.randn((2, 12, 24), generator=generator).bfloat16()
    start = constant_fan_in_start(torch.rand(12, 24, generator=generator), 0.25)
    low = constant_fan_in_update(weight, start, gradient, 0.3, density=0.25)
    high = constant_fan_in_update(weight.float(), start, gradient.float(), 0.3, density=0.25)
    assert torch.equal(low, high)


@pytest.mark.gpu
def test_gpu_gives_the_same_mask():
    generator = torch.Generator().manual_seed(6)
    weight, gradient = torch.randn((2, 64, 96), generator=generator)
    start = constant_fan_in_start(torch.rand(64, 96, generator=generator), 0.2)
    here = constant_fan_in_update(weight, start, gradient, 0.3, density=0.2, gamma_sal=0.9)
    there = constant_fan_in_update(weight.cuda(), start.cuda(), gradient.cuda(), 0.3, density=0.2, gamma_sal=0.9)
    assert torch.equal(here, there.cpu())
