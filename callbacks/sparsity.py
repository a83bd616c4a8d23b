"""SparsityCallback: an existing Trainer trains sparse by one more line.

    Trainer(model, args, train_dataset=..., callbacks=[SparsityCallback(SparsityConfig(sparsity=0.75, method="rigl"))])
    Trainer(pruned_model, args, train_dataset=..., callbacks=[SparsityCallback()])     # keep the zeros there are
    Trainer(SparseGPT2ForCausalLM(config), args, ..., callbacks=[SparsityCallback()])  # a new model whose config says how

It calls what a custom loop would call (:mod:`hf_sparse.training.sparse_training`) at the Trainer's events and adds density,
mask updates and FLOPs to the Trainer's log. It holds configuration only: the masks are buffers of the model, so the Trainer
saves and loads them with its checkpoints, and the step is the Trainer's.
"""

import logging
import os

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from hf_sparse.callbacks.metrics import add_metrics, stand_before_reporters
from hf_sparse.config import CONFIG_KEY, SparsityConfig
from hf_sparse.flops import FlopCounter
from hf_sparse.masks import Masks
from hf_sparse.training.densify import densify
from hf_sparse.training.sharding import unwrapped
from hf_sparse.training.sparse_training import SparseTraining

__all__ = ["SparsityCallback"]

logger = logging.getLogger(__name__)


class SparsityCallback(TrainerCallback, ExportableState):
    """Trains the Trainer's model with masks.

    The model becomes sparse when the Trainer is made; give the callback to its constructor, so that a checkpoint's masks have
    a place when training resumes. After training the model is a plain one with zeros.

    Adds to the Trainer's log: ``density``; ``mask_updates``, ``mask_change`` (share of the kept weights that the last update
    exchanged) where masks move, ``ever_active`` (share of weights kept at some time) where weights are grown; ``flops_spent``
    and ``flops_dense``, what training took so far, backward included, and what the dense model would have taken.
    Under FSDP2 every process takes part in logging; with ``SHARDED_STATE_DICT`` the Trainer's ``save_model`` writes no plain
    model, sparse or not, so set ``FULL_STATE_DICT`` before it. A training that is interrupted leaves its masks in the model:
    ``callback.training.finish()`` before saving it.

    Args:
        config: a :class:`hf_sparse.SparsityConfig` with a method, or a dict of its fields. None: what the model's config
            asks for, if it is one of :mod:`hf_sparse.models.sparse_configs` and was never trained sparse; else the zeros that
            the model has stay as they are.

    Raises:
        ValueError: from the Trainer's constructor, before training: see :func:`hf_sparse.sparsify`; DeepSpeed and FSDP1.
    """

    def __init__(self, config: SparsityConfig | dict | None = None):
        if not isinstance(config, (SparsityConfig, dict, type(None))):
            raise TypeError(f"a config is a SparsityConfig or a dict of its fields, got {config!r}")
        self.config = SparsityConfig.from_dict(config) if isinstance(config, dict) else config
        self.training: SparseTraining | None = None  # made by the Trainer's events, never restored
        self.flops_spent = self.flops_dense = 0.0
        self._counter: FlopCounter | None = None
        self._ended = False
        self._placed: dict[str, tuple] = {}  # masks that a checkpoint is to overwrite, and how often they were written

    def state(self) -> dict:
        """What the Trainer writes into its checkpoints: enough to make this callback again."""
        config = None if self.config is None else self.config.to_dict()
        counted = {"flops_spent": self._spent(), "flops_dense": self._dense()}
        return {"args": {"config": config}, "attributes": counted}

    def on_init_end(self, args, state, control, model=None, **kwargs):
        _check_arguments(args)
        if model is not None:
            self.config = self.config or _asked_for(unwrapped(model))
            self.training = SparseTraining(unwrapped(model), self.config)
            self._place(unwrapped(model))

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        model = unwrapped(model)
        stand_before_reporters(self)
        if _saved(state, "DenseFinetuningCallback", "attributes").get("done"):
            self.training = None  # the checkpoint was written after the transition
            if Masks.attached(model):
                densify(model)
            self._count_flops(model, state)
            return
        if state.global_step > 0:
            self._check_same_config(_saved(state, type(self).__name__, "args").get("config"))
            self._check_loaded(model, state.global_step)
        if self.training is None or self.training.model is not model or self._ended:
            fresh = state.global_step == 0 or self.config is None or self.config.saliency == "zeros"
            if not fresh and not Masks.attached(model):
                raise ValueError(
                    "training resumes, but there was no place for the checkpoint's masks: SparsityCallback was added after the "
                    "Trainer was made. Give it to the Trainer's constructor: Trainer(..., callbacks=[SparsityCallback(...)])"
                )
            self.training = SparseTraining(model, self.config)
        self._ended = False
        self.training.step = state.global_step
        self.training.start(optimizer, state.max_steps)
        self._count_flops(model, state)
        _warn_of_plain_adapters(self.training)

    def on_step_begin(self, args, state, control, **kwargs):
        training = self.training
        if training is not None and training.is_over():  # made dense by DenseFinetuningCallback
            training.stop()
            training = self.training = None
            if self._counter is not None:
                self._counter.densities, self._counter.gradient_densities = {}, None
        if training is None:
            return
        training.step = state.global_step
        training.forget_gradients()
        if self._counter is not None:
            self._counter.densities = training.densities()
            self._counter.gradient_densities = training.gradient_densities()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is None or "loss" not in logs:
            return
        over = self.training is None or self.training.is_over()
        metrics = {"density": 1.0} if over else self.training.metrics()
        if self._counter is not None and not self._counter.failed:
            scale = args.world_size
            metrics |= {"flops_spent": self._spent() * scale, "flops_dense": self._dense() * scale}
        add_metrics(state, logs, metrics)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.flops_spent, self.flops_dense = self._spent(), self._dense()
        self._counter = None
        FlopCounter.detach(unwrapped(model))
        if self.training is not None:
            self.training.finish()
            self._ended = True
            self._placed = {}
            if self.training.method.is_dynamic:  # no longer saved, so not loaded either; static ones need not be
                self._place(unwrapped(model))

    def _place(self, model: nn.Module) -> None:
        self._placed = {name: (mask, mask._version) for name, mask in Masks.attached(model).items()}

    def _check_same_config(self, saved: dict | None) -> None:
        if saved is None or self.config is None:
            return
        mine = self.config.to_dict()
        different = [key for key in mine if key != "provenance" and mine[key] != saved.get(key)]
        if different:
            raise ValueError(
                "the checkpoint was trained with another sparsity config; they differ in "
                + ", ".join(f"{key} ({saved.get(key)!r} there, {mine[key]!r} here)" for key in different)
                + ". Resume with the same, or start a new training from the checkpoint's weights"
            )

    def _check_loaded(self, model: nn.Module, step: int) -> None:
        """Loading writes into the masks there are, in place, which autograd's version counter tells."""
        attached = Masks.attached(model)
        for name, (mask, version) in self._placed.items():
            if not self.training.method.is_dynamic and not model.get_parameter(name).requires_grad:
                continue  # neither it nor its mask changes, and PEFT saves adapters only
            if attached.get(name) is mask and mask._version == version:
                raise ValueError(
                    f"training resumes at step {step}, but no mask of {name} was loaded. Resume from a checkpoint that the "
                    f"sparse training wrote (its model file holds {name}_mask), in a new Trainer. If the file has it and the "
                    "Trainer warned of missing keys, this transformers saves the model under other names than it loads"
                )

    def _count_flops(self, model: nn.Module, state) -> None:
        saved = _saved(state, type(self).__name__, "attributes") if state.global_step > 0 else {}
        before = saved.get("flops_spent", 0.0), saved.get("flops_dense", 0.0)
        try:
            self._counter = FlopCounter.attach(model, strict=False)
        except ValueError as error:
            logger.warning("FLOPs are not counted: %s", error)
            return
        self._counter.spent, self._counter.dense = before

    def _spent(self) -> float:
        return self.flops_spent if self._counter is None else self._counter.spent

    def _dense(self) -> float:
        return self.flops_dense if self._counter is None else self._counter.dense


