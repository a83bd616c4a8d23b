"""One-shot pruning: a for-loop over layers that anyone can read.

    report = prune(model, SparsityConfig(sparsity=0.5, saliency="sparsegpt"), batches)

    for each decoder layer:
        statistics = what its weights' inputs look like on the calibration data
        for each group of weights with the same input:
            scores -> mask -> weight, or a solver that does all three
        the pruned layer's outputs become the next layer's inputs

The model is changed in place and stays an ordinary model; :class:`hf_sparse.report.SparsityReport` says what was done.
"""

import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from hf_sparse import saliency
from hf_sparse.calibration import check_followable, collect, mean_gradients
from hf_sparse.capture import as_batches, capture, find_decoder_layers, visiting
from hf_sparse.config import CONFIG_KEY, SparsityConfig
from hf_sparse.instruments import Timer, device_name, peak_memory, progress_bar, reset_peak_memory, versions
from hf_sparse.masks import Masks
from hf_sparse.patterns import NM
from hf_sparse.pruning.checks import check_placement, check_tokens, check_weights
from hf_sparse.pruning.group import Outcome, label, prune_group
from hf_sparse.pruning.measure import summarize
from hf_sparse.pruning.permute import choose_permutation, permute_hidden_units, producers_of
from hf_sparse.pruning.plan import data_needs, looks_at_data, make_plan
from hf_sparse.pruning.resume import FinishedLayers
from hf_sparse.report import SparsityReport
from hf_sparse.saliency import Statistics
from hf_sparse.targets import Target, find_targets

__all__ = ["prune"]

_TOKENS_PER_STEP = {"cuda": 8192, "cpu": 2048}  # enough to keep the device busy, small beside the statistics


