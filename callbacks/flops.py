"""FlopsCallback: training stops when it has spent a budget of FLOPs.

    Trainer(model, args, train_dataset=..., callbacks=[SparsityCallback(config), FlopsCallback("1.5e18")])

A sparse and a dense model are compared fairly at equal training FLOPs, not at equal steps: a sparse model may train on more
tokens for the same budget, as in RigL's extended training (arxiv.org/abs/1911.11134). What a pass costs is said in
:mod:`hf_sparse.flops`: forward and backward by the densities of the moment, attention and head included; evaluation, generation
and what gradient checkpointing recomputes are free.

The learning rate still follows ``max_steps``. One step of ``model`` costs ``world_size * accumulation *
FlopCounter(model)({"input_ids": (batch, length)})``, so ``max_steps`` can be chosen to end where the budget does.
"""

import logging
import math

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from hf_sparse.callbacks.metrics import add_metrics, stand_before_reporters
from hf_sparse.flops import FlopCounter
from hf_sparse.training.sharding import unwrapped

__all__ = ["FlopsCallback"]

logger = logging.getLogger(__name__)


class FlopsCallback(TrainerCallback, ExportableState):
    """Stops training, and saves, at the first step that reaches a budget of training FLOPs.

    The sum is over all processes and over all runs that resumed from one another: the checkpoint carries it. With several
    processes they compare notes only when a log or checkpoint needs it and each time half of the remaining steps are done.
    Densities are those that :class:`SparsityCallback` keeps; alone, the model counts as dense.

    Adds to the Trainer's log: ``flops``, spent so far, and ``flops_budget_left``, a fraction of the budget. (``total_flos`` is
    the Trainer's own estimate and knows no zeros.)

    Args:
        budget: FLOPs, as a number or a string such as ``"1.5e18"``.

    Raises:
        ValueError: the budget is not a positive number, the resumed run has already spent it, the model's FLOPs cannot be
            counted, or the Trainer trains it without calling it.
    """

    def __init__(self, budget: float | str):
        try:
            self.budget = float(budget)
        except (TypeError, ValueError):
            self.budget = math.nan
        if isinstance(budget, bool) or not 0 < self.budget < math.inf:
            raise ValueError(f"budget is a positive number of FLOPs, such as 1.5e18 or '1.5e18', got {budget!r}")
        self.spent = 0.0  # in all, as of the last time the processes added up
        self._counter: FlopCounter | None = None
        self._before = 0.0  # spent by earlier runs
        self._start: tuple[int, float] | None = None  # the step and the counter's sum when this run began
        self._next = 0  # the step at which to add up again

    def state(self) -> dict:
        """What the Trainer writes into its checkpoints: enough to make this callback again."""
        return {"args": {"budget": self.budget}, "attributes": {"spent": self.spent}}

    def on_init_end(self, args, state, control, model=None, **kwargs):
        if model is not None:
            FlopCounter.attach(
                unwrapped(model)
            )  # now, before the model is sharded; what cannot be counted fails at once

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        stand_before_reporters(self)
        self.spent = self._before = self._spent_before(state)
        if self.spent >= self.budget:
            raise ValueError(
                f"the budget of {self.budget:g} FLOPs is already spent: the run that resumes at step {state.global_step} has "
                f"used {self.spent:g}; give a larger budget"
            )
        self._counter = FlopCounter.attach(unwrapped(model))
        self._start = None

    def on_step_begin(self, args, state, control, **kwargs):
        if (
            self._start is None
        ):  # not earlier: at the beginning other callbacks set the counter to what they resume from
            self._start, self._next = (state.global_step, self._counter.spent), state.global_step + 1

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= min(self._next, state.max_steps):
            self._add_up(args, state)
        if self.spent >= self.budget:
            control.should_training_stop = control.should_save = control.should_log = True
        if control.should_log or control.should_evaluate or control.should_save:
            self._add_up(args, state)
        return control

    def on_epoch_end(self, args, state, control, **kwargs):
        if control.should_log or control.should_evaluate or control.should_save:
            self._add_up(args, state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is not None and ("loss" in logs or "train_loss" in logs):
            left = max(0.0, 1 - self.spent / self.budget)
            add_metrics(state, logs, {"flops": self.spent, "flops_budget_left": left})

    def on_train_end(self, args, state, control, model=None, **kwargs):
        FlopCounter.detach(unwrapped(model))
        self._counter = self._start = None

    def _add_up(self, args, state) -> None:
        """Sums over the processes. All of them come here at the same steps: every condition above is the same for all."""
        if self._start is None:
            return
        step, base = self._start
        here = self._counter.spent - base
        if args.world_size > 1:
            total = torch.tensor(here, dtype=torch.float64, device=args.device)
            torch.distributed.all_reduce(total)
            here = total.item()
        if here == 0:
            raise ValueError(
                "FLOPs cannot be counted: no training step has called the model. Some memory-saving losses call a part of it "
                "instead; switch them off"
            )
        self.spent = self._before + here
        self._next = state.global_step + 1
        if args.world_size > 1:
            left = (self.budget - self.spent) / (here / (state.global_step - step))
            self._next = state.global_step + max(1, int(left / 2))

    def _spent_before(self, state) -> float:
        """What the runs that this one resumes have spent."""
        name = type(self).__name__
        if state.global_step == 0:
            return 0.0
        saved = state.stateful_callbacks.get(name)
        if saved is None:
            logger.warning("the checkpoint has no %s; its FLOPs are the Trainer's estimate, state.total_flos", name)
            state.stateful_callbacks[name] = self.state()  # the Trainer cannot save a callback that has no entry
            return float(state.total_flos)
        return float((saved[-1] if isinstance(saved, list) else saved)["attributes"]["spent"])
