"""What the exports to graph runtimes (``onnx``, ``openvino``) share: which models, example inputs, and the comparison.

One graph serves prefill and decode. Its inputs, for ``batch`` sequences with ``past`` tokens behind and ``new`` ahead:

    input_ids       int64 [batch, new]
    attention_mask  int64 [batch, past + new]    0 where a sequence is padded (on the left)
    position_ids    int64 [batch, new]
    keys, values    per layer [batch, heads, past, width]; past = 0 is prefill

and its outputs ``logits [batch, new, vocabulary]`` and the keys and values of past + new. A runtime is compared with the
model as it is used: a padded batch is filled in one call, then extended token by token on the runtime's own cache.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy
import torch

from hf_sparse.export.source import Source

__all__ = ["check_causal_lm", "compare_answers", "compare_weights", "example_inputs", "load_for_export", "read_dtype"]

_DTYPES = ("float32", "float16", "bfloat16")
_TOLERANCE = 1e-3  # of the largest logit, in float32; 30 layers measure 5e-6

Step = Callable[[numpy.ndarray, numpy.ndarray, numpy.ndarray], numpy.ndarray]


def check_causal_lm(source: Source) -> None:
    """Raises ValueError for anything but a decoder-only language model of transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    stated = (source.config.get("architectures") or ["none stated"])[0]
    if stated not in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        raise ValueError(
            f"this target exports causal language models of transformers (such as LlamaForCausalLM); the source is {stated}"
        )


def read_dtype(source: Source, dtype: str) -> str:
    """``dtype``, or for ``auto`` the one that most weights are stored in.

    Raises:
        ValueError: it is none that these runtimes compute in.
    """
    if dtype == "auto":
        stored = [str(source.dtype(name)).removeprefix("torch.") for name in source.names]
        dtype = max(sorted(set(stored)), key=stored.count)
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is one of {', '.join(_DTYPES)}, got {dtype!r}")
    return dtype


def load_for_export(source: Source, dtype: str):
    """A model of its own to trace (the user's is not touched): attention in plain operations, experts as one batched
    product (the grouped kernels have no counterpart in a graph format).

    Raises:
        ValueError: it does not remember by keys and values (Mamba, linear attention): another graph than this one.
    """
    model = source.model(dtype).requires_grad_(False)
    if getattr(model, "_can_set_experts_implementation", lambda: False)():
        model.set_experts_implementation("batched_mm")
    _pairs(model, torch.zeros(1, 2, dtype=torch.long))
    return model


def _pairs(model, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    with torch.no_grad():
        cache = getattr(model(ids, use_cache=True), "past_key_values", None)
    layers = getattr(cache, "layers", None) or [None]
    pairs = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    for index, pair in enumerate(pairs):
        if any(not isinstance(tensor, torch.Tensor) or tensor.dim() != 4 for tensor in pair):
            raise ValueError(
                f"layer {index} of {type(model).__name__} does not remember by keys and values of shape [batch, heads, past, "
                f"width] but by something else ({type(layers[index]).__name__}); such models cannot be exported to this target"
            )
    return pairs


def example_inputs(model, batch: int = 2, past: int = 5, new: int = 3) -> tuple[dict[str, torch.Tensor], list]:
    """Inputs to trace with (no size is 0 or 1, which tracing would take for a constant), and per layer (keys, values)."""
    ids = torch.arange(batch * (past + new)).reshape(batch, -1) % model.config.get_text_config().vocab_size
    inputs = {
        "input_ids": ids[:, past:].contiguous(),
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(past, past + new).repeat(batch, 1),
    }
    # Layers with a window would hand out less than past; the graph keeps all and leaves the window to the mask.
    widths = [[(pair.shape[1], pair.shape[3]) for pair in pairs] for pairs in _pairs(model, ids[:1, :2])]
    return inputs, [tuple(torch.zeros(batch, h, past, w, dtype=model.dtype) for h, w in pair) for pair in widths]


@torch.no_grad()
def compare_answers(source: Source, dtype: str, computes: str, step: Step, prompt: int = 9, more: int = 8) -> str:
    """Runs a padded prompt and ``more`` greedy tokens through ``step`` and the model in float32; says how close they are.

    Args:
        dtype: of the weights. They are rounded to it before anything is compared.
        computes: of the runtime's arithmetic. In 16 bits it may be 4 times as far from float32 as torch in 16 bits is.
        step: ``(input_ids, attention_mask, position_ids) -> logits [batch, new, vocabulary]`` as float32; it keeps the
            cache between calls, and starts with an empty one.

    Raises:
        RuntimeError: the logits differ by more than rounding.
    """
    model = source.model(dtype).float()  # the weights as they were rounded, arithmetic in float32
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (2, prompt), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, prompt + more - 1, dtype=torch.long)
    mask[0, :3] = 0
    ids, want = _follow(_torch_step(model), mask, ids, None)
    got = _follow(step, mask, ids, prompt)[1]
    if got.shape != want.shape:
        raise RuntimeError(f"the runtime's logits have shape {tuple(got.shape)}, the model's {tuple(want.shape)}")
    seen, scale = mask.bool(), float(want[mask.bool()].abs().max())

    def error(logits):
        return float((logits - want)[seen].abs().nan_to_num(nan=torch.inf).max()) / scale

    allowed = _TOLERANCE
    if computes != "float32":
        model.to(getattr(torch, computes))
        allowed = max(allowed, 4 * error(_follow(_torch_step(model), mask, ids, prompt)[1]))
    if not error(got) <= allowed:
        raise RuntimeError(
            f"the runtime's logits differ from the model's by {error(got):.1e} of the largest; rounding allows {allowed:.1e}"
        )
    equal = got[:, -more:].argmax(-1) == want[:, -more:].argmax(-1)
    return (
        f"logits within {error(got):.1e} of the largest ({computes} against float32 in torch), {int(equal.sum())} of "
        f"{equal.numel()} greedy tokens equal"
    )


