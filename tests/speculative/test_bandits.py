"""Bandits on arms whose means are known: the regret that theory promises, and what full information changes."""

import json
import math
import random

import pytest

from hf_sparse.speculative.bandits import BANDITS, UCB1, BetaThompson, UCBTuned, bandit_from_dict, ucb1_regret_bound
from hf_sparse.speculative.rules import MaxConfidence, Round, Signals, StaticLength, rule_from_dict
from hf_sparse.speculative.tapout import TapOut

MEANS = [0.3, 0.45, 0.5, 0.6, 0.75]


def play(bandit, pulls, seed, means=MEANS) -> float:
    """Regret of a run with rewards that are 0 or 1."""
    rng, lost = random.Random(seed), 0.0
    for _ in range(pulls):
        arm = bandit.select()
        bandit.update(arm, float(rng.random() < means[arm]))
        lost += max(means) - means[arm]
    return lost


@pytest.mark.parametrize("name", BANDITS)
def test_regret_stays_below_the_bound_of_ucb1_and_grows_like_a_logarithm(name):
    runs = 10
    half, whole = (sum(play(BANDITS[name](5, seed=s), T, s) for s in range(runs)) / runs for T in (1500, 3000))
    assert whole < ucb1_regret_bound(MEANS, 3000)
    random_choice = 3000 * (max(MEANS) - sum(MEANS) / 5)
    assert whole < 0.6 * random_choice
    assert whole - half < 0.75 * half  # linear regret would double


def test_variance_and_posterior_learn_faster_than_ucb1():
    """Auer et al. 2002, section 4, and every comparison since."""
    runs = 10
    regret = {name: sum(play(kind(5, seed=s), 3000, s) for s in range(runs)) / runs for name, kind in BANDITS.items()}
    assert regret["UCBTuned"] < 0.5 * regret["UCB1"] and regret["BetaThompson"] < 0.5 * regret["UCB1"]


def test_the_regret_of_thompson_sampling_is_that_of_lai_and_robbins():
    """Asymptotically sum of D_i / KL(m_i, m*) ln T (Agrawal and Goyal 2012); at 5,000 pulls within a factor of two."""
    kl = lambda p, q: p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))  # noqa: E731
    slope = sum((0.75 - m) / kl(m, 0.75) for m in MEANS[:-1])
    found = sum(play(BetaThompson(5, seed=s), 5000, s) for s in range(20)) / 20
    assert 0.5 * slope * math.log(5000) < found < 2 * slope * math.log(5000)


def test_indices_by_hand():
    bandit = UCB1(2)
    for arm, reward in ((0, 0.5), (1, 0.4), (0, 0.5), (0, 0.5), (0, 0.5)):
        bandit.update(arm, reward)
    # 0.5 + sqrt(2 ln 5 / 4) = 1.397 against 0.4 + sqrt(2 ln 5 / 1) = 2.194
    assert bandit.select() == 1 and bandit.best() == 0
    careful = UCB1(2, exploration=0.01)
    careful.counts, careful.sums, careful.squares = bandit.counts, bandit.sums, bandit.squares
    assert careful.select() == 0  # 0.563 against 0.527
    tuned = UCBTuned(2)
    tuned.counts, tuned.sums, tuned.squares = [4.0, 1.0], [2.0, 0.4], [1.0, 0.16]
    per = math.log(5)
    expected = [
        0.5 + math.sqrt(per / 4 * min(0.25, math.sqrt(2 * per / 4))),
        0.4 + math.sqrt(per * min(0.25, math.sqrt(2 * per))),
    ]
    assert [tuned._index(arm, 5, None) for arm in range(2)] == pytest.approx(expected)


def test_a_discounted_bandit_follows_a_change():
    def after_change(discount):
        bandit, rng = UCBTuned(2, discount=discount), random.Random(0)
        for step in range(3000):
            means = (0.7, 0.3) if step < 2700 else (0.3, 0.7)
            arm = bandit.select()
            bandit.update(arm, float(rng.random() < means[arm]))
        return bandit.best()

    assert after_change(0.99) == 1 and after_change(1.0) == 0


@pytest.mark.parametrize("name", BANDITS)
def test_a_saved_bandit_goes_on_as_if_it_had_not_been(name):
    one, rng = BANDITS[name](3, discount=0.99, seed=4), random.Random(1)
    for _ in range(50):
        one.update(one.select(), rng.random())
    other = bandit_from_dict(json.loads(json.dumps(one.to_dict())))
    assert other == one and [one.select() for _ in range(9)] == [other.select() for _ in range(9)]


