"""Two processes train what one trains; run by test_distributed.py as ``_sparse_loop.py ddp`` or ``fsdp2``.

Every rank first trains alone on whole batches, then with the other on its half of each micro-batch, and compares. Models
are float64: sums in another order then differ by 1e-16 of their size, scores are ranked in float32, and two scores that are
so close that they change places would have to be equal to 16 digits. In float32 a near tie, sooner or later, would decide
otherwise.
"""

import sys
from contextlib import nullcontext
from datetime import timedelta

from _launch import launch, tiny_model

STEPS, MICRO = 6, 2
SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 64, "max_position_embeddings": 32}
MOVE = {"every": 2, "end": 6, "anneal": "constant"}
RAMP = {"every": 2, "end": 6, "initial_sparsity": 0.2}

# name, model, config, whether the masks are chosen before the model is wrapped
CASES = [
    ("static", "llama", dict(method="static", sparsity=0.6), True),
    ("static", "net", dict(method="static", sparsity=0.6, saliency="magnitude"), False),
    ("static 2:4", "tall", dict(method="static", pattern="2:4", saliency="magnitude"), False),
    ("static blocks", "llama", dict(method="static", pattern="4x4", sparsity=0.5, saliency="magnitude"), True),
    ("set", "llama", dict(method="set", sparsity=0.6, schedule=MOVE), False),
    ("set", "net", dict(method="set", sparsity=0.5, schedule=MOVE), True),
    ("rigl", "llama", dict(method="rigl", sparsity=0.6, schedule=MOVE), True),
    ("rigl", "llama", dict(method="rigl", sparsity=0.6, schedule=MOVE), False),
    ("rigl", "net", dict(method="rigl", sparsity=0.5, schedule=MOVE), False),
    ("rigl", "gpt2", dict(method="rigl", sparsity=0.6, schedule=MOVE), True),
    ("rigl", "moe", dict(method="rigl", sparsity=0.6, schedule=MOVE), False),
    ("gmp", "llama", dict(method="gmp", sparsity=0.6, schedule=RAMP), False),
    ("gmp global", "gpt2", dict(method="gmp", sparsity=0.6, schedule=RAMP | {"scope": "global"}), True),
    ("gmp global", "net", dict(method="gmp", sparsity=0.6, schedule=RAMP | {"scope": "global"}), False),
    ("gmp rows", "net", dict(method="gmp", sparsity=0.6, pattern="row", schedule=RAMP), False),
    ("granet", "llama", dict(method="granet", sparsity=0.6, schedule=MOVE | {"ramp_end": 4}), False),
    ("srigl", "llama", dict(method="srigl", sparsity=0.6, schedule=MOVE), True),
    ("srigl", "net", dict(method="srigl", sparsity=0.4, schedule=MOVE), False),
    ("srigl", "moe", dict(method="srigl", sparsity=0.5, schedule=MOVE), False),
    ("sr-ste", "llama", dict(method="sr-ste"), False),
    ("sr-ste", "gpt2", dict(method="sr-ste"), True),
    ("top-kast", "gpt2", dict(method="top-kast", sparsity=0.8, schedule={"every": 2}), False),
    ("top-kast", "net", dict(method="top-kast", sparsity=0.6, schedule={"every": 2}), True),
    ("chts", "llama", dict(method="chts", sparsity=0.6, schedule=MOVE), False),
    ("chts", "gpt2", dict(method="chts", sparsity=0.6, schedule=MOVE), True),
]


def build(family: str):
    """A model in float64 and its units of sharding."""
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if family in ("net", "tall"):
        torch.manual_seed(0)
        # 7, 5 and 9 rows are not divisible by 2, one row is fewer than there are processes, Conv1D is stored [in, out]
        layers = [nn.Linear(12, 7), nn.Tanh(), Conv1D(9, 7), nn.Tanh(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 1)]
        layers = [nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 1)] if family == "tall" else layers
        model = nn.Sequential(*layers).double()
        return model, [layer for layer in model if not isinstance(layer, nn.Tanh)]
    if family == "gpt2":
        sizes = {"n_layer": 2, "n_embd": 36, "n_head": 3, "vocab_size": 64, "n_positions": 32}
    elif family == "moe":
        sizes = SMALL | {"num_hidden_layers": 1, "num_experts": 3, "moe_intermediate_size": 12}
        sizes |= {"_experts_implementation": "eager"}
    else:
        sizes = SMALL | {"intermediate_size": 44}
    model = tiny_model("qwen3_moe" if family == "moe" else family, **sizes).double()
    return model, model.transformer.h if family == "gpt2" else model.model.layers


def batches(family: str):
    """``[step, sample]``, the same in every process."""
    import torch

    generator = torch.Generator().manual_seed(1)
    if family in ("net", "tall"):
        return torch.randn(STEPS, 4 * MICRO, 12, generator=generator, dtype=torch.float64)
    return torch.randint(64, (STEPS, 4 * MICRO, 10), generator=generator)


