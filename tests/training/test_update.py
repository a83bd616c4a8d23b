"""How masks move: against a reference in plain Python, and sharded over processes against whole."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_sparse.training.update import drop_and_grow, drop_and_grow_all, lowest, lowest_of_all

INFINITY = float("inf")
LEVELS = [-INFINITY, -3.0, -1e-40, -0.0, 0.0, 1e-40, 1.0, 1.0 + 2**-23, 7.5, INFINITY]


def by_sorting(scores: list[float], candidates: list[bool], count: int) -> list[bool]:
    """Python's sort is stable, compares -0.0 equal to 0.0, and knows nothing of bits."""
    order = sorted((i for i, c in enumerate(candidates) if c), key=lambda i: scores[i])
    chosen = set(order[:count])
    return [i in chosen for i in range(len(scores))]


def cases(trials: int):
    for trial in range(trials):
        rng = random.Random(trial)
        levels = rng.choice([LEVELS, [0.0, -0.0], [-1.0, 1.0], [rng.gauss(0, 1) for _ in range(40)]])
        size = rng.randint(1, 40)
        scores = torch.tensor([rng.choice(levels) for _ in range(size)])
        candidates = torch.tensor([rng.random() < 0.7 for _ in range(size)])
        yield rng, scores, candidates


def test_lowest_is_what_sorting_finds():
    for rng, scores, candidates in cases(400):
        count = rng.randint(0, int(candidates.sum()))
        found = lowest([scores], [candidates], [count])[0]
        assert found.tolist() == by_sorting(scores.tolist(), candidates.tolist(), count)


def test_lowest_of_all_is_what_sorting_one_long_list_finds():
    for trial in range(300):
        rng = random.Random(trial)
        levels = rng.choice([LEVELS, [0.0, -0.0], [-2.0, 5.0]])
        shapes = [(rng.randint(1, 4), rng.randint(1, 5)) for _ in range(rng.randint(1, 4))]
        scores = [torch.tensor([[rng.choice(levels) for _ in range(c)] for _ in range(r)]) for r, c in shapes]
        candidates = [torch.rand(shape, generator=torch.Generator().manual_seed(trial)) < 0.6 for shape in shapes]
        flat_scores = [x for s in scores for x in s.flatten().tolist()]
        flat_candidates = [x for c in candidates for x in c.flatten().tolist()]
        count = rng.randint(0, sum(flat_candidates))
        found = lowest_of_all(scores, candidates, count)
        assert [x for f in found for x in f.flatten().tolist()] == by_sorting(flat_scores, flat_candidates, count)


def test_drop_and_grow_is_what_sorting_finds():
    for rng, scores, mask in cases(400):
        growth = torch.tensor([rng.choice(LEVELS) for _ in range(len(mask))])
        kept = int(mask.sum())
        drop = rng.randint(0, kept)
        keep = rng.randint(kept - drop, len(mask))
        gone = by_sorting(scores.tolist(), mask.tolist(), drop)
        survives = [m and not g for m, g in zip(mask.tolist(), gone, strict=True)]
        new = by_sorting([-g for g in growth.tolist()], [not s for s in survives], keep - sum(survives))
        found = drop_and_grow(mask, scores, growth, drop=drop, keep=keep)
        assert found.tolist() == [s or n for s, n in zip(survives, new, strict=True)]
        assert int(found.sum()) == keep


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_scores_are_ranked_in_float32(dtype):
    scores = torch.tensor([1.0, 1.0 + 1e-12, -2.0, 0.5], dtype=dtype)  # the first two are one number in float32
    found = lowest([scores], [torch.ones(4, dtype=torch.bool)], [3])[0]
    assert found.tolist() == [True, False, True, True]


def test_any_shape_and_layout():
    scores = torch.arange(24.0).reshape(2, 3, 4)
    transposed = scores.transpose(0, 2)  # not contiguous: the index that breaks ties and counts is that of the view
    every = torch.ones_like(transposed, dtype=torch.bool)
    assert torch.equal(lowest([transposed], [every], [5])[0], transposed < 5)
    assert torch.equal(lowest_of_all([transposed, transposed], [every, every], 10)[1], transposed < 5)


def test_a_weight_dropped_a_moment_ago_may_be_grown_again():
    mask = torch.tensor([True, True, False, False])
    size, slope = torch.tensor([0.1, 5.0, 0.0, 0.0]), torch.tensor([9.0, 0.0, 1.0, 2.0])
    assert drop_and_grow(mask, size, slope, drop=1, keep=2).tolist() == [True, True, False, False]


def test_counts_that_cannot_be_are_refused():
    mask, scores = torch.tensor([True, False, True]), torch.zeros(3)
    for drop, keep in ((3, 3), (-1, 2), (0, 1), (1, 4)):
        with pytest.raises(ValueError, match=f"cannot drop {drop} of 2 kept weights and then keep {keep} of 3"):
            drop_and_grow(mask, scores, scores, drop=drop, keep=keep)
    with pytest.raises(ValueError, match="1 more weights survive than are to be kept"):
        drop_and_grow_all([mask], [scores], [scores], [0], [1])


@pytest.mark.slow
def test_sharded_over_three_processes_equals_whole():
    """Many ties, negative scores, both zeros, denormals and infinities, ranks without a row."""
    script = Path(__file__).with_name("_sharded_update.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