def _follow(step: Step, mask: torch.Tensor, ids: torch.Tensor, prompt: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Feeds a prompt in one call and the rest token by token; returns the tokens fed and the logits at every position.

    Without ``prompt``, ``ids`` is the prompt and each next token is the likeliest; otherwise ``ids`` has them all.
    """
    positions, total, logits = (mask.cumsum(1) - 1).clamp(min=0), mask.shape[1], []
    end, begin = prompt or ids.shape[1], 0
    while True:
        now = slice(begin, end)
        given = step(ids[:, now].numpy(), mask[:, :end].numpy(), positions[:, now].numpy())
        logits.append(torch.from_numpy(numpy.asarray(given, dtype=numpy.float32)))
        if end == total:
            return ids, torch.cat(logits, 1)
        if prompt is None:
            ids = torch.cat([ids, logits[-1][:, -1].argmax(-1, keepdim=True)], 1)
        begin, end = end, end + 1


def _torch_step(model) -> Step:
    cache = None

    def step(input_ids, attention_mask, position_ids):
        nonlocal cache
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        given = {name: torch.from_numpy(array) for name, array in given.items()}
        answer = model(**given, past_key_values=cache, use_cache=True)
        cache = answer.past_key_values
        return answer.logits.float().numpy()

    return step


def compare_weights(model, constants: Iterable[tuple[tuple[int, ...], Callable[[], Any]]]) -> str:
    """Every weight of the model that has zeros must be among the ``constants`` of a graph, value by value.

    A graph may hold a weight transposed, and a fused one (gate and up of an expert) in its two halves.

    Args:
        constants: ``(shape, read)`` of each; ``read()`` gives the array as float32.

    Raises:
        RuntimeError: a weight is not there; its name is given.
    """
    found: dict[tuple, list] = {}
    for shape, read in constants:
        if len(shape) >= 2:
            array = numpy.ascontiguousarray(read(), dtype=numpy.float32)
            found.setdefault(_fingerprint(array), []).append(read)
    sparse = {name: p.detach() for name, p in model.named_parameters() if p.dim() >= 2 and (p == 0).any()}
    for name, weight in sparse.items():
        weight = weight.float()
        halves = [weight.chunk(2, dim) for dim in (-2, -1) if weight.shape[dim] % 2 == 0]
        if not any(all(_is_among(part.numpy(), found) for part in parts) for parts in [(weight,), *halves]):
            raise RuntimeError(f"{name} ({tuple(weight.shape)}) is not in the graph as it is in the model")
    zeros = sum(int((weight == 0).sum()) for weight in sparse.values())
    return f"{len(sparse)} weights with {zeros} zeros found in the file, value by value"


def _fingerprint(array: numpy.ndarray) -> tuple[int, int, int]:
    """Size, nonzeros and the sum of all bits: the same however the values are ordered."""
    bits = numpy.ascontiguousarray(array).view(numpy.uint32)
    return array.size, int(numpy.count_nonzero(array)), int(bits.sum(dtype=numpy.uint64))


def _is_among(weight: numpy.ndarray, found: dict[tuple, list]) -> bool:
    turned = numpy.swapaxes(weight, -1, -2)
    for read in found.get(_fingerprint(weight), []):
        array = numpy.asarray(read(), dtype=numpy.float32)
        if numpy.array_equal(array, weight) or numpy.array_equal(array, turned):
            return True
    return False
