"""What the packed layer is to everybody else: the layer it replaced. The layout is one in plain torch."""

import copy
import io

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_sparse.runtime.layouts import layout_module
from hf_sparse.runtime.packed_linear import PackedLinear, row_tiles_of

pytestmark = pytest.mark.usefixtures("plain_layout")


def stock(shape=(24, 40), bias=True, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    layer = nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype)
    with torch.no_grad():
        layer.weight.masked_fill_(torch.rand(shape) < 0.7, 0)
    return layer


def packed_of(layer):
    weight = layer.weight.detach()
    tensors = layout_module("plain").pack_tiles(row_tiles_of(weight, 16), tuple(weight.shape), weight.dtype)
    return PackedLinear("plain", tensors, weight.shape, weight.dtype, layer.bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 5, 40), (2, 0, 40)])
def test_it_computes_what_the_layer_computed(shape, bias):
    layer = stock(bias=bias)
    x = torch.randn(shape)
    torch.testing.assert_close(packed_of(layer)(x), layer(x))


def test_state_dict_is_that_of_the_stock_layer_and_loads_both_ways():
    layer, other = stock(), stock()
    with torch.no_grad():
        other.weight.mul_(2)
        other.bias.mul_(3)
    packed = packed_of(layer)
    assert list(packed.state_dict()) == ["bias", "weight"] and set(packed.state_dict()) == set(layer.state_dict())
    assert all(torch.equal(tensor, layer.state_dict()[name]) for name, tensor in packed.state_dict().items())
    assert not nn.Linear(40, 24).load_state_dict(packed.state_dict()).missing_keys
    x = torch.randn(2, 40)
    packed(x)  # a prepared call must not survive the loading
    packed.load_state_dict(other.state_dict())
    torch.testing.assert_close(packed(x), other(x))
    with pytest.raises(RuntimeError, match=r"size mismatch for weight: \(3, 40\) in the file"):
        packed.load_state_dict({"weight": torch.zeros(3, 40), "bias": torch.zeros(24)})
    with pytest.raises(RuntimeError, match="Missing key"):
        packed.load_state_dict({"bias": torch.zeros(24)})


def test_casting_rounds_the_weight_and_packs_it_anew():
    layer = stock()
    packed = packed_of(layer)
    packed(torch.randn(1, 40))
    packed.to(torch.bfloat16)
    assert packed.weight.dtype == packed.bias.dtype == torch.bfloat16
    assert torch.equal(packed.weight, layer.weight.bfloat16())
    x = torch.randn(3, 40).bfloat16()
    torch.testing.assert_close(packed(x), layer.to(torch.bfloat16)(x))
    with pytest.raises(ValueError, match=r"no layout for torch.float64 weights on cpu: unpack\(model\)"):
        packed.double()


def test_copies_and_pickles_are_independent():
    packed = packed_of(stock())
    x = torch.randn(2, 40)
    expected = packed(x)
    duplicate = copy.deepcopy(packed)
    file = io.BytesIO()
    torch.save(packed, file)
    packed._buffers["values"].zero_()
    assert torch.equal(duplicate(x), expected)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)
    assert not torch.equal(packed(x), expected)


def test_gradients_reach_the_input_and_the_bias():
    layer = stock()
    packed = packed_of(copy.deepcopy(layer))
    inputs = [torch.randn(2, 3, 40).requires_grad_() for _ in range(1)] * 2
    results = []
    for module in (layer, packed):
        x = inputs[0].detach().clone().requires_grad_()
        module(x).square().sum().backward()
        results.append((x.grad, module.bias.grad))
    torch.testing.assert_close(results[1], results[0])
    single = torch.randn(40, requires_grad=True)
    packed(single).sum().backward()
    torch.testing.assert_close(single.grad, layer.weight.sum(0))
    operator = torch.ops.hf_sparse.packed_linear.default
    # torch.library.opcheck hands over copies, and no copy of a handle stands for a layer: its checks are made by hand
    x = torch.randn(2, 3, 40)
    with FakeTensorMode() as mode:
        fake = operator(*(mode.from_tensor(tensor) for tensor in (x, packed.handle, packed.bias)), 24)
    real = operator(x, packed.handle, packed.bias, 24)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
    with pytest.raises(RuntimeError, match="no packed layer's handle"):
        operator(torch.randn(2, 40), packed.handle.clone(), None, 24)


def test_a_bias_that_learned_is_the_one_that_is_added():
    layer = stock()
    packed = packed_of(copy.deepcopy(layer))
    x = torch.randn(2, 40)
    for module in (layer, packed):
        with torch.no_grad():
            module(x)  # prepares the call
        module(x).square().sum().backward()  # x asks for no gradient, the bias does
        with torch.no_grad():
            module.bias.sub_(module.bias.grad)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), layer(x))
    with torch.inference_mode():
        assert packed_of(stock())(x).shape == (2, 24)


def test_compiled_equals_eager_without_a_graph_break():
    packed = packed_of(stock())
    x = torch.randn(2, 40)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), packed(x))
        torch.testing.assert_close(compiled(x[:1]), packed(x[:1]))


def test_layers_with_different_numbers_of_nonzeros_are_one_compiled_program():
    """As the blocks of a model are: the sizes of packed tensors must not be part of the program."""
    torch.compiler.reset()
    blocks = [torch.nn.Sequential(packed_of(stock(seed=seed))) for seed in range(10)]
    assert len({block[0].nbytes for block in blocks}) == 10
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    x = torch.randn(2, 40)
    with torch.no_grad():
        for block in blocks:
            expected = block(x)
            block.compile(backend=counter, fullgraph=True, dynamic=False)
            assert torch.equal(block(x), expected)
        blocks[3][0].bias.add_(1)
        torch.testing.assert_close(blocks[3](x), blocks[3][0].multiply(x, blocks[3][0].bias))
    assert counter.frame_count == 1


def test_damaged_tensors_are_refused_before_they_are_used():
    packed = packed_of(stock())
    tensors = packed.tensors | {"values": packed.tensors["values"][:-1]}
    with pytest.raises(ValueError, match="lengths disagree"):
        PackedLinear("plain", tensors, (24, 40), torch.float32)


def test_memory_and_description():
    packed = packed_of(stock())
    kept = int((packed.weight != 0).sum())
    assert packed.nbytes == kept * 8
    assert f"in_features=40, out_features=24, bias=True, layout=plain, {kept * 8 / 3840:.0%} of dense" in repr(packed)