@torch.no_grad()
def prune(
    model: nn.Module,
    config: SparsityConfig,
    batches: Iterable | None = None,
    *,
    device: str | torch.device | None = None,
    storage: str | torch.device | None = None,
    progress: bool = False,
    resume_dir: str | Path | None = None,
) -> SparsityReport:
    """Prunes ``model`` in place, in one shot.

    Args:
        model: any transformers model; decoder-only for saliencies that look at data.
        config: what to prune and how. ``model.config`` records it under ``hf_sparse``.
        batches: calibration token ids, see :func:`hf_sparse.capture.as_batches`. Needed by every saliency that looks
            at data; a few hundred thousand tokens are customary (128 sequences of 2,048).
        device: where a layer is while it is worked on; default: where the model is. The model stays where it is and its
            layers visit the device one at a time; a gradient saliency takes the whole model there for its backward pass.
        storage: where hidden states wait between layers; default: ``device``. ``"cpu"`` frees accelerator memory.
        progress: show a bar with the layer, its error and the time left.
        resume_dir: a directory that records finished layers; an interrupted run called again with the same arguments
            continues after the last one, and ends with the same weights. It stays: remove it once the model is saved.

    Returns:
        The report.

    Raises:
        ValueError: before any weight is changed: targets that match nothing, a pattern that does not fit a weight, weights
            that are not finite or quantized, missing calibration data or tokens the model cannot take, an unknown saliency
            or allocation, another run's ``resume_dir``.
    """
    if config.method is not None:
        raise ValueError(
            f"prune() is one-shot and method {config.method!r} trains; give the config to SparsityCallback or sparsify(), or "
            "leave method out"
        )
    if Masks.in_checkpoints(model):
        raise ValueError(
            "this model is in sparse training, which would undo the pruning; finish it first (training.finish())"
        )
    Masks.detach(model)  # of a training that is over; other weights will be zero
    started = time.perf_counter()
    home = next(model.parameters()).device
    device = torch.device(device or home)
    storage = torch.device(storage or device)
    check_placement(model, looks_at_data(config))
    timer = Timer(device)
    reset_peak_memory(device)

    targets = find_targets(model, config.targets, config.ignore)
    needs = data_needs(config)
    notes: list[str] = []
    stack = None
    if needs in ("inputs", "hessian") or config.allocation == "owl":
        stack = find_decoder_layers(model)
        outside = [name for name in targets if not name.startswith(stack[0] + ".")]
        if outside and config.targets is not None:
            raise ValueError(
                f"saliency {label(config.saliency)!r} with allocation {config.allocation!r} looks at the inputs of the "
                f"decoder layers ({stack[0]}); {outside[0]!r} lies outside. Leave it out of targets, or prune it without "
                "calibration: magnitude, uniform"
            )
        if outside:
            notes.append(f"{len(outside)} weights outside the decoder layers stay dense, e.g. {outside[0]}")
            targets = {name: target for name, target in targets.items() if name not in outside}
        check_followable(model, targets)
    if not looks_at_data(config):
        batches = None  # not looked at, so no word of it in the report
    elif batches is not None:
        # a mean over |gradients| depends on how samples are grouped: one by one, whatever the device
        step = 1 if needs == "gradient" else _TOKENS_PER_STEP.get(device.type, 2048)
        batches = as_batches(batches, step)
        check_tokens(model, batches)
    else:
        also = "".join(f" and {name}" for name in ("repair", "permute") if getattr(config, name))
        raise ValueError(
            f"saliency {label(config.saliency)!r} with allocation {config.allocation!r}{also} looks at data; give "
            "calibration batches"
        )
    check_weights(model, targets)

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    recapture = None if stack is None else partial(capture, model, *stack, batches, device, storage)
    try:
        with timer("allocation"):
            plan = make_plan(model, config, targets, recapture)
        gradients = {}
        if needs == "gradient":
            with timer("gradients"):
                gradients = mean_gradients(model, batches, list(targets), device)
        if needs in ("nothing", "gradient"):
            outcome = _prune_without_inputs(model, config, targets, plan, gradients, device, progress)
            layer_errors: dict[int, float] = {}
        else:
            store = None if resume_dir is None else FinishedLayers(resume_dir, model, config, batches)
            with timer("capture"):
                captured = recapture()
            outcome, layer_errors = _prune_layers(model, config, targets, plan, captured, needs, store, timer, progress)
    finally:
        for module, mode in modes:
            module.training = mode

    report = summarize(model, [outcome.measured[name] for name in targets])
    _record_config(model, config)
    report.config = getattr(model.config, CONFIG_KEY)
    report.layer_errors = layer_errors
    report.notes = notes
    report.timings = timer.seconds
    report.seconds = time.perf_counter() - started
    report.device = device_name(device)
    report.peak_memory_bytes = peak_memory(device)
    report.versions = versions()
    if batches is not None:
        report.calibration = {
            "samples": sum(len(b["input_ids"]) for b in batches),
            "tokens": sum(b["input_ids"].numel() for b in batches),
        }
    return report


# ------------------------------------------------------------------------------------------------------- the loop itself


def _prune_without_inputs(model, config, targets, plan, gradients, device, progress) -> Outcome:
    """Saliencies that look at the weights alone, or at gradients already taken: no layer has to run."""
    outcome = Outcome()
    with progress_bar(progress, "pruning", len(targets)) as step:
        for name, target in targets.items():
            statistics = Statistics(name=name, seed=config.seed)
            gradient = target.matrix(gradients[name]).to(device) if name in gradients else None
            prune_group([name], targets, model, config, plan, statistics, outcome, gradient, device)
            step(name)
    outcome.measure(model, targets, plan)
    return outcome


