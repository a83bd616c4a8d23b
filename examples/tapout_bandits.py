"""What TapOut's bandits can be expected to learn, in worlds whose truth is known: regret beside theory, and full information.

    python examples/tapout_bandits.py                 # two minutes on a CPU
    python examples/tapout_bandits.py --tiny

Left: five arms that pay 1 with probabilities 0.3 to 0.75; the regret of each bandit, a mean over runs, with the bound of UCB1
(Auer, Cesa-Bianchi and Fischer 2002, theorem 1) and the asymptotic slope of Lai and Robbins.

Right: drafts in a simulated text of easy and hard stretches, where the drafter's confidence says, noisily, whether the next
token will be accepted. Tokens per unit of time (a drafted token costs 0.1 of a verification) over the rounds so far, for TapOut
with the chosen rule rewarded only, with full information, and with the naive kind that enters whatever a round happened to
show; grey: the rules alone.

Written: tapout_bandits.json and .png.
"""

import argparse
import json
import math
import random
import sys
from pathlib import Path

COST = 0.1
MEANS = [0.3, 0.45, 0.5, 0.6, 0.75]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pulls", type=int, default=10_000, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=2_000, help="default: %(default)s")
    parser.add_argument("--runs", type=int, default=30, help="of each; default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("tapout_bandits.json"))
    parser.add_argument("--tiny", action="store_true", help="a few pulls")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.pulls, arguments.rounds, arguments.runs = 200, 60, 2
    from hf_sparse.atomic import atomic_write_text
    from hf_sparse.speculative.bandits import BANDITS, ucb1_regret_bound

    points = sorted({round(arguments.pulls ** (i / 30)) for i in range(31)} - {0, 1})
    regret = {}
    for name, kind in BANDITS.items():
        runs = [play(kind(len(MEANS), seed=seed), arguments.pulls, seed, points) for seed in range(arguments.runs)]
        regret[name] = [sum(values) / len(values) for values in zip(*runs, strict=True)]
    bound = [ucb1_regret_bound(MEANS, pulls) for pulls in points]
    kl = lambda p, q: p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))  # noqa: E731
    slope = sum((max(MEANS) - mean) / kl(mean, max(MEANS)) for mean in MEANS if mean < max(MEANS))

    places = sorted({round(arguments.rounds ** (i / 25)) for i in range(6, 26)})
    learned = {}
    for rules in RULES:
        for way in ("chosen rule only", "full information", "whatever was seen"):
            runs = [
                learn(make_policy(RULES[rules](), way), arguments.rounds, seed, places)
                for seed in range(arguments.runs)
            ]
            learned.setdefault(rules, {})[way] = [sum(values) / len(values) for values in zip(*runs, strict=True)]
        learned[rules]["alone"] = {
            rule.name: learn(rule, max(1000, arguments.rounds), 0, [max(1000, arguments.rounds)])[0]
            for rule in RULES[rules]()
        }
    content = {
        "command": " ".join(["python", "examples/tapout_bandits.py", *(Path(w).name for w in sys.argv[1:])]),
        "means": MEANS,
        "pulls": points,
        "regret": regret,
        "ucb1_bound": bound,
        "lai_robbins_slope": slope,
        "cost": COST,
        "rounds": places,
        "tokens_per_cost": learned,
        "runs": arguments.runs,
    }
    atomic_write_text(arguments.output, json.dumps(content, indent=1) + "\n")
    plot(content, arguments.output.with_suffix(".png"))
    for name, values in regret.items():
        print(f"{name}: regret {values[-1]:.0f} after {points[-1]} pulls (bound of UCB1: {bound[-1]:.0f})")
    for rules, ways in learned.items():
        best = max(ways["alone"].values())
        shares = ", ".join(f"{way} {values[-1] / best:.1%}" for way, values in ways.items() if way != "alone")
        print(f"{rules}, of the best rule alone after {places[-1]} rounds: {shares}")