def train(family: str, fields: dict, before: bool, wrap: str | None, rank: int = 0, ranks: int = 1):
    """Trains and returns the masks and the weights, whole, and what the training says of itself."""
    import torch
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from hf_sparse.config import SparsityConfig
    from hf_sparse.masks import Masks
    from hf_sparse.training.sharding import whole
    from hf_sparse.training.sparse_training import sparsify

    model, layers = build(family)
    config = SparsityConfig(**fields)
    training = sparsify(model, config) if before else None
    wrapped = model
    if wrap == "ddp":
        # with every forward DDP would copy the masks of rank 0 over those of the others, and hide that they differ
        wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    elif wrap in ("fsdp2", "hsdp"):
        mesh = init_device_mesh("cpu", (ranks,))
        if wrap == "hsdp":  # two replicas, each of one shard
            mesh = init_device_mesh("cpu", (ranks, 1), mesh_dim_names=("replicate", "shard"))
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=3e-3, weight_decay=0.1)
    if training is None:
        training = sparsify(model, config, optimizer, total_steps=STEPS)
    else:
        training.start(optimizer, STEPS)
    norms = []
    micro_batches = MICRO if wrap else 1  # alone, a step is one batch
    for step, batch in enumerate(batches(family)):
        for number, micro in enumerate(batch.chunk(micro_batches)):
            last = number == micro_batches - 1
            quiet = nullcontext()
            silent = step // 2 % 2 == 1 and not last  # accumulate with communication in some steps, without in others
            if silent and wrap == "ddp":
                quiet = wrapped.no_sync()
            if wrap in ("fsdp2", "hsdp"):
                model.set_requires_gradient_sync(not silent)
            mine = micro.chunk(ranks)[rank]
            with quiet:
                loss = wrapped(mine).square().mean() if mine.is_floating_point() else wrapped(mine, labels=mine).loss
                (loss / micro_batches).backward()
        norms.append(float(whole(nn.utils.clip_grad_norm_(wrapped.parameters(), 0.5))))
        optimizer.step()
        optimizer.zero_grad()
    masks = {name: whole(mask).clone() for name, mask in Masks.attached(model).items()}
    weights = {name: whole(p.detach()).clone() for name, p in model.named_parameters()}
    said = {"densities": training.densities(), "metrics": training.metrics(), "norms": norms}
    training.finish()
    return masks, weights, said


def compare(case, alone, together):
    import torch

    masks, weights, said = together
    assert masks.keys() == alone[0].keys() and masks
    for name, mask in masks.items():
        assert torch.equal(mask, alone[0][name]), f"{case}: the mask of {name} differs"
        assert int(mask.sum()) == round(said["densities"][name] * mask.numel()), f"{case}: density of {name}"
        assert not weights[name].masked_fill(mask, 0).any(), f"{case}: {name} is not zero where it is pruned"
    for name, weight in weights.items():
        torch.testing.assert_close(weight, alone[1][name], rtol=1e-6, atol=1e-9, msg=f"{case}: {name} differs")
    assert said["densities"] == alone[2]["densities"], case
    assert said["metrics"].keys() == alone[2]["metrics"].keys()
    for what, value in said["metrics"].items():
        assert abs(value - alone[2]["metrics"][what]) < 1e-6, f"{case}: {what} is {value}, not {alone[2]['metrics']}"
    torch.testing.assert_close(torch.tensor(said["norms"]), torch.tensor(alone[2]["norms"]), rtol=1e-6, atol=0)


def main():
    import torch.distributed as dist

    wrap, only = sys.argv[1], " ".join(sys.argv[2:])
    chosen = [case for case in CASES if only in ("", case[0])]
    alone = [train(*case[1:], wrap=None) for case in chosen]
    for case, (masks, _, _) in zip(chosen, alone, strict=True):  # so that equality says something: masks did move
        moves = case[0].split()[0] in ("set", "rigl", "srigl", "chts")
        first = train_start(case) if moves else None
        assert not moves or any(not bool((masks[n] == first[n]).all()) for n in masks), f"{case[0]} moved nothing"
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for case, reference in zip(chosen, alone, strict=True):
        print(*case[:2], flush=True)
        together = train(*case[1:], wrap, dist.get_rank(), dist.get_world_size())
        compare(" ".join((*case[:2], wrap, "before" if case[3] else "after")), reference, together)
    dist.destroy_process_group()


def train_start(case):
    from hf_sparse.config import SparsityConfig
    from hf_sparse.masks import Masks
    from hf_sparse.training.sparse_training import sparsify

    model, _ = build(case[1])
    sparsify(model, SparsityConfig(**case[2]))
    return Masks.attached(model)


if __name__ == "__main__":
    launch(main)
