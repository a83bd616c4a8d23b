"""Cost: multiply-accumulates and floating-point operations of a (sparse) model, and of training it.

**Per token.** :func:`macs_per_token` follows SD^2 (arxiv.org/abs/2504.08838): a weight used once per token costs one MAC per
nonzero, the output head included, embedding lookups and attention scores not; an expert by its share of tokens, top-k of E.

**Forward.** :func:`forward_flops` lists the terms of one forward pass (a multiply-accumulate is 2 FLOPs). For a decoder,
with B sequences of T positions, they come from the model's own shapes, so a model on the meta device is enough:

    a weight          2 B T numel density            the output head too, also when tied to the embedding
    "attention"       4 B T^2 heads head_dim         QK^T and AV per layer, not halved for causality; T x window if sliding
    "softmax"         3 B T^2 heads                  per layer
    embeddings, norms, activations, biases, recurrent scans: 0

This is the count of SPDF (arxiv.org/abs/2303.10464), whose table only comes out with the softmax. Every other model (images,
audio, encoder-decoder, classifiers) is run once per input shape on the meta device: shapes without numbers.

**Training.** A pass is a forward, an input gradient and a weight gradient, each as costly as the forward, each with its own
density. With f_S and f_D for the sparse and the dense forward, a step costs

    dense 3 f_D    static 3 f_S    RigL 3 f_S, on update steps 2 f_S + f_D (arxiv.org/abs/1911.11134)
    SR-STE 2 f_S + f_D (2102.04010)    Top-KAST 2 f_forward + f_backward (2106.03517)

Frozen weights have no weight gradient; everything has an input gradient, also below the lowest adapter of PEFT, where a
framework saves it. What gradient checkpointing recomputes is not counted, as in the papers. These are the FLOPs of a machine
that skips zeros, not time: dense hardware spends those of the dense model. :class:`FlopCounter` counts them during training.
"""

import copy
import logging
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from hf_sparse.targets import Target, find_targets

logger = logging.getLogger(__name__)

__all__ = ["FlopCounter", "Phase", "active_share", "end_to_end_flops", "forward_flops", "macs_per_token", "rigl_flops"]
__all__ += ["sparse_flops", "training_flops"]

Densities = Mapping[str, float]  # {parameter name: fraction of weights kept}; missing = 1
_NO_SCORES = ("linear_attention", "conv", "moe", "mamba", "recurrent")  # layers that compare no positions pairwise
_WINDOWS = {"sliding_attention": "sliding_window", "hybrid_sliding": "sliding_window"}  # layer type: its config entry
_WINDOWS |= {"chunked_attention": "attention_chunk_size", "full_attention": "", "hybrid": ""}


def active_share(model: nn.Module, target: Target) -> float:
    """The share of tokens that use a weight: 1, or top-k / E for fused experts (1 if the model states no top-k)."""
    if not target.is_experts:
        return 1.0
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    for key in ("num_experts_per_tok", "moe_k", "top_k"):
        top_k = getattr(config, key, None)
        if isinstance(top_k, int):
            return min(1.0, top_k / target.shape[0])
    return 1.0


def macs_per_token(model: nn.Module, targets: dict[str, Target], densities: dict[str, float]) -> float:
    """Multiply-accumulates per token of the given weights, with ``densities`` where stated and dense elsewhere.

    Args:
        targets: every weight that multiplies activations once per token, output head included
            (``find_targets(model, ["re:.*"])``).
        densities: ``{name: fraction of nonzeros}``.
    """
    return sum(t.numel * active_share(model, t) * densities.get(name, 1.0) for name, t in targets.items())


def forward_flops(model: nn.Module, inputs: Mapping[str, tuple[int, ...] | torch.Tensor]) -> dict[str, float]:
    """The dense FLOPs of one forward pass, term by term: ``{parameter name: FLOPs}``, "attention" and "softmax".

    Args:
        inputs: the model's keyword arguments, as tensors or as shapes: ``{"input_ids": (1, 2048)}``,
            ``{"pixel_values": (1, 3, 224, 224)}``.

    Raises:
        ValueError: the model cannot be counted (the message says why), or the inputs have no sequence.
    """
    return _cost_of(model)(_shapes(inputs))


def sparse_flops(forward: Mapping[str, float], densities: Densities) -> float:
    """The FLOPs of one forward pass (:func:`forward_flops`) whose weights have these densities."""
    return sum(flops * densities.get(name, 1.0) for name, flops in forward.items())


