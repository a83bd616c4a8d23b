"""Sparse training: one object that keeps a model's masks true while any optimizer trains it.

    training = sparsify(model, SparsityConfig(sparsity=0.75, method="rigl"), optimizer, total_steps=10_000)
    for batch in loader:                      # an ordinary loop: hooks on the weights and on optimizer.step do the rest
        model(**batch).loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    training.finish()

What happens when, and why there:

* In ``backward``, as soon as a weight's gradient is complete, the entries of pruned weights are set to zero. That is before
  anybody clips, so the norm is that of the weights that train. On the one step before an update that looks at the gradient
  of pruned weights (RigL), the whole gradient is put aside first; the optimizer never sees it.
* After ``optimizer.step`` pruned weights are set to exactly zero, whatever the optimizer did with them.
* Then, on the steps of the schedule, the masks move. A weight that was grown starts at zero with zero moments.

A step that a gradient scaler skips for an overflow moves no mask. Steps are optimizer steps; all randomness is a function of
the seed, the step and the parameter's name. So a resumed run continues bit for bit, and processes that train together agree
without a broadcast.
"""

import weakref
from dataclasses import replace

import torch
from torch import nn

from hf_sparse.config import CONFIG_KEY, SparsityConfig
from hf_sparse.masks import Masks
from hf_sparse.methods import METHODS, schedule_options
from hf_sparse.training import dense_weights
from hf_sparse.training.moments import moments, reset_moments
from hf_sparse.training.sharding import all_agree, average, check_supported, local, sums, unwrapped
from hf_sparse.training.start import choose_first_masks, describe_zeros, find_weights
from hf_sparse.training.timetable import Timetable, initial_share
from hf_sparse.training.topology import move
from hf_sparse.training.weight import Weight

__all__ = ["SparseTraining", "sparsify"]


def sparsify(
    model: nn.Module,
    config: SparsityConfig | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    total_steps: int | None = None,
) -> "SparseTraining":
    """Makes ``model`` sparse for training: chooses masks, puts them beside the weights, zeroes what they prune.

    Args:
        model: any model; the weights are changed in place. A model that already carries masks of the same config keeps them.
        config: what is sparse and by which method. None: exactly the zeros the model has now stay (sparse fine-tuning).
        optimizer: if given, training starts at once (:meth:`SparseTraining.start`). Wrap the model (DDP, ``fully_shard``) and
            make the optimizer first; masks may be chosen before or after.
        total_steps: optimizer steps of the training, for schedules given as shares of it.

    A custom loop resumes with the checkpoint's masks, which are in its state dict, and its step:
    ``training = sparsify(model, config)``, ``model.load_state_dict(...)``, ``training.step = step``,
    ``training.start(optimizer, total_steps)``.

    Raises:
        ValueError: before any weight is changed: no method, no zeros to keep, masks of another config, weights that are not
            trained but would have to be, a schedule that ends before it starts, an optimizer or a sharding that is not
            supported.
    """
    training = SparseTraining(model, config, optimizer, total_steps)
    if optimizer is not None:
        training.start(optimizer, total_steps)
    return training


