"""What one-shot methods check of a model and its calibration data before any work."""

import torch
from torch import nn

from hf_sparse.targets import Target

__all__ = ["check_placement", "check_tokens", "check_weights"]


def check_placement(model: nn.Module, looks_at_data: bool = True) -> None:
    """Raises ValueError for weights that are nowhere, or whose layers cannot visit one device after another."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "the model has weights on the meta device (never loaded, or offloaded by device_map); load all of them to the "
            "CPU and let the layers visit an accelerator with device='cuda'"
        )
    if looks_at_data and len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        raise ValueError(
            "device_map spread this model over several devices; load it on one (the CPU, say) and let its layers visit the "
            "accelerator with device='cuda'"
        )


def check_tokens(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> None:
    """On an accelerator a position or a token outside its table is an assertion that ends the process."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    positions = getattr(config, "max_position_embeddings", None)
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    if isinstance(positions, int) and longest > positions:
        raise ValueError(f"the model has {positions} positions; calibration sequences of {longest} tokens are too long")
    rows = len(model.get_input_embeddings().weight)
    low, high = (f(int(f_(b["input_ids"])) for b in batches) for f, f_ in ((min, torch.min), (max, torch.max)))
    if low < 0 or high >= rows:
        raise ValueError(
            f"the calibration data has token ids from {low} to {high}, but the model's embedding has {rows} rows; was it "
            "tokenised with this model's tokenizer?"
        )


def check_weights(model: nn.Module, targets: dict[str, Target]) -> None:
    for name in targets:
        weight = model.get_parameter(name)
        if not weight.is_floating_point() or weight.element_size() < 2:
            raise ValueError(
                f"{name} is stored as {str(weight.dtype).removeprefix('torch.')}: a quantized model cannot be pruned; load it "
                "dequantized, in bfloat16, say"
            )
        if not bool(weight.isfinite().all()):
            bad = int((~weight.isfinite()).sum())
            raise ValueError(
                f"{name} holds {bad} values that are NaN or infinite; nothing was pruned. Check the checkpoint"
            )
