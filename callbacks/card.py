"""CardCallback: a training that pushes to the Hub publishes a card of what was measured, in place of the stock one.

    Trainer(..., args=TrainingArguments(push_to_hub=True, ...), callbacks=[SparsityCallback(...), CardCallback()])

``Trainer.push_to_hub`` writes a card of its own right before it uploads. The callback puts its own writer in that place, on
this one trainer: first training_report.json (data, steps, losses, density, FLOPs, hardware, versions, as far as they are
known), then the card from all reports in the output directory. Without a push, both are written when training ends.
"""

import json
from typing import Any

from transformers import TrainerCallback

from hf_sparse.atomic import atomic_write_text
from hf_sparse.hub_cards.sparsity_card import SparsityCard

__all__ = ["CardCallback"]


class CardCallback(TrainerCallback):
    """Writes the model card of a training.

    Args:
        dataset: what it was trained on, in a few words; default: what the dataset says of itself.
        license: of the model; default: what the reports or the config state.
        trainer: the Trainer, for a card in every push; ``trainer.add_callback(CardCallback(trainer=trainer))``. Without it the
            card is written when training ends, and a Trainer that pushes afterwards would write its own over it; so with
            ``push_to_hub=True`` it is needed, and its absence is an error when training begins.
    """

    def __init__(self, dataset: str | None = None, license: str | None = None, trainer=None):
        self.dataset, self.license, self.trainer = dataset, license, trainer
        if trainer is not None:
            self._attach(trainer)

    def _attach(self, trainer) -> None:
        def create_model_card(**kwargs):
            if trainer.is_world_process_zero():
                self.write(trainer.args, trainer.state, trainer.model, trainer.train_dataset)

        trainer.create_model_card = create_model_card  # of this object; the class stays as it is

    def on_train_begin(self, args, state, control, **kwargs):
        if args.push_to_hub and self.trainer is None:
            raise ValueError(
                "a Trainer that pushes writes its own card before it uploads: hand it over, "
                "trainer.add_callback(CardCallback(trainer=trainer))"
            )

    def on_train_end(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        if self.trainer is None and state.is_world_process_zero and (_directory(args) / "config.json").is_file():
            self.write(args, state, model, getattr(train_dataloader, "dataset", None))

    def write(self, args, state, model, dataset) -> None:
        """training_report.json and README.md into the output directory, which must hold the saved model."""
        directory = _directory(args)
        report = training_report(args, state, model, dataset, self.dataset)
        if self.license:
            report["license"] = self.license
        atomic_write_text(directory / "training_report.json", json.dumps(report, indent=1) + "\n")
        SparsityCard(directory, license=self.license).save()


def _directory(args):
    from pathlib import Path

    return Path(args.output_dir)


def training_report(args, state, model, dataset=None, description: str | None = None) -> dict[str, Any]:
    """What is known of a training when it ends; what is not known is left out.

    Args:
        args, state, model, dataset: the Trainer's. description: of the data.
    """
    import torch

    from hf_sparse.instruments import device_name, versions

    log = state.log_history
    last = lambda key: next((entry[key] for entry in reversed(log) if key in entry), None)  # noqa: E731
    parts = [entry["loss"] for entry in log if "loss" in entry]
    devices = max(1, args.world_size)
    report: dict[str, Any] = {
        "dataset": description or _described(dataset),
        "rows": len(dataset) if hasattr(dataset, "__len__") else None,
        "steps": state.global_step,
        "batch_size": args.train_batch_size * args.gradient_accumulation_steps * devices,
        "learning_rate": args.learning_rate,
        "final_loss": parts[-1] if parts else None,
        "losses": parts[:: max(1, len(parts) // 50)],
        "eval_loss": last("eval_loss"),
        "density": last("density"),
        "ever_active": last("ever_active"),
        "flops": last("flops_spent") or last("flops"),
        "flops_dense": last("flops_dense"),
        "squarehead": last("squarehead"),
        "seconds": last("train_runtime"),
        "device": device_name(next(model.parameters()).device if model is not None else torch.device("cpu")),
        "base_model": _name(model),
        "versions": versions(),
    }
    if report["squarehead"] is not None:
        report["teacher"] = True
    columns = getattr(dataset, "column_names", None) or []
    if "source" in columns:
        report["self_distilled_rows"] = sum(source == "model" for source in dataset["source"])
    return {key: value for key, value in report.items() if value is not None}


def _described(dataset) -> str | None:
    info = getattr(dataset, "info", None)
    return (getattr(info, "dataset_name", None) or None) if info is not None else None


def _name(model) -> str | None:
    from pathlib import Path

    name = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    return None if not name else Path(name).name if Path(name).exists() else name
