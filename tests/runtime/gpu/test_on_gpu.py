"""The kernels on a GPU: against float64 for every kind of shape, under CUDA graphs and torch.compile, from several threads."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from test_kernel_source import assert_product
from test_layouts import LAYOUTS, random_weight, same_bits

from hf_sparse import pack_for_inference, unpack
from hf_sparse.patterns import NM
from hf_sparse.runtime.gpu import delta, nvrtc, paired, semi_structured
from hf_sparse.runtime.layouts import special_layouts

pytestmark = pytest.mark.gpu
SHAPES = [(1, 1), (5, 3), (33, 304), (70, 1030), (1000, 2048), (4096, 1024), (257, 14336), (96, 28672)]


def gpu(*tensors):
    return [None if tensor is None else tensor.cuda() for tensor in tensors]


def case(rows, columns, sparsity, tokens, dtype):
    weight = random_weight((rows, columns), sparsity, dtype)
    if rows > 3:
        weight[2] = 0
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn((tokens, columns), generator=generator).to(dtype)
    return gpu(weight, x, torch.randn(rows, generator=generator).to(dtype) if rows % 2 else None)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_and_unpacking(layout, shape, dtype):
    for sparsity in (0.0, 0.5, 0.7, 0.97, 1.0):
        weight, _, bias = case(*shape, sparsity, 1, dtype)
        packed = layout.pack(weight)
        layout.check(packed, shape, dtype)
        call = layout.prepare(packed, shape, dtype, bias)
        assert same_bits(layout.unpack(packed, shape, dtype).cpu(), weight.cpu())
        for tokens in (1, 2, 3, 4, 5, 8, 9, 12, *((16, 17, 33) if layout is paired else ())):
            x = case(*shape, sparsity, tokens, dtype)[1]
            assert_product(call(x), weight, x, bias)
            assert torch.equal(layout.linear(x, packed, shape, dtype, bias), call(x))  # the same sums in the same order
        x = case(*shape, sparsity, 100, dtype)[1]
        assert torch.equal(call(x), F.linear(x, weight, bias))  # a prompt: unpacked, then the dense product


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_on_the_gpu_as_on_the_cpu(layout):
    weight = random_weight((300, 2100), 0.8)
    here, there = layout.pack(weight), layout.pack(weight.cuda())
    assert all(torch.equal(here[n].view(torch.uint8), there[n].cpu().view(torch.uint8)) for n in layout.NAMES)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_skewed_rows(layout):
    """Some rows dense, most nearly empty: long and short rows side by side."""
    weight = random_weight((200, 4096), 0.99)
    weight[::37] = torch.randn(len(weight[::37]), 4096).bfloat16()
    x = torch.randn(4, 4096).bfloat16()
    weight, x = gpu(weight, x)
    call = layout.prepare(layout.pack(weight), (200, 4096), torch.bfloat16, None)
    assert_product(call(x), weight, x, None)
    assert_product(call(x[:1]), weight, x[:1], None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_and_odd_addresses_of_x(layout):
    weight, x, _ = case(64, 1024, 0.7, 8, torch.bfloat16)
    call = layout.prepare(layout.pack(weight), (64, 1024), torch.bfloat16, None)
    odd = torch.empty(8 * 1024 + 1, dtype=x.dtype, device="cuda")[1:].view(8, 1024).copy_(x)
    strided = torch.stack([x, x], 1)[:, 0]
    for tokens in (1, 4, 8):
        for view in (odd, strided, x.t().contiguous().t()):
            assert_product(call(view[:tokens]), weight, x[:tokens], None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_graph_replays_and_chains(layout):
    """Layers one after another in a graph, each reading what the one before wrote: a kernel that started early would show."""
    weights = [random_weight((2048, 2048), 0.7, seed=seed).cuda() for seed in range(4)]
    calls = [layout.prepare(layout.pack(weight), (2048, 2048), torch.bfloat16, None) for weight in weights]
    for tokens in (1, 2) if layout is delta else (1, 8, 16):
        x = torch.randn(tokens, 2048, device="cuda").bfloat16()

        def run(x):
            for _ in range(3):
                for first, second in zip(calls[::2], calls[1::2], strict=True):
                    x = second(first(x)) / 600
            return x

        expected = run(x)
        graph, static = torch.cuda.CUDAGraph(), x.clone()
        with torch.cuda.graph(graph):
            out = run(static)
        for _ in range(20):
            static.copy_(x)
            graph.replay()
            assert torch.equal(out, expected)
            x = torch.randn_like(x)
            expected = run(x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_and_streams(layout):
    weight, x, _ = case(512, 1024, 0.7, 2, torch.bfloat16)
    call = layout.prepare(layout.pack(weight), (512, 1024), torch.bfloat16, None)
    expected, wrong = call(x), []
    torch.cuda.synchronize()

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(200):
                wrong.append(not torch.equal(call(x), expected))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 800 and not any(wrong)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wrong_inputs_are_refused(layout):
    weight, x, _ = case(64, 1024, 0.7, 2, torch.bfloat16)
    packed = layout.pack(weight)
    call = layout.prepare(packed, (64, 1024), torch.bfloat16, None)
    for wrong in (x.float(), x.half(), x[:, :1000], x.cpu(), x[None]):
        with pytest.raises(ValueError, match="packed weight takes"):
            call(wrong)
    with pytest.raises(ValueError, match="bias"):
        layout.prepare(packed, (64, 1024), torch.bfloat16, torch.zeros(65, device="cuda"))
    layout.linear(x, packed, (64, 1024), torch.bfloat16, None)
    assert torch.equal(copy.deepcopy(packed)[layout.NAMES[0]], packed[layout.NAMES[0]])  # the kept plan is not copied


def test_compiler_errors_carry_the_log():
    with pytest.raises(RuntimeError, match="undefined_name"):
        nvrtc.build('extern "C" __global__ void f(int* p) { *p = undefined_name; }', "f", {}, 0)


def test_triton_fallback():
    pytest.importorskip("triton")
    from hf_sparse.runtime.gpu import delta_triton

    for shape in [(33, 304), (70, 1030), (256, 4096)]:
        for tokens in (1, 2, 3, 4):
            weight, x, bias = case(*shape, 0.7, tokens, torch.bfloat16)
            assert_product(delta_triton.linear(x, delta.pack(weight), shape, bias), weight, x, bias)


# ------------------------------------------------------------------------------------------------ 2:4, torch's kernels


def two_of_four(rows, columns, dtype=torch.bfloat16):
    weight = random_weight((rows, columns), 0.0, dtype).cuda()
    return weight.masked_fill(~NM(2, 4).mask(weight.abs().float()), 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 64), (192, 4160), (2048, 5632)], ids=str)
def test_semi_structured_product_and_unpacking(shape, dtype):
    weight = two_of_four(*shape, dtype)
    weight[3] = 0
    packed = semi_structured.pack_tiles([weight[:32], weight[32:]], shape, dtype)
    semi_structured.check(packed, shape, dtype)
    if weight.nbytes > 1 << 20:  # the library pads small ones
        assert semi_structured.nbytes(packed) == weight.nbytes * 9 // 16
    assert same_bits(semi_structured.unpack(packed, shape, dtype), weight)
    bias = torch.randn(shape[0], device="cuda").to(dtype)
    for given in (None, bias):
        call = semi_structured.prepare(packed, shape, dtype, given)
        for tokens in (1, 7, 8, 300):
            x = torch.randn(tokens, shape[1], device="cuda").to(dtype)
            assert_product(call(x), weight, x, given)
    for broken in (packed["compressed"][:-1], packed["compressed"].float()):
        with pytest.raises(ValueError, match="compressed entries"):
            semi_structured.check({"compressed": broken}, shape, dtype)


def test_semi_structured_takes_only_what_it_can_give_back():
    weight = two_of_four(128, 128)
    assert special_layouts(weight) == ["2:4"]
    three, infinite = weight.clone(), weight.clone()
    three[0, :3] = 1
    infinite[0, :2] = torch.tensor([torch.inf, 1])
    infinite[0, 2:4] = 0
    for other in (three, infinite, weight[:40], weight.float()):
        assert special_layouts(other) == []
        with pytest.raises(ValueError, match="2:4 layout takes"):
            semi_structured.pack_tiles([other], tuple(other.shape), other.dtype)


@pytest.mark.parametrize("tokens", [1, 4096])
def test_auto_considers_semi_structured(tokens):
    model = torch.nn.Sequential(torch.nn.Linear(4096, 8192, bias=False)).cuda().bfloat16()
    model[0].weight.data = two_of_four(8192, 4096)
    dense, x = copy.deepcopy(model), torch.randn(tokens, 4096, device="cuda").bfloat16()
    choice = pack_for_inference(model, batch_size=tokens).layers["0"]
    assert set(choice.microseconds) >= {"dense", "2:4"}
    assert choice.layout == min(choice.microseconds, key=choice.microseconds.get)
    assert_product(model(x), dense[0].weight, x, None)
    if choice.layout != "dense":
        assert torch.equal(unpack(model)[0].weight, dense[0].weight)