def training_flops(
    forward: Mapping[str, float],
    densities: Densities,
    gradient_densities: Densities | None = None,
    frozen: frozenset = frozenset(),
) -> float:
    """The FLOPs of one forward and backward pass.

    Args:
        forward: the terms of :func:`forward_flops`.
        densities: of the weights in the forward pass and in the gradient of the inputs.
        gradient_densities: of the gradient of the weights; a name that is missing has its forward density. All ones on the
            update steps of RigL and on every step of SR-STE; the backward set of Top-KAST.
        frozen: weights without a gradient.
    """
    gradient = densities if gradient_densities is None else gradient_densities
    total = 0.0
    for name, flops in forward.items():
        density = densities.get(name, 1.0)
        total += flops * (2 * density + (0.0 if name in frozen else gradient.get(name, density)))
    return total


def rigl_flops(sparse: float, dense: float, interval: int) -> float:
    """RigL's FLOPs per step on average: ``interval`` sparse steps and one that needs the dense weight gradient.

    (3 f_S interval + 2 f_S + f_D) / (interval + 1), of the forward FLOPs f_S and f_D (arxiv.org/abs/1911.11134).
    """
    return (3 * sparse * interval + 2 * sparse + dense) / (interval + 1)


class Phase(NamedTuple):
    """A stretch of training: ``sequences`` of ``length`` tokens at fixed ``densities`` (none: dense)."""

    sequences: float
    length: int
    densities: Densities = {}


def end_to_end_flops(model: nn.Module, phases: list[Phase]) -> dict[str, float]:
    """The training FLOPs of several phases together, such as sparse pretraining and dense fine-tuning (SPDF).

    Returns:
        ``total``, ``dense`` (the same phases without zeros) and ``reduction``, their ratio.
    """
    costs = [forward_flops(model, {"input_ids": (1, phase.length)}) for phase in phases]
    total = sum(p.sequences * training_flops(forward, p.densities) for p, forward in zip(phases, costs, strict=True))
    dense = sum(p.sequences * training_flops(forward, {}) for p, forward in zip(phases, costs, strict=True))
    return {"total": total, "dense": dense, "reduction": dense / total}


