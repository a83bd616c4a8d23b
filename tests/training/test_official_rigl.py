"""RigL and SET step by step against the masks of google-research/rigl; GraNet's schedules against VITA-Group/GraNet.

``tests/data/official_rigl.json`` was recorded from a run of that code (``SparseRigLOptimizerBase`` and
``SparseSETOptimizerBase``, unchanged) on a network of two layers, 12x16 and 16x8, with real losses and gradients: the scores
as it ranked them, among them its noise of 1e-5 on |w|, the masks before and after every update, the drop fraction, and the
step. What is tested is the rule, with the scores fed in. Around the rule the official code differs from ours in this:

- On the iteration of a mask update RigL takes *no* optimizer step, and the iteration does not count: the gradient of a fresh
  batch moves the mask and is thrown away. SET takes the step and then updates.
- Updates come at steps 0, 4, 8 ... 24 for RigL (before the first optimizer step too) and at 1, 5, 9 ... for SET.
- ``k = int(float32(α) * float32(nnz))``. In double precision the truncation can differ where α nnz is a whole number: at half
  time float32 says 0.14999999, so that of 40 weights 5 go, not 6.
- Its cosine takes the step itself, not the steps since ``begin_step``; for a begin of 0 that is the same.
- Ties are broken by noise; here there are none.
"""

import base64
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_sparse.schedules import Cosine, Cubic
from hf_sparse.training.update import drop_and_grow

RECORD = json.loads((Path(__file__).parents[1] / "data" / "official_rigl.json").read_text(encoding="utf-8"))
METHODS = ["rigl", "set"]


def scores(text: str, shape: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f4").reshape(shape).copy())


def mask(text: str, shape: list[int]) -> torch.Tensor:
    packed = np.frombuffer(bytes.fromhex(text), dtype=np.uint8)
    return torch.from_numpy(np.unpackbits(packed, count=math.prod(shape)).reshape(shape).astype(bool))


def layers(method: str):
    """(update, layer, shape) of every recorded layer update."""
    run = RECORD[method]
    return [(u, layer, shape) for u in run["updates"] for layer, shape in zip(u["layers"], run["shapes"], strict=True)]


@pytest.mark.parametrize("method", METHODS)
def test_every_update_gives_the_official_mask(method):
    moved = 0
    for update, layer, shape in layers(method):
        before, after = mask(layer["mask"], shape), mask(layer["after"], shape)
        nonzeros = int(before.sum())
        drop = int(update["drop_fraction"] * nonzeros)
        ours = drop_and_grow(
            before, scores(layer["drop"], shape), scores(layer["grow"], shape), drop=drop, keep=nonzeros
        )
        assert torch.equal(ours, after), f"{method}, step {update['global_step']}, layer {shape}"
        moved += int((before & ~after).sum())
    assert moved > 80  # the record is of masks that move


@pytest.mark.parametrize("method", METHODS)
def test_masks_chain_from_update_to_update(method):
    """Ours carried on from the first recorded mask ends at the last official one."""
    run = RECORD[method]
    current = [
        mask(layer["mask"], shape) for layer, shape in zip(run["updates"][0]["layers"], run["shapes"], strict=True)
    ]
    for update in run["updates"]:
        for i, (layer, shape) in enumerate(zip(update["layers"], run["shapes"], strict=True)):
            nonzeros = int(current[i].sum())
            drop = int(update["drop_fraction"] * nonzeros)
            drop_scores, grow_scores = scores(layer["drop"], shape), scores(layer["grow"], shape)
            current[i] = drop_and_grow(current[i], drop_scores, grow_scores, drop=drop, keep=nonzeros)
    for ours, layer, shape in zip(current, run["updates"][-1]["layers"], run["shapes"], strict=True):
        assert torch.equal(ours, mask(layer["after"], shape))


def test_a_weight_dropped_in_an_update_may_come_back_in_it():
    """The record has such weights: fewer change place than were dropped."""
    returned = 0
    for update, layer, shape in layers("rigl"):
        before, after = mask(layer["mask"], shape), mask(layer["after"], shape)
        returned += int(update["drop_fraction"] * int(before.sum())) - int((before & ~after).sum())
    assert returned > 0


@pytest.mark.parametrize("method", METHODS)
def test_drop_fraction_is_the_official_cosine(method):
    run = RECORD[method]
    cosine = Cosine(run["initial"], 0.0, run["begin"], run["end"])
    for update in run["updates"]:
        assert cosine(update["global_step"]) == pytest.approx(update["drop_fraction"], abs=1e-7)


def test_drop_fraction_halves_at_half_time():
    official = {update["global_step"]: update["drop_fraction"] for update in RECORD["rigl"]["updates"]}
    assert [official[t] for t in (0, 12, 24)] == pytest.approx([0.3, 0.15, 0.0], abs=1e-7)
    assert [Cosine(0.3, 0.0, 0, 24)(t) for t in (0, 12, 24)] == pytest.approx([0.3, 0.15, 0.0], abs=1e-15)


# VITA-Group/GraNet @ f338a24, CIFAR/sparselearning/core.py: how many of 10^6 weights ``Masking.pruning`` keeps after a step,
# for 100 steps an epoch. It prunes globally, by |w| over all layers. The last entry is the last update that prunes: the code
# stops one update before the end of the ramp, and so a little short of the final density.
GRANET = [
    # initial and final density, begin and end of the ramp in multiples of the update interval, {step: kept}
    (0.5, 0.1, 0, 800, {25: 463659, 100: 367968, 200: 268750, 400: 149999, 600: 106249, 775: 100012}),
    (1.0, 0.05, 80, 480, {120: 742550, 200: 375850, 280: 168750, 400: 57600, 440: 50950}),
]


@pytest.mark.parametrize(("initial", "final", "begin", "end", "kept"), GRANET)
def test_cubic_is_the_ramp_of_granet(initial, final, begin, end, kept):
    ramp = Cubic(1 - initial, 1 - final, begin, end)
    for step, count in kept.items():
        assert 1e6 * (1 - ramp(step)) == pytest.approx(count, abs=1.001)  # it truncates
    assert ramp(end) == 1 - final


def test_cosine_is_the_prune_rate_of_granet():
    """Its ``CosineDecay(0.5, 1000)``: to 0.005, not to zero, over all of training rather than the ramp."""
    official = {0: 0.5, 250: 0.4275089283436704, 500: 0.2525, 750: 0.07749107165632929, 1000: 0.005}
    assert {t: Cosine(0.5, 0.005, 0, 1000)(t) for t in official} == pytest.approx(official, abs=1e-12)
