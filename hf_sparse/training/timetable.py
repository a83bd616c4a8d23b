"""The timetable of a sparse training: when masks change, how many weights they exchange, how sparse they are by then.

It is made from the config once the length of training is known. All of it are functions of the optimizer step, but for one
number: how many updates were made. An update whose step was skipped (an overflow, a gradient that is missing or not finite)
stays due and is made after the next good step.
"""

from dataclasses import dataclass

from hf_sparse.config import SparsityConfig
from hf_sparse.methods import METHODS, schedule_options
from hf_sparse.schedules import SCHEDULES, Schedule, Updates, as_step

__all__ = ["Timetable", "initial_share"]


def initial_share(config: SparsityConfig) -> float:
    """The share of the final sparsity that the first masks have: 1, or less where sparsity grows."""
    options = schedule_options(config.method, config.schedule)
    if "ramp" not in options:
        return 1.0
    return options["initial_sparsity"] / config.sparsity if config.sparsity else 0.0


@dataclass
class Timetable:
    """When masks change and by how much; made by :meth:`of`.

    Attributes:
        updates: the steps of updates.
        ramp: the share of the final sparsity over steps, or None.
        exchange: the share of the kept weights that an update exchanges, or None.
        done: updates made, those before a resume included; None until the first question.
    """

    updates: Updates
    ramp: Schedule | None = None
    exchange: Schedule | None = None
    done: int | None = None

    @classmethod
    def of(cls, config: SparsityConfig, total_steps: int | None) -> "Timetable | None":
        """The timetable of a config; None for masks that never change.

        Raises:
            ValueError: it ends before it begins, has no update, or never reaches the sparsity.
        """
        method, options = METHODS[config.method], schedule_options(config.method, config.schedule)
        if not method.is_dynamic:
            return None
        every = options["every"]
        begin, end = (as_step(options[name], total_steps, name) for name in ("begin", "end"))
        if end <= begin:
            raise ValueError(f"the schedule of {config.method!r} ends at step {end}, before it begins at step {begin}")
        until = end
        if method.grow is not None and total_steps is not None:
            until = min(end, total_steps - 1)  # a weight grown after the last step would have none to learn in
        ramp = exchange = None
        if "ramp" in options:
            top = as_step(options.get("ramp_end", options["end"]), total_steps, "ramp_end")
            if top > end:
                raise ValueError(
                    f"the sparsity would rise until step {top}, but masks are updated until step {end} only"
                )
            if total_steps is not None and end > total_steps:
                raise ValueError(
                    f"the sparsity would be reached at step {end}, after the last one, {total_steps}; end the schedule earlier"
                )
            if every >= top - begin:
                raise ValueError(
                    f"the sparsity rises from step {begin} to {top}, and every={every} leaves one update for all of it; give a "
                    f"smaller every, at most {(top - begin) // 2}"
                )
            ramp = SCHEDULES[options["ramp"]](initial_share(config), 1.0, begin, min(top, until))
        elif end - begin < every:
            raise ValueError(
                f"no mask would ever be updated: the schedule runs from step {begin} to {end}, and every={every} is longer"
            )
        if "drop_fraction" in options:
            shape = SCHEDULES[options["anneal"]]
            exchange = shape(options["drop_fraction"], options.get("final_drop_fraction", 0.0), begin, end)
        return cls(Updates(every, begin, max(begin, until), closing=ramp is not None), ramp, exchange)

    def pending(self, step: int) -> bool:
        """Whether an update is to be made after optimizer step ``step``."""
        if self.done is None:
            self.done = self.updates.count(step - 1)
        return self.updates.count(step) > self.done

    def made(self, step: int) -> None:
        """Notes that the updates due until ``step`` were made."""
        self.done = self.updates.count(step)

    def count(self, step: int) -> int:
        """Updates made until now, ``step`` being the last step."""
        return self.updates.count(step) if self.done is None else self.done

    def drop_fraction(self, step: int) -> float:
        return 0.0 if self.exchange is None else self.exchange(step)

    def share(self, step: int) -> float:
        """The share of the final sparsity that masks have after an update at ``step``."""
        return 1.0 if self.ramp is None else self.ramp(step)
