"""Is the packed model faster here, where, and by how much of what the bytes allow? Dense and packed side by side in one run.

    report = benchmark(model, runtime="auto", new_tokens=64)       # hf-sparse bench PATH

Both models live in one process and take turns, round by round, so that whatever else the machine does hits both alike; a
ratio is the median of the rounds' ratios. Three things are timed:

    prefill    one forward pass over the prompt
    decode     forward passes of one token per sequence with a cache of keys and values; on CUDA one graph per token, because
               launches from Python would otherwise be what is measured
    layers     every linear layer alone, in the order of the model, so that each is read from memory as in decoding

and set beside the time it takes to read the bytes of the weights once, at the bandwidth measured in the same run: no kernel
for a few tokens is faster than that.
"""

import copy
import functools
import time
from collections.abc import Callable

import torch
from torch import nn

from hf_sparse.instruments import device_name, progress_bar
from hf_sparse.runtime.bench_report import BenchReport, LayerRow, Pair
from hf_sparse.runtime.gpu.timing import GraphOfCalls
from hf_sparse.runtime.pack import pack_for_inference
from hf_sparse.runtime.packed_linear import PackedLinear

__all__ = ["benchmark", "read_bandwidth"]


def benchmark(
    model: nn.Module,
    runtime: str = "auto",
    *,
    batch_size: int = 1,
    prompt: int = 128,
    new_tokens: int = 64,
    rounds: int = 5,
    progress: bool = False,
) -> BenchReport:
    """Time a causal language model dense and packed, on the device it is on. The model itself stays dense.

    Args:
        runtime: as in :func:`pack_for_inference`.
        batch_size: sequences decoded together.
        prompt, new_tokens: lengths in tokens; the prompt is random.
        rounds: repetitions, dense and packed in turn.

    Raises:
        ValueError: a length or count below 1.
    """
    for name, value in {"batch_size": batch_size, "prompt": prompt, "new_tokens": new_tokens, "rounds": rounds}.items():
        if value < 1:
            raise ValueError(f"{name} is at least 1, got {value}")
    model = model.eval()
    device = next(model.parameters()).device
    packed = copy.deepcopy(model)
    choices = pack_for_inference(packed, runtime, batch_size=batch_size)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (batch_size, prompt), generator=torch.Generator().manual_seed(0)).to(device)
    runners = [_Runner(each, ids, new_tokens) for each in (model, packed)]
    prefills, decodes = ([], []), ([], [])
    with torch.inference_mode(), progress_bar(progress, "benchmark", 2 * (rounds + 1)) as advance:
        for round in range(rounds + 1):  # the first one warms up
            for runner, prefill, decode in zip(runners, prefills, decodes, strict=True):
                seconds = runner.prefill(), runner.decode() / new_tokens
                advance(f"round {round} of {rounds}")
                if round:
                    prefill.append(seconds[0])
                    decode.append(seconds[1])
        agreement = (runners[0].tokens == runners[1].tokens).float().mean()
        layers = _layer_rows(model, packed, choices.layers, batch_size, rounds)
    return BenchReport(
        device=device_name(device),
        dtype=str(model.dtype).removeprefix("torch."),
        runtime=runtime,
        batch_size=batch_size,
        prompt=prompt,
        new_tokens=new_tokens,
        rounds=rounds,
        prefill=Pair.of(*prefills),
        decode=Pair.of(*decodes),
        bandwidth=read_bandwidth(device),
        dense_bytes=_bytes(model),
        packed_bytes=_bytes(packed),
        same_tokens=float(agreement),
        choices=str(choices),
        layers=layers,
    )


