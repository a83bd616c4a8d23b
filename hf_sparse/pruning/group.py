"""One group: weights that share an input, from statistics to pruned weights, and what becomes known about them.

scores = saliency(weight, statistics);  mask = pattern.mask(scores);  weight *= mask        or a solver, which does all
then, if asked, the kept weights are re-fitted by least squares                             three at once
"""

import torch
from torch import nn

from hf_sparse import saliency
from hf_sparse.flops import active_share
from hf_sparse.patterns import Pattern
from hf_sparse.pruning.admm import alps
from hf_sparse.pruning.measure import measure_parameter
from hf_sparse.pruning.obs import sparsegpt
from hf_sparse.pruning.repair import repair
from hf_sparse.pruning.solution import Solution, relative_error
from hf_sparse.report import ParameterReport
from hf_sparse.targets import Target

__all__ = ["Outcome", "fewest_tokens", "label", "prune_group"]


class Outcome:
    """What becomes known about the parameters on the way: errors, anything out of the ordinary, and their final measure."""

    def __init__(self):
        self.errors: dict[str, float] = {}
        self.notes: dict[str, str] = {}
        self.measured: dict[str, ParameterReport] = {}

    def measure(self, model: nn.Module, targets: dict[str, Target], plan: dict[str, tuple[Pattern, float]]) -> None:
        """Measures parameters where they are now: counting zeros of a large model is quick on the device only."""
        for name, target in targets.items():
            weight, share = model.get_parameter(name), active_share(model, target)
            facts = self.errors.get(name), self.notes.get(name)
            self.measured[name] = measure_parameter(target, weight, plan[name][0], share, *facts)


def label(name) -> str:
    return name if isinstance(name, str) else getattr(name, "__name__", repr(name))


def prune_group(names, targets, model, config, plan, statistics, outcome, gradient=None, device=None) -> None:
    """Prunes weights that share one input: one matrix each, or one per expert. Works on ``device`` if they are elsewhere."""
    matrices = [targets[name].matrix(model.get_parameter(name).data) for name in names]
    active = [i for i, name in enumerate(names) if plan[name][1] > 0]
    if not active:
        return
    patterns = [plan[names[i]][0] for i in active]
    sparsities = [plan[names[i]][1] for i in active]
    per_expert = matrices[0].dim() == 3
    errors: list[list[tuple[float, int]]] = [[] for _ in active]  # (error, tokens) of every matrix
    starved = 0
    for expert in range(len(matrices[0]) if per_expert else 1):
        views = [matrices[i][expert] if per_expert else matrices[i] for i in active]
        one = statistics[expert] if isinstance(statistics, list) else statistics
        one.seed, one.damp = config.seed, config.damp
        one.gradient = None if gradient is None else (gradient[expert] if per_expert else gradient)
        chosen, fits = config.saliency, config.repair
        if saliency.needs(chosen) in ("inputs", "hessian") and one.tokens < fewest_tokens(views[0].shape[1]):
            # statistics of a handful of tokens would be noise, to choose weights by and to fit them to
            chosen, fits, starved = "magnitude", False, starved + 1
        dense = [view.to(device or view.device, torch.float32) for view in views]
        labels = [names[i] for i in active]
        solutions = _solve(chosen, fits, config, dense, one, patterns, sparsities, labels, expert)
        for known, view, solution in zip(errors, views, solutions, strict=True):
            view.copy_(solution.weight)
            if one.hessian is not None:
                known.append((solution.error, one.tokens))
    for i, known in zip(active, errors, strict=True):
        if known:  # experts count by the tokens they serve
            outcome.errors[names[i]] = sum(e * n for e, n in known) / sum(n for _, n in known)
        if starved:
            what = f"{starved} of {len(matrices[0])} experts" if per_expert else "it"
            outcome.notes[names[i]] = f"too few calibration tokens: {what} pruned by magnitude"


def fewest_tokens(inputs: int) -> int:
    """Fewer rows than this say nothing about a covariance of ``inputs`` dimensions, even with a ridge."""
    return max(4, inputs // 32)


def _solve(chosen, fits, config, weights, statistics, patterns, sparsities, names, expert) -> list[Solution]:
    """Scores -> mask -> weight for matrices that share one input; or a solver that does all three."""
    if chosen in saliency.SOLVERS:
        if chosen == "sparsegpt":
            options = {"damp": config.damp, "block_size": config.block_size}
            solutions = sparsegpt(weights, statistics.hessian, patterns, sparsities, **options)
        else:
            solutions = alps(weights, statistics.hessian, patterns, sparsities, damp=config.damp)
    else:
        score = saliency.get(chosen)
        solutions = []
        for weight, pattern, sparsity, name in zip(weights, patterns, sparsities, names, strict=True):
            statistics.name = f"{name}[{expert}]" if expert else name
            scores = score(weight, statistics)
            if bool(scores.isnan().any()):
                raise ValueError(f"saliency {label(chosen)!r} returned NaN scores for {name}")
            if scores.shape != weight.shape:
                raise ValueError(
                    f"saliency {label(chosen)!r} returned scores of shape {tuple(scores.shape)} for {name} of shape "
                    f"{tuple(weight.shape)}"
                )
            mask = pattern.mask(scores, sparsity)
            solutions.append(Solution(weight.masked_fill(~mask, 0.0), mask, 0.0))
    hessian = statistics.hessian
    if fits and hessian is not None and statistics.tokens:
        start = [s.weight for s in solutions]
        repaired = repair(weights, hessian, [s.mask for s in solutions], damp=config.damp, start=start)
        solutions = [Solution(weight, s.mask, 0.0) for weight, s in zip(repaired, solutions, strict=True)]
    if hessian is not None and not (chosen in saliency.SOLVERS and not fits):
        for weight, solution in zip(weights, solutions, strict=True):
            solution.error = relative_error(weight, solution.weight, hessian)
    return solutions
