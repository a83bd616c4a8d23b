"""When to stop drafting: rules that look at the drafter's distribution q after every drafted token.

    rule               stops when                               default                        where from
    StaticLength       k tokens are drafted                     k = 5                          arxiv.org/abs/2211.17192
    Heuristic          k tokens are drafted; k grows by 2       k = 5, at least 1              transformers' "heuristic"
                       after a round that is accepted whole,
                       else shrinks by 1
    DrawnConfidence    q(drawn token) < h                       h = 0.4                        transformers' default
    MaxConfidence      max q < h                                h = 0.8
    LogitMargin        q(first) - q(second) < h                 h = 0.2
    SVIP               sqrt(0.15 H) > h                         h = 0.3, its released code     arxiv.org/abs/2411.18462
    SVIPDifference     sqrt(H) rose by more than h              h = 0.2
    AdaEDL             1 - sqrt(0.2 H) < lambda, and lambda     lambda = 0.4, acceptance 0.9   arxiv.org/abs/2410.18351
                       follows the acceptance

H is the entropy of q in nats; q is what the token was drawn from, after temperature and every other logits processor. The token
at which a rule stops stays in the draft: a rule may look at it (DrawnConfidence does), and dropping it for what it is would
bias sampling. Rules are all there is to a policy: the loop calls ``begin`` before a draft, ``stop`` after every token, ``end``
after the verification. The published thresholds were tuned on the papers' models; where none is known the default is ours.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import ClassVar, NamedTuple

__all__ = ["RULES", "SVIP", "AdaEDL", "DrawnConfidence", "Heuristic", "LogitMargin", "MaxConfidence", "Round", "Rule"]
__all__ += ["SVIPDifference", "Signals", "StaticLength", "rule_from_dict"]


class Signals(NamedTuple):
    """What a rule sees of q: its two largest probabilities, its entropy in nats, and the probability of the drawn token."""

    first: float
    second: float
    entropy: float
    drawn: float


@dataclass
class Round:
    """One draft and its verification.

    Attributes:
        drafted, accepted: numbers of tokens; ``accepted + 1`` were emitted, less if generation ended within them.
        ended: what ended the draft: ``rule``, ``limit`` (the policy's ``max_draft``), ``eos`` (drafted) or ``length`` (there
            was no room for more).
        signals: of every drafted token.
        draft_seconds, verify_seconds: wall clock; host and device meet at the end of both.
        emitted: tokens that went into the output.
    """

    drafted: int
    accepted: int
    ended: str = "rule"
    signals: list[Signals] = field(default_factory=list)
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    emitted: int = 0


@dataclass
class Rule:
    """Base of the rules; a subclass says ``stop``, and what it must remember between tokens or rounds.

    ``max_draft`` bounds every draft; the loop stops there whatever the rule says.
    """

    max_draft: int = field(default=32, kw_only=True)
    looks: ClassVar[bool] = (
        True  # whether ``stop`` reads the signals; if not, they are not computed and it is given None
    )

    def __post_init__(self):
        if self.max_draft < 1:
            raise ValueError(f"max_draft is a number of tokens, at least 1; got {self.max_draft}")

    @property
    def name(self) -> str:
        """Class and parameters, e.g. ``MaxConfidence(0.8)``."""
        values = [value for key, value in asdict(self).items() if key != "max_draft"]
        return f"{type(self).__name__}({', '.join(f'{value:g}' for value in values)})"

    def begin(self) -> None:
        """A new draft."""

    def stop(self, signals: Signals) -> bool:
        """Whether the token that ``signals`` describes is the last of the draft."""
        raise NotImplementedError

    def end(self, result: Round) -> None:
        """The draft was verified; adaptive rules learn from every round, also from those they did not decide."""

    def never_longer_than(self, other: "Rule") -> bool:
        """Whether this rule stops no later than ``other`` on every draft, whatever the signals."""
        return self == other

    def to_dict(self) -> dict:
        """Parameters and state, JSON; :func:`rule_from_dict` reads it."""
        return {"rule": type(self).__name__, **asdict(self)}


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} is positive, got {value}")


@dataclass
class StaticLength(Rule):
    """Always ``k`` tokens."""

    looks: ClassVar[bool] = False
    k: int = 5

    def __post_init__(self):
        super().__post_init__()
        _positive("k", self.k)
        self._count = 0

    def begin(self) -> None:
        self._count = 0

    def stop(self, signals: Signals) -> bool:
        self._count += 1
        return self._count >= self.k

    def never_longer_than(self, other: Rule) -> bool:
        return isinstance(other, StaticLength) and self.k <= other.k


@dataclass
class Heuristic(Rule):
    """transformers' "heuristic" schedule: two more tokens after a round accepted whole, one less otherwise, at least one."""

    looks: ClassVar[bool] = False
    k: float = 5.0

    def __post_init__(self):
        super().__post_init__()
        _positive("k", self.k)
        self._count = 0

    def begin(self) -> None:
        self._count = 0

    def stop(self, signals: Signals) -> bool:
        self._count += 1
        return self._count >= self.k

    def end(self, result: Round) -> None:
        if result.ended != "length" and result.drafted:
            whole = result.accepted == result.drafted
            self.k = self.k + 2.0 if whole else max(1.0, self.k - 1.0)