def _asked_for(model: nn.Module) -> SparsityConfig | None:
    """The training in the config of a sparse model that has not been trained yet."""
    config = getattr(model, "config", None)
    ask = getattr(config, "sparsity_config", None)
    return ask() if callable(ask) and getattr(config, CONFIG_KEY, None) is None else None


def _saved(state, name: str, part: str) -> dict:
    """What the Trainer's state has of a callback class: its ``args`` or ``attributes``."""
    found = (state.stateful_callbacks or {}).get(name) or {}
    found = found[-1] if isinstance(found, list) else found  # the Trainer keeps a list where there are several
    return found.get(part, {}) if isinstance(found, dict) else {}


def _warn_of_plain_adapters(training: SparseTraining) -> None:
    """Plain LoRA trains well beside zeros, but merging it fills them."""
    for weight in training.weights:
        layer, _, last = weight.target.module.rpartition(".")
        adapter = training.model.get_submodule(layer) if last == "base_layer" else None
        if hasattr(adapter, "lora_A") and type(adapter).__name__ != "MaskedLoraLinear":
            logger.warning(
                "%s has a plain LoRA adapter: the model stays sparse while it is apart, and merging it fills the zeros. For an "
                "adapter that can be merged use hf_sparse.integrations.peft.masked_lora(LoraConfig(...)) or shira_config(...)",
                weight.target.plain[1],
            )
            return


def _check_arguments(args) -> None:
    """Refuses what hides the weights, before the Trainer wraps anything."""
    if getattr(args, "deepspeed", None):
        raise ValueError(
            "DeepSpeed steps the optimizer inside backward and (ZeRO-3) hides the weights between uses, so masks cannot hold; "
            "use DDP or FSDP2"
        )
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if not (getattr(args, "fsdp", None) or launched):
        return
    config = getattr(args, "fsdp_config", None) or {}
    version = config.get("version") or (os.environ.get("FSDP_VERSION", "1") if launched else 2)
    if int(version) == 1:
        raise ValueError(
            "FSDP1 flattens weights into one buffer, so single weights cannot be masked; use FSDP2: fsdp_config={'version': 2} "
            "or fsdp_version: 2 in the accelerate config"
        )
    if os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true":
        raise ValueError(
            "with cpu_ram_efficient_loading only one process has the weights when masks are chosen, and accelerate carries no "
            "buffers over; turn it off: fsdp_config={'cpu_ram_efficient_loading': False}, or in the accelerate config"
        )
