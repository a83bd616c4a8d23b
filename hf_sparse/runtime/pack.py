"""Packing a loaded model for inference, and taking it back.

    report = pack_for_inference(model)              # each layer in whatever is fastest on this machine
    print(report)                                   # 210 of 211 linear layers packed (panels), 212.3 MB -> 77.4 MB
    unpack(model)                                   # nn.Linear again, the weights bit for bit

Layers are replaced one by one, and the dense weight of a layer goes before the next is packed, so the peak is the model
and one layer. A checkpoint that is packed on disk never becomes dense at all: see ``from_pretrained(..., sparse_runtime=)``
in ``integrations.quantizer``.

What is left as it is: layers in which packing would not save bytes, tied weights (the embedding reads them), fused
experts, convolutions, and whatever ``ignore`` names. On a CPU, ``auto`` also gives large dense layers (the output head) a
kernel that reads them faster, where it measures so.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from hf_sparse.instruments import progress_bar
from hf_sparse.runtime.choose import fastest
from hf_sparse.runtime.cpu.arena import Arena
from hf_sparse.runtime.dense_linear import MOST_TOKENS, DenseLinear
from hf_sparse.runtime.layouts import layout_module, layouts_for, special_layouts
from hf_sparse.runtime.packed_linear import PackedLinear, row_tiles_of
from hf_sparse.targets import Target, find_targets

__all__ = [
    "LayerChoice",
    "RuntimeReport",
    "check_runtime",
    "choose_layout",
    "linear_targets",
    "pack_for_inference",
    "packed_layer",
    "put_in_place",
    "stream_dense_rows",
    "unpack",
]

RUNTIMES = ("auto", "packed", "int8")
MIN_SAVING = 0.1  # a layer is worth packing if it takes at least this share of its bytes away
MIN_STREAMED_BYTES = 1 << 20  # below this a dense layer costs next to nothing either way


@dataclass(frozen=True)
class LayerChoice:
    """What became of one layer: ``layout`` is a name of ``layouts.LAYOUTS``, ``dense``, or ``rows`` (dense, but our kernel);
    times are per call."""

    layout: str
    sparsity: float
    dense_bytes: int
    bytes: int
    why: str
    microseconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RuntimeReport:
    """What :func:`pack_for_inference` did, layer by layer (names of modules)."""

    runtime: str
    batch_size: int
    layers: dict[str, LayerChoice]

    @property
    def dense_bytes(self) -> int:
        return sum(layer.dense_bytes for layer in self.layers.values())

    @property
    def bytes(self) -> int:
        return sum(layer.bytes for layer in self.layers.values())

    def __str__(self):
        kinds = Counter(layer.layout for layer in self.layers.values())
        packed = len(self.layers) - kinds["dense"] - kinds["rows"]
        del kinds["dense"]
        names = f" ({', '.join(f'{count} {name}' for name, count in sorted(kinds.items()))})" if kinds else ""
        text = f"{packed} of {len(self.layers)} linear layers packed{names}, "
        text += f"{self.dense_bytes / 1e6:.1f} MB -> {self.bytes / 1e6:.1f} MB"
        reasons = Counter(layer.why for layer in self.layers.values() if layer.layout == "dense")
        return text + "".join(f"; {count} dense: {why}" for why, count in reasons.most_common())


def pack_for_inference(
    model: nn.Module,
    runtime: str = "auto",
    *,
    batch_size: int = 1,
    targets: list[str] | None = None,
    ignore: list[str] = (),
    progress: bool = False,
) -> RuntimeReport:
    """Replace the sparse linear layers of a model by packed ones, in place; ``generate`` and the rest work as before.

    Args:
        model: any torch model; its sparse weights are zeros in dense tensors.
        runtime: ``auto`` packs a layer where that is faster than dense, measured for its shape and density and
            remembered for this machine; ``packed`` packs every layer that gets smaller, without measuring; ``int8`` packs
            with weights and activations rounded to 8 bits (CPU).
        batch_size: tokens per call to be fast for: sequences in a batch, tokens that are verified at once, or the
            length of prompts (with a large one ``auto`` considers the sparse tensor cores of a GPU for 2:4 weights).
        targets, ignore: which weights, in the grammar of ``SparsityConfig``.

    Raises:
        ValueError: unknown ``runtime``, a batch size below 1, targets that match nothing, a model being trained sparse.
    """
    check_runtime(runtime)
    if batch_size < 1:
        raise ValueError(f"batch_size is the number of tokens in a call, at least 1, got {batch_size}")
    if any(name.endswith("_mask") and buffer.dtype == torch.bool for name, buffer in model.named_buffers()):
        raise ValueError(
            "this model is being trained sparse (it has masks): finish the training or densify(model) first"
        )
    layers: dict[str, LayerChoice] = {}
    chosen, arena = linear_targets(model, targets, ignore), Arena()
    with progress_bar(progress, "packing", len(chosen)) as advance:
        for name, target in chosen.items():
            layer = model.get_submodule(name)
            matrix = target.matrix(layer.weight.detach())
            density = float((matrix != 0).sum()) / max(1, matrix.numel())
            special = special_layouts(matrix) if runtime == "auto" else []
            choice = choose_layout(target.shape, matrix.dtype, density, matrix.device, runtime, batch_size, special)
            if choice.layout != "dense":
                packed = packed_layer(choice, row_tiles_of(matrix), target.shape, matrix.dtype, layer, arena)
                put_in_place(model, name, packed)
                choice = replace(choice, bytes=packed.nbytes)
            layers[name] = choice
            advance(name)
    if runtime != "packed":
        layers |= stream_dense_rows(model, batch_size, ignore)
    return RuntimeReport(runtime, batch_size, layers)


def unpack(model: nn.Module) -> nn.Module:
    """The stock model again: every packed layer becomes the layer it was, with the same weights (``int8``: the rounded
    ones). In place; returns the model.

    Raises:
        ValueError: nothing in the model is packed.
    """
    ours = [name for name, module in model.named_modules() if isinstance(module, (PackedLinear, DenseLinear))]
    if not ours:
        raise ValueError("no layer of this model is packed")
    for name in ours:
        layer = model.get_submodule(name)
        if getattr(layer, "transposed", False):
            from transformers.pytorch_utils import Conv1D

            stock = Conv1D(0, 0)
            stock.nx, stock.nf = layer.in_features, layer.out_features
        else:
            with torch.device("meta"):
                stock = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        weight = layer.weight  # a parameter that may be tied, or a tensor unpacked just now
        stock.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
        stock.register_parameter("bias", layer.bias)
        put_in_place(model, name, stock)
    return model


def check_runtime(runtime: str) -> None:
    """Raises ValueError: not a name of ``RUNTIMES``."""
    if runtime not in RUNTIMES:
        raise ValueError(f"the sparse runtime is one of {', '.join(RUNTIMES)}, got {runtime!r}")


def choose_layout(
    shape: tuple[int, int],
    dtype: torch.dtype,
    density: float,
    device: torch.device,
    runtime: str,
    batch_size: int,
    special: list[str] = (),
) -> LayerChoice:
    """The layout for a weight of which only the shape, dtype and share of nonzeros are known, and the ``special_layouts``
    that it fits. ``bytes`` is that of the dense weight until it is packed."""
    nbytes = shape[0] * shape[1] * dtype.itemsize

    def choice(layout: str, why: str, times: dict[str, float] | None = None) -> LayerChoice:
        return LayerChoice(layout, 1 - density, nbytes, nbytes, why, times or {})

    if runtime == "int8":
        reason = layout_module("panels-int8").unavailable(device)
        return choice("dense", reason) if reason else choice("panels-int8", "asked for")
    layouts = layouts_for(device, dtype, batch_size)
    if not layouts:
        return choice("dense", f"no kernel for {str(dtype).removeprefix('torch.')} on {device.type}")
    if density * dtype.itemsize + 1 / 8 > (1 - MIN_SAVING) * dtype.itemsize:
        return choice("dense", "too few zeros to save memory")
    if runtime == "packed":
        return choice(layouts[0], "asked for")
    times = fastest(shape, dtype, density, device, batch_size, ["dense", *layouts, *special])
    best = min(times, key=times.get)
    return choice(best, "dense is faster here" if best == "dense" else "fastest", times)


def packed_layer(
    choice: LayerChoice, tiles: Iterable[torch.Tensor], shape, dtype: torch.dtype, stock: nn.Module, arena: Arena
) -> PackedLinear:
    """The layer that takes the place of ``stock``, from the row tiles of its weight."""
    tensors = arena.place(layout_module(choice.layout).pack_tiles(tiles, tuple(shape), dtype))
    return PackedLinear(choice.layout, tensors, shape, dtype, stock.bias, transposed=type(stock) is not nn.Linear)


def stream_dense_rows(model: nn.Module, batch_size: int, ignore: Iterable[str] = ()) -> dict[str, LayerChoice]:
    """On a CPU: large layers that are still dense get the kernel that streams their rows, where it is faster. Their
    weights stay where they are, tied or not. The choices that were made."""
    made = {}
    for name, layer in list(model.named_modules()):
        weight = getattr(layer, "weight", None)
        if (
            type(layer) is not nn.Linear
            or weight.device.type != "cpu"
            or weight.dtype not in (torch.bfloat16, torch.float32)
            or not weight.is_contiguous()
            or weight.nbytes < MIN_STREAMED_BYTES
            or batch_size > MOST_TOKENS
            or {name, name.rpartition(".")[2], name + ".weight"} & set(ignore)
        ):
            continue
        times = fastest(tuple(weight.shape), weight.dtype, 1.0, weight.device, batch_size, ["dense", "rows"])
        if times["rows"] < times["dense"]:
            put_in_place(model, name, DenseLinear(layer))
            zeros = 1 - float((weight != 0).sum()) / weight.numel()
            made[name] = LayerChoice("rows", zeros, weight.nbytes, weight.nbytes, "fastest", times)
    return made


def linear_targets(model: nn.Module, targets: list[str] | None = None, ignore: Iterable[str] = ()) -> dict[str, Target]:
    """Module name -> target, for the plain linear layers whose weight nobody else uses."""
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    chosen = {}
    for target in find_targets(model, targets, list(ignore)).values():
        module = model.get_submodule(target.module)
        plain = type(module) is nn.Linear or (target.layout == "transposed" and type(module).__name__ == "Conv1D")
        if plain and len(target.shape) == 2 and owners[id(module.weight)] == 1:
            chosen[target.module] = target
    return chosen


def put_in_place(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replaces a submodule; the hook by which accelerate moves its inputs between devices goes along."""
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    hook = getattr(getattr(owner, child), "_hf_hook", None)
    setattr(owner, child, module.train(owner.training))
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(module, hook)
