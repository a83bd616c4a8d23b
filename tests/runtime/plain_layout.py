"""A layout in plain torch, for what the runtime does around a kernel: values and positions, multiplied by unpacking."""

import torch

NAMES = ("values", "positions")


def unavailable(device):
    return None


def supports(dtype):
    return dtype in (torch.float32, torch.bfloat16, torch.float16)


def pack_tiles(tiles, shape, dtype):
    values, positions, above = [], [], 0
    for tile in tiles:
        assert tile.is_contiguous() and tile.dtype == dtype and tile.shape[1] == shape[1]
        flat = tile.reshape(-1)
        at = flat.nonzero().reshape(-1)
        values.append(flat[at])
        positions.append(at + above)
        above += flat.numel()
    assert above == shape[0] * shape[1]
    return {"values": torch.cat(values), "positions": torch.cat(positions).int()}


def unpack(tensors, shape, dtype):
    dense = torch.zeros(shape[0] * shape[1], dtype=dtype, device=tensors["values"].device)
    return dense.index_copy_(0, tensors["positions"].long(), tensors["values"]).reshape(shape)


def check(tensors, shape, dtype):
    if tuple(tensors) != NAMES or tensors["values"].dtype != dtype:
        raise ValueError("not a plain weight")
    if len(tensors["values"]) != len(tensors["positions"]):
        raise ValueError("lengths disagree")


def nbytes(tensors):
    return sum(tensor.nbytes for tensor in tensors.values())


def linear(x, tensors, shape, dtype, bias):
    return torch.nn.functional.linear(x, unpack(tensors, shape, dtype).to(x.dtype), bias)


def prepare(tensors, shape, dtype, bias):
    bias = None if bias is None else bias.detach().clone()  # as kernels that add it in float32 do
    return lambda x: linear(x, tensors, shape, dtype, bias)
