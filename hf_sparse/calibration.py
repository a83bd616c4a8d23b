"""Calibration: what the inputs of every weight look like, one decoder layer at a time.

    captured = capture(model, batches, device)          # the inputs and keyword arguments of every decoder layer
    for index, layer in enumerate(captured.layers):
        statistics = collect(layer, captured.inputs(index), targets of this layer, needs="hessian")
        ... prune the layer ...
        captured.advance(index, layer)                  # outputs of the pruned layer are the inputs of the next

Error propagates: each layer is calibrated on what the already pruned layers before it really produce. Memory never holds
more than one layer's statistics; weights and hidden states may live in CPU memory while one layer is on the accelerator.

How the inputs of every layer are found without knowing the architecture: the model's own ``forward`` runs once per batch
with every decoder layer replaced by a recorder that returns its input unchanged, so all embeddings, masks and position
tensors are computed by the model itself (per layer type, sliding windows included) and no layer's work is done. What a
layer receives beside the hidden states must not depend on earlier layers' results; that holds for the decoder-only models
of transformers.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from hf_sparse.saliency import Statistics
from hf_sparse.targets import Target

__all__ = ["Captured", "as_batches", "capture", "collect", "find_decoder_layers", "mean_gradients"]


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
        content["input_ids"] = ids = ids.unsqueeze(0) if ids.dim() == 1 else ids
        mask = content.get("attention_mask")
        content.pop("labels", None)
        if set(content) <= {"input_ids", "attention_mask"} and (mask is None or bool(torch.as_tensor(mask).all())):
            plain.extend(ids.unbind(0))
        else:
            result.append({key: torch.as_tensor(value) for key, value in content.items()})
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

        for layer in layers:
            layer.forward = recorder  # an instance attribute; the class's forward is back once it is deleted
        try:
            model(**content, use_cache=False)
        except _Done:
            pass
        except (IndexError, TypeError, AttributeError, RuntimeError, ValueError):
            if in_tuple or not calls:
                raise
            continue
        finally:
            for layer in layers:
                del layer.forward
        if len(calls) == len(layers) and all(hidden.shape == entered[0].shape for hidden in entered):
            return calls, entered[0]
    raise ValueError(
        f"the forward of {type(model).__name__} did not pass its hidden states through its {len(layers)} decoder layers "
        f"in order (it called {len(calls)} of them); layer-by-layer calibration cannot follow it"
    )


class _TensorPool:
    """Moves arguments to the device, each distinct tensor once: masks and positions repeat over layers and batches."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stored: list[torch.Tensor] = []
        self.current: dict[int, torch.Tensor] = {}  # id of a tensor of the current batch -> its stored copy

    def new_batch(self) -> None:
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
        for other in self.stored[-8:]:  # the few tensors of the batch before; comparing with all would be quadratic
            if other.shape == value.shape and other.dtype == value.dtype and torch.equal(other, value):
                return other
        self.stored.append(value)
        return value


@torch.no_grad()
def collect(
    captured: Captured,
    index: int,
    layer: nn.Module,
    targets: dict[str, Target],
    needs: str,
    on_output: Callable[[int, torch.Tensor], None] | None = None,
) -> dict[str, "Statistics | list[Statistics]"]:
    """Runs a layer over all batches and gathers the statistics of its targets' inputs.

    Weights with the same input tensor (q/k/v, gate/up) share one Statistics object, so its Hessian is made once.

    Args:
        layer: the layer, on ``captured.device``.
        targets: its targets, ``{parameter name in the model: Target}``.
        needs: ``inputs`` or ``hessian``.
        on_output: called with (batch number, output) for every batch.

    Returns:
        ``{parameter name: Statistics}``; for fused experts a list, one per expert. A weight whose module was never called
        gets Statistics with no tokens.

    Raises:
        ValueError: a target the calibration cannot follow (a convolution, an unknown expert layout), or an input that is
            not finite.
    """
    prefix = f"{captured.name}.{index}."
    result: dict[str, Statistics | list[Statistics]] = {}
    keep: list[torch.Tensor | None] = [None]  # the current batch's padding mask, seen by the hooks
    seen: dict[int, tuple[torch.Tensor, Statistics]] = {}  # inputs of the current forward, by identity
    handles = []

    def linear_hook(name: str):
        def hook(module, args):
            x = args[0]
            if id(x) in seen:
                result[name] = seen[id(x)][1]
                return
            statistics = result.setdefault(name, Statistics())
            seen[id(x)] = (x, statistics)
            _accumulate(statistics, _rows(x, keep[0]), needs)

        return hook

    by_module: dict[str, list[Target]] = {}
    for target in targets.values():
        by_module.setdefault(target.module, []).append(target)
    try:
        for module_name, owned in by_module.items():
            module = layer.get_submodule(module_name.removeprefix(prefix))
            if owned[0].is_experts:
                hook = _experts_hook(owned, module, result, keep, needs)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            elif owned[0].layout == "conv":
                raise ValueError(
                    f"{owned[0].name} is a convolution; calibration covers linear layers and fused experts. "
                    f"Ignore it (ignore=[{owned[0].name!r}]) or use a saliency without calibration, such as magnitude"
                )
            else:
                handles.append(module.register_forward_pre_hook(linear_hook(owned[0].name)))
        for batch in range(len(captured.hidden)):
            keep[0] = captured.keep[batch]
            seen.clear()
            output = captured.run(index, batch, layer)
            if on_output is not None:
                on_output(batch, output)
    finally:
        for handle in handles:
            handle.remove()
    for target in targets.values():
        empty = [Statistics() for _ in range(target.shape[0])] if target.is_experts else Statistics()
        statistics = result.setdefault(target.name, empty)
        for one in statistics if isinstance(statistics, list) else [statistics]:
            if one.sum_squares is not None and not bool(one.sum_squares.isfinite().all()):
                raise ValueError(
                    f"the input of {target.name} is not finite: the model overflows on this calibration data. "
                    "Check the weights, or load the model in bfloat16 or float32"
                )
    return result


