"""Schedules: numbers that change with the optimizer step, and the steps at which masks are updated.

A schedule is a frozen dataclass and a pure function of the optimizer step (never of the micro-batch), so there is nothing to
save and nothing to restore: a resumed run computes the same values from the same step. With progress
``p = (step - begin) / (end - begin)`` clamped to [0, 1] its value is ``final + (initial - final) * decay(p)``:

    Constant       1                        the initial value for ever
    Linear         1 - p
    Cubic          (1 - p)^3                gradual magnitude pruning (arxiv.org/abs/1710.01878): most is pruned early
    Cosine         (1 + cos(pi p)) / 2      RigL's drop fraction (arxiv.org/abs/1911.11134): 0.3, 0.15, 0 at p = 0, 1/2, 1
    Exponential    (e^(-kp) - e^(-k)) / (1 - e^(-k)), rate k = 5; it ends exactly at the final value

:class:`Updates` says when: every so many steps between a first and a last one.
"""

import math
from dataclasses import dataclass

__all__ = ["SCHEDULES", "Constant", "Cosine", "Cubic", "Exponential", "Linear", "Schedule", "Updates", "as_step"]


@dataclass(frozen=True)
class Schedule:
    """From ``initial`` at step ``begin`` to ``final`` at step ``end``; constant before and after.

    Raises:
        ValueError: ``end`` lies before ``begin``.
    """

    initial: float
    final: float
    begin: int = 0
    end: int = 0

    def __post_init__(self):
        if self.end < self.begin:
            raise ValueError(f"a schedule ends at step {self.end}, before it begins at step {self.begin}")

    def __call__(self, step: int) -> float:
        """The value at an optimizer step."""
        length = self.end - self.begin
        progress = 1.0 if step >= self.end else max(0.0, (step - self.begin) / length)
        return self.final + (self.initial - self.final) * self._decay(progress)

    def _decay(self, progress: float) -> float:
        raise NotImplementedError


@dataclass(frozen=True)
class Constant(Schedule):
    def _decay(self, progress):
        return 1.0


@dataclass(frozen=True)
class Linear(Schedule):
    def _decay(self, progress):
        return 1.0 - progress


@dataclass(frozen=True)
class Cubic(Schedule):
    def _decay(self, progress):
        return (1.0 - progress) ** 3


@dataclass(frozen=True)
class Cosine(Schedule):
    def _decay(self, progress):
        return 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Exponential(Schedule):
    rate: float = 5.0

    def _decay(self, progress):
        return (math.exp(-self.rate * progress) - math.exp(-self.rate)) / (1.0 - math.exp(-self.rate))


SCHEDULES = {
    "constant": Constant,
    "linear": Linear,
    "cubic": Cubic,
    "cosine": Cosine,
    "exponential": Exponential,
}


@dataclass(frozen=True)
class Updates:
    """The optimizer steps after which masks are updated: ``begin + every``, ``begin + 2 every``, ... up to ``end``.

    Steps count from 1: the update of step 100 follows the hundredth ``optimizer.step()``.

    Args:
        every: steps between updates (the papers' delta T).
        closing: also update at ``end`` itself when it is no multiple, so that a ramp of the sparsity reaches its target.

    Raises:
        ValueError: ``every`` is not positive, or ``end`` lies before ``begin``.
    """

    every: int
    begin: int = 0
    end: int = 0
    closing: bool = False

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"masks are updated every so many steps, at least 1, got {self.every}")
        if self.end < self.begin:
            raise ValueError(f"mask updates end at step {self.end}, before they begin at step {self.begin}")

    def due(self, step: int) -> bool:
        """Whether masks are updated after optimizer step ``step``."""
        if not self.begin < step <= self.end:
            return False
        return (step - self.begin) % self.every == 0 or (self.closing and step == self.end)

    def count(self, step: int) -> int:
        """How many updates the first ``step`` steps bring."""
        done = max(0, min(step, self.end) - self.begin)
        extra = self.closing and step >= self.end and done % self.every != 0
        return done // self.every + extra


def as_step(value: float, total_steps: int | None, what: str) -> int:
    """A step number from a whole number of steps, or from a share of training written as a float in [0, 1].

    Raises:
        ValueError: neither, or a share while the length of training is not known.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise ValueError(f"{what} is a step (a whole number) or a share of training (a float in [0, 1]), got {value!r}")
    if isinstance(value, int):
        return value
    if value > 1.0:
        if value.is_integer():  # 2000.0 out of a YAML file
            return int(value)
        raise ValueError(f"{what} is a step (a whole number) or a share of training (a float in [0, 1]), got {value!r}")
    if total_steps is None:
        raise ValueError(
            f"{what}={value} is a share of training, but the number of steps is not known; give total_steps, or a step"
        )
    return round(value * total_steps)
