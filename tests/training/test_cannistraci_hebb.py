"""Cannistraci-Hebb scores against the authors' GPU variant and against a walk over paths; drawing against torch.multinomial.

``tests/data/official_chts.json`` was recorded from a run of ``DSTScheduler._dst_step`` of
biomedical-cybernetics/Cannistraci-Hebb-training on random masks and weights: its growth scores (``CH2_L3n``, ``CH3_L3n``) and
the probabilities it draws the kept links with (``weight_magnitude_soft``, ``ri_soft``).
"""

import base64
import itertools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_sparse.training.cannistraci_hebb import link_scores, soft_drop, soft_grow, temperature

RECORD = json.loads((Path(__file__).parents[1] / "data" / "official_chts.json").read_text(encoding="utf-8"))


def floats(text: str, shape) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f4").reshape(shape).copy())


def bits(text: str, shape) -> torch.Tensor:
    packed = np.frombuffer(bytes.fromhex(text), dtype=np.uint8)
    return torch.from_numpy(np.unpackbits(packed, count=math.prod(shape)).reshape(shape).astype(bool))


def random(shape, seed: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rule", ["CH2", "CH3"])
@pytest.mark.parametrize("case", RECORD["cases"], ids=lambda case: str(case["shape"]))
def test_scores_are_the_official_ones(case, rule):
    official = floats(case[rule], case["shape"])
    assert (official > 0).sum() > 10
    torch.testing.assert_close(link_scores(bits(case["mask"], case["shape"]), rule), official, rtol=1e-6, atol=0)


def by_walking(links: list[tuple[int, int]], out: int, inp: int, rule: str) -> torch.Tensor:
    """The definition on an ordinary graph: nodes are ('u', i) and ('v', j), the local community all that lies on a path of
    length 3, a link is internal if it joins two of its nodes, external if it leaves it other than to the two ends."""
    neighbours = {("u", i): set() for i in range(out)} | {("v", j): set() for j in range(inp)}
    for i, j in links:
        neighbours["u", i].add(("v", j))
        neighbours["v", j].add(("u", i))
    scores = torch.zeros(out, inp)
    for i, j in itertools.product(range(out), range(inp)):
        a, b = ("u", i), ("v", j)
        if b in neighbours[a]:
            continue
        paths = [(t, d) for t in neighbours[a] for d in neighbours[t] if b in neighbours[d] and d != a]
        community = {node for path in paths for node in path}
        for z in community:
            internal = len(neighbours[z] & community)
            external = len(neighbours[z] - community - {a, b})
            scores[i, j] += (1 + internal if rule == "CH2" else 1) / (1 + external)
    return scores


@pytest.mark.parametrize("rule", ["CH2", "CH3"])
@pytest.mark.parametrize(("seed", "density"), [(0, 0.15), (1, 0.3), (2, 0.5), (3, 0.8)])
def test_scores_are_those_of_a_walk_over_paths(seed, density, rule):
    mask = random((9, 13), seed) < density
    links = [tuple(link) for link in mask.nonzero().tolist()]
    torch.testing.assert_close(link_scores(mask, rule), by_walking(links, *mask.shape, rule), rtol=1e-6, atol=1e-7)


def test_one_path_by_hand():
    """u0 - v0 - u1 - v1: both nodes in between know one of the community and nobody outside. u1 also reads v2 below."""
    mask = torch.tensor([[True, False, False], [True, True, False]])
    assert link_scores(mask, "CH3")[0].tolist() == [0, 2, 0]
    assert link_scores(mask, "CH2")[0].tolist() == [0, 4, 0]
    mask[1, 2] = True
    assert link_scores(mask, "CH3")[0].tolist() == [0, 1.5, 1.5]
    assert link_scores(mask, "CH2")[0].tolist() == [0, 3, 3]


def test_temperature_rises_from_one_to_three():
    assert [temperature(step, 200) for step in (0, 100, 200, 500)] == [1, 2, 3, 3]


@pytest.mark.parametrize("case", RECORD["cases"], ids=lambda case: str(case["shape"]))
def test_probabilities_of_keeping_are_the_official_ones(case):
    weight = floats(case["weight"], case["shape"])
    for name, official in case["removal"].items():
        method, step = name.split()
        if method != "weight_magnitude_soft":
            continue  # relative importance, which the authors' Transformer runs do not use
        p = weight.abs() ** temperature(int(step), 100)
        torch.testing.assert_close(p / p.sum(), floats(official, case["shape"]), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_drawing_is_multinomial_when_it_is_given_its_noise(seed):
    """torch.multinomial without replacement divides p by exponential noise and takes the largest; with U = exp(-that) ours
    must choose the very same."""
    mask = random((12, 20), seed) < 0.4
    weight = (random((12, 20), seed + 100) - 0.5) * mask
    drop = int(0.3 * mask.sum())
    p = (weight.abs() ** 2.0).flatten()
    keep = int(mask.sum()) - drop
    official = torch.multinomial(p / p.sum(), keep, generator=torch.Generator().manual_seed(seed))
    exponential = torch.empty_like(p).exponential_(generator=torch.Generator().manual_seed(seed))
    ours = soft_drop(weight.abs(), mask, torch.exp(-exponential).view(12, 20), drop=drop, temperature=2.0)
    assert set(official.tolist()) == set(ours.flatten().nonzero().flatten().tolist())

    scores = link_scores(ours)
    p = scores.flatten()
    official = torch.multinomial(p / p.sum(), drop, generator=torch.Generator().manual_seed(seed + 1))
    exponential = torch.empty_like(p).exponential_(generator=torch.Generator().manual_seed(seed + 1))
    grown = soft_grow(scores, ours, torch.exp(-exponential).view(12, 20), keep=int(mask.sum())) & ~ours
    assert set(official.tolist()) == set(grown.flatten().nonzero().flatten().tolist())


def test_sets_are_drawn_with_the_probability_of_drawing_one_after_the_other():
    p = [0.4, 0.3, 0.2, 0.1]
    exact = {}
    for pair in itertools.combinations(range(4), 2):
        exact[pair] = sum(p[a] * p[b] / (1 - p[a]) for a, b in itertools.permutations(pair))
    assert sum(exact.values()) == pytest.approx(1)
    draws, generator = 6000, torch.Generator().manual_seed(0)
    importance, everything = torch.tensor([p]), torch.ones(1, 4, dtype=torch.bool)
    seen = Counter()
    for _ in range(draws):
        kept = soft_drop(importance, everything, torch.rand(1, 4, generator=generator), drop=2, temperature=1.0)
        seen[tuple(kept[0].nonzero().flatten().tolist())] += 1
    chi_square = sum((seen[pair] - draws * exact[pair]) ** 2 / (draws * exact[pair]) for pair in exact)
    assert chi_square < 20.5  # 5 degrees of freedom: exceeded once in a thousand, and the noise is fixed


def test_counts_are_exact_and_links_stay_in_their_place():
    mask = random((16, 24), 3) < 0.2
    links = int(mask.sum())
    for drop in (0, 1, links // 3, links):
        kept = soft_drop(random((16, 24), 4), mask, random((16, 24), 5), drop=drop, temperature=1.5)
        assert int(kept.sum()) == links - drop and not (kept & ~mask).any()
        grown = soft_grow(link_scores(kept), kept, random((16, 24), 6), keep=links)
        assert int(grown.sum()) == links and not (kept & ~grown).any()


def test_links_without_probability_are_taken_last():
    weight = torch.tensor([[0.0, 1.0, 0.0, 2.0, 0.0, 3.0]])
    mask = torch.tensor([[True, True, True, True, False, True]])
    for seed in range(20):
        kept = soft_drop(weight, mask, random((1, 6), seed), drop=2, temperature=3.0)
        assert kept.tolist() == [[False, True, False, True, False, True]]
        kept = soft_drop(weight, mask, random((1, 6), seed), drop=1, temperature=3.0)
        assert kept[0, [1, 3, 5]].all() and int(kept.sum()) == 4 and not kept[0, 4]


def test_growth_takes_all_scored_links_and_more_where_the_scores_do_not_suffice():
    kept = torch.zeros(6, 6, dtype=torch.bool)
    kept[0, 0] = kept[1, 0] = kept[1, 1] = True  # one path: only (0, 1) has a score
    scores = link_scores(kept)
    assert int((scores > 0).sum()) == 1
    others = set()
    for seed in range(30):
        grown = soft_grow(scores, kept, random((6, 6), seed), keep=6)
        assert int(grown.sum()) == 6 and grown[0, 1]
        others |= set(map(tuple, (grown & ~kept).nonzero().tolist()))
    assert len(others) > 25  # anything missing may come


def test_where_the_scores_do_not_suffice_every_missing_link_gets_a_little_more():
    """1e-5 on top of scores of that size, as in the official code: the draw is then nearly uniform."""
    kept = random((20, 20), 0) < 0.1
    scores = torch.zeros(20, 20)
    scores[3, :4] = 2e-5
    p = ((scores + 1e-5) * ~kept).flatten()
    for seed in range(5):
        official = torch.multinomial(p / p.sum(), 30, generator=torch.Generator().manual_seed(seed))
        exponential = torch.empty_like(p).exponential_(generator=torch.Generator().manual_seed(seed))
        grown = soft_grow(scores, kept, torch.exp(-exponential).view(20, 20), keep=int(kept.sum()) + 30) & ~kept
        assert set(official.tolist()) == set(grown.flatten().nonzero().flatten().tolist())


def test_noise_at_the_ends_of_the_interval_does_no_harm():
    mask = torch.ones(2, 3, dtype=torch.bool)
    noise = torch.tensor([[0.0, 1.0, 0.5], [0.0, 1.0, 0.5]])
    kept = soft_drop(torch.ones(2, 3), mask, noise, drop=4, temperature=1.0)
    assert kept.tolist() == [[False, True, False], [False, True, False]]


def test_equal_noise_gives_equal_masks():
    mask, noise = random((8, 8), 0) < 0.5, random((8, 8), 1)
    first = soft_drop(random((8, 8), 2), mask, noise, drop=9, temperature=1.0)
    assert torch.equal(first, soft_drop(random((8, 8), 2), mask, noise, drop=9, temperature=1.0))


def test_errors_name_what_was_wrong():
    mask = random((4, 4), 0) < 0.5
    with pytest.raises(ValueError, match="'CH2' and 'CH3', got 'CH9'"):
        link_scores(mask, "CH9")
    with pytest.raises(ValueError, match="matrix"):
        link_scores(mask[0])
    with pytest.raises(ValueError, match="cannot be dropped of"):
        soft_drop(mask.float(), mask, random((4, 4), 1), drop=17, temperature=1.0)
    with pytest.raises(ValueError, match="cannot be reached"):
        soft_grow(mask.float(), mask, random((4, 4), 1), keep=0)
    with pytest.raises(ValueError, match="one shape"):
        soft_drop(mask.float(), mask, random((4, 5), 1), drop=1, temperature=1.0)


@pytest.mark.gpu
def test_gpu_gives_the_same_mask():
    mask, noise = random((64, 96), 0) < 0.2, random((64, 96), 1)
    torch.testing.assert_close(link_scores(mask.cuda()).cpu(), link_scores(mask), rtol=1e-5, atol=0)
    here = soft_drop(random((64, 96), 2), mask, noise, drop=300, temperature=2.0)
    there = soft_drop(random((64, 96), 2).cuda(), mask.cuda(), noise.cuda(), drop=300, temperature=2.0)
    assert torch.equal(here, there.cpu())
