"""Calibration: what the inputs of every weight look like, one decoder layer at a time.

    captured = capture(model, name, layers, batches, device, storage)      hf_sparse.capture
    for index, layer in enumerate(captured.layers):
        statistics = collect(captured, index, layer, captured.targets_of(index, targets), needs="hessian")
        ... prune the layer ...
        captured.advance(index, layer)                  # outputs of the pruned layer are the inputs of the next

Error propagates: each layer is calibrated on what the already pruned layers before it really produce. Memory never holds
more than one layer's statistics; weights and hidden states may live in CPU memory while one layer is on the accelerator.
"""

from collections.abc import Callable

import torch
from torch import nn

from hf_sparse.capture import Captured
from hf_sparse.saliency import Statistics
from hf_sparse.targets import Target

__all__ = ["check_followable", "collect", "mean_gradients"]


def check_followable(model: nn.Module, targets: dict[str, Target]) -> None:
    """Raises for the first target whose inputs :func:`collect` cannot see, before any layer is touched.

    Raises:
        ValueError: a convolution, or fused experts without transformers' expert interface.
    """
    for target in targets.values():
        module = model.get_submodule(target.module)
        if target.layout == "conv":
            raise ValueError(
                f"{target.name} is a convolution; calibration covers linear layers and fused experts. "
                f"Ignore it (ignore=[{target.name!r}]) or use a saliency without calibration, such as magnitude"
            )
        if target.is_experts and not (hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")):
            parts = ", ".join(name for name, _ in module.named_parameters(recurse=False))
            raise ValueError(
                f"{target.module} ({type(module).__name__}: {parts}) is a fused expert layout without transformers' expert "
                "interface, so calibration cannot tell which tokens each expert sees. Ignore such experts "
                f"(ignore=['re:.*{target.module.rpartition('.')[2]}']) or use a saliency without calibration, such as "
                "magnitude"
            )


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
        ValueError: an input that is not finite.
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
        # one sort for all experts: picking each one's tokens by a mask would wait for the device once per expert
        order = index.flatten().argsort(stable=True)
        sizes = torch.bincount(index.flatten(), minlength=count)[:count].tolist()
        for expert, chosen in enumerate((order // index.shape[1])[: sum(sizes)].split(sizes)):
            rows = hidden[chosen]
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

    The whole model runs forward and backward on ``device``; other parameters get no gradient. Gradients that were there
    before are put back.
    """
    wanted = {name: model.get_parameter(name) for name in names}
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    sums = {name: torch.zeros(p.shape, dtype=torch.float32, device=device) for name, p in wanted.items()}
    home = next(model.parameters()).device
    model.to(device)
    try:
        for parameter, _, _ in flags:
            parameter.grad = None
            parameter.requires_grad_(False)
        for parameter in wanted.values():  # by the parameter: a tied weight has more names than one
            parameter.requires_grad_(True)
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
        model.to(home)
        for parameter, flag, grad in flags:
            parameter.grad = grad
            parameter.requires_grad_(flag)
    return {name: value.to(home) for name, value in sums.items()}
