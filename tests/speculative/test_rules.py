"""Each rule against its formula, by hand."""

import math

import pytest

from hf_sparse.speculative.metrics import Speculation, bootstrap, expected_length, improvement_factor
from hf_sparse.speculative.rules import (
    RULES,
    SVIP,
    AdaEDL,
    DrawnConfidence,
    Heuristic,
    LogitMargin,
    MaxConfidence,
    Round,
    Signals,
    StaticLength,
    SVIPDifference,
    rule_from_dict,
)  # fmt: skip

SURE = Signals(first=0.95, second=0.03, entropy=0.2, drawn=0.95)
TORN = Signals(first=0.45, second=0.4, entropy=1.1, drawn=0.4)
LOST = Signals(first=0.1, second=0.09, entropy=4.0, drawn=0.02)


@pytest.mark.parametrize(
    ("rule", "stops"),
    [
        (MaxConfidence(0.8), (False, True, True)),
        (MaxConfidence(0.3), (False, False, True)),
        (DrawnConfidence(0.4), (False, False, True)),
        (LogitMargin(0.2), (False, True, True)),
        (SVIP(), (False, True, True)),  # sqrt(0.15 * 1.1) = 0.41, and H > 0.6 is the released code's rule
        (SVIP(0.5), (False, False, True)),
        (AdaEDL(), (False, False, True)),  # 1 - sqrt(0.2 * 4) = 0.11
    ],
)
def test_rules_of_one_position(rule, stops):
    rule.begin()
    assert tuple(rule.stop(signals) for signals in (SURE, TORN, LOST)) == stops


def test_svip_stops_where_the_entropy_exceeds_six_tenths_of_a_nat():
    """sqrt(entropy * 0.15) > 0.3, Geralt-Targaryen/SVIP."""
    assert not SVIP().stop(SURE._replace(entropy=0.599)) and SVIP().stop(SURE._replace(entropy=0.601))


def test_svip_difference_looks_at_the_rise():
    rule = SVIPDifference(0.2)
    rule.begin()
    assert not rule.stop(TORN)  # the first has none before it
    assert not rule.stop(SURE) and rule.stop(TORN)  # sqrt(1.1) - sqrt(0.2) = 0.6
    rule.begin()
    assert not rule.stop(LOST)


def test_lengths():
    rule = StaticLength(3)
    rule.begin()
    assert [rule.stop(LOST) for _ in range(3)] == [False, False, True]
    heuristic = Heuristic(2)
    for accepted, after in ((2, 4), (1, 3), (3, 5), (0, 4)):
        heuristic.begin()
        drafted = next(n for n in range(1, 9) if heuristic.stop(SURE))
        heuristic.end(Round(drafted, accepted))
        assert heuristic.k == after
    for _ in range(9):
        heuristic.end(Round(4, 0))
    assert heuristic.k == 1


def test_the_threshold_of_adaedl_follows_the_acceptance():
    rule = AdaEDL()
    rule.end(Round(4, 4))  # average 0.5 * 0.9 + 0.5 = 0.95: accepted more than wanted, so bolder
    assert rule.threshold == pytest.approx(0.9 * 0.4 + 0.1 * 0.39)
    for _ in range(5):
        rule.end(Round(4, 0))
    assert rule.threshold > 0.4
    before = rule.threshold
    rule.end(Round(0, 0))
    assert rule.threshold == before


@pytest.mark.parametrize("name", RULES)
def test_rules_come_back_from_json(name):
    import json

    rule = RULES[name](max_draft=9)
    again = rule_from_dict(json.loads(json.dumps(rule.to_dict())))
    assert again == rule and again.max_draft == 9 and again.name == rule.name


def test_which_rule_never_drafts_longer():
    strict, bold = MaxConfidence(0.9), MaxConfidence(0.5)
    assert strict.never_longer_than(bold) and not bold.never_longer_than(strict)
    assert SVIP(0.2).never_longer_than(SVIP(0.5)) and StaticLength(2).never_longer_than(StaticLength(3))
    assert not strict.never_longer_than(LogitMargin(0.1)) and not StaticLength(2).never_longer_than(SVIP())


# ------------------------------------------------------------------------------------------------------------- metrics


def test_mal_is_one_plus_acceptance_times_gamma():
    stats = Speculation()
    for accepted in (0, 3, 5, 2, 5):
        stats.add(Round(5, accepted, emitted=accepted + 1))
    assert stats.mean_accepted_length == pytest.approx(1 + stats.acceptance * 5) == 4.0
    assert stats.acceptance == pytest.approx(15 / 25) and (stats + stats).rounds == 10


def test_expected_length_and_improvement():
    assert expected_length(0.8, 5) == pytest.approx((1 - 0.8**6) / 0.2)
    assert expected_length(1.0, 5) == 6 and expected_length(0.0, 5) == 1
    # SD^2: Llama-3.2-3B, dense and at 50%, drafting five tokens for Llama-3.1-70B; c from MACs
    assert improvement_factor(3.5, 5, 0.0462) == pytest.approx(2.84, abs=0.005)
    assert improvement_factor(3.5, 5, 0.0259) == pytest.approx(3.10, abs=0.005)


def test_cost_ratio_leaves_the_prompt_out():
    stats = Speculation()
    stats.add(Round(5, 3, emitted=4))  # the first round reads the prompt and is not timed
    assert stats.cost_ratio is None
    stats.add(Round(4, 3, draft_seconds=0.2, verify_seconds=0.5, emitted=4))
    assert stats.cost_ratio == pytest.approx(0.1)
    assert stats.to_dict()["cost_ratio"] == stats.cost_ratio


def test_the_bootstrap_of_a_mean_is_its_standard_error():
    import random

    rng = random.Random(0)
    values = [rng.gauss(10, 2) for _ in range(400)]
    low, high = bootstrap(values, lambda chosen: sum(chosen) / len(chosen))
    assert (high - low) / 2 == pytest.approx(1.96 * 2 / math.sqrt(400), rel=0.15)
