"""TRL's SFTTrainer for a pruned model, put together: in full, through LoRA, with or without the dense parent as a teacher.

    trainer = sft_trainer(pruned, SFTConfig("run"), dataset, processing_class=tokenizer)
    trainer.train()
    model = plain_model(trainer)

What there is to know about fine-tuning a pruned model is decided here, and each part can be had without this file:

    zeros in the weights     stay: SparsityCallback() in full fine-tuning, masked_lora(...) through LoRA
    adapter="lora"           rank 16, alpha 32 on all linear layers (self-data distillation: rank 8, arXiv 2410.09982)
    teacher                  DistillationMixin before SFTTrainer: SquareHead and KL (arXiv 2310.06927)
    extra columns            a dataset of self_distill carries where each row comes from; TRL gets prompt and completion alone,
                             and computes the loss on the completion
"""

from typing import Any

from hf_sparse.targets import find_targets

__all__ = ["plain_model", "sft_trainer"]

_TRAINED = ("prompt", "completion", "messages", "text", "input_ids", "labels", "attention_mask", "completion_mask")
_SPARSE = 0.05  # a layer with fewer zeros is dense: single zeros are accidents of rounding


def sft_trainer(
    model,
    args,
    train_dataset,
    *,
    processing_class,
    adapter: Any = None,
    teacher=None,
    distillation=None,
    callbacks=(),
    **kwargs,
):
    """A ``trl.SFTTrainer`` that keeps what pruning left out.

    Args:
        model: a transformers model, pruned in any way or dense.
        args: a ``trl.SFTConfig``.
        train_dataset: prompt and completion (what :func:`hf_sparse.distillation.self_data.self_distill` returns), messages,
            or text; other columns are left out.
        adapter: None for full fine-tuning, ``"lora"``, or a ``peft.LoraConfig``.
        teacher: the dense parent, for ``distillation`` (a :class:`hf_sparse.callbacks.DistillationLoss`).
        kwargs: further arguments of ``SFTTrainer``.

    Raises:
        ModuleNotFoundError: trl, or peft for an adapter, is not installed.
        ValueError: an unknown adapter, a dataset without a column to train on, a distillation without a teacher.
    """
    try:
        from trl import SFTTrainer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("fine-tuning needs TRL: pip install 'hf-sparse[trl]'") from error
    if distillation is not None and teacher is None:
        raise ValueError("distillation needs a teacher: give the dense model this one was pruned from")
    sparse = _is_sparse(model)
    callbacks = list(callbacks)
    if adapter is not None:
        kwargs["peft_config"] = _lora(adapter, sparse)
    elif sparse:
        from hf_sparse.callbacks.sparsity import SparsityCallback

        if not any(isinstance(callback, SparsityCallback) for callback in callbacks):
            callbacks.append(SparsityCallback())
    kind = SFTTrainer
    if teacher is not None:
        from hf_sparse.callbacks.distillation import DistillationMixin

        kind = type("DistillationSFTTrainer", (DistillationMixin, SFTTrainer), {})
        kwargs |= {"teacher": teacher, "distillation": distillation}
    data = {"train_dataset": _columns(train_dataset)}
    if kwargs.get("eval_dataset") is not None:
        data["eval_dataset"] = _columns(kwargs.pop("eval_dataset"))
    return kind(model, args, processing_class=processing_class, callbacks=callbacks, **data, **kwargs)


def plain_model(trainer):
    """The trained model as stock transformers has it: adapters merged without filling a zero, the KV cache on again."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    if hasattr(model, "merge_and_unload"):
        from hf_sparse.integrations.peft import merge_sparse

        model = merge_sparse(model)
    model.config.use_cache = True
    return model.eval()


def _lora(adapter, sparse: bool):
    try:
        from peft import LoraConfig
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("an adapter needs PEFT: pip install 'hf-sparse[peft]'") from error
    if adapter == "lora":
        adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    if not isinstance(adapter, LoraConfig):
        raise ValueError(f"adapter is None, 'lora' or a peft.LoraConfig; got {adapter!r}")
    if not sparse:
        return adapter
    from hf_sparse.integrations.peft import masked_lora

    return masked_lora(adapter)


def _is_sparse(model) -> bool:
    weights = (model.get_parameter(name) for name in find_targets(model))
    return any(int((weight == 0).sum()) > _SPARSE * weight.numel() for weight in weights)


def _columns(dataset):
    names = getattr(dataset, "column_names", None)
    if names is None:
        return dataset
    kept = [name for name in names if name in _TRAINED]
    if not {"messages", "text", "input_ids", "completion"} & set(kept):
        raise ValueError(
            f"the dataset has the columns {', '.join(names)}; TRL trains on prompt and completion (self_distill makes "
            "them), messages, or text"
        )
    return dataset.select_columns(kept)
