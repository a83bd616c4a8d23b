"""What is particular to several processes, one function each; run by test_distributed.py, two processes."""

import copy
import tempfile
from datetime import timedelta

import _sparse_loop
from _launch import launch, tiny_model


def sparse(model, optimizer=None, total_steps=6, **fields):
    from hf_sparse.config import SparsityConfig
    from hf_sparse.training.sparse_training import sparsify

    fields = {"method": "static", "sparsity": 0.6} | fields
    return sparsify(model, SparsityConfig(**fields), optimizer, total_steps=total_steps)


def llama(sharded: bool = False):
    model = tiny_model("llama", hidden_size=32, intermediate_size=45).double()
    return shard(model) if sharded else model


def shard(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def masks_of(model):
    from hf_sparse.masks import Masks
    from hf_sparse.training.sharding import whole

    return {name: whole(mask) for name, mask in Masks.attached(model).items()}


def assert_same(one: dict, two: dict):
    import torch

    assert one.keys() == two.keys() and one
    assert all(torch.equal(one[name], two[name]) for name in one)


def assert_refused(model, message: str):
    """Before anything changes."""
    from hf_sparse.training.sharding import local

    before = [local(p.detach()).clone() for p in model.parameters()]
    try:
        sparse(model)
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"not refused: {message}")
    assert all((local(p) == b).all() for p, b in zip(model.parameters(), before, strict=True))
    assert not any(name.endswith("_mask") for name, _ in model.named_buffers())


def check_fsdp1_is_refused(rank):
    from torch import nn
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # its __init__ wants an accelerator
    nn.Module.__init__(model)
    model._modules["_fsdp_wrapped_module"], model.training_state = llama(), None
    assert_refused(model, "FSDP1")


def check_columns_cut_by_tensor_parallelism_are_refused(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    model = tiny_model("llama")
    parallelize_module(model, init_device_mesh("cpu", (2,)), {"model.layers.0.mlp.down_proj": RowwiseParallel()})
    assert_refused(model, "model.layers.0.mlp.down_proj.weight is sharded as (Shard(dim=1),)")


def check_a_wrapper_has_the_masks_of_its_model(rank):
    """Random masks are made of parameter names, and DDP puts 'module.' before them."""
    from torch.nn.parallel import DistributedDataParallel

    one, two = llama(), llama()
    sparse(one)
    sparse(DistributedDataParallel(two))
    assert_same(masks_of(one), masks_of(two))


def check_masks_of_an_earlier_training_are_cut(rank):
    """Masks attached before sharding, by a training that is not the one that goes on."""
    import torch

    alone, model = llama(), llama()
    sparse(alone, method="rigl", schedule={"every": 2})
    sparse(model, method="rigl", schedule={"every": 2})
    shard(model)
    training = sparse(model, torch.optim.SGD(model.parameters(), 0.1), method="rigl", schedule={"every": 2})
    assert_same(masks_of(alone), masks_of(model))
    assert all(weight.companion("explored").shape == weight.values().shape for weight in training.weights)


def check_zeros_that_only_one_process_has(rank):
    import torch

    from hf_sparse.training.sparse_training import sparsify

    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:3] = 0.0  # all on the first process
    zeros = {"model.layers.0.mlp.up_proj.weight": model.model.layers[0].mlp.up_proj.weight != 0}
    shard(model)
    training = sparsify(model)
    assert_same(masks_of(model), zeros)
    assert training.densities() == {"model.layers.0.mlp.up_proj.weight": 1 - 3 / 45}


def check_a_model_of_which_only_a_part_is_sharded(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    alone, model = llama(), llama()
    fully_shard(model.model.layers[0], mesh=init_device_mesh("cpu", (2,)))
    one, two = sparse(alone), sparse(model)
    assert_same(masks_of(alone), masks_of(model))
    assert one.densities() == two.densities() and one.metrics() == two.metrics()


def check_hybrid_sharding(rank):
    for case in _sparse_loop.CASES:
        if case[0] in ("rigl", "srigl", "gmp global") and case[1] in ("net", "gpt2"):
            together = _sparse_loop.train(*case[1:], "hsdp", rank, 2)
            _sparse_loop.compare(f"{case[0]} {case[1]} hsdp", REFERENCES[case[:2]], together)


def check_that_gradients_put_aside_are_averaged(rank):
    """The control of what _sparse_loop.py shows: without the average every process would grow other weights."""
    import torch
    import torch.distributed as dist

    from hf_sparse.training import sparse_training

    def agree():
        moves = {
            "every": 2,
            "end": 6,
            "anneal": "constant",
        }  # to the end: with each forward DDP copies buffers of rank 0
        masks, _, _ = _sparse_loop.train("llama", dict(method="rigl", schedule=moves), True, "ddp", rank, 2)
        mine = torch.cat([mask.flatten() for mask in masks.values()])
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine)
        return torch.equal(*both)

    assert agree()
    average, sparse_training.average = sparse_training.average, lambda tensors: None
    try:
        assert not agree()
    finally:
        sparse_training.average = average


def check_that_a_gradient_overflow_of_one_process_is_known_to_all(rank):
    import torch

    model = llama(sharded=True)
    training = sparse(model, torch.optim.SGD(model.parameters(), 0.1), method="rigl", schedule={"every": 2})
    for weight in training.weights:
        weight.gradient = torch.zeros_like(weight.values())
    assert training._gradients_are_usable()
    if rank == 1:
        training.weights[3].gradient[-1] = float("inf")
    assert not training._gradients_are_usable()


def check_densify_counts_what_all_processes_hold(rank):
    from hf_sparse.training.densify import densify

    alone, model = llama(), llama(sharded=True)
    sparse(alone)
    sparse(model)
    assert densify(alone) == densify(model) > 0
    assert not masks_of(model)


def check_state_dicts(rank):
    """Masks are cut, gathered, broadcast and stored as the weights are."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )

    model = llama(sharded=True)
    training = sparse(model)
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    masks = masks_of(model)
    assert {name.removesuffix("_mask") for name in full if name.endswith("_mask")} == (
        masks.keys() if rank == 0 else set()
    )
    names = [None]
    if rank == 0:
        assert all(torch.equal(full[f"{name}_mask"], mask) for name, mask in masks.items())
        names = [list(full)]
    dist.broadcast_object_list(names)

    other = llama(sharded=True)
    sparse(other, seed=1)
    assert any(not torch.equal(masks[name], mask) for name, mask in masks_of(other).items())
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(other, copy.deepcopy(full) if rank == 0 else {}, options=options)
    assert_same(masks, masks_of(other))

    folder = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder)
    dcp.save(get_model_state_dict(model), checkpoint_id=folder[0])
    for sharded in (True, False):  # as a DTensor again, and whole
        other = llama(sharded=sharded)
        sparse(other, seed=1)
        state = get_model_state_dict(other)
        dcp.load(state, checkpoint_id=folder[0])
        set_model_state_dict(other, state)
        assert_same(masks, masks_of(other))

    training.finish()
    plain = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    assert rank or plain.keys() == llama().state_dict().keys()


REFERENCES = {}


def main():
    import torch.distributed as dist

    for case in _sparse_loop.CASES:
        if case[0] in ("rigl", "srigl", "gmp global") and case[1] in ("net", "gpt2"):
            REFERENCES[case[:2]] = _sparse_loop.train(*case[1:], wrap=None)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            print(name, flush=True)
            check(dist.get_rank())
    dist.destroy_process_group()


if __name__ == "__main__":
    launch(main)
