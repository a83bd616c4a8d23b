"""Distillation in the Trainer: a mixin that adds SquareHead and KL to the loss (arXiv 2310.06927).

    trainer = DistillationTrainer(model, args, train_dataset=..., teacher=dense_model, callbacks=[SparsityCallback()])
    trainer.train()

    class SparseSFTTrainer(DistillationMixin, SFTTrainer): ...      # the same for any subclass of Trainer

How it works. ``compute_loss`` of the Trainer below runs unchanged, with ``output_hidden_states=True`` among the inputs. The
student's hidden states are read where its backbone returns them (a forward hook during that one call), because not every
Trainer hands the model's outputs out: TRL's computes its loss from ``lm_head.weight`` without building logits. The teacher's
backbone then sees the same inputs, in evaluation mode, without gradients, under the same autocast.

Gradient accumulation: the cross entropy is divided by the labels of the whole step, and so is KL; micro-batches of any
sizes add up to the loss of one large batch. SquareHead is a ratio per micro-batch, averaged over the micro-batches.

Evaluation is not distilled: ``eval_loss`` stays the cross entropy, comparable with that of any other run.

Logged with every training loss, and so in ``state.log_history`` and every reporter: ``ce``, ``squarehead``, ``kl``, before
their weights, averaged over the steps as ``loss`` is: loss = sum of weight * part.

The teacher must not be in training itself, dropout in the student (GPT-2's default) keeps the loss of equal models above
zero, and packed batches without an attention mask count every token.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import Trainer

from hf_sparse.distillation.losses import kl_from_states, output_head, predicts_label, squarehead
from hf_sparse.distillation.vocabulary import shared_vocabulary
from hf_sparse.loading import load_model, load_tokenizer

__all__ = ["DistillationLoss", "DistillationMixin", "DistillationTrainer"]


@dataclass(frozen=True, kw_only=True)
class DistillationLoss:
    """The weights of the parts; the defaults are those of the paper's final recipe, cross entropy and SquareHead.

    Attributes:
        ce: weight of the Trainer's own loss.
        squarehead: weight of SquareHead.
        kl: weight of the KL divergence of the predictions.
        temperature: of the KL divergence.
        layers: pairs (student layer, teacher layer) that SquareHead compares, see
            :func:`hf_sparse.distillation.losses.squarehead`; None compares each with its equal.
        vocabulary: how many tokens KL compares, where the models' vocabularies are one tokenizer's, padded to different sizes:
            ``len(tokenizer)``; None: all. It is found out if the teacher is given by its name.
    """

    ce: float = 1.0
    squarehead: float = 1.0
    kl: float = 0.0
    temperature: float = 1.0
    layers: tuple[tuple[int, int], ...] | None = None
    vocabulary: int | None = None

    def __post_init__(self):
        for name in ("ce", "squarehead", "kl"):
            if getattr(self, name) < 0:
                raise ValueError(f"the weight {name} is not negative, got {getattr(self, name)}")
        if self.squarehead == self.kl == 0:
            raise ValueError("squarehead and kl are both 0: nothing is distilled; use the plain Trainer")
        if self.temperature <= 0:
            raise ValueError(f"temperature is positive, got {self.temperature}")
        if self.vocabulary is not None and self.vocabulary < 1:
            raise ValueError(f"vocabulary is a number of tokens, at least 1; got {self.vocabulary}")


class DistillationMixin:
    """Put it before a Trainer class; takes two more keyword arguments than that class.

    Args:
        teacher: the dense model, or what :func:`hf_sparse.loading.load_model` loads (in the student's dtype). It is put into
            evaluation mode and, when training starts, onto the student's device; it runs without gradients and is never
            changed.
        distillation: a :class:`DistillationLoss`.

    Raises:
        ValueError: the teacher is the model in training, or its vocabulary or width do not fit (the message has both).
    """

    def __init__(self, *args, teacher: nn.Module | str, distillation: DistillationLoss | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        if self.is_deepspeed_enabled:
            raise NotImplementedError("distillation under DeepSpeed is not supported; use DDP or FSDP2")
        if self.args.n_gpu > 1:
            raise NotImplementedError(
                f"{self.args.n_gpu} GPUs in one process (DataParallel) are not supported; start one process per GPU with "
                "torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES"
            )
        self.distillation = distillation or DistillationLoss()
        student = _base(self.model)
        tokenizers = [getattr(self, "processing_class", None), None]
        if isinstance(teacher, str):
            if self.distillation.kl and tokenizers[0] is not None:
                tokenizers[1] = load_tokenizer(teacher)
            teacher = load_model(teacher, dtype=str(student.dtype).removeprefix("torch."))
        if teacher is self.model or teacher is student:
            raise ValueError("the teacher is the model in training; pass the dense model, or copy.deepcopy(model)")
        _check_fit(student, _base(teacher), self.distillation)
        self._vocabulary = _compared_tokens(student, _base(teacher), self.distillation, *tokenizers)
        self.teacher = teacher.eval()
        self._parts: dict[str, torch.Tensor] = {}
        self._parts_since = 0
        if self.distillation.kl:
            self._heads = output_head(self.model), output_head(self.teacher)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        seen = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
        student = _base(self.accelerator.unwrap_model(model, keep_torch_compile=False))
        with _returned_by(student.base_model) as captured:
            result = super().compute_loss(
                model, {**inputs, "output_hidden_states": True}, return_outputs, num_items_in_batch
            )
        ce = result[0] if return_outputs else result
        ours = captured[0] if captured else None
        if ours is None:
            raise ValueError(
                f"{type(student.base_model).__name__} returned no hidden states to compare with the teacher's"
            )
        theirs = self._teacher_states(seen, ours[-1].device)

        # how the Trainer treats this micro-batch's loss: already a share of the step's, or a mean that it divides
        steps = self.current_gradient_accumulation_steps
        shared = self._is_share_of_step(num_items_in_batch)
        weights, parts = self.distillation, {"ce": ce}
        if weights.squarehead:
            mask = inputs.get("attention_mask")
            error = squarehead(
                ours, theirs, mask if mask is not None and mask.dim() == 2 else None, layers=weights.layers
            )
            parts["squarehead"] = error / steps if shared else error
        if weights.kl:
            labels = inputs.get("shift_labels")
            mask = labels != -100 if labels is not None else predicts_label(inputs["labels"])
            items = num_items_in_batch if shared else None
            with self.accelerator.autocast():
                kl = kl_from_states(
                    ours[-1],
                    theirs[-1],
                    *self._heads,
                    mask,
                    temperature=weights.temperature,
                    items=items,
                    vocabulary=self._vocabulary,
                )
            if shared:
                kl = kl / steps if items is None else kl * self._ranks_counted()
            parts["kl"] = kl
        loss = sum(getattr(weights, name) * part for name, part in parts.items())
        if not self._parts:
            self._parts_since = self.state.global_step
        for name, part in parts.items():
            value = part.detach().float() / (1 if shared else steps)
            self._parts[name] = self._parts[name] + value if name in self._parts else value
        return (loss, result[1]) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        if "loss" in logs and self._parts:
            count = max(1, self.state.global_step - self._parts_since)
            for name, total in self._parts.items():
                logs[name] = float(self.accelerator.reduce(total, "mean")) / count
            self._parts = {}
        elif "train_loss" in logs:  # the end of training; what was not logged must not enter another run's average
            self._parts = {}
        super().log(logs, *args, **kwargs)

    def _teacher_states(self, inputs: dict, device: torch.device) -> tuple[torch.Tensor, ...]:
        if next(self.teacher.parameters()).device != device:
            self.teacher.to(device)
        # the backbone: its logits would be the largest tensor of the step, and KL makes them block by block
        inputs = {**inputs, "use_cache": False, "output_hidden_states": True}
        with torch.no_grad(), self.accelerator.autocast():
            return _base(self.teacher).base_model(**inputs).hidden_states

    def _is_share_of_step(self, num_items_in_batch) -> bool:
        stated = getattr(self, "loss_is_scaled_for_ga", None)  # transformers 5.2x has it, earlier ones decide as below
        if stated is not None:
            return stated
        return (self.model_accepts_loss_kwargs and num_items_in_batch is not None) or self.compute_loss_func is not None

    def _ranks_counted(self) -> int:
        """``num_items_in_batch`` counts every rank's labels while gradients are averaged over the ranks."""
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1


class DistillationTrainer(DistillationMixin, Trainer):
    """``transformers.Trainer`` with a teacher. (TRL's class of the same name does on-policy distillation.)"""


def _base(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def _returned_by(backbone: nn.Module):
    """Collects the hidden states that a backbone returns while the context lasts, one entry per call."""
    captured: list[tuple[torch.Tensor, ...]] = []
    handle = backbone.register_forward_hook(lambda module, args, output: captured.append(output.hidden_states))
    try:
        yield captured
    finally:
        handle.remove()


def _check_fit(student: nn.Module, teacher: nn.Module, distillation: DistillationLoss) -> None:
    ours, theirs = student.config.get_text_config(), teacher.config.get_text_config()
    names = f"student {type(student).__name__}", f"teacher {type(teacher).__name__}"
    if distillation.squarehead and ours.hidden_size != theirs.hidden_size:
        raise ValueError(
            f"{names[0]} has width {ours.hidden_size}, {names[1]} has {theirs.hidden_size}; SquareHead compares hidden "
            "states of equal width: use KL only, DistillationLoss(squarehead=0, kl=1)"
        )
    if distillation.squarehead and distillation.layers is None and ours.num_hidden_layers != theirs.num_hidden_layers:
        raise ValueError(
            f"{names[0]} has {ours.num_hidden_layers} layers, {names[1]} has {theirs.num_hidden_layers}; say which are "
            "compared: DistillationLoss(layers=((student layer, teacher layer), ...))"
        )


def _compared_tokens(student, teacher, distillation: DistillationLoss, tokenizer, teacher_tokenizer) -> int | None:
    """How many tokens KL compares."""
    if not distillation.kl:
        return None
    sizes = [model.config.get_text_config().vocab_size for model in (student, teacher)]
    if distillation.vocabulary is not None:
        if distillation.vocabulary > min(sizes):
            raise ValueError(
                f"vocabulary={distillation.vocabulary}, but student {type(student).__name__} has {sizes[0]} tokens and teacher "
                f"{type(teacher).__name__} {sizes[1]}"
            )
        return distillation.vocabulary
    names = f"student {type(student).__name__}", f"teacher {type(teacher).__name__}"
    return shared_vocabulary(*sizes, tokenizer, teacher_tokenizer, names)
