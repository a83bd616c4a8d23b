"""Tokens per second of a model shaped like Llama 3 8B with unstructured zeros on a GPU: dense against packed, end to end.

    python examples/benchmarks/gpu_decode.py --output decode.json            # 16 GB of weights, a minute or two
    python examples/benchmarks/gpu_decode.py --layers 4 --sparsity 0.7       # less of both

Random weights (speed does not depend on them), bfloat16, a cache of keys and values of fixed length, one CUDA graph a step:
what a serving loop runs. The decoder is written out below with as few kernels as plain torch allows, so that what is left
beside the linear layers (norms, rotary embedding, attention, the dense output layer) is small and equal for both, and
``torch.compile`` fuses it in both (``--eager`` measures without it as well). The linear layers are replaced by
``pack_for_inference``; dense and packed steps take turns and medians count. The greedy tokens of both are compared: they
differ where two logits are closer than the rounding of bfloat16 sums.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from _gpu_tiny import show_sizes
from torch import nn

from hf_sparse import pack_for_inference
from hf_sparse.instruments import device_name, versions

LLAMA_8B = dict(hidden=4096, inner=14336, heads=32, kv_heads=8, vocabulary=128256, layers=32)


class Block(nn.Module):
    """A Llama decoder layer for one step: x [batch, 1, hidden] with keys and values [batch, kv heads, length, 128]."""

    def __init__(self, hidden, inner, heads, kv_heads):
        super().__init__()
        self.size, self.heads, self.kv_heads = hidden // heads, heads, kv_heads
        for name, rows, columns in (
            ("q_proj", hidden, hidden),
            ("k_proj", kv_heads * self.size, hidden),
            ("v_proj", kv_heads * self.size, hidden),
            ("o_proj", hidden, hidden),
            ("gate_proj", inner, hidden),
            ("up_proj", inner, hidden),
            ("down_proj", hidden, inner),
        ):
            setattr(self, name, nn.Linear(columns, rows, bias=False))
        self.norms = nn.Parameter(torch.ones(2, hidden))

    def forward(self, x, keys, values, position, rotation, mask):
        batch, hidden = x.shape[0], x.shape[-1]
        normed = F.rms_norm(x, (hidden,), self.norms[0], 1e-5)
        both = torch.cat([self.q_proj(normed), self.k_proj(normed)], -1).view(batch, -1, self.size)
        query, key = rotate(both, rotation).split([self.heads, self.kv_heads], 1)
        keys.index_copy_(2, position, key[:, :, None])
        values.index_copy_(2, position, self.v_proj(normed).view(batch, self.kv_heads, 1, self.size))
        # query heads that share keys are queries of one head: no copy of the cache for each of them
        grouped = query.reshape(batch, self.kv_heads, -1, self.size)
        attended = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
        x = x + self.o_proj(attended.reshape(batch, 1, hidden))
        normed = F.rms_norm(x, (hidden,), self.norms[1], 1e-5)
        return x + self.down_proj(F.silu(self.gate_proj(normed)) * self.up_proj(normed))


def rotate(x, rotation):
    """Rotary embedding of x [batch, heads, size] with rotation [size / 2, 2]: cosines and sines."""
    pairs = x.float().view(*x.shape[:-1], -1, 2)
    if torch.compiler.is_compiling():  # the compiler fuses real arithmetic only
        (real, imaginary), (cosine, sine) = pairs.unbind(-1), rotation.unbind(-1)
        turned = torch.stack([real * cosine - imaginary * sine, real * sine + imaginary * cosine], -1)
    else:  # one kernel: a complex multiplication
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotation))
    return turned.flatten(-2).to(x.dtype)


class Decoder(nn.Module):
    """Embedding, blocks, output layer, and the state of a greedy decoding."""

    def __init__(self, hidden, inner, heads, kv_heads, vocabulary, layers):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, hidden)
        self.blocks = nn.ModuleList(Block(hidden, inner, heads, kv_heads) for _ in range(layers))
        self.lm_head = nn.Linear(hidden, vocabulary, bias=False)
        self.norm = nn.Parameter(torch.ones(hidden))

    def start(self, batch: int, length: int) -> None:
        block = self.blocks[0]
        kind = dict(device=self.norm.device, dtype=self.norm.dtype)
        size = batch, block.kv_heads, length, block.size
        self.caches = [(torch.zeros(size, **kind), torch.zeros(size, **kind)) for _ in self.blocks]
        angles = torch.arange(length)[:, None] * 500000.0 ** (-torch.arange(0, block.size, 2) / block.size)
        self.rotations = torch.stack([angles.cos(), angles.sin()], -1).to(kind["device"])
        self.places = torch.arange(length, device=kind["device"])
        self.position = torch.zeros(1, dtype=torch.long, device=kind["device"])
        self.token = torch.arange(batch, device=kind["device"])[:, None]
        self.logits = torch.zeros(batch, self.lm_head.out_features, **kind)

    def compile(self) -> None:
        """The small operations between the linear layers fused; every block runs the same compiled code."""
        for block in self.blocks:
            block.compile(dynamic=False)
        self.begin = torch.compile(self.begin, dynamic=False)
        self.end = torch.compile(self.end, dynamic=False)

    def step(self) -> None:
        x, rotation, mask = self.begin()
        for block, (keys, values) in zip(self.blocks, self.caches, strict=True):
            x = block(x, keys, values, self.position, rotation, mask)
        self.end(x)

    def begin(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(x [batch, 1, hidden], rotation [size / 2, 2], what attention adds [batch, kv heads, grouped, length])."""
        block = self.blocks[0]
        after = torch.where(self.places <= self.position, 0.0, float("-inf")).to(self.norm.dtype)
        shape = len(self.token), block.kv_heads, block.heads // block.kv_heads, len(self.places)
        return self.embed(self.token), self.rotations[self.position][0], after.expand(shape).contiguous()

    def end(self, x: torch.Tensor) -> None:
        """Logits, the greedy token, one position on."""
        self.logits.copy_(self.lm_head(F.rms_norm(x, x.shape[-1:], self.norm, 1e-5))[:, 0])
        self.token.copy_(self.logits.argmax(-1, keepdim=True))
        self.position += 1

    def graph(self, batch: int, length: int) -> torch.cuda.CUDAGraph:
        self.start(batch, length)
        self.step()
        self.step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        self.restart()
        return graph

    def restart(self) -> None:
        self.position.zero_()
        self.token.copy_(torch.arange(len(self.token), device=self.token.device)[:, None])


