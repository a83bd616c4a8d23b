"""TapOut: a bandit chooses, draft by draft, which rule says when to stop (arxiv.org/abs/2511.02017).

    policy = TapOut()                                       lives across calls of generate; policy.save("tapout.json")
    model.generate(**inputs, custom_generate=SpeculativeDecoding(draft_model, policy))

No threshold is tuned: rules of different kinds and boldness are the arms, and the reward says which of them suits this pair of
models and this text. With d tokens drafted, a of them accepted, at most M in a draft:

    simple       a / M
    blended      1/2 a / M + 1/2 a / d                       the paper's; mostly the acceptance rate where M is large
    throughput   (a + theta c (M - d)) / (M max(1, theta c)) c: cost of a drafted token in forwards of the target,
                                                             theta: tokens emitted per cost so far; both measured

What a user wants is the ratio of all emitted tokens to all time, E[a + 1] / E[1 + c d]. It is largest where E[a - theta c d]
is, with theta the ratio itself: that is the third reward, moved into [0, 1].

Levels: one bandit chooses a rule for a whole draft (``sequence``); or one bandit for each position in the draft chooses whom to
ask there (``token``), rewarded 1 for going on to a token that was accepted or for stopping at one that was not.

Full information (beyond the paper). From one draft more is known than how the chosen rule did: a rule that would have stopped
at k <= d would have had min(a, k) accepted. Entering that whenever it is known would mislead: a bold rule is seen then mostly
where it happens to stop early (in simulation such a bandit settles on the wrong rule). Entered is only what was bound to be
seen:

    the chosen rule; a rule that never stops later than the chosen one (the same rule with a stricter threshold)
    every rule, in some rounds: at first, and in one of five rounds in which the bandit wants another rule than the one that
    looks best, drafting goes on until all rules have said stop, and all of them learn at once

The default is this with UCB1 that explores little (c = 0.1: an answer of 500 tokens is about 100 rounds, too few for c = 2) and
the throughput reward; ``TapOut.paper()`` is the paper's headline variant: UCB1 with c = 2, the blended reward, the chosen rule
only.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

from hf_sparse.atomic import atomic_write_text
from hf_sparse.speculative.bandits import BANDITS, Bandit, bandit_from_dict
from hf_sparse.speculative.rules import (
    SVIP,
    AdaEDL,
    LogitMargin,
    MaxConfidence,
    Round,
    Rule,
    Signals,
    SVIPDifference,
    rule_from_dict,
)

__all__ = ["REWARDS", "TapOut", "default_rules"]

_ASK_ALL = 0.2  # of the rounds of exploration
REWARDS = ("simple", "blended", "throughput")


def default_rules() -> list[Rule]:
    """One rule of each kind that the paper's arms are said to be, with the defaults of :mod:`.rules`."""
    return [MaxConfidence(), SVIP(), SVIPDifference(), LogitMargin(), AdaEDL()]


