import math

import pytest

from hf_sparse.schedules import SCHEDULES, Constant, Cosine, Cubic, Exponential, Linear, Updates, as_step


def test_rigls_cosine_drop():
    """alpha/2 (1 + cos(pi t / T_end)) with alpha = 0.3, arxiv.org/abs/1911.11134 section 3."""
    schedule = Cosine(0.3, 0.0, 0, 25_000)
    assert [schedule(t) for t in (0, 12_500, 25_000, 30_000)] == pytest.approx([0.3, 0.15, 0.0, 0.0], abs=1e-12)
    for t in range(0, 25_001, 500):
        assert schedule(t) == pytest.approx(0.15 * (1 + math.cos(math.pi * t / 25_000)))


def test_the_cubic_of_gradual_pruning():
    """s_t = s_f + (s_i - s_f)(1 - (t - t0) / (n dt))^3, arxiv.org/abs/1710.01878 equation 1."""
    schedule = Cubic(0.5, 0.9, 100, 1100)
    for t in range(100, 1101, 100):
        assert schedule(t) == pytest.approx(0.9 + (0.5 - 0.9) * (1 - (t - 100) / 1000) ** 3)
    assert schedule(0) == schedule(100) == 0.5
    assert schedule(1100) == schedule(5000) == 0.9


@pytest.mark.parametrize("kind", SCHEDULES.values())
def test_begins_and_ends_where_it_says(kind):
    schedule = kind(0.2, 0.8, 10, 30)
    assert schedule(0) == schedule(10) == pytest.approx(0.2)
    assert schedule(30) == schedule(99) == pytest.approx(0.2 if kind is Constant else 0.8)
    values = [schedule(t) for t in range(10, 31)]
    assert values == sorted(values)


def test_shapes_at_the_middle():
    assert Linear(0.0, 1.0, 0, 10)(5) == pytest.approx(0.5)
    assert Exponential(1.0, 0.0, 0, 10)(5) == pytest.approx((math.exp(-2.5) - math.exp(-5)) / (1 - math.exp(-5)))


def test_a_schedule_of_no_length_is_at_its_end():
    assert Cubic(0.1, 0.9, 5, 5)(5) == 0.9


@pytest.mark.parametrize("make", [lambda: Linear(0, 1, 5, 4), lambda: Updates(1, 5, 4)])
def test_ends_before_it_begins(make):
    with pytest.raises(ValueError, match="step 4, before"):
        make()


@pytest.mark.parametrize("closing", [False, True])
def test_updates_are_due_and_counted(closing):
    updates = Updates(every=3, begin=2, end=10, closing=closing)
    due = [t for t in range(0, 20) if updates.due(t)]
    assert due == ([5, 8, 10] if closing else [5, 8])
    for t in range(20):
        assert updates.count(t) == sum(d <= t for d in due)


def test_closing_does_not_count_twice():
    updates = Updates(every=4, begin=0, end=8, closing=True)
    assert [t for t in range(12) if updates.due(t)] == [4, 8]
    assert updates.count(100) == 2


def test_updates_need_a_period():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Updates(0, 0, 10)


def test_steps_and_shares():
    assert as_step(100, None, "end") == 100
    assert as_step(0.75, 1000, "end") == 750
    assert as_step(1.0, 1000, "end") == 1000
    assert as_step(1, 1000, "end") == 1
    assert as_step(2000.0, None, "end") == 2000


@pytest.mark.parametrize("value", [-1, 1.5, True, "half", None])
def test_neither_step_nor_share(value):
    with pytest.raises(ValueError, match="end is a step .a whole number. or a share of training"):
        as_step(value, 1000, "end")


def test_a_share_of_an_unknown_length():
    with pytest.raises(ValueError, match="end=0.75 is a share of training, but the number of steps is not known"):
        as_step(0.75, None, "end")
