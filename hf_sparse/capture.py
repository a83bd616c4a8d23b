"""Capture: what every decoder layer of a model receives, without running the layers.

The model's own ``forward`` runs once per batch with every decoder layer replaced by a recorder that returns its input
unchanged. So all embeddings, masks and position tensors are computed by the model itself (per layer type, sliding windows
included), no layer's work is done, and no architecture has to be known. What a layer receives beside the hidden states must
not depend on earlier layers' results; that holds for the decoder-only models of transformers.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from hf_sparse.targets import Target

__all__ = ["Captured", "as_batches", "capture", "find_decoder_layers", "visiting"]


def find_decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """``(name, layers)`` of the stack of decoder layers: the largest ModuleList of as many items as the config has layers.

    Raises:
        ValueError: no such list; the message says which lists there are.
    """
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    expected = getattr(text, "num_hidden_layers", None)
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }
    sizes = {
        name: sum(p.numel() for p in module.parameters()) for name, module in lists.items() if len(module) == expected
    }
    if not sizes:
        seen = ", ".join(f"{name} ({len(module)})" for name, module in lists.items()) or "none"
        raise ValueError(
            f"cannot find the decoder layers of {type(model).__name__}: its config says num_hidden_layers={expected}, "
            f"and it has no list of that many modules. Lists of modules seen: {seen}"
        )
    name = max(sizes, key=sizes.get)
    return name, lists[name]


def as_batches(batches: Iterable, tokens_per_step: int) -> list[dict[str, torch.Tensor]]:
    """Calibration data in any usual form as a list of keyword arguments for the model.

    Args:
        batches: token ids ``[samples, length]``, or an iterable of such tensors, or of dicts with ``input_ids`` and
            perhaps ``attention_mask``. Samples of one length without padding are regrouped so that a step has about
            ``tokens_per_step`` tokens; anything else is taken as it comes.

    Raises:
        ValueError: no data, or something that is not token ids.
    """
    items = [batches] if isinstance(batches, (torch.Tensor, dict)) or hasattr(batches, "input_ids") else list(batches)
    plain: list[torch.Tensor] = []
    result: list[dict[str, torch.Tensor]] = []
    for item in items:
        content = dict(item) if hasattr(item, "keys") else {"input_ids": item}
        ids = content.get("input_ids")
        ids = torch.as_tensor(ids) if isinstance(ids, list) else ids
        if not isinstance(ids, torch.Tensor) or ids.is_floating_point():
            raise ValueError(f"calibration data is token ids or dicts with input_ids, got {type(item).__name__}")
        content.pop("labels", None)
        content = {key: torch.as_tensor(value) for key, value in content.items()}
        if ids.dim() == 1:  # one sample, as a row of a dataset has it
            content = {key: value.unsqueeze(0) if value.dim() == 1 else value for key, value in content.items()}
        mask = content.get("attention_mask")
        if set(content) <= {"input_ids", "attention_mask"} and (mask is None or bool(mask.all())):
            plain.extend(content["input_ids"].unbind(0))
        else:
            result.append(content)
    by_length: dict[int, list[torch.Tensor]] = {}
    for row in plain:
        by_length.setdefault(len(row), []).append(row)
    for length, rows in by_length.items():
        step = max(1, tokens_per_step // max(1, length))
        result.extend({"input_ids": torch.stack(rows[i : i + step])} for i in range(0, len(rows), step))
    if not result or sum(batch["input_ids"].numel() for batch in result) == 0:
        raise ValueError("there is no calibration data: the batches are empty")
    return result


class _Done(Exception):
    """Raised by the last recorder: the rest of the model (norm, head) is not needed."""


@dataclass
class _Call:
    """One layer's inputs for one batch beside the hidden states."""

    args: tuple
    kwargs: dict


@dataclass
class Captured:
    """The inputs of every decoder layer, batch by batch.

    Attributes:
        name: the module name of the layer stack.
        hidden: per batch, the hidden states ``[samples, length, hidden]`` entering the current layer, on ``storage``.
        keep: per batch, None or the boolean ``[samples * length]`` of tokens that are not padding.
        calls: per layer, per batch, the other arguments; equal tensors are stored once.
        device: where layers run. storage: where hidden states wait.
    """

    name: str
    layers: nn.ModuleList
    device: torch.device
    storage: torch.device
    hidden: list[torch.Tensor] = field(default_factory=list)
    keep: list[torch.Tensor | None] = field(default_factory=list)
    calls: list[list[_Call]] = field(default_factory=list)

    def run(self, index: int, batch: int, layer: nn.Module) -> torch.Tensor:
        """The output of ``layer`` (layer number ``index``) for one batch, on the device."""
        call = self.calls[index][batch]
        hidden = self.hidden[batch].to(self.device, non_blocking=True)
        output = layer(hidden, *call.args, **call.kwargs)
        return output[0] if isinstance(output, tuple) else output

    def targets_of(self, index: int, targets: dict[str, Target]) -> dict[str, Target]:
        """Those of ``targets`` that belong to layer number ``index``."""
        prefix = f"{self.name}.{index}."
        return {name: target for name, target in targets.items() if name.startswith(prefix)}

    @torch.no_grad()
    def advance(self, index: int, layer: nn.Module) -> None:
        """Replaces the stored hidden states by this layer's outputs."""
        for batch in range(len(self.hidden)):
            self.hidden[batch].copy_(self.run(index, batch, layer))