def random_decoder(sizes: dict) -> Decoder:
    with torch.device("meta"):
        decoder = Decoder(**sizes)
    decoder = decoder.to(torch.bfloat16).to_empty(device="cuda").requires_grad_(False)
    generator = torch.Generator("cuda").manual_seed(0)
    for parameter in decoder.parameters():
        if parameter.dim() == 2 and parameter.shape[0] > 2:
            parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
        else:
            parameter.fill_(1)
    return decoder


def with_zeros(decoder: Decoder, sparsity: float) -> Decoder:
    """A copy whose decoder layers have random zeros; embedding, norms and output layer are shared."""
    import copy

    shared = {id(p): p for p in (decoder.embed.weight, decoder.lm_head.weight, decoder.norm)}
    sparse, generator = copy.deepcopy(decoder, shared), torch.Generator("cuda").manual_seed(1)
    for layer in sparse.blocks.modules():
        if isinstance(layer, nn.Linear):
            zeros = torch.rand(layer.weight.shape, device="cuda", generator=generator) < sparsity
            layer.weight.data.masked_fill_(zeros, 0)
    return sparse


def compare(decoder: Decoder, sparsity: float, batch: int, tokens: int, rounds: int, compiled: bool) -> dict:
    torch.compiler.reset()
    dense = with_zeros(decoder, sparsity)
    packed = with_zeros(decoder, sparsity)
    report = pack_for_inference(packed, "auto", batch_size=batch, ignore=["lm_head"])
    if compiled:
        dense.compile()
        packed.compile()
    graphs = {"dense": dense.graph(batch, tokens + 8)}
    graphs["packed"] = packed.graph(batch, tokens + 8)
    times, texts = {name: [] for name in graphs}, {}
    for round in range(rounds + 1):
        for (name, graph), model in zip(graphs.items(), (dense, packed), strict=True):
            model.restart()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(tokens):
                graph.replay()
            end.record()
            end.synchronize()
            if round:
                times[name].append(begin.elapsed_time(end) / tokens)
    for (name, graph), model in zip(graphs.items(), (dense, packed), strict=True):
        model.restart()
        texts[name] = []
        for _ in range(8):
            graph.replay()
            texts[name].append(model.token.clone())
    first = {}
    for name, model in (("dense", dense), ("packed", packed)):
        model.restart()
        graphs[name].replay()
        first[name] = model.logits.float()
    milliseconds = {name: median(values) for name, values in times.items()}
    kinds: dict[str, str] = {}
    for name, layer in report.layers.items():
        kinds[name.rsplit(".", 1)[-1]] = layer.layout
    return dict(
        sparsity=sparsity,
        batch=batch,
        compiled=compiled,
        dense_ms=milliseconds["dense"],
        packed_ms=milliseconds["packed"],
        speedup=milliseconds["dense"] / milliseconds["packed"],
        dense_tokens_per_second=1e3 * batch / milliseconds["dense"],
        packed_tokens_per_second=1e3 * batch / milliseconds["packed"],
        linear_bytes_dense=report.dense_bytes,
        linear_bytes_packed=report.bytes,
        layouts=kinds,
        logits_error=float((first["packed"] - first["dense"]).norm() / first["dense"].norm()),
        same_tokens=float((torch.stack(texts["dense"]) == torch.stack(texts["packed"])).float().mean()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.7, 0.5, 0.8])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 8], help="batches; the later ones at 70%% only")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="the blocks as they are, without torch.compile, as well")
    parser.add_argument("--tiny", action="store_true", help="sizes of the layouts only; no GPU, seconds")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.tiny:
        return show_sizes()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU: hf-sparse bench runs anywhere")
    results = []
    with torch.inference_mode():
        decoder = random_decoder(LLAMA_8B | {"layers": arguments.layers})
        cases = [(s, arguments.batch[0]) for s in arguments.sparsity]
        cases += [(arguments.sparsity[0], batch) for batch in arguments.batch[1:]]
        for compiled, (sparsity, batch) in itertools.product([True] + [False] * arguments.eager, cases):
            result = compare(decoder, sparsity, batch, arguments.tokens, arguments.rounds, compiled)
            how = "compiled" if compiled else "eager"
            results.append(result)
            print(
                f"{sparsity:.0%} zeros, batch {batch}, {how}: {result['dense_ms']:.2f} -> {result['packed_ms']:.2f} ms a step, "
                f"x{result['speedup']:.2f}, {result['packed_tokens_per_second']:.0f} tokens/s, linears "
                f"{result['linear_bytes_dense'] / 1e9:.1f} -> {result['linear_bytes_packed'] / 1e9:.1f} GB, logits within "
                f"{result['logits_error']:.4f}, {result['same_tokens']:.0%} same tokens, {result['layouts']}",
                flush=True,
            )
    if arguments.output:
        words = [Path(word).name for word in sys.argv[1:]]
        about = dict(
            command=" ".join(["python", "examples/benchmarks/gpu_decode.py", *words]),
            device=device_name(torch.device("cuda")),
            versions=versions(),
            layers=arguments.layers,
        )
        arguments.output.write_text(json.dumps(about | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
