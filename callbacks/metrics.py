"""Numbers of a callback in the Trainer's own log: history, reporters and progress bar.

``Trainer.log`` appends to ``state.log_history`` and then passes ``logs`` from callback to callback, reporters (TensorBoard,
Trackio, Weights & Biases, ...) before anything the user added. A callback can therefore still write into the history's last
entry, and into ``logs`` for those after it; to reach the reporters it has to stand before them.
"""

import gc

from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import DefaultFlowCallback

__all__ = ["add_metrics", "stand_before_reporters"]


def add_metrics(state: TrainerState, logs: dict[str, float], metrics: dict[str, float]) -> None:
    """Adds ``metrics`` to a log entry in ``on_log``: to what later callbacks see, and to the history."""
    logs.update(metrics)
    if state.log_history and state.log_history[-1].get("step") == state.global_step:
        state.log_history[-1].update(metrics)


def stand_before_reporters(callback: TrainerCallback) -> bool:
    """Moves ``callback`` to the front of its Trainer's callbacks, right behind the Trainer's own; False if none is found.

    The Trainer gives a callback no way to its neighbours, so the list is found among the objects that hold the callback.
    """
    for holder in gc.get_referrers(callback):
        if isinstance(holder, list) and any(type(other) is DefaultFlowCallback for other in holder):
            holder.remove(callback)
            first = next(i for i, other in enumerate(holder) if type(other) is DefaultFlowCallback)
            holder.insert(first + 1, callback)
            return True
    return False