def test_errors():
    with pytest.raises(ValueError, match="at least one arm, got 0"):
        UCB1(0)
    with pytest.raises(ValueError, match=r"discount lies in \(0, 1\], got 0"):
        UCB1(2, discount=0)
    with pytest.raises(ValueError, match=r"rewards lie in \[0, 1\], for arms 0 to 1; got 1.5 for arm 0"):
        UCB1(2).update(0, 1.5)
    with pytest.raises(ValueError, match="unknown bandit 'EXP3'; known are UCB1"):
        bandit_from_dict({"bandit": "EXP3"})


# -------------------------------------------------------------------------------------------------------------- TapOut


class World:
    """Texts of easy and hard stretches: q's confidence says, noisily, whether the next token will be accepted."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)

    def round(self, policy, most=16) -> tuple[int, int]:
        rng = self.rng
        policy.begin()
        easy = rng.random() < 0.5
        drafted, accepted, alive, seen = 0, 0, True, []
        while drafted < most:
            right = rng.random() < (0.95 if easy else 0.4)
            first = min(0.999, max(0.01, rng.gauss(0.9 if right else 0.45, 0.15)))
            entropy = -first * math.log(first) + (1 - first) * 2.0
            drafted += 1
            alive = alive and right
            accepted += alive
            seen.append(Signals(first, (1 - first) / 2, entropy, first))
            if policy.stop(seen[-1]):
                break
        ended = "rule" if drafted < most else "limit"
        policy.end(Round(drafted, accepted, ended, seen, 0.1 * drafted, 1.0, accepted + 1))
        return drafted, accepted


def throughput(policy, rounds, seed=0, cost=0.1) -> float:
    world = World(seed)
    results = [world.round(policy) for _ in range(rounds)]
    return sum(a + 1 for _, a in results) / sum(1 + cost * d for d, _ in results)


def test_tapout_comes_close_to_the_best_of_its_rules_without_knowing_which():
    rules = lambda: [StaticLength(1), StaticLength(12), MaxConfidence(0.95), MaxConfidence(0.6), MaxConfidence(0.05)]  # noqa: E731
    alone = {rule.name: throughput(rule, 4000) for rule in rules()}
    best, worst = max(alone.values()), min(alone.values())
    learned = throughput(TapOut(rules(), "UCBTuned", reward="throughput", max_draft=16, full_information=True), 4000)
    assert best > 1.2 * worst and learned > 0.95 * best, (alone, learned)


def test_full_information_learns_faster_than_the_pulled_arm_alone():
    rules = [MaxConfidence(h) for h in (0.05, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99)]

    def early(bandit, full):
        policies = (TapOut(rules, bandit, max_draft=16, full_information=full) for _ in range(12))
        runs = [throughput(policy, 120, seed) for seed, policy in enumerate(policies)]
        return sum(runs) / len(runs)

    for bandit in ("UCB1", "UCBTuned"):
        assert early(bandit, True) > 1.02 * early(bandit, False), bandit


def test_full_information_is_not_biased():
    """What every rule is credited with, when others are chosen, is what it gets when it alone is used."""
    rules = [StaticLength(1), MaxConfidence(0.9), MaxConfidence(0.6), StaticLength(8)]
    policy = TapOut(rules, "UCB1", reward="simple", max_draft=16, full_information=True)
    world = World(3)
    for _ in range(6000):
        world.round(policy)
    for rule in rules:
        alone = World(4)
        expected = sum(alone.round(rule)[1] for _ in range(6000)) / 6000 / 16
        count = policy.pulls()[rule.name]
        assert policy.means()[rule.name] == pytest.approx(expected, abs=max(0.01, 0.6 / math.sqrt(count))), rule.name


def test_a_round_teaches_about_the_rules_it_was_bound_to_show():
    strict, bold = MaxConfidence(0.9), MaxConfidence(0.5)
    policy = TapOut([strict, bold, StaticLength(9)], reward="simple", max_draft=10)
    policy.bandits[0].update_all({0: 0.1, 1: 0.9, 2: 0.1})
    policy.bandits[0].counts = [50.0] * 3
    policy.bandits[0].sums = [5.0, 45.0, 5.0]
    policy.begin()
    assert policy._arm == 1 and not policy._exploring
    for first in (0.95, 0.8, 0.4):
        stop = policy.stop(Signals(first, 0.01, 0.5, first))
    assert stop
    policy.end(Round(3, 2))
    # strict would have stopped at the second token, of which both were accepted; what StaticLength(9) would have done is not
    # known
    assert policy.bandits[0].counts == [51.0, 51.0, 50.0]
    assert policy.bandits[0].sums == pytest.approx([5.2, 45.2, 5.0])


def test_places_are_counted_in_the_targets_tokens():
    """A drafter of another tokenizer: six tokens of its own were three of the target's."""
    policy = TapOut([MaxConfidence(0.9), MaxConfidence(0.2)], reward="simple", max_draft=6)
    policy.begin()  # nothing is known yet, so all rules are asked
    for first in (0.95, 0.95, 0.95, 0.5, 0.95, 0.1):
        policy.stop(Signals(first, 0.01, 0.5, first))
    policy.end(Round(3, 3))
    assert policy.means() == {"MaxConfidence(0.9)": pytest.approx(2 / 6), "MaxConfidence(0.2)": pytest.approx(3 / 6)}