def play(bandit, pulls: int, seed: int, points: list[int]) -> list[float]:
    """Regret at ``points``."""
    rng, lost, found = random.Random(seed), 0.0, []
    for pull in range(1, pulls + 1):
        arm = bandit.select()
        bandit.update(arm, float(rng.random() < MEANS[arm]))
        lost += max(MEANS) - MEANS[arm]
        if pull in points:
            found.append(lost)
    return found


def _nested():
    from hf_sparse.speculative.rules import MaxConfidence

    return [MaxConfidence(h) for h in (0.05, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99)]


def _mixed():
    from hf_sparse.speculative.tapout import default_rules

    return default_rules()


RULES = {"eight thresholds of one rule": _nested, "the five default rules": _mixed}


def make_policy(rules, way: str):
    """TapOut that learns in one of three ways; the naive one is made here, since it is there only to be compared with."""
    from hf_sparse.speculative.tapout import TapOut

    class Naive(TapOut):
        def _reward_rules(self, result):
            seen = {}
            for index, place in enumerate(self._stops):
                if index == self._arm or place is not None or result.ended == "limit":
                    drafted = result.drafted if place is None else min(place, result.drafted)
                    seen[index] = self._value(min(result.accepted, drafted), drafted)
            self.bandits[0].update_all(seen)

    kind = Naive if way == "whatever was seen" else TapOut
    return kind(rules, max_draft=16, cost_ratio=COST, full_information=way == "full information")


def learn(policy, rounds: int, seed: int, places: list[int]) -> list[float]:
    """Tokens per cost over the first rounds, at ``places``."""
    rng, tokens, cost, found = random.Random(seed), 0, 0.0, []
    for number in range(1, rounds + 1):
        drafted, accepted = one_round(policy, rng)
        tokens += accepted + 1
        cost += 1 + COST * drafted
        if number in places:
            found.append(tokens / cost)
    return found


def one_round(policy, rng, most: int = 16) -> tuple[int, int]:
    from hf_sparse.speculative.rules import Round, Signals

    policy.begin()
    easy = rng.random() < 0.5
    drafted, accepted, alive = 0, 0, True
    while drafted < most:
        right = rng.random() < (0.95 if easy else 0.4)
        first = min(0.999, max(0.01, rng.gauss(0.9 if right else 0.45, 0.15)))
        entropy = -first * math.log(first) + (1 - first) * 2.0
        drafted += 1
        alive = alive and right
        accepted += alive
        if policy.stop(Signals(first, (1 - first) / 2, entropy, first)):
            break
    policy.end(Round(drafted, accepted, "rule" if drafted < most else "limit"))
    return drafted, accepted


def plot(content: dict, path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return
    worlds = content["tokens_per_cost"]
    figure = Figure(figsize=(5.2 * (1 + len(worlds)), 4.2), layout="constrained")
    left, *others = figure.subplots(1, 1 + len(worlds))
    for name, values in content["regret"].items():
        left.plot(content["pulls"], values, label=name)
    left.plot(content["pulls"], content["ucb1_bound"], "k--", linewidth=0.8, label="bound of UCB1")
    asymptote = [content["lai_robbins_slope"] * math.log(pulls) for pulls in content["pulls"]]
    left.plot(content["pulls"], asymptote, "k:", linewidth=0.8, label="slope of Lai and Robbins")
    left.set(xscale="log", yscale="log", xlabel="pulls", ylabel="regret", title="five arms, means 0.3 to 0.75")
    left.legend(fontsize=8)
    for axis, (name, ways) in zip(others, worlds.items(), strict=True):
        for value in ways["alone"].values():
            axis.axhline(value, color="grey", linewidth=0.5)
        for way, values in ways.items():
            if way != "alone":
                axis.plot(content["rounds"], values, label=way)
        axis.set(xscale="log", xlabel="rounds", ylabel="tokens per forward's time", title=f"TapOut, {name}")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