class FlopCounter:
    """Counts the training FLOPs of a model while it trains, from the shapes of what is fed to it.

    A forward pre-hook does it on every pass that builds gradients: evaluation and generation are free, as in the papers. It
    reads shapes only (no synchronisation; a microsecond per weight matrix) and holds no weights. The Trainer's own
    ``state.total_flos`` knows no zeros (6 x parameters x tokens); ``trainer.floating_point_ops = counter`` corrects it.

    Attributes:
        densities: ``{parameter name: density}``, to be kept current by whoever changes the masks; missing = 1.
        gradient_densities: the same for the gradient of the weights; None = ``densities`` (see :func:`training_flops`).
        frozen: weights that had no gradient when the counter was made.
        spent: FLOPs so far, in this process.
        dense: what the same passes would have cost without zeros.
        failed: inputs were met that cannot be counted, and the sums are not to be used; see :meth:`attach`.

    Sequences packed into one row count as one, unless the batch carries ``max_length_q``. ``torch.compile(fullgraph=True)``
    does not admit the hook; call :meth:`count`.

    Raises:
        ValueError: the model cannot be counted.
    """

    def __init__(self, model: nn.Module, densities: Densities | None = None):
        self.densities: Densities = dict(densities or {})
        self.gradient_densities: Densities | None = None
        self.spent = self.dense = 0.0
        self.strict, self.failed = True, False
        self._cost = _cost_of(model)
        self.frozen = frozenset(name for name in _weights(model) if not model.get_parameter(name).requires_grad)
        self._main_input = getattr(model, "main_input_name", "input_ids")

    @classmethod
    def attach(cls, model: nn.Module, strict: bool = True) -> "FlopCounter":
        """The counter of ``model``; made, and hooked to it as ``model.floating_point_ops``, if it has none.

        Args:
            strict: raise at inputs that cannot be counted; False: warn once, and set ``failed``.
        """
        if (counter := cls.attached(model)) is None:
            counter = model.floating_point_ops = cls(model)
            counter._handle = model.register_forward_pre_hook(counter._observe, with_kwargs=True)
            counter.strict = strict
        counter.strict |= strict
        return counter

    @classmethod
    def attached(cls, model: nn.Module) -> "FlopCounter | None":
        """The counter that :meth:`attach` gave this model, if any."""
        counter = vars(model).get("floating_point_ops")
        return counter if isinstance(counter, cls) else None

    @classmethod
    def detach(cls, model: nn.Module) -> None:
        """Removes the model's counter and its hook, if it has one."""
        if (counter := cls.attached(model)) is not None:
            counter._handle.remove()
            del model.floating_point_ops

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> float:
        """The FLOPs of one forward and backward pass on ``inputs``, at the densities of now. Counts nothing."""
        return training_flops(self._cost(_shapes(inputs)), self.densities, self.gradient_densities, self.frozen)

    def count(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Adds one forward and backward pass on ``inputs`` to ``spent`` and ``dense``."""
        forward = self._cost(_shapes(inputs))
        self.spent += training_flops(forward, self.densities, self.gradient_densities, self.frozen)
        self.dense += training_flops(forward, {}, frozen=self.frozen)

    @torch.compiler.disable  # traced, the sums would be constants of the graph and every step would compile anew
    def _observe(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not torch.is_grad_enabled() or self.failed:
            return
        try:
            self.count({self._main_input: args[0], **kwargs} if args else kwargs)
        except ValueError as error:
            if self.strict:
                raise
            self.failed = True
            logger.warning("FLOPs are not counted: %s", error)


class _Decoder(NamedTuple):
    """The cost of a language model, in closed form."""

    weights: dict[str, float]  # {parameter name: FLOPs per position}
    windows: list[int | None]  # of every layer that has attention
    heads: int
    widths: int  # of a head's keys and of its values, together
    prompt: int  # positions that a soft prompt adds

    def __call__(self, inputs: Mapping[str, tuple]) -> dict[str, float]:
        text = inputs.get("input_ids") or inputs.get("inputs_embeds")
        if text is None or len(text[0]) < 2:
            raise ValueError(f"no input_ids or inputs_embeds [batch, sequence] among the inputs {sorted(inputs)}")
        length = text[0][1] + self.prompt
        positions = text[0][0] * length
        longest = min(length, inputs.get("max_length_q", length))  # of sequences packed into one row
        scores = float(positions * self.heads * sum(min(longest, window or longest) for window in self.windows))
        forward = {name: flops * positions for name, flops in self.weights.items()}
        return forward | {"attention": 2 * scores * self.widths, "softmax": 3 * scores}


class _Measured:
    """The cost of any other model, by running a copy of it without numbers, once for every shape of the inputs."""

    def __init__(self, model: nn.Module):
        memo = {}  # makes deepcopy replace every tensor by one of its shape, never copying the weights
        for tensor in [*model.parameters(), *model.buffers()]:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
        self.model = copy.deepcopy(model, memo).eval()
        self.encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        self.known: dict[tuple, dict[str, float]] = {}

    def __call__(self, inputs: Mapping[str, tuple]) -> dict[str, float]:
        key = tuple(sorted((name, value) for name, value in inputs.items() if isinstance(value, tuple)))
        if key not in self.known:
            try:
                self.known[key] = self._run(dict(key))
            except Exception as error:  # any model code may run here
                fed = ", ".join(f"{name} {list(shape)}" for name, (shape, _) in key)
                raise ValueError(
                    f"cannot count the FLOPs of {type(self.model).__name__}: its forward does not run on shapes alone "
                    f"({fed}): {type(error).__name__}: {error}"
                ) from error
        return self.known[key]

    def _run(self, inputs: dict[str, tuple]) -> dict[str, float]:
        from torch.utils.flop_counter import FlopCounterMode

        real = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)
        if "decoder_input_ids" not in inputs and "labels" in inputs and self.encoder_decoder:
            inputs["decoder_input_ids"] = inputs["labels"]  # what the model would derive itself
        fed = {
            name: torch.empty(shape, dtype=real if dtype.is_floating_point else dtype, device="meta")
            for name, (shape, dtype) in inputs.items()
            if name != "labels" and "mask" not in name
        }
        model = copy.deepcopy(self.model)  # hooks end with it
        for module in model.modules():  # those of the model that trains are not for it
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        used: dict[str, float] = {}
        for name, cost in _weights(model).items():
            module = model.get_submodule(name.rpartition(".")[0])
            outputs = getattr(module, "nf", None) or model.get_parameter(name).shape[0]  # nf: Conv1D, [in, out]

            def use(module, args, output, name=name, cost=cost, outputs=outputs):
                if isinstance(output, torch.Tensor):
                    used[name] = used.get(name, 0.0) + cost * (output.numel() // outputs)

            if name.endswith(".weight"):  # fused experts are left to the rest
                module.register_forward_hook(use)
        softmax = {
            op: lambda shape, *args, out_shape=None, **kwargs: 3 * math.prod(shape)
            for op in (torch.ops.aten._softmax, torch.ops.aten._safe_softmax)
        }
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=softmax) as counted:
            model(**fed)
        of_softmax = float(sum(n for op, n in counted.get_flop_counts()["Global"].items() if op in softmax))
        rest = counted.get_total_flops() - of_softmax - sum(used.values())
        return used | {"attention": rest, "softmax": of_softmax}


def _cost_of(model: nn.Module) -> "_Decoder | _Measured":
    """The function ``{input name: (shape, dtype)} -> terms`` of this model."""
    if not _is_decoder(model):
        return _Measured(model)
    weights, config = _weights(model), model.config
    heads = getattr(config, "num_attention_heads", None)
    if heads is None:
        if any("Attention" in type(module).__name__ for module in model.modules()):
            raise ValueError(f"cannot count the FLOPs of {type(model).__name__}: its config has no num_attention_heads")
        return _Decoder(weights, [], 0, 0, _prompt_length(model))
    alike = ["sliding_attention"] * config.num_hidden_layers  # where the config states a window; else it is None
    kinds = getattr(config, "layer_types", None) or alike
    kinds = [kind for kind in kinds if kind not in _NO_SCORES]
    if unknown := sorted(set(kinds) - set(_WINDOWS)):
        known = f"{', '.join(unknown)} layers, and only {', '.join(_WINDOWS)} are known"
        raise ValueError(f"cannot count the FLOPs of {type(model).__name__}: it has {known}")
    windows = [getattr(config, _WINDOWS[kind] or "no window", None) for kind in kinds]
    if getattr(config, "qk_rope_head_dim", None):  # multi-head latent attention: keys and values differ in width
        widths = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    else:
        widths = 2 * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return _Decoder(weights, windows, heads, widths, _prompt_length(model))


def _is_decoder(model: nn.Module) -> bool:
    """Whether every weight of the model works on every position of one text: a language model with its head."""
    config = getattr(model, "config", None)
    if getattr(model, "main_input_name", "") != "input_ids" or not hasattr(config, "get_text_config"):
        return False
    one_text = not getattr(config, "is_encoder_decoder", False) and config.get_text_config() is config
    return one_text and getattr(model, "get_output_embeddings", lambda: None)() is not None


def _weights(model: nn.Module) -> dict[str, float]:
    """``{parameter name: FLOPs per position}`` of what multiplies activations: the targets, routers and adapters."""
    costs = {n: 2.0 * t.numel * active_share(model, t) for n, t in find_targets(model, ["re:.*"]).items()}
    listed = {id(model.get_parameter(name)) for name in costs}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or isinstance(module, nn.Embedding) or id(weight) in listed:
            continue
        if weight.dim() == 2 or isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            listed.add(id(weight))
            costs[f"{name}.weight"] = 2.0 * weight.numel()
    return {name: cost for name, cost in costs.items() if ".original_module." not in name}  # what PEFT replaced


def _prompt_length(model: nn.Module) -> int:
    """The virtual tokens that PEFT puts before every sequence (a prefix adds keys and values only)."""
    peft = getattr(model, "active_peft_config", None)
    adds = getattr(peft, "is_prompt_learning", False) and not str(peft.peft_type).endswith("PREFIX_TUNING")
    return peft.num_virtual_tokens if adds else 0


def _shapes(inputs: Mapping) -> dict[str, tuple | int]:
    """``{name: (shape, dtype)}`` of tensors and of shapes; ``max_length_q`` as it is."""
    found: dict[str, tuple | int] = {n: (tuple(v.shape), v.dtype) for n, v in inputs.items() if hasattr(v, "dtype")}
    for name, value in inputs.items():
        if isinstance(value, tuple) and all(isinstance(n, int) for n in value):
            found[name] = (value, torch.long if name.endswith("_ids") else torch.float32)
        elif name == "max_length_q" and isinstance(value, int):
            found[name] = value
    return found