class SparseTraining:
    """The masks of one model in training. Use :func:`sparsify` to make one.

    Attributes:
        model: the model, not a wrapper of it.
        config: the sparsity config; with ``saliency="zeros"`` its sparsity is what was found.
        weights: the masked parameters.
        dense: number of weights of targets that stay dense (by allocation or override) and so have no mask.
        step: optimizer steps done.
    """

    def __init__(self, model: nn.Module, config: SparsityConfig | None = None, optimizer=None, total_steps=None):
        if isinstance(config, dict):
            config = SparsityConfig.from_dict(config)
        if config is not None and not isinstance(config, SparsityConfig):
            raise TypeError(f"a config is a SparsityConfig or a dict of its fields, got {config!r}")
        config = replace(config) if config else SparsityConfig(method="static", saliency="zeros")  # ours to complete
        if config.method is None:
            raise ValueError(
                f"the config has no training method; choose one of {', '.join(METHODS)}: SparsityConfig(method='static', ...) "
                "keeps a mask, and no config at all keeps the zeros the model has"
            )
        check_supported(model)
        self.model = model = unwrapped(model)  # under a wrapper parameters have other names, and so other random masks
        self.config = config
        self.method = METHODS[config.method]
        self.options = schedule_options(config.method, config.schedule)
        self.step = 0
        self.timetable: Timetable | None = None
        self._failed = 0  # steps in a row at which an update was due and could not be made
        self._handles: list = []
        self._last_change: torch.Tensor | None = None  # stays on the device until somebody asks
        self._skipped = False
        self._moments_seen = False
        self.weights, self.dense = find_weights(model, config)
        if optimizer is not None:  # whatever is wrong is said before a weight changes
            Timetable.of(config, total_steps)
            self._check_optimizer(optimizer)
        first = [weight.sparsity * initial_share(config) for weight in self.weights]
        choose_first_masks(self.weights, config, self.options, first)
        self._count()
        if config.saliency == "zeros":
            describe_zeros(model, config, self.weights)
        self._zero_pruned()
        setattr(getattr(model, "config", model), CONFIG_KEY, config.to_dict())  # what the next training compares with

    # -- start and end -----------------------------------------------------------------------------------------------

    def start(self, optimizer, total_steps: int | None = None) -> None:
        """Puts the hooks on the weights and the optimizer; from here on its steps keep and move the masks.

        Args:
            optimizer: a ``torch.optim.Optimizer`` or accelerate's wrapper of one, made after the model was wrapped.
            total_steps: optimizer steps of the whole training.

        Raises:
            ValueError: the optimizer has no step hooks or does not train the masked weights, a share of training without
                ``total_steps``, an empty schedule, a checkpoint that was loaded without its masks.
        """
        check_supported(self.model)
        self.timetable = Timetable.of(self.config, total_steps)
        optimizer = self._check_optimizer(optimizer)
        for weight in self.weights:
            weight.align()
        self._count()
        self._check_zeros()
        self.stop()
        for weight in self.weights:
            if weight.parameter.requires_grad:
                hook = self._gradient_hook(weight)
                if hook is not None:
                    self._handles.append(weight.parameter.register_post_accumulate_grad_hook(hook))
        self._handles.append(optimizer.register_step_pre_hook(self._before_step))
        self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def _check_optimizer(self, optimizer) -> torch.optim.Optimizer:
        while hasattr(optimizer, "optimizer"):  # accelerate's wrapper calls itself an Optimizer but has no hooks
            optimizer = optimizer.optimizer
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(
                f"{type(optimizer).__name__} is no torch.optim.Optimizer, so there is no step to follow; DeepSpeed and others "
                "that step elsewhere are not supported"
            )
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for weight in self.weights:
            if weight.parameter.requires_grad and id(weight.parameter) not in trained:
                raise ValueError(
                    f"the optimizer does not hold {weight.name}; make it after the model is wrapped, from model.parameters()"
                )
        return optimizer

    def stop(self) -> None:
        """Takes the hooks off; masks stay, and training may be started again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def finish(self) -> None:
        """Takes the hooks off and leaves a plain model with zeros; its masks are no longer saved with it.

        They stay beside the weights until :func:`hf_sparse.training.densify.densify`, so that another training may go on.
        """
        self.stop()
        for weight in self.weights:
            weight.gradient = None
            for what in ("explored", "dense", "trained"):
                weight.drop(what)
        Masks.keep_out_of_checkpoints(self.model)

    def is_over(self) -> bool:
        """Whether somebody made the model dense (:func:`hf_sparse.training.densify.densify`)."""
        return self.weights[0].companion("mask") is None

    # -- what the hooks do -------------------------------------------------------------------------------------------

    def _gradient_hook(self, weight: Weight):
        """Runs when a gradient is complete (for this micro-batch); masks it, in place."""
        if self.config.method == "sr-ste":
            return None  # straight through: the dense weights get the whole gradient
        which = "trained" if self.config.method == "top-kast" else "mask"
        zero = None

        @torch.no_grad()
        def hook(parameter: torch.Tensor) -> None:
            nonlocal zero
            gradient, mask = local(parameter.grad), weight.companion(which)
            if mask is None:
                return  # the model was densified
            if zero is None:
                zero = gradient.new_zeros(())
            if self._needs_gradients():
                self._put_aside(weight, parameter.grad, mask)
            torch.where(mask, gradient, zero, out=gradient)  # selected, not multiplied: 0 * inf is NaN

        return hook

    def _needs_gradients(self) -> bool:
        return self.method.needs_gradient and self.timetable is not None and self.timetable.pending(self.step + 1)

    def _put_aside(self, weight: Weight, accumulating: torch.Tensor, mask: torch.Tensor) -> None:
        """Adds this micro-batch's gradient of pruned weights; that of kept ones is accumulated in ``accumulating`` already.

        A new tensor accumulates after ``zero_grad``: what an overflow left behind, whose step was skipped, is forgotten.
        """
        gradient = local(accumulating)
        begun = weight.accumulating is not None and weight.accumulating() is accumulating
        if weight.gradient is None or not begun:
            weight.gradient = gradient.clone()
            weight.accumulating = weakref.ref(accumulating)
        else:
            torch.where(mask, gradient, weight.gradient + gradient, out=weight.gradient)

    def forget_gradients(self) -> None:
        """Drops gradients put aside for an update, at the start of a step; a skipped step would leave stale ones."""
        for weight in self.weights:
            weight.gradient = None

    def _before_step(self, optimizer, args, kwargs) -> None:
        if self.is_over():
            self.stop()
            return
        if self.method.dense_weights and any(callable(one) for one in (*args[1:], *kwargs.values())):
            raise ValueError(
                f"method {self.config.method!r} holds dense weights while the optimizer steps, and a closure would see them; "
                "call backward() before optimizer.step()"
            )
        found_inf = getattr(optimizer, "found_inf", None)  # fused optimizers are called and skip by themselves
        self._skipped = found_inf is not None and bool(found_inf.item())
        if self.method.dense_weights:
            scale = getattr(optimizer, "grad_scale", None)  # fused optimizers unscale by themselves, after this
            dense_weights.swap_in(
                self.weights, self.config.method, self.options, 1.0 if scale is None else float(scale)
            )

    @torch.no_grad()
    def _after_step(self, optimizer, args, kwargs) -> None:
        if self.is_over():
            return
        if not self._skipped:
            self.step += 1
        due = not self._skipped and self.timetable is not None and self.timetable.pending(self.step)
        if self.method.dense_weights:
            before = [weight.mask.clone() for weight in self.weights] if due else []
            dense_weights.swap_out(self.weights, self.config.method, self.options, refresh=due)
            if due:
                self._record_change(before)
                self.timetable.made(self.step)
        else:
            self._zero_pruned(trained_only=True)
            if self.method.grow is not None and not self._moments_seen:
                self._moments_seen = not self._skipped
                for weight in self.weights:  # now, rather than hours later at the first update
                    moments(optimizer, weight)
            if due:
                self._update(optimizer)
        self.forget_gradients()

    @torch.no_grad()
    def _update(self, optimizer: torch.optim.Optimizer) -> None:
        weights = self.weights
        if self.method.needs_gradient and not self._gradients_are_usable():
            return
        self._count()  # masks may have been loaded since
        share, updates = self.timetable.share(self.step), self.timetable.updates
        known = dict(fraction=self.timetable.drop_fraction(self.step), step=self.step, seed=self.config.seed)
        options = self.options | {"begin": updates.begin, "end": updates.end}
        masks = move(weights, self.method, options, sparsities=[w.sparsity * share for w in weights], **known)
        before = [weight.mask.clone() for weight in weights]
        for weight, old, new in zip(weights, before, masks, strict=True):
            weight.put("mask", new)
            if weight.companion("explored") is not None:
                weight.put("explored", weight.companion("explored") | new)
            if self.method.grow is not None:
                reset_moments(optimizer, weight, old & new)
        self._zero_pruned()
        self._record_change(before)
        self._count()
        self.timetable.made(self.step)

    def _gradients_are_usable(self) -> bool:
        """Whether every masked weight has a finite gradient of this step, on all processes; else the update waits."""
        gradients = [weight.gradient for weight in self.weights]
        missing = [w.name for w, g in zip(self.weights, gradients, strict=True) if g is None]
        device = self.weights[0].values().device
        usable = all_agree(not missing, device)
        if usable:
            average([g for weight, g in zip(self.weights, gradients, strict=True) if weight.rows is None])
            finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).all()
            usable = all_agree(bool(finite), device)
        self._failed = 0 if usable else self._failed + 1
        if self._failed > self.options["every"]:
            what = f"{missing[0]} has had no gradient" if missing else "gradients have not been finite"
            raise ValueError(
                f"the mask update of step {self.step - self._failed + 1} could not be made: {what} for {self._failed} steps. "
                "Ignore weights that the loss does not depend on, or that are frozen"
            )
        return usable

    # -- numbers -----------------------------------------------------------------------------------------------------

    def densities(self) -> dict[str, float]:
        """``{parameter name: fraction of weights kept}``; asks no device."""
        return {weight.name: weight.kept / weight.numel for weight in self.weights}

    def gradient_densities(self) -> dict[str, float] | None:
        """Where the weight gradient of the coming step is denser than the weight: ``{name: density}``; else None."""
        if self.config.method == "top-kast":
            return {w.name: 1.0 - min(w.sparsity, self.options["backward_sparsity"]) for w in self.weights}
        if self.config.method == "sr-ste" or self._needs_gradients():
            return {weight.name: 1.0 for weight in self.weights}
        return None

    def metrics(self) -> dict[str, float]:
        """What a log wants to know: density, updates, the share of weights ever kept, how much the last update moved.

        Density is that of all targets, those included that an allocation leaves dense. Every process of a sharded model has
        to ask.
        """
        if self.is_over():
            return {"density": 1.0}
        numel = sum(weight.numel for weight in self.weights)
        found = {"density": (self._total("mask") + self.dense) / (numel + self.dense)}
        if self.method.is_dynamic:
            found["mask_updates"] = self.timetable.count(self.step) if self.timetable else 0
            if self._last_change is not None:
                found["mask_change"] = float(self._last_change)
        if self.weights[0].companion("explored") is not None:
            found["ever_active"] = (self._total("explored") + self.dense) / (numel + self.dense)
        return found

    # -- small steps -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _zero_pruned(self, trained_only: bool = False) -> None:
        for weight in self.weights:
            if trained_only and not weight.parameter.requires_grad:
                continue
            values = weight.values()
            torch.where(weight.mask, values, values.new_zeros(()), out=values)

    def _totals(self, what: str) -> list[int]:
        counts = self._sums([weight.companion(what).sum() for weight in self.weights])
        return counts.tolist()

    def _sums(self, numbers: list[torch.Tensor]) -> torch.Tensor:
        """One number per weight, summed over the processes it is sharded over."""
        return sums(numbers, [weight.rows for weight in self.weights])

    def _total(self, what: str) -> int:
        return sum(self._totals(what))

    def _count(self) -> None:
        for weight, count in zip(self.weights, self._totals("mask"), strict=True):
            weight.kept = count

    def _record_change(self, before: list[torch.Tensor]) -> None:
        """Share of the kept weights that were not kept before; on the device until it is logged."""
        new = self._sums([(weight.mask & ~old).sum() for weight, old in zip(self.weights, before, strict=True)])
        kept = self._sums([weight.mask.sum() for weight in self.weights])
        self._last_change = new.sum() / kept.sum().clamp_min(1)

    def _check_zeros(self) -> None:
        for weight in self.weights:
            if bool((weight.values().masked_fill(weight.mask, 0) != 0).any()):
                raise ValueError(
                    f"{weight.name} has nonzero weights where its mask says zero: a checkpoint was loaded without the masks it "
                    "was trained with. Resume from a checkpoint that the sparse training wrote (its model file holds "
                    f"{weight.attribute}_mask beside {weight.attribute}), or start from the weights with saliency 'zeros'"
                )
