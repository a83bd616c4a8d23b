"""Patterns against brute force: a Python sort of (score, index) pairs, and literal arrays small enough to read."""

import itertools
import random

import pytest
import torch

from hf_sparse.patterns import (
    NM,
    Block,
    Channel,
    ConstantFanIn,
    Pattern,
    Unstructured,
    _drop_lowest,
    parse,
    pruned_count,
)

EVERY = ["unstructured", "row", "constant-fan-in", "2:4", "1:4", "3:8", "4x4", "2x8", "channel"]


def dropped_by_sorting(scores: list[float], k: int) -> set[int]:
    """The reference: the k first of the indices ordered by (score, index)."""
    return set(sorted(range(len(scores)), key=lambda i: (scores[i], i))[:k])


def reference_mask(pattern: Pattern, scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """What each pattern means, one 2-D matrix, with loops over Python floats."""
    out, inp = scores.shape
    values = scores.tolist()
    keep = [[True] * inp for _ in range(out)]

    def drop(groups: list[list[tuple[int, int]]], k: int):
        """Of the groups, drops the k whose scores sum lowest."""
        for g in dropped_by_sorting([sum(values[i][j] for i, j in group) for group in groups], k):
            for i, j in groups[g]:
                keep[i][j] = False

    if isinstance(pattern, Block):
        starts = itertools.product(range(0, out, pattern.rows), range(0, inp, pattern.cols))
        groups = [[(i + a, j + b) for a in range(pattern.rows) for b in range(pattern.cols)] for i, j in starts]
        drop(groups, round(sparsity * len(groups)))
    elif isinstance(pattern, Channel):
        drop([[(i, j) for j in range(inp)] for i in range(out)], round(sparsity * out))
    elif isinstance(pattern, NM):
        for i in range(out):
            for start in range(0, inp, pattern.m):
                drop([[(i, start + c)] for c in range(pattern.m)], pattern.m - pattern.n)
    elif isinstance(pattern, ConstantFanIn):
        for i in range(out):
            drop([[(i, j)] for j in range(inp)], round(sparsity * inp))
    elif pattern.scope == "tensor":
        drop([[(i, j)] for i in range(out) for j in range(inp)], round(sparsity * out * inp))
    else:
        total, given = round(sparsity * out * inp), 0
        for i in range(out):
            count = (i + 1) * total // out - given
            given += count
            drop([[(i, j)] for j in range(inp)], count)
    return torch.tensor(keep)


def random_cases():
    """(pattern, shape, sparsity, kind of scores) over shapes every pattern fits, 3-D ones included."""
    rng = random.Random(0)
    for text in EVERY:
        for kind in ("distinct", "few values", "constant"):
            shape = (4 * rng.randint(1, 4), 8 * rng.randint(1, 12))
            shape = (rng.randint(1, 3), *shape) if rng.random() < 0.5 else shape
            sparsity = parse(text).implied_sparsity
            yield text, shape, round(rng.random(), 3) if sparsity is None else sparsity, kind


@pytest.mark.parametrize("text,shape,sparsity,kind", random_cases())
def test_a_mask_is_what_sorting_by_score_and_index_drops(text, shape, sparsity, kind):
    generator = torch.Generator().manual_seed(len(text) + shape[-1])
    # whole numbers, so that block and channel sums are exact in any order of summation
    scores = {
        "distinct": torch.randperm(torch.Size(shape).numel(), generator=generator).reshape(shape).float(),
        "few values": torch.randint(0, 4, shape, generator=generator).float(),
        "constant": torch.full(shape, 3.0),
    }[kind]
    pattern = parse(text)
    mask = pattern.mask(scores, sparsity)
    assert mask.dtype == torch.bool and mask.shape == scores.shape
    for matrix, got in zip(scores.reshape(-1, *shape[-2:]), mask.reshape(-1, *shape[-2:]), strict=True):
        assert torch.equal(got, reference_mask(pattern, matrix, sparsity))
    assert pattern.check(torch.where(mask, 1.5, 0.0))


@pytest.mark.parametrize("text", [text for text in EVERY if ":" not in text])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
def test_counts_are_exact_at_the_ends_and_in_the_middle(text, sparsity):
    pattern = parse(text)
    scores = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert int((~pattern.mask(scores, sparsity)).sum()) == round(sparsity * scores.numel())


def test_every_expert_has_its_own_exact_count():
    scores = torch.rand(5, 7, 16, generator=torch.Generator().manual_seed(2))
    scores[0] += 100.0  # would keep everything if the experts were ranked together
    zeros = (~parse("unstructured").mask(scores, 0.3)).sum(dim=(1, 2))
    assert zeros.tolist() == [round(0.3 * 7 * 16)] * 5


def test_rows_differ_by_at_most_one_and_the_total_is_exact():
    for rows, columns, sparsity in [(7, 10, 0.33), (3, 100, 0.5), (64, 5, 0.1), (5, 3, 0.999), (1, 9, 0.5)]:
        scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows))
        zeros = (~parse("row").mask(scores, sparsity)).sum(dim=1)
        assert int(zeros.max() - zeros.min()) <= 1
        assert int(zeros.sum()) == round(sparsity * rows * columns)


