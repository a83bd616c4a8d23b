"""DenseFinetuningCallback: from sparse to dense inside one training (SPDF, arxiv.org/abs/2303.10464; vSPDF).

    callbacks=[SparsityCallback(SparsityConfig(sparsity=0.75, method="static")), DenseFinetuningCallback(at=0.9)]

At the transition the masks go (:func:`hf_sparse.training.densify.densify`) and revived weights start at exactly zero. The
optimizer starts afresh and the learning rate has a warm-up and a schedule of its own over the steps that are left, as in the
paper, where dense fine-tuning is a separate run with its own recipe; ``optimizer="carry"`` and ``schedule="carry"`` go on
with what there is. To change data as well, train twice and call ``densify(model)`` between two Trainers.
"""

import math
from functools import partial

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from hf_sparse.masks import Masks
from hf_sparse.schedules import as_step
from hf_sparse.training.densify import densify
from hf_sparse.training.sharding import unwrapped

__all__ = ["DenseFinetuningCallback"]

_DECAYS = ("linear", "cosine", "constant")


class DenseFinetuningCallback(TrainerCallback, ExportableState):
    """Makes the Trainer's model dense in the middle of a sparse training.

    Args:
        at: the optimizer step of the transition, or a float in (0, 1): the share of training.
        learning_rate: peak of the dense phase. Default: the Trainer's.
        warmup: steps, or share of the dense phase, over which the learning rate rises from 0.
        schedule: how it falls to ``final_learning_rate``: ``linear`` (the paper's), ``cosine``, ``constant``; ``carry`` goes on
            with the Trainer's.
        final_learning_rate: where it ends, as a fraction of the peak.
        optimizer: ``fresh`` forgets all moments, ``carry`` keeps them (those of revived weights are zero).

    Raises:
        ValueError: an argument out of range; at the start of training, a transition outside of it or no sparse training
            before it.
    """

    def __init__(
        self,
        at: float,
        learning_rate: float | None = None,
        warmup: float = 0,
        schedule: str = "linear",
        final_learning_rate: float = 0.0,
        optimizer: str = "fresh",
    ):
        as_step(at, 1, "at")
        as_step(warmup, 1, "warmup")
        if schedule not in (*_DECAYS, "carry"):
            raise ValueError(f"schedule is one of {', '.join(_DECAYS)} or carry, got {schedule!r}")
        if optimizer not in ("fresh", "carry"):
            raise ValueError(f"optimizer is 'fresh' or 'carry', got {optimizer!r}")
        if not 0.0 <= final_learning_rate <= 1.0:
            raise ValueError(f"final_learning_rate is a fraction of the peak in [0, 1], got {final_learning_rate!r}")
        if learning_rate is not None and not learning_rate > 0:
            raise ValueError(f"learning_rate is positive, got {learning_rate!r}")
        if schedule == "carry" and (learning_rate is not None or warmup):
            raise ValueError(
                "schedule='carry' goes on with the Trainer's learning rate; leave learning_rate and warmup out"
            )
        self.at = at
        self.learning_rate = learning_rate
        self.warmup = warmup
        self.schedule = schedule
        self.final_learning_rate = final_learning_rate
        self.optimizer = optimizer
        self.done = False

    def state(self) -> dict:
        names = ("at", "learning_rate", "warmup", "schedule", "final_learning_rate", "optimizer")
        return {"args": {name: getattr(self, name) for name in names}, "attributes": {"done": self.done}}

    def on_train_begin(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        step = self._transition(state)
        if not 0 < step < state.max_steps:
            raise ValueError(
                f"at={self.at!r} is step {step}; the transition lies between the first step and the last, {state.max_steps}"
            )
        if self.schedule != "carry" and not isinstance(lr_scheduler, LambdaLR):
            raise ValueError(
                f"the dense phase has a learning rate of its own, which {type(lr_scheduler).__name__} cannot be given; use a "
                "schedule of transformers (linear, cosine, ...), or schedule='carry'"
            )
        self.done = state.global_step >= step
        if self.done:  # resumed after the transition: the scheduler's position was loaded, its shape was not
            self._install_schedule(args, state, lr_scheduler)
        elif not Masks.attached(unwrapped(model)):
            raise ValueError(
                "there is no sparse training to end; put SparsityCallback(...) before DenseFinetuningCallback"
            )

    def on_step_end(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        if self.done or state.global_step < self._transition(state):
            return
        densify(unwrapped(model))
        self.done = True
        if self.optimizer == "fresh":
            while hasattr(optimizer, "optimizer"):
                optimizer = optimizer.optimizer
            optimizer.state.clear()
        if self.schedule != "carry":
            self._install_schedule(args, state, lr_scheduler)
            lr_scheduler.last_epoch = -1
            lr_scheduler.step()

    def _transition(self, state) -> int:
        return as_step(self.at, state.max_steps, "at")

    def _install_schedule(self, args, state, lr_scheduler) -> None:
        if self.schedule == "carry":
            return
        steps = state.max_steps - self._transition(state)
        peak = 1.0 if self.learning_rate is None else self.learning_rate / args.learning_rate
        shape = partial(_factor, schedule=self.schedule, warmup=as_step(self.warmup, steps, "warmup"), steps=steps)
        final = self.final_learning_rate
        lr_scheduler.lr_lambdas = [lambda step: peak * shape(step, final=final) for _ in lr_scheduler.base_lrs]


def _factor(step: int, *, schedule: str, warmup: int, steps: int, final: float) -> float:
    """Share of the peak learning rate ``step`` steps after the transition."""
    if step < warmup:
        return step / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    falling = {"linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)), "constant": 1.0}[
        schedule
    ]
    return final + (1.0 - final) * falling