def _prune_layers(model, config, targets, plan, captured, needs, store, timer, progress):
    """The loop over decoder layers; ``(outcome, {layer: error})``."""
    outcome = Outcome()
    layer_errors: dict[int, float] = {}
    everything: dict[str, Target] = {}
    if config.permute:
        everything = find_targets(model, ["re:.*"])  # what produces the hidden units may itself stay dense
        _check_permutable(targets, everything, plan, captured)
    with progress_bar(progress, "pruning", len(captured.layers)) as step:
        for index, layer in enumerate(captured.layers):
            mine = captured.targets_of(index, targets)
            done = store.load(index, model, outcome.errors, outcome.notes, layer_errors) if store else False
            with timer.around("transfer", visiting(layer, captured.device)):
                if mine and not done:
                    first: dict[int, torch.Tensor] = {}
                    with timer("statistics"):
                        statistics = collect(captured, index, layer, mine, needs, _keep_first(first))
                    if config.permute:
                        with timer("permute"):
                            moved = captured, index, layer, first[0]
                            _permute(model, config, mine, everything, plan, statistics, *moved)
                    with timer("solve"):
                        for names in _groups(statistics):
                            prune_group(names, targets, model, config, plan, statistics[names[0]], outcome)
                    del statistics
                    with timer("propagate"):
                        before = captured.hidden[0].to(
                            captured.device, torch.float32, copy=True
                        )  # advance overwrites it
                        captured.advance(index, layer)
                        after = captured.hidden[0].to(captured.device)
                        layer_errors[index] = _layer_error(before, first[0], after, captured.keep[0])
                else:
                    with timer("propagate"):
                        captured.advance(index, layer)
                with timer("measure"):
                    outcome.measure(model, mine, plan)
            if store and mine and not done:
                # a permutation also moves biases, which are no targets
                names = [n for n, _ in model.named_parameters() if n.startswith(f"{captured.name}.{index}.")]
                names = names if config.permute else list(mine)
                with timer("keep progress"):
                    store.save(index, names, model, outcome.errors, outcome.notes, layer_errors)
            error = f" error {layer_errors[index]:.4f}" if index in layer_errors else ""
            step(f"layer {index + 1}/{len(captured.layers)}{error}")
    return outcome, layer_errors


def _layer_error(before: torch.Tensor, dense: torch.Tensor, pruned: torch.Tensor, keep: torch.Tensor | None) -> float:
    """How far the layer's outputs moved, relative to what the layer adds to its inputs; padding left out."""
    if keep is not None:
        before, dense, pruned = (x.reshape(len(keep), -1)[keep] for x in (before, dense, pruned))
    added = (dense.float() - before).square().sum().clamp_min(torch.finfo(torch.float32).tiny)
    return float((dense.float() - pruned.float()).square().sum() / added)


def _check_permutable(targets, everything, plan, captured) -> None:
    hidden = captured.hidden[0].shape[-1]
    if not any(isinstance(plan[name][0], NM) and producers_of(t, everything, hidden) for name, t in targets.items()):
        raise ValueError(
            "permute finds nothing to reorder: it moves the hidden units of an MLP whose consuming linear (down_proj) is "
            "pruned n:m; experts and attention keep their order. Leave permute out, or widen targets"
        )


def _permute(model, config, targets, everything, plan, statistics, captured, index, layer, reference) -> None:
    """Reorders the hidden units of a layer's MLP for the n:m pattern of the weight that consumes them."""
    for name, target in targets.items():
        pattern, producers = plan[name][0], producers_of(target, everything, reference.shape[-1])
        if not isinstance(pattern, NM) or not producers or statistics[name].sum_squares is None:
            continue
        weight = target.matrix(model.get_parameter(name).data).float()
        order = choose_permutation(saliency.ria(weight, statistics[name]), pattern, seed=config.seed)
        permute_hidden_units(model, target, producers, order)
        moved = captured.run(index, 0, layer)
        if not torch.allclose(moved.float(), reference.float(), rtol=1e-2, atol=1e-3 * float(reference.abs().max())):
            permute_hidden_units(model, target, producers, order.argsort())  # attention heads, say: put everything back
            continue
        old = statistics[name]
        hessian = None if old.hessian is None else old.hessian[order][:, order]
        squares = old.sum_squares[order] if hessian is None else hessian.diagonal()
        statistics[name] = Statistics(tokens=old.tokens, sum_squares=squares, hessian=hessian)


def _groups(statistics: dict) -> list[list[str]]:
    """Names that share one Statistics object, in order."""
    groups: dict[int, list[str]] = {}
    for name, value in statistics.items():
        groups.setdefault(id(value), []).append(name)
    return list(groups.values())


def _keep_first(reference: dict[int, torch.Tensor]):
    def on_output(batch: int, output: torch.Tensor) -> None:
        if batch == 0:  # one batch is sample enough to say how far the layer moved
            reference[0] = output

    return on_output


def _record_config(model: nn.Module, config: SparsityConfig) -> None:
    content = config.to_dict()
    content["provenance"] = {"hf_sparse": versions()["hf-sparse"], **content["provenance"]}
    setattr(model.config, CONFIG_KEY, content)
