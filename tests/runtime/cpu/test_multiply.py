"""Products of packed and dense weights against float64, for every path, shape, dtype and number of tokens.

The bounds are those of the arithmetic: n products summed in float32 in any order are off by at most n eps sum|w||x|
(Higham, Accuracy and Stability of Numerical Algorithms, 3.1), the result is rounded once more to its own dtype.
"""

import random

import pytest
import torch

from hf_sparse.runtime.cpu import layout, library, multiply, panels, panels_int8
from hf_sparse.runtime.cpu.dense import dense_linear, prepare_dense

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1), (16, 8), (17, 5), (1, 200), (31, 1), (48, 64), (100, 67), (33, 130)]


def assert_close(y, x, weight, bias=None, step=2.0**-24):
    """``step``: the rounding of one product or sum."""
    x, weight = x.double(), weight.double()
    expected, size = x @ weight.t(), x.abs() @ weight.abs().t()
    if bias is not None:
        expected, size = expected + bias.double(), size + bias.double().abs()
    bound = (x.shape[-1] + 3) * step * size + torch.finfo(y.dtype).eps / 2 * (expected.abs() + size * 1e-4)
    bound += x.shape[-1] * 2.0**-120 if y.dtype != torch.float16 else 2.0**-24  # denormals; those of float16 are larger
    worst = ((y.double() - expected).abs() / bound).max() if y.numel() else 0
    assert worst <= 1, f"{worst} of the bound"


@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_products(isa, random_weight, dtype, x_dtype):
    rng = random.Random(f"{dtype} {x_dtype}")
    for shape in SHAPES:
        for sparsity in (0, 0.6, 0.95, 1):
            weight = random_weight(*shape, sparsity, dtype, seed=rng.randint(0, 999))
            bias = torch.randn(shape[0]).to(dtype) if rng.random() < 0.5 else None
            call = panels.prepare(panels.pack(weight), shape, dtype, bias)
            for tokens in (1, 2, 3, rng.randint(4, 15), 16, rng.randint(17, 80), rng.randint(193, 200)):
                x = torch.randn(tokens, shape[1]).to(x_dtype)
                y = call(x)
                assert y.dtype == x_dtype and y.shape == (tokens, shape[0])
                assert_close(y, x, weight, bias)


