"""The CUDA sources themselves, compiled as C++ and run on the CPU thread by thread (``emulator.h``), against float64."""

import pytest
import torch
from emulate import COMPILER, arguments, library
from test_layouts import random_weight, same_bits

from hf_sparse.runtime.gpu import delta, paired

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
SHAPES = [(5, 3, 0.3), (33, 304, 0.7), (70, 1030, 0.5), (40, 2600, 0.97), (64, 520, 1.0)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


def case(rows, columns, sparsity, tokens, dtype):
    weight = random_weight((rows, columns), sparsity, dtype)
    weight[rows // 2] = 0
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((tokens, columns), generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype) if rows % 2 else None
    return weight, x, bias, torch.full((tokens, rows), float("nan"), dtype=dtype)


def assert_product(y, weight, x, bias):
    """Within half a unit in the last place, and the rounding of a float32 sum (columns times 2^-24 of its terms)."""
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    terms = x.double().abs() @ weight.double().abs().t()
    ulp = 2.0 ** (-8 if y.dtype == torch.bfloat16 else -11)
    assert ((y.double() - exact).abs() <= ulp * exact.abs() + 2e-6 * terms + 1e-7).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "warps", "split", "grid", "dtype"),
    [
        (1, 4, 1, 2, torch.bfloat16),
        (1, 4, 4, 1, torch.float16),
        (2, 4, 2, 3, torch.bfloat16),
        (3, 2, 1, 5, torch.float16),
        (4, 8, 4, 2, torch.bfloat16),
    ],
)
def test_delta(shape, tokens, warps, split, grid, dtype, folder):
    rows, columns, _ = shape
    half = int(dtype == torch.float16)
    sizes = dict(HALF=half, EARLY=0, TOKENS=tokens, WARPS=warps, SPLIT=split, BLOCKS=1)
    kernels = library("delta.cu", folder, **sizes)
    weight, x, bias, y = case(*shape, tokens, dtype)
    packed = delta.pack(weight)
    blocks = packed["bases"].shape[1]
    groups = warps // split
    shared = -(-(columns + 8) * (4 if tokens < 3 else 8) // 16) * 16
    shared += -(-rows // (grid * groups)) * warps * tokens * 4 if split > 1 else 0
    kernels.run_linear(*arguments(grid, shared, x, y, *packed.values(), bias, rows, columns, blocks))
    assert_product(y, weight, x, bias)
    dense = torch.full((rows, columns), 7.0, dtype=dtype)
    shared = -(-(columns + 8) // 8) * 16
    kernels.run_unpack(*arguments(grid, shared, dense, *packed.values(), rows, columns, blocks))
    assert same_bits(dense, weight)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "groups", "stages", "engine", "dtype"),
    [
        (1, 1, 2, 1, torch.bfloat16),
        (8, 2, 1, 1, torch.float16),
        (13, 1, 3, 1, torch.bfloat16),
        (3, 1, 2, 0, torch.float16),  # without a copy engine, as before Hopper
    ],
)
def test_paired(shape, tokens, groups, stages, engine, dtype, folder):
    rows, columns, _ = shape
    tiles = -(-tokens // 8)
    sizes = dict(HALF=int(dtype == torch.float16), EARLY=0, TILES=tiles, GROUPS=groups, STAGES=stages, BLOCKS=1)
    kernels = library("paired.cu", folder, **sizes, COPY_ENGINE=engine)
    weight, x, bias, y = case(*shape, tokens, dtype)
    packed = paired.pack(weight)
    down, across = -(-rows // 32), -(-columns // 1024)
    slot, width = 128 * int(packed["starts"].diff().max()), -(-columns // 8) * 8
    wide = torch.nn.functional.pad(x, (0, width - columns)).contiguous()
    shared = 128 + max(groups * stages * slot, groups * 4096 * tiles)
    kernels.run_linear(
        *arguments(down, shared, wide, y, packed["data"], packed["starts"], bias, tokens, rows, width, across, slot)
    )
    assert_product(y, weight, x, bias)
    dense = torch.full((rows, columns), 7.0, dtype=dtype)
    kernels.run_unpack(
        *arguments(down * across, 128 + slot, dense, packed["data"], packed["starts"], rows, columns, across, slot)
    )
    assert same_bits(dense, weight)