class TapOut:
    """A policy for :class:`hf_sparse.speculative.decoding.SpeculativeDecoding` that learns while it is used.

    Args:
        rules: the arms; default: :func:`default_rules`.
        bandit: a name of :data:`hf_sparse.speculative.bandits.BANDITS`.
        level: ``sequence`` or ``token``.
        reward: ``simple``, ``blended``, ``throughput`` (default), or a function ``(accepted, drafted, max_draft) -> [0, 1]``.
        max_draft: of any draft.
        full_information: let a round teach about all rules it says something about; default: yes, for ``sequence``.
        cost_ratio: c, if it is known; None: measured.
        bandit_options: of the bandit, e.g. ``{"discount": 0.999}`` or ``{"exploration": 0.5}``.

    Attributes:
        history: ``[(arm, drafted, accepted)]`` of this process; the arm is -1 in rounds that asked all rules.
    """

    def __init__(
        self,
        rules: list[Rule] | None = None,
        bandit: str = "UCB1",
        *,
        level: str = "sequence",
        reward: str | Callable[[int, int, int], float] | None = None,
        max_draft: int = 32,
        full_information: bool | None = None,
        cost_ratio: float | None = None,
        bandit_options: dict | None = None,
    ):
        self.rules = default_rules() if rules is None else list(rules)
        if not self.rules or len({rule.name for rule in self.rules}) != len(self.rules):
            raise ValueError(f"TapOut takes one or more different rules, got {[rule.name for rule in self.rules]}")
        if bandit not in BANDITS:
            raise ValueError(f"unknown bandit {bandit!r}; known are {', '.join(BANDITS)}")
        if level not in ("sequence", "token"):
            raise ValueError(f"level is 'sequence' or 'token', got {level!r}")
        if not callable(reward) and reward not in (None, *REWARDS):
            raise ValueError(f"unknown reward {reward!r}; known are {', '.join(REWARDS)}, or give a function")
        if level == "token" and (full_information or reward):
            raise ValueError(
                "at level 'token' every position is rewarded for its own decision; reward and full_information are for "
                "'sequence'"
            )
        if max_draft < 1:
            raise ValueError(f"max_draft is a number of tokens, at least 1; got {max_draft}")
        sequence = level == "sequence"
        self.level, self.reward, self.max_draft = level, (reward or "throughput") if sequence else None, max_draft
        self.full_information = sequence if full_information is None else full_information
        self.given_cost_ratio = cost_ratio
        options = {"exploration": 0.1} if bandit == "UCB1" else {}
        bandits = 1 if sequence else max_draft
        self.bandits: list[Bandit] = [
            BANDITS[bandit](len(self.rules), **options | (bandit_options or {})) for _ in range(bandits)
        ]
        self.names = [rule.name for rule in self.rules]  # of the start; adaptive rules change theirs
        self.clock = {"draft_seconds": 0.0, "drafted": 0.0, "verify_seconds": 0.0, "rounds": 0.0, "emitted": 0.0}
        self.history: list[tuple[int, int, int]] = []
        self._arm, self._exploring, self._stops, self._asked = 0, False, [], []

    @classmethod
    def paper(cls, rules: list[Rule] | None = None, max_draft: int = 32) -> "TapOut":
        """The paper's headline variant, as far as it is known: sequence level, UCB1, blended reward."""
        return cls(
            rules,
            "UCB1",
            reward="blended",
            full_information=False,
            max_draft=max_draft,
            bandit_options={"exploration": 2.0},
        )

    # ------------------------------------------------------------------------------------------------ what the loop calls

    def begin(self) -> None:
        for rule in self.rules:
            rule.begin()
        self._stops: list[int | None] = [None] * len(self.rules)
        self._asked: list[tuple[int, bool]] = []
        self._tokens = 0
        if self.level == "sequence":
            bandit = self.bandits[0]
            unseen = any(count == 0 for count in bandit.counts)
            self._arm = bandit.select()
            asks_all = random.Random(f"{bandit.seed}/all/{bandit.selections}").random() < _ASK_ALL
            self._exploring = self.full_information and (unseen or (asks_all and self._arm != bandit.best()))

    def stop(self, signals: Signals) -> bool:
        self._tokens += 1
        said = [rule.stop(signals) for rule in self.rules]  # all must see every token: some remember the one before
        for index, stopped in enumerate(said):
            if stopped and self._stops[index] is None:
                self._stops[index] = self._tokens
        if self.level == "token":
            arm = self.bandits[min(self._tokens, self.max_draft) - 1].select()
            self._asked.append((arm, said[arm]))
            return said[arm]
        if self._exploring:
            return all(place is not None for place in self._stops)
        return self._stops[self._arm] is not None

    def end(self, result: Round) -> None:
        self._measure(result)
        if result.drafted and result.ended != "length":  # cut short by the end of the text: nobody's decision
            if self.level == "token":
                self._reward_positions(result)
            else:
                self._reward_rules(result)
            arm = self._asked[0][0] if self.level == "token" else -1 if self._exploring else self._arm
            self.history.append((arm, result.drafted, result.accepted))
        for rule in self.rules:
            rule.end(result)

    # ------------------------------------------------------------------------------------------------------------ learning

    @property
    def cost_ratio(self) -> float:
        """c: a drafted token's time in forwards of the target; 0.1 before anything is measured."""
        if self.given_cost_ratio is not None:
            return self.given_cost_ratio
        clock = self.clock
        if not (clock["drafted"] and clock["verify_seconds"]):
            return 0.1
        return (clock["draft_seconds"] / clock["drafted"]) / (clock["verify_seconds"] / clock["rounds"])

    def means(self) -> dict[str, float]:
        """The mean reward of every rule so far, by the name it began with (at level ``token``: of the first position)."""
        return {name: self.bandits[0].mean(index) for index, name in enumerate(self.names)}

    def pulls(self) -> dict[str, float]:
        """How often every rule was rewarded."""
        return {name: sum(bandit.counts[index] for bandit in self.bandits) for index, name in enumerate(self.names)}

    def _measure(self, result: Round) -> None:
        clock = self.clock
        for key in clock:  # of the last hundred rounds or so: machines and texts change
            clock[key] *= 0.99
        clock["draft_seconds"] += result.draft_seconds
        clock["verify_seconds"] += result.verify_seconds
        clock["drafted"] += result.drafted
        clock["emitted"] += result.accepted + 1
        clock["rounds"] += 1

    def _value(self, accepted: int, drafted: int) -> float:
        most = self.max_draft
        if callable(self.reward):
            return self.reward(accepted, drafted, most)
        if self.reward == "simple":
            return accepted / most
        if self.reward == "blended":
            return 0.5 * accepted / most + 0.5 * accepted / drafted
        cost = self.cost_ratio
        worth = cost * self.clock["emitted"] / (self.clock["rounds"] + cost * self.clock["drafted"])
        return (accepted + worth * (most - drafted)) / (most * max(1.0, worth))

    def _reward_rules(self, result: Round) -> None:
        seen = {}
        # a drafter of another tokenizer counts its own tokens, verification the target's
        scale = result.drafted / self._tokens if self._tokens else 1.0
        for index, (rule, place) in enumerate(zip(self.rules, self._stops, strict=True)):
            bound = index == self._arm or rule.never_longer_than(self.rules[self._arm])
            if self._exploring or (bound if self.full_information else index == self._arm):
                drafted = result.drafted if place is None else min(max(1, round(place * scale)), result.drafted)
                seen[index] = self._value(min(result.accepted, drafted), drafted)
        self.bandits[0].update_all(seen)

    def _reward_positions(self, result: Round) -> None:
        for place, (arm, stopped) in enumerate(
            self._asked[: result.accepted + 1]
        ):  # beyond a rejection nothing is known
            right = float(place < result.accepted)
            self.bandits[place].update(arm, 1 - right if stopped else right)

    # -------------------------------------------------------------------------------------------------------------- memory

    def to_dict(self) -> dict:
        """Rules, bandits and what was measured, as JSON; a reward that is a function cannot be stored."""
        if callable(self.reward):
            raise ValueError("a reward that is a function cannot be saved; use one of " + ", ".join(REWARDS))
        return {
            "rules": [rule.to_dict() for rule in self.rules],
            "names": self.names,
            "bandits": [bandit.to_dict() for bandit in self.bandits],
            "level": self.level,
            "reward": self.reward,
            "max_draft": self.max_draft,
            "full_information": self.full_information,
            "cost_ratio": self.given_cost_ratio,
            "clock": self.clock,
        }

    @classmethod
    def from_dict(cls, content: dict) -> "TapOut":
        """The policy that :meth:`to_dict` described, with all it has learned."""
        policy = cls(
            [rule_from_dict(rule) for rule in content["rules"]],
            content["bandits"][0]["bandit"],
            level=content["level"],
            reward=content["reward"],
            max_draft=content["max_draft"],
            full_information=content["full_information"],
            cost_ratio=content["cost_ratio"],
        )
        policy.names, policy.clock = list(content["names"]), dict(content["clock"])
        policy.bandits = [bandit_from_dict(bandit) for bandit in content["bandits"]]
        return policy

    def save(self, path: str | Path) -> None:
        """Writes :meth:`to_dict`; the file appears when it is whole."""
        atomic_write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "TapOut":
        """What :meth:`save` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