@torch.no_grad()
def capture(
    model: nn.Module,
    name: str,
    layers: nn.ModuleList,
    batches: list[dict[str, torch.Tensor]],
    device: torch.device,
    storage: torch.device,
) -> Captured:
    """Runs the model around its decoder layers and records what each of them receives.

    The model is expected where it lives (often the CPU); tensors are moved to ``device`` (arguments) and ``storage``
    (hidden states).
    """
    captured = Captured(name, layers, device, storage, calls=[[] for _ in layers])
    home = next(model.parameters()).device
    pool = _TensorPool(device)
    for batch in batches:
        content = {key: value.to(home) for key, value in batch.items()}
        calls, hidden = _record(model, layers, content)
        pool.new_batch()
        captured.hidden.append(hidden.to(storage, copy=True))
        mask = batch.get("attention_mask")
        padded = mask is not None and not bool(mask.all())
        captured.keep.append(mask.bool().flatten().to(device) if padded else None)
        for layer_calls, call in zip(captured.calls, calls, strict=True):
            layer_calls.append(_Call(pool.put(call.args), pool.put(call.kwargs)))
    return captured


def _record(model: nn.Module, layers: nn.ModuleList, content: dict) -> tuple[list[_Call], torch.Tensor]:
    """One forward of the model with recorders for layers. Returns each layer's call and the first hidden states."""
    went_through = False
    for in_tuple in (False, True):  # what the model's loop expects of a layer is seen by trying
        calls: list[_Call] = []
        entered: list[torch.Tensor] = []

        def recorder(*args, _calls=calls, _entered=entered, _in_tuple=in_tuple, **kwargs):
            hidden = args[0] if args else kwargs.pop("hidden_states")
            _entered.append(hidden)
            _calls.append(_Call(args[1:], kwargs))
            if len(_calls) == len(layers):
                raise _Done
            return (hidden,) if _in_tuple else hidden

        own = [vars(layer).get("forward") for layer in layers]  # accelerate and others set a forward on the instance
        for layer in layers:
            layer.forward = recorder  # an instance attribute; the class's forward is back once it is deleted
        try:
            model(**content, use_cache=False)
        except _Done:
            pass
        except (IndexError, TypeError, AttributeError, RuntimeError, ValueError):
            if not calls or (in_tuple and not went_through):
                raise
            continue
        finally:
            for layer, forward in zip(layers, own, strict=True):
                if forward is None:
                    del layer.forward
                else:
                    layer.forward = forward
        went_through = True
        if len(calls) == len(layers) and all(_same(hidden, entered[0]) for hidden in entered):
            return calls, entered[0]
    raise ValueError(
        f"the forward of {type(model).__name__} did not pass its hidden states unchanged from one of its {len(layers)} "
        f"decoder layers to the next (it called {len(calls)} of them); layer-by-layer calibration cannot follow it"
    )


def _same(hidden: torch.Tensor, first: torch.Tensor) -> bool:
    """Whether what a layer was given is what the one before returned: recorders return their input."""
    return hidden is first or (hidden.shape == first.shape and torch.equal(hidden.to(first.device), first))


class _TensorPool:
    """Moves arguments to the device, each distinct tensor once: masks and positions repeat over layers and batches."""

    def __init__(self, device: torch.device):
        self.device = device
        self.before: list[torch.Tensor] = []  # what the batch before stored
        self.current: dict[int, torch.Tensor] = {}  # id of a tensor of the current batch -> its stored copy

    def new_batch(self) -> None:
        self.before = list(self.current.values())
        self.current.clear()  # ids may be reused once the batch's tensors are gone

    def put(self, value):
        if isinstance(value, torch.Tensor):
            if id(value) not in self.current:
                self.current[id(value)] = self._stored(value.to(self.device))
            return self.current[id(value)]
        if isinstance(value, dict):
            return {key: self.put(item) for key, item in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self.put(item) for item in value)
        return value

    def _stored(self, value: torch.Tensor) -> torch.Tensor:
        for other in [*self.before, *self.current.values()]:  # comparing with all batches would be quadratic
            if other.shape == value.shape and other.dtype == value.dtype and torch.equal(other, value):
                return other
        return value


@contextmanager
def visiting(layer: nn.Module, device: torch.device) -> Iterator[None]:
    """A layer on the device for a while, then back where it lives, in the very memory it came from.

    Copying into that memory instead of new one keeps views and shared tensors what they are, and saves the operating
    system the work of handing out gigabytes again.
    """
    tensors = [*layer.parameters(), *layer.buffers()]
    homes = [tensor.data for tensor in tensors]
    if all(home.device == device for home in homes):
        yield
        return
    try:
        for tensor in tensors:  # inside: a layer that does not fit must not stay there by half
            tensor.data = tensor.data.to(device, non_blocking=True)
        yield
    finally:
        for tensor, home in zip(tensors, homes, strict=True):
            if tensor.data is not home and tensor.device != home.device:
                home.copy_(tensor.data)
            tensor.data = home