def read_bandwidth(device: torch.device, rounds: int = 7) -> float:
    """Bytes per second of the quickest of ``rounds`` reads of a large tensor by torch's own reduction."""
    size = (1 << 30) if device.type == "cuda" else (1 << 28)
    tensor = torch.ones(size // 4, device=device)
    seconds = [_seconds(device, tensor.sum) for _ in range(rounds)]
    return size / min(seconds)


class _Runner:
    """Prefill and greedy decoding of one model."""

    def __init__(self, model: nn.Module, ids: torch.Tensor, new_tokens: int):
        self.model, self.ids, self.new_tokens, self.device = model, ids, new_tokens, ids.device
        self.tokens = torch.zeros(ids.shape[0], new_tokens, dtype=torch.long, device=self.device)
        self.step = torch.zeros((), dtype=torch.long, device=self.device)
        self.token = ids[:, -1:].clone()
        self.cache = self.graph = None

    def prefill(self) -> float:
        def run():
            if self.device.type == "cuda":
                self._reset_static_cache()
            else:
                self.cache = None
            output = self.model(self.ids, past_key_values=self.cache, use_cache=True)
            self.cache = output.past_key_values
            self.token.copy_(output.logits[:, -1:].argmax(-1))

        return _seconds(self.device, run)

    def decode(self) -> float:
        self.step.zero_()
        if self.device.type == "cuda" and self.graph is None:
            self._capture()
            self.prefill()  # warming up moved the cache on
            self.step.zero_()
        run = self.graph.replay if self.graph else self._decode_one

        def all_tokens():
            for _ in range(self.new_tokens):
                run()

        return _seconds(self.device, all_tokens)

    def _decode_one(self) -> None:
        logits = self.model(self.token, past_key_values=self.cache, use_cache=True).logits
        self.token.copy_(logits[:, -1:].argmax(-1))
        self.tokens.scatter_(1, self.step.expand(len(self.token), 1), self.token)
        self.step += 1

    def _reset_static_cache(self) -> None:
        if self.cache is not None:
            self.cache.reset()
            return
        from transformers import StaticCache

        self.cache = StaticCache(config=self.model.config, max_cache_len=self.ids.shape[1] + self.new_tokens + 8)

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._decode_one()
                self.step.zero_()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._decode_one()


def _seconds(device: torch.device, run: Callable[[], object]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each counted once."""
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensors.values())


def _layer_rows(model, packed, choices, batch_size: int, rounds: int) -> list[LayerRow]:
    """Every linear layer that was considered, timed alone; rows of the same kind and shape are added up."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    groups: dict[tuple[str, tuple[int, int]], list[str]] = {}
    for name in choices:
        kind = ".".join(part for part in name.split(".")[-2:] if not part.isdigit())
        layer = packed.get_submodule(name)
        groups.setdefault((kind, tuple(_shape(layer))), []).append(name)
    inputs = {
        shape: torch.randn(batch_size, shape[1], device=device, generator=generator).to(model.dtype)
        for _, shape in groups
    }
    times = {key: ([], []) for key in groups}
    sweep = _sweep_cuda if device.type == "cuda" else _sweep_cpu
    sweeps = [sweep(each, groups, inputs) for each in (model, packed)]
    for round in range(rounds + 1):
        for side in (0, 1):
            spent = sweeps[side]()
            if round:
                for key, seconds in spent.items():
                    times[key][side].append(seconds)
    rows = []
    for (kind, shape), names in groups.items():
        kept = [choices[name] for name in names]
        rows.append(
            LayerRow(
                kind=kind,
                shape=shape,
                count=len(names),
                layouts=", ".join(sorted({choice.layout for choice in kept})),
                sparsity=sum(choice.sparsity for choice in kept) / len(kept),
                dense_bytes=sum(choice.dense_bytes for choice in kept),
                packed_bytes=sum(choice.bytes for choice in kept),
                time=Pair.of(*times[kind, shape]),
            )
        )
    return rows


def _shape(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, PackedLinear):
        return layer.shape
    shape = tuple(layer.weight.shape)
    return shape if isinstance(layer, nn.Linear) else shape[::-1]


def _sweep_cpu(model, groups, inputs) -> Callable[[], dict]:
    key_of = {name: key for key, names in groups.items() for name in names}
    layers = [(key_of[name], module) for name, module in model.named_modules() if name in key_of]

    def sweep():
        spent = dict.fromkeys(groups, 0.0)
        for key, layer in layers:
            begin = time.perf_counter()
            layer(inputs[key[1]])
            spent[key] += time.perf_counter() - begin
        return spent

    return sweep


def _sweep_cuda(model, groups, inputs) -> Callable[[], dict]:
    """A graph for each kind of layer: launches from Python are not what is asked for."""
    graphs = {
        key: GraphOfCalls([functools.partial(model.get_submodule(name), inputs[key[1]]) for name in names])
        for key, names in groups.items()
    }
    return lambda: {key: graph() for key, graph in graphs.items()}