def test_constant_fan_in_keeps_the_same_number_in_every_row():
    scores = torch.rand(9, 37, generator=torch.Generator().manual_seed(3))
    assert parse("constant-fan-in").mask(scores, 0.7).sum(dim=1).tolist() == [37 - round(0.7 * 37)] * 9


@pytest.mark.parametrize("n", [4, 16, 17, 200])
@pytest.mark.parametrize("values", [2, 1000])
def test_selecting_equals_sorting_on_both_sides_of_16_elements(n, values):
    scores = torch.randint(0, values, (4, n), generator=torch.Generator().manual_seed(n)).float()
    for k in (0, 1, n // 3, n - 1, n):
        drop = _drop_lowest(scores, k)
        for row, got in zip(scores.tolist(), drop, strict=True):
            assert set(got.nonzero().flatten().tolist()) == dropped_by_sorting(row, k)


def test_literal_masks():
    scores = torch.tensor([[1.0, 4, 2, 3], [8, 7, 6, 5]])
    assert parse("unstructured").mask(scores, 0.5).tolist() == [[False] * 4, [True] * 4]
    assert parse("row").mask(scores, 0.5).tolist() == [[False, True, False, True], [True, True, False, False]]
    assert parse("2:4").mask(scores).tolist() == [[False, True, False, True], [True, True, False, False]]
    assert parse("1:2").mask(scores, 0.5).tolist() == [[False, True, False, True], [True, False, True, False]]
    assert parse("1x2").mask(scores, 0.5).tolist() == [[False] * 4, [True] * 4]
    assert parse("2x1").mask(scores, 0.25).tolist() == [[True, True, False, True]] * 2  # columns sum to 9 11 8 8
    assert parse("channel").mask(scores, 0.5).tolist() == [[False] * 4, [True] * 4]
    assert parse("4:4").mask(scores).all()


def test_negative_and_infinite_scores_are_ranked_like_any_other():
    scores = torch.tensor([[-1.0, float("inf"), -float("inf"), 0.0]])
    assert parse("unstructured").mask(scores, 0.5).tolist() == [[False, True, False, True]]


def test_scores_in_half_precision_and_views_are_taken_as_they_are():
    scores = torch.randint(0, 9, (32, 16), generator=torch.Generator().manual_seed(4))
    wanted = parse("unstructured").mask(scores.T.float().contiguous(), 0.4)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(parse("unstructured").mask(scores.to(dtype).T, 0.4), wanted)


@pytest.mark.parametrize(
    "text,bad",
    [
        ("2:4", [[1.0, 1, 1, 0], [1, 1, 0, 0]]),
        ("2:4", [[1.0, 0], [0, 0]]),  # does not divide
        ("2x2", [[1.0, 1, 0, 0], [1, 0, 0, 0]]),
        ("2x3", [[1.0, 1, 0, 0], [1, 1, 0, 0]]),  # does not divide
        ("constant-fan-in", [[1.0, 1, 0, 0], [1, 0, 0, 0]]),
        ("channel", [[1.0, 1, 1, 1], [1, 1, 1, 0]]),
    ],
)
def test_check_rejects_a_violation_also_in_one_expert_only(text, bad):
    bad = torch.tensor(bad)
    assert not parse(text).check(bad)
    assert not parse(text).check(torch.stack([torch.zeros_like(bad), bad]))


@pytest.mark.parametrize(
    "text,good",
    [
        ("2:4", [[1.0, 0, 0, 0], [0, 0, 0, 0]]),  # fewer than n is fine
        ("2x2", [[1.0, 1, 0, 0], [1, 1, 0, 0]]),
        ("constant-fan-in", [[1.0, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1]]),  # an ablated neuron
        ("channel", [[1.0, 1, 1, 1], [0, 0, 0, 0]]),
        ("unstructured", [[1.0, 0, 1, 1]]),
        ("row", [[1.0, 0, 1, 1]]),
    ],
)
def test_check_accepts(text, good):
    assert parse(text).check(torch.tensor(good))


@pytest.mark.parametrize("text", [*EVERY, "16x16", "1:2", "7:16"])
def test_a_pattern_prints_as_what_it_is_parsed_from(text):
    pattern = parse(text)
    assert str(pattern) == text and parse(str(pattern)) == pattern and parse(pattern) is pattern
    assert hash(pattern) == hash(parse(text))


def test_patterns_are_frozen():
    with pytest.raises(AttributeError):
        parse("2:4").n = 3


@pytest.mark.parametrize(
    "text,message",
    [
        ("2-4", "unknown pattern '2-4'; known are unstructured, row, constant-fan-in, channel, n:m"),
        ("", "unknown pattern ''"),
        ("5:4", "0 < n <= m, got 5:4"),
        ("0:4", "0 < n <= m, got 0:4"),
        ("0:0", "0 < n <= m, got 0:0"),
        ("0x4", "at least one row and one column, got 0x4"),
        ("2:4 ", "unknown pattern"),
        ("-2:4", "unknown pattern"),
        (24, "a pattern is a string such as 'unstructured' or '2:4', got 24"),
        (None, "got None"),
    ],
)
def test_parse_says_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        parse(text)


def test_scope_is_checked():
    with pytest.raises(ValueError, match="scope is 'tensor' or 'row', got 'column'"):
        Unstructured(scope="column")


def test_the_shape_must_divide():
    with pytest.raises(ValueError, match=r"pattern 2:4 does not fit a weight of shape \(3, 6\): its input dimension 6"):
        parse("2:4").mask(torch.rand(3, 6))
    with pytest.raises(ValueError, match=r"pattern 4x4 .* \(2, 6, 8\): 6x8 is not made of whole 4x4 blocks"):
        parse("4x4").mask(torch.rand(2, 6, 8), 0.5)
    assert "not a multiple of 4" in NM(2, 4).fits((3, 6))
    assert NM(2, 4).fits((3, 8)) is None and Block(3, 2).fits((5, 3, 8)) is None


def test_the_sparsity_must_be_possible_and_agree_with_the_pattern():
    scores = torch.rand(4, 8)
    with pytest.raises(ValueError, match="2:4 always has sparsity 0.5, but 0.75 was asked for"):
        parse("2:4").mask(scores, 0.75)
    assert parse("1:4").implied_sparsity == 0.75 and parse("row").implied_sparsity is None
    with pytest.raises(ValueError, match="pattern unstructured needs a sparsity"):
        parse("unstructured").mask(scores)
    for value in (-0.1, 1.1, 50, float("nan")):
        with pytest.raises(ValueError, match=r"lies in \[0, 1\]"):
            parse("unstructured").mask(scores, value)


def test_pruned_count_rounds_to_the_nearest():
    assert [pruned_count(0.5, 4), pruned_count(0.3, 10), pruned_count(0.999, 5), pruned_count(0.0, 7)] == [2, 3, 5, 0]
