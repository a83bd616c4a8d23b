"""Multi-armed bandits: which of K choices to take next, when only the one taken shows what it is worth.

    select()            the arm to pull          update(arm, reward)     what it gave, in [0, 1]

With n_i pulls of arm i, mean reward m_i, and t = sum of n_i:

    UCB1                argmax  m_i + sqrt(c ln t / n_i)                           c = 2: Auer, Cesa-Bianchi and Fischer 2002
    UCBTuned            argmax  m_i + sqrt(ln t / n_i  min(1/4, V_i))              the same paper
                                V_i = mean of r^2 - m_i^2 + sqrt(2 ln t / n_i)
    GaussianThompson    argmax of draws from N(s_i / (n_i + 1), v / (n_i + 1))     v: variance of the rewards
    BetaThompson        argmax of draws from Beta(1 + s_i, 1 + n_i - s_i)          s_i: sum of rewards

Regret of UCB1 after T pulls of arms whose means are D_i below the best one's, at most (Auer et al., theorem 1)

    8 sum ln T / D_i + (1 + pi^2 / 3) sum D_i

``discount`` < 1 forgets: counts and sums shrink by it at every update, so that arms are compared by their last 1 / (1 -
discount) pulls. Draws depend on the seed and on how many there were, and on nothing else, so a bandit that was saved goes on as
if it had not been.
"""

import math
import random
from dataclasses import asdict, dataclass, field

__all__ = [
    "BANDITS",
    "UCB1",
    "Bandit",
    "BetaThompson",
    "GaussianThompson",
    "UCBTuned",
    "bandit_from_dict",
    "ucb1_regret_bound",
]


@dataclass
class Bandit:
    """Counts, sums and squares per arm; a subclass says which arm looks best.

    Attributes:
        arms: how many there are. discount: in (0, 1]; 1 forgets nothing. seed: of the draws of Thompson sampling.
        counts, sums, squares: discounted numbers of pulls, sums of rewards and of their squares. selections: calls of
            ``select``.
    """

    arms: int
    discount: float = field(default=1.0, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    counts: list[float] = field(default_factory=list, kw_only=True)
    sums: list[float] = field(default_factory=list, kw_only=True)
    squares: list[float] = field(default_factory=list, kw_only=True)
    selections: int = field(default=0, kw_only=True)

    def __post_init__(self):
        if self.arms < 1:
            raise ValueError(f"a bandit has at least one arm, got {self.arms}")
        if not 0 < self.discount <= 1:
            raise ValueError(f"discount lies in (0, 1], got {self.discount}")
        for name in ("counts", "sums", "squares"):
            if not getattr(self, name):
                setattr(self, name, [0.0] * self.arms)

    def mean(self, arm: int) -> float:
        """The mean reward of an arm; 0 before its first pull."""
        return self.sums[arm] / self.counts[arm] if self.counts[arm] > 0 else 0.0

    def best(self) -> int:
        """The arm of the highest mean so far, the first of equals."""
        return max(range(self.arms), key=self.mean)

    def select(self) -> int:
        """The arm to pull next; each once before any is compared."""
        self.selections += 1
        for arm, count in enumerate(self.counts):
            if count == 0:
                return arm
        total = max(math.e, sum(self.counts))
        rng = random.Random(f"{self.seed}/{self.selections}")
        return max(range(self.arms), key=lambda arm: self._index(arm, total, rng))

    def update(self, arm: int, reward: float) -> None:
        """Enters what a pull of ``arm`` gave."""
        self.update_all({arm: reward})

    def update_all(self, rewards: dict[int, float]) -> None:
        """Enters what one round told about several arms."""
        if wrong := [arm for arm, reward in rewards.items() if not (0 <= arm < self.arms and 0 <= reward <= 1)]:
            raise ValueError(
                f"rewards lie in [0, 1], for arms 0 to {self.arms - 1}; got {rewards[wrong[0]]} for arm {wrong[0]}"
            )
        if self.discount < 1 and rewards:
            for values in (self.counts, self.sums, self.squares):
                values[:] = [value * self.discount for value in values]
        for arm, reward in rewards.items():
            self.counts[arm] += 1
            self.sums[arm] += reward
            self.squares[arm] += reward * reward

    def _index(self, arm: int, total: float, rng: random.Random) -> float:
        raise NotImplementedError

    def to_dict(self) -> dict:
        """Parameters and state, JSON; :func:`bandit_from_dict` reads it."""
        return {"bandit": type(self).__name__, **asdict(self)}


@dataclass
class UCB1(Bandit):
    """Optimism by the number of pulls alone. ``exploration`` is the c of the formula; below 2 it explores less."""

    exploration: float = field(default=2.0, kw_only=True)

    def _index(self, arm: int, total: float, rng: random.Random) -> float:
        return self.mean(arm) + math.sqrt(self.exploration * math.log(total) / self.counts[arm])


@dataclass
class UCBTuned(Bandit):
    """Optimism by the number of pulls and the spread of the rewards."""

    def _index(self, arm: int, total: float, rng: random.Random) -> float:
        per_pull = math.log(total) / self.counts[arm]
        variance = self.squares[arm] / self.counts[arm] - self.mean(arm) ** 2 + math.sqrt(2 * per_pull)
        return self.mean(arm) + math.sqrt(per_pull * min(0.25, max(0.0, variance)))


@dataclass
class GaussianThompson(Bandit):
    """Thompson sampling with a Gaussian posterior. ``variance`` of the rewards; 1 is the textbook's, and explores a lot."""

    variance: float = field(default=1.0, kw_only=True)

    def _index(self, arm: int, total: float, rng: random.Random) -> float:
        weight = self.counts[arm] + 1
        return rng.gauss(self.sums[arm] / weight, math.sqrt(self.variance / weight))


@dataclass
class BetaThompson(Bandit):
    """Thompson sampling with a Beta posterior; a reward between 0 and 1 counts as that share of a success."""

    def _index(self, arm: int, total: float, rng: random.Random) -> float:
        return rng.betavariate(1 + self.sums[arm], 1 + max(0.0, self.counts[arm] - self.sums[arm]))


BANDITS: dict[str, type[Bandit]] = {kind.__name__: kind for kind in (UCB1, UCBTuned, GaussianThompson, BetaThompson)}


def bandit_from_dict(content: dict) -> Bandit:
    """The bandit that :meth:`Bandit.to_dict` described."""
    content = dict(content)
    name = content.pop("bandit", None)
    if name not in BANDITS:
        raise ValueError(f"unknown bandit {name!r}; known are {', '.join(BANDITS)}")
    try:
        return BANDITS[name](**content)
    except TypeError as error:
        raise ValueError(f"bandit {name}: {error}") from error


def ucb1_regret_bound(means: list[float], pulls: int) -> float:
    """The bound on the expected regret of UCB1 with c = 2 (Auer et al. 2002, theorem 1), for rewards in [0, 1]."""
    gaps = [max(means) - mean for mean in means]
    return sum(8 * math.log(pulls) / gap for gap in gaps if gap > 0) + (1 + math.pi**2 / 3) * sum(gaps)