@pytest.mark.parametrize("tokens", range(1, 41))
def test_every_number_of_tokens(isa, random_weight, tokens):
    """Each has code of its own. The tokens do not influence one another."""
    shape = (40, 100)
    for dtype, x_dtype in (
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
    ):
        weight = random_weight(*shape, 0.7, dtype)
        call = panels.prepare(panels.pack(weight), shape, dtype)
        x = torch.randn(tokens, 100).to(x_dtype)
        y = call(x)
        assert_close(y, x, weight)
        x[tokens // 2] = float("nan")
        others = torch.arange(tokens) != tokens // 2
        assert torch.equal(call(x)[others], y[others]) and call(x)[tokens // 2].isnan().all()


def test_threads_change_nothing(isa, random_weight, two_threads):
    weight = random_weight(512, 300, 0.5)
    weight[:200] = 0  # parts are cut by bytes, not by rows
    call = panels.prepare(panels.pack(weight), (512, 300), torch.float32)
    for tokens in (1, 5, 33):
        x = torch.randn(tokens, 300)
        with_two = call(x)
        torch.set_num_threads(1)
        with_one = call(x)
        torch.set_num_threads(2)
        assert_close(with_two, x, weight)
        assert torch.equal(with_one, with_two) or isa == "none"


def test_infinities_and_nan_go_where_dense_puts_them(isa, random_weight):
    weight = random_weight(35, 19, 0.5, torch.bfloat16)
    weight[3, 4], weight[7, 0], weight[20, 18] = float("inf"), float("nan"), float("-inf")
    x = torch.randn(9, 19).bfloat16()
    x[2, 5], x[4, 7] = float("inf"), float("nan")
    expected = x.double() @ weight.double().t()
    for dtype in (torch.bfloat16, torch.float32):
        y = panels.linear(x.to(dtype), panels.pack(weight), (35, 19), torch.bfloat16)
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y == float("inf"), expected == float("inf"))
        assert torch.equal(y == float("-inf"), expected == float("-inf"))


def test_shapes_of_x(isa, random_weight):
    weight = random_weight(20, 24, 0.5, torch.bfloat16)
    call = panels.prepare(panels.pack(weight), (20, 24), torch.bfloat16)
    x = torch.randn(2, 3, 24).bfloat16()
    assert torch.equal(call(x), call(x.view(6, 24)).view(2, 3, 20))
    assert torch.equal(call(x.transpose(0, 1)), call(x).transpose(0, 1))
    assert call(x[:, :0]).shape == (2, 0, 20)
    with pytest.raises(ValueError, match=r"float16 \[..., 24\]"):
        call(x[..., :23])
    with pytest.raises(ValueError, match="float64"):
        call(x.double())
    with pytest.raises(ValueError, match="bias"):
        panels.prepare(panels.pack(weight), (20, 24), torch.bfloat16, torch.zeros(19))
    with pytest.raises(ValueError, match="masks of a weight"):
        panels.prepare(panels.pack(weight), (40, 24), torch.bfloat16)


def test_empty_sides(isa):
    for shape in ((0, 8), (8, 0)):
        y = panels.linear(
            torch.ones(3, shape[1]), panels.pack(torch.zeros(shape)), shape, torch.float32, torch.ones(shape[0])
        )
        assert torch.equal(y, torch.ones(3, shape[0]))


def test_paths_agree(random_weight, monkeypatch):
    if library.isa_code() < library.ISA_CODES["avx512"]:
        pytest.skip("one path only")
    weight, x = random_weight(64, 256, 0.7, torch.bfloat16), torch.randn(7, 256)
    results = {}
    for name in ("avx512", "avx2", "none"):
        monkeypatch.setenv("HF_SPARSE_CPU_ISA", name)
        results[name] = panels.linear(x, panels.pack(weight), (64, 256), torch.bfloat16)
    size = x.abs() @ weight.float().abs().t()
    assert ((results["avx512"] - results["avx2"]).abs() <= 256 * 2.0**-24 * size).all()
    assert not torch.equal(results["avx512"], results["none"])  # else nothing was forced


def test_many_tokens_unpack_tile_by_tile(isa, random_weight, monkeypatch):
    """The path beyond ``kernel_tokens``, with tiles of 16 rows."""
    monkeypatch.setattr(multiply, "TILE_BYTES", 1)
    monkeypatch.setattr(multiply, "kernel_tokens", lambda *_: 0)
    for dtype, x_dtype in (
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ):
        weight, bias, x = random_weight(75, 50, 0.7, dtype), torch.randn(75).to(dtype), torch.randn(5, 50).to(x_dtype)
        assert_close(panels.linear(x, panels.pack(weight), (75, 50), dtype, bias), x, weight, bias)


# -- int8


def rounded_activations(x):
    """The documented rule, in torch: q and the scale of each token."""
    largest = x.float().abs().amax(dim=1, keepdim=True)
    step = torch.where(largest > 1e-30, torch.full_like(largest, 127) / largest, 0)
    return torch.round(x.float() * step), torch.where(largest > 1e-30, largest / 127, 0)


@pytest.mark.parametrize("x_dtype", FLOATS)
def test_int8_sums_are_exact(isa, random_weight, x_dtype):
    if isa == "none":
        pytest.skip("without a kernel activations are not rounded")
    for shape in [*SHAPES, (40, 1100)]:
        for sparsity in (0, 0.6, 1):
            weight = random_weight(*shape, sparsity)
            tensors, bias = panels_int8.pack(weight), torch.randn(shape[0])
            q_weight = layout.unpack(tensors, shape, torch.int8)
            call = panels_int8.prepare(tensors, shape, torch.float32, bias)
            for tokens in (1, 2, 3, 5, 8, 13, 16, 19, 50):
                x = torch.randn(tokens, shape[1]).to(x_dtype)
                q, scale = rounded_activations(x)
                sums = (q.double() @ q_weight.double().t()).float()  # below 2^24 x 127: exact in float64
                expected = sums * (tensors["scales"] * scale) + bias
                y = call(x)
                assert y.dtype == x_dtype
                eps = max(torch.finfo(x_dtype).eps, 2.0**-22)
                torch.testing.assert_close(y.float(), expected, rtol=eps, atol=eps)


def test_int8_extremes(isa):
    """All weights at -127 or 127 and all activations at their largest: no sum saturates."""
    if isa == "none":
        pytest.skip("without a kernel activations are not rounded")
    weight = torch.ones(16, 4096)
    weight[::2] = -1
    y = panels_int8.linear(torch.ones(2, 4096), panels_int8.pack(weight), (16, 4096), torch.float32)
    assert torch.equal(y, torch.full((2, 16), 4096.0) * weight[:, 0])
    x = torch.ones(4, 4096)
    x[0, 1], x[1, 1], x[2], x[3] = float("nan"), float("inf"), 0, 1e-35
    y = panels_int8.linear(x, panels_int8.pack(weight), (16, 4096), torch.float32)
    assert y[:2].isnan().all() and not y[2:].any()


def test_int8_without_a_kernel_is_the_rounded_weight(random_weight, monkeypatch):
    monkeypatch.setenv("HF_SPARSE_CPU_ISA", "none")
    tensors, x = panels_int8.pack(random_weight(20, 30, 0.5)), torch.randn(3, 30)
    dense = panels_int8.unpack(tensors, (20, 30), torch.float32)
    assert torch.equal(panels_int8.linear(x, tensors, (20, 30), torch.float32), x @ dense.t())


# -- dense weights in place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (50, 31), (19, 1030), (7, 3000)])
def test_dense(isa, random_weight, shape, dtype):
    weight = random_weight(*shape, 0, dtype)
    bias = torch.randn(shape[0]).to(dtype)
    for tokens in range(1, 11):
        x = torch.randn(tokens, shape[1]).to(dtype)
        assert_close(dense_linear(x, weight, bias), x, weight, bias)
        assert_close(dense_linear(x, weight), x, weight)


def test_dense_sees_changes_in_place(isa, random_weight):
    weight, x = random_weight(30, 40, 0), torch.randn(1, 40)
    call = prepare_dense(weight)
    call(x)
    weight.mul_(2)
    assert_close(call(x), x, weight)
    with pytest.raises(ValueError, match="contiguous"):
        prepare_dense(weight.t())
    with pytest.raises(RuntimeError):
        call(torch.randn(1, 41))
