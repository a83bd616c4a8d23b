"""What speculative decoding gained: accepted length, acceptance, and the improvement that follows from the drafter's cost.

mean accepted length    tokens emitted per forward of the target, its own token included, over all steps: from 1 to gamma + 1
acceptance rate         accepted / drafted tokens; MAL = 1 + rate * gamma where every draft has gamma tokens
improvement factor      MAL / (gamma c + 1), c: cost of a drafter's forward in forwards of the target. With the acceptance alpha
                        of each token taken as independent, MAL = (1 - alpha^(gamma + 1)) / (1 - alpha)
                        (arxiv.org/abs/2211.17192, theorem 3.8; SD^2, arxiv.org/abs/2504.08838, with c from MACs)
"""

import random
from dataclasses import dataclass, field
from typing import Any

from hf_sparse.speculative.rules import Round

__all__ = ["Speculation", "bootstrap", "expected_length", "improvement_factor"]


@dataclass
class Speculation:
    """Counts over rounds, of one text or of many; ``a + b`` joins them.

    Attributes:
        drafted, accepted, emitted: tokens per round. draft_seconds, verify_seconds: in all, the first round of a text (which
            reads the prompt) left out, and ``timed_*`` what they were spent on.
    """

    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    emitted: list[int] = field(default_factory=list)
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    timed_tokens: int = 0
    timed_rounds: int = 0

    def add(self, one: Round) -> None:
        self.drafted.append(one.drafted)
        self.accepted.append(one.accepted)
        self.emitted.append(one.emitted)
        if one.verify_seconds:
            self.draft_seconds += one.draft_seconds
            self.verify_seconds += one.verify_seconds
            self.timed_tokens += one.drafted
            self.timed_rounds += 1

    def __add__(self, other: "Speculation") -> "Speculation":
        return Speculation(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    @property
    def rounds(self) -> int:
        return len(self.drafted)

    @property
    def mean_accepted_length(self) -> float:
        """Tokens per forward of the target."""
        return sum(self.emitted) / max(1, len(self.emitted))

    @property
    def acceptance(self) -> float:
        """Accepted per drafted token."""
        return sum(self.accepted) / max(1, sum(self.drafted))

    @property
    def cost_ratio(self) -> float | None:
        """c as measured: seconds per drafted token over seconds per verification."""
        if not self.timed_tokens or not self.verify_seconds:
            return None
        return (self.draft_seconds / self.timed_tokens) / (self.verify_seconds / self.timed_rounds)

    def to_dict(self) -> dict[str, Any]:
        return {
            "rounds": self.rounds,
            "drafted": sum(self.drafted),
            "accepted": sum(self.accepted),
            "emitted": sum(self.emitted),
            "mean_accepted_length": self.mean_accepted_length,
            "acceptance": self.acceptance,
            "cost_ratio": self.cost_ratio,
            "draft_seconds": self.draft_seconds,
            "verify_seconds": self.verify_seconds,
        }


def expected_length(alpha: float, gamma: int) -> float:
    """Tokens per step if each of ``gamma`` drafted tokens is accepted with probability ``alpha``, independently."""
    return gamma + 1.0 if alpha == 1 else (1 - alpha ** (gamma + 1)) / (1 - alpha)


def improvement_factor(mean_accepted_length: float, gamma: float, cost_ratio: float) -> float:
    """How many times as fast as the target alone: tokens per step over the step's cost in forwards of the target.

    Args:
        gamma: tokens drafted per step, a mean if they differ. cost_ratio: c, of MACs or of latencies.
    """
    return mean_accepted_length / (gamma * cost_ratio + 1)


def bootstrap(values: list, statistic, draws: int = 1000, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """The confidence interval of ``statistic(values)`` by resampling ``values``, one entry per text."""
    rng = random.Random(seed)
    found = sorted(statistic(rng.choices(values, k=len(values))) for _ in range(draws))
    cut = (1 - level) / 2
    return found[int(cut * draws)], found[min(draws - 1, int((1 - cut) * draws))]
