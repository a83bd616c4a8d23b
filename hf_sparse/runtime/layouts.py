"""The layouts that a weight can be packed in for inference.

A layout is a module of plain functions; there is one for each way to store the nonzeros that a kernel multiplies with:

    unavailable(device)                       why it cannot run there, or None
    supports(dtype)                           whether weights of this dtype can be packed
    pack_tiles(tiles, shape, dtype)           dense row tiles -> {name: tensor}, without a whole dense weight
    unpack(tensors, shape, dtype)             back, bit for bit (int8: to the rounded weights)
    check(tensors, shape, dtype)              ValueError for any tensors that a kernel must not be given
    nbytes(tensors)                           bytes in memory
    prepare(tensors, shape, dtype, bias)      -> f(x [tokens, in]) -> [tokens, out], what the layer calls
    linear(x, tensors, shape, dtype, bias)    the same in one call, for torch.compile

| layout        | device | weights               | what it is                                                          |
|---------------|--------|-----------------------|---------------------------------------------------------------------|
| `panels`      | CPU    | bfloat16, float16, -32 | a bit an entry and the nonzeros, in panels of 16 rows              |
| `panels-int8` | CPU    | int8, a scale a row   | the same, activations rounded to 8 bits as well                     |
| `delta`       | CUDA   | bfloat16, float16     | gaps of 4 bits between the nonzeros of a row, for 1 or 2 tokens     |
| `paired`      | CUDA   | bfloat16, float16     | bits and nonzeros in the order of tensor cores, for up to 16 tokens |
| `2:4`         | CUDA   | bfloat16, float16     | for weights that are 2:4: sparse tensor cores, for prompts          |

A layout that takes only some weights has `fits(weight)` as well, and `any_zeros` False in the table below.
"""

import importlib
import math
from types import ModuleType
from typing import NamedTuple

import torch

__all__ = ["LAYOUTS", "Layout", "layout_module", "layouts_for", "special_layouts"]


class Layout(NamedTuple):
    """The device it runs on, its module, up to how many tokens it is meant for, and whether zeros may be anywhere."""

    device: str
    module: str
    tokens: float = math.inf
    any_zeros: bool = True


LAYOUTS = {
    "panels": Layout("cpu", "hf_sparse.runtime.cpu.panels"),
    "panels-int8": Layout("cpu", "hf_sparse.runtime.cpu.panels_int8"),
    "delta": Layout("cuda", "hf_sparse.runtime.gpu.delta", 2),
    "paired": Layout("cuda", "hf_sparse.runtime.gpu.paired"),
    "2:4": Layout("cuda", "hf_sparse.runtime.gpu.semi_structured", any_zeros=False),
}


def layout_module(name: str) -> ModuleType:
    """The functions of a layout.

    Raises:
        ValueError: no layout has this name.
    """
    if name not in LAYOUTS:
        raise ValueError(f"no layout is called {name!r}; there are {', '.join(LAYOUTS)}")
    return importlib.import_module(LAYOUTS[name].module)


def layouts_for(device: torch.device, dtype: torch.dtype, tokens: int = 1) -> list[str]:
    """The exact layouts that run on a device for any weight of a dtype; first the one meant for so many tokens a call."""
    found = [
        name
        for name, layout in LAYOUTS.items()
        if layout.device == device.type
        and layout.any_zeros
        and not name.endswith("int8")
        and layout_module(name).supports(dtype)
        and layout_module(name).unavailable(device) is None
    ]
    return sorted(found, key=lambda name: LAYOUTS[name].tokens < tokens)


def special_layouts(weight: torch.Tensor) -> list[str]:
    """The layouts for weights with a structure that this one [rows, columns] has, on its device."""
    return [
        name
        for name, layout in LAYOUTS.items()
        if not layout.any_zeros
        and layout.device == weight.device.type
        and layout_module(name).unavailable(weight.device) is None
        and layout_module(name).fits(weight)
    ]
