"""The name of a module in a model that was built with another head than the one the name comes from, or with none."""

__all__ = ["name_in"]


def name_in(model, name: str) -> str:
    """``name`` as this model has it: the same, or without or with the base model's prefix, as transformers maps weights.

    Raises:
        ValueError: the model has no such module.
    """
    modules, prefix = {name for name, _ in model.named_modules()}, f"{model.base_model_prefix}."
    for mapped in (name, name.removeprefix(prefix), prefix + name):
        if mapped in modules:
            return mapped
    raise ValueError(f"{type(model).__name__} has no module {name}, which the checkpoint speaks of")