@dataclass
class _Threshold(Rule):
    threshold: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        _positive("threshold", self.threshold)

    def never_longer_than(self, other: Rule) -> bool:
        """The higher a confidence is asked for, the earlier the stop; entropies turn it around."""
        if type(self) is not type(other):
            return False
        return self.threshold >= other.threshold if self._confidence else self.threshold <= other.threshold

    _confidence = True


@dataclass
class DrawnConfidence(_Threshold):
    """Stops at a token whose own probability is low."""

    threshold: float = 0.4

    def stop(self, signals: Signals) -> bool:
        return signals.drawn < self.threshold


@dataclass
class MaxConfidence(_Threshold):
    """Stops where no token is likely."""

    threshold: float = 0.8

    def stop(self, signals: Signals) -> bool:
        return signals.first < self.threshold


@dataclass
class LogitMargin(_Threshold):
    """Stops where two tokens are almost equally likely."""

    threshold: float = 0.2

    def stop(self, signals: Signals) -> bool:
        return signals.first - signals.second < self.threshold


@dataclass
class SVIP(_Threshold):
    """Stops where the entropy bounds the chance of acceptance too low (arxiv.org/abs/2411.18462)."""

    threshold: float = 0.3
    _confidence = False

    def stop(self, signals: Signals) -> bool:
        return math.sqrt(0.15 * signals.entropy) > self.threshold


@dataclass
class SVIPDifference(_Threshold):
    """Stops where the square root of the entropy jumps up."""

    threshold: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        self._before: float | None = None

    def begin(self) -> None:
        self._before = None

    def stop(self, signals: Signals) -> bool:
        now, before = math.sqrt(signals.entropy), self._before
        self._before = now
        return before is not None and now - before > self.threshold

    _confidence = False


@dataclass
class AdaEDL(Rule):
    """Stops where 1 - sqrt(g H), a lower bound of the chance of acceptance, falls below lambda (arxiv.org/abs/2410.18351).

    After every round the moving average of the acceptance is compared with ``acceptance``; lambda takes a small step up if
    it is lower, down otherwise. (The rates of both averages are those of a public re-implementation of the method it takes
    them from, Draft & Verify.)
    """

    threshold: float = 0.4
    gamma: float = 0.2
    acceptance: float = 0.9
    step: float = 0.01
    average: float = 0.9

    @property
    def name(self) -> str:
        return f"AdaEDL({self.threshold:.2g})"

    def stop(self, signals: Signals) -> bool:
        return 1.0 - math.sqrt(self.gamma * signals.entropy) < self.threshold

    def end(self, result: Round) -> None:
        if not result.drafted:
            return
        self.average = 0.5 * self.average + 0.5 * result.accepted / result.drafted
        aim = self.threshold + (self.step if self.average < self.acceptance else -self.step)
        self.threshold = min(1.0, max(0.0, 0.9 * self.threshold + 0.1 * aim))

    def never_longer_than(self, other: Rule) -> bool:
        return False  # lambdas move


RULES: dict[str, type[Rule]] = {
    rule.__name__: rule
    for rule in (StaticLength, Heuristic, DrawnConfidence, MaxConfidence, LogitMargin, SVIP, SVIPDifference, AdaEDL)
}


def rule_from_dict(content: dict) -> Rule:
    """The rule that :meth:`Rule.to_dict` described.

    Raises:
        ValueError: no such rule, or parameters it does not have.
    """
    content = dict(content)
    name = content.pop("rule", None)
    if name not in RULES:
        raise ValueError(f"unknown rule {name!r}; known are {', '.join(RULES)}")
    try:
        return RULES[name](**content)
    except TypeError as error:
        raise ValueError(f"rule {name}: {error}") from error