def _rows(x: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """An input ``[..., in]`` as ``[tokens, in]``, padding left out."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if keep is None or len(keep) != len(rows) else rows[keep]


def _accumulate(statistics: Statistics, rows: torch.Tensor, needs: str) -> None:
    if len(rows) == 0:
        return
    if needs == "hessian":
        if statistics.hessian is None:
            size = rows.shape[-1]
            statistics.hessian = torch.zeros(size, size, device=rows.device)
        if rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16):
            # the activations are half precision already: multiply them as they are, accumulate and return float32
            statistics.hessian += torch.mm(rows.T, rows, out_dtype=torch.float32)
        else:
            rows = rows.float()
            statistics.hessian.addmm_(rows.T, rows)
        statistics.sum_squares = statistics.hessian.diagonal()
    else:
        squares = rows.float().square().sum(dim=0)
        statistics.sum_squares = squares if statistics.sum_squares is None else statistics.sum_squares + squares
    statistics.tokens += len(rows)


def _experts_hook(owned: list[Target], module: nn.Module, result: dict, keep: list, needs: str):
    """A pre-hook that hands each fused expert the tokens really routed to it.

    transformers calls ``experts(hidden [tokens, hidden], top_k_index [tokens, k], top_k_weights [tokens, k])``, whatever the
    router. The first weight sees the hidden states; the second the gated activations, which are computed again here
    through the module's own gate, for the routed tokens only.
    """
    first = [t for t in owned if "down" not in t.kind]
    second = [t for t in owned if "down" in t.kind]
    if not hasattr(module, "_apply_gate") or not hasattr(module, "is_transposed"):
        raise ValueError(
            f"{type(module).__name__} is a fused expert layout without transformers' expert interface "
            f"(it has {', '.join(n for n, _ in module.named_parameters(recurse=False))}); calibration cannot tell which "
            "tokens each expert sees. Ignore its weights or use a saliency without calibration, such as magnitude"
        )
    entry = "gate_up_proj" if module.has_gate else "up_proj"

    def hook(module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        index = args[1] if len(args) > 1 else next(v for v in kwargs.values() if not v.is_floating_point())
        hidden, index = hidden.reshape(-1, hidden.shape[-1]), index.reshape(hidden.shape[:-1].numel(), -1)
        if keep[0] is not None and len(keep[0]) == len(hidden):
            hidden, index = hidden[keep[0]], index[keep[0]]
        count = module.num_experts
        for group in (first, second):
            if group and group[0].name not in result:
                shared = [Statistics() for _ in range(count)]
                result.update({t.name: shared for t in group})
        weight = getattr(module, entry)
        bias = getattr(module, entry + "_bias", None) if module.has_bias else None
        for expert in range(count):
            rows = hidden[(index == expert).any(dim=-1)]
            if len(rows) == 0:
                continue
            if first:
                _accumulate(result[first[0].name][expert], rows, needs)
            if second:
                up = rows @ (weight[expert] if module.is_transposed else weight[expert].T)
                up = up if bias is None else up + bias[expert]
                inner = module._apply_gate(up) if module.has_gate else module.act_fn(up)
                _accumulate(result[second[0].name][expert], inner, needs)

    return hook


def mean_gradients(
    model: nn.Module, batches: list[dict[str, torch.Tensor]], names: list[str], device: torch.device
) -> dict[str, torch.Tensor]:
    """``{name: mean over batches of |dL/dw|}`` of the language-model loss, float32, in the parameters' stored shape.

    The whole model runs forward and backward on ``device``; other parameters get no gradient.
    """
    wanted = {name: model.get_parameter(name) for name in names}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    sums = {name: torch.zeros(p.shape, dtype=torch.float32, device=device) for name, p in wanted.items()}
    home = next(model.parameters()).device
    model.to(device)
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in wanted)
        for batch in batches:
            content = {key: value.to(device) for key, value in batch.items()}
            labels = content["input_ids"]
            if "attention_mask" in content:
                labels = labels.masked_fill(content["attention_mask"] == 0, -100)
            with torch.enable_grad():
                model(**content, labels=labels, use_cache=False).loss.backward()
            for name, parameter in wanted.items():
                if parameter.grad is not None:
                    sums[name] += parameter.grad.float().abs() / len(batches)
                    parameter.grad = None
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
        model.to(home)
    return {name: value.to(home) for name, value in sums.items()}