def test_rewards_by_hand():
    policy = TapOut.paper([StaticLength(4)], max_draft=10)
    assert policy._value(2, 4) == pytest.approx(0.5 * 0.2 + 0.5 * 0.5)
    assert TapOut([StaticLength(4)], max_draft=10, reward="simple")._value(2, 4) == pytest.approx(0.2)
    fast = TapOut([StaticLength(4)], max_draft=10, reward="throughput", cost_ratio=0.1)
    fast.clock = {"draft_seconds": 0.0, "drafted": 40.0, "verify_seconds": 0.0, "rounds": 10.0, "emitted": 28.0}
    # theta = 28 / (10 + 0.1 * 40) = 2 tokens per forward; a drafted token costs 0.1, so 0.2 tokens
    assert fast._value(2, 4) == pytest.approx((2 + 0.2 * 6) / 10)
    assert fast._value(3, 10) < fast._value(3, 5) < fast._value(10, 10) <= 1
    own = TapOut([StaticLength(4)], reward=lambda accepted, drafted, most: accepted / drafted)
    assert own._value(2, 4) == 0.5
    with pytest.raises(ValueError, match="cannot be saved"):
        own.to_dict()


def test_the_cost_ratio_is_measured_and_a_text_that_ends_teaches_nothing():
    policy = TapOut([StaticLength(2), StaticLength(4)], max_draft=8)
    for _ in range(4):
        policy.begin()
        for _ in range(4):
            policy.stop(Signals(0.9, 0.05, 0.3, 0.9))
        policy.end(Round(4, 2, draft_seconds=0.4, verify_seconds=2.0))
    assert policy.cost_ratio == pytest.approx(0.05)
    before = policy.pulls()
    policy.begin()
    policy.end(Round(1, 1, "length"))
    assert policy.pulls() == before and len(policy.history) == 4


def test_what_was_learned_is_kept(tmp_path):
    policy = TapOut(bandit="BetaThompson", reward="throughput", full_information=True, max_draft=16)
    world = World(0)
    for _ in range(60):
        world.round(policy)
    policy.save(tmp_path / "tapout.json")
    again = TapOut.load(tmp_path / "tapout.json")
    assert again.to_dict() == policy.to_dict() and again.means() == policy.means()
    state = world.rng.getstate()
    first = [world.round(policy) for _ in range(20)]
    world.rng.setstate(state)
    assert [world.round(again) for _ in range(20)] == first


def test_token_level_rewards_going_on_and_stopping():
    policy = TapOut([StaticLength(1), StaticLength(8)], "UCB1", level="token", max_draft=8)
    policy.begin()
    said = [policy.stop(Signals(0.9, 0.05, 0.3, 0.9)) for _ in range(2)]
    assert said[0]  # the first arm of the first position says stop at once
    policy.begin()
    policy._asked = [(1, False), (1, False), (0, True)]
    before = [list(bandit.sums) for bandit in policy.bandits[:3]]
    policy.end(Round(3, 1))  # the second token was rejected: going on to it was wrong, of the third nothing is known
    after = [list(bandit.sums) for bandit in policy.bandits[:3]]
    assert after[0][1] - before[0][1] == 1 and after[1][1] == before[1][1] and after[2] == before[2]
    assert policy.bandits[1].counts[1] == 1 and policy.bandits[2].counts == [0.0, 0.0]


def test_bad_policies():
    with pytest.raises(ValueError, match="unknown bandit 'ucb'"):
        TapOut(bandit="ucb")
    with pytest.raises(ValueError, match="one or more different rules"):
        TapOut([StaticLength(2), StaticLength(2)])
    with pytest.raises(ValueError, match="unknown reward 'speed'"):
        TapOut(reward="speed")
    with pytest.raises(ValueError, match="level is 'sequence' or 'token'"):
        TapOut(level="word")
    with pytest.raises(ValueError, match="reward and full_information are for 'sequence'"):
        TapOut(level="token", full_information=True)
    with pytest.raises(ValueError, match="unknown rule 'Never'"):
        rule_from_dict({"rule": "Never"})
    with pytest.raises(ValueError, match="rule SVIP: .*unexpected keyword"):
        rule_from_dict({"rule": "SVIP", "h": 1})
    with pytest.raises(ValueError, match="threshold is positive, got 0"):
        MaxConfidence(0)
