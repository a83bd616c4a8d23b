"""From the packed bytes of a checkpoint straight into packed layers: what ``from_pretrained(..., sparse_runtime=)`` does.

transformers puts the packed bytes of a linear weight where its dense weight would go (``integrations.quantizer``). Here each
is read a few rows at a time, repacked in the layout of its kernel, and dropped. The peak is the packed model and one layer.
"""

from dataclasses import replace

from torch import nn

from hf_sparse.formats.row_tiles import row_tiles
from hf_sparse.formats.unpack import is_packed, read_header, unpack_tensor
from hf_sparse.runtime.cpu.arena import Arena
from hf_sparse.runtime.pack import (
    RuntimeReport,
    check_runtime,
    choose_layout,
    linear_targets,
    packed_layer,
    put_in_place,
    stream_dense_rows,
)
from hf_sparse.runtime.packed_linear import positive_zeros, row_tiles_of

__all__ = ["check_runtime", "linear_weights", "to_packed_layers"]


def linear_weights(model: nn.Module) -> list[str]:
    """The weights that may stay packed while the model is loaded."""
    return [target.name for target in linear_targets(model).values()]


def to_packed_layers(model: nn.Module, names: list[str], runtime: str, batch_size: int = 1) -> RuntimeReport:
    """Every weight of ``names`` that holds packed bytes becomes a packed layer, or a dense one where that is faster."""
    layers, arena = {}, Arena()
    for weight in names:
        name = weight.rpartition(".")[0]
        stock = model.get_submodule(name)
        packed = stock.weight.data
        if not is_packed(packed):
            continue  # it had too few zeros to be packed on disk
        header, dtype = read_header(packed), model.dtype
        transposed = type(stock) is not nn.Linear
        shape = header.shape[::-1] if transposed else header.shape
        density = header.values / max(1, header.numel)
        choice = choose_layout(shape, dtype, density, packed.device, runtime, batch_size)
        if choice.layout == "dense":
            stock.weight = nn.Parameter(unpack_tensor(packed, dtype, verify=False))
        else:
            tiles = positive_zeros(row_tiles(packed, dtype))
            if transposed:  # its rows are our columns: this one weight has to be dense for a moment
                tiles = row_tiles_of(unpack_tensor(packed, dtype, verify=False).t())
            layer = packed_layer(choice, tiles, shape, dtype, stock, arena)
            put_in_place(model, name, layer)
            choice = replace(choice, bytes=layer.nbytes)
        layers[name] = choice
    if runtime != "packed":
        layers |= stream_dense_rows(model, batch_size)
    return RuntimeReport(runtime, batch_size, layers)
