"""Packing is exact, both paths write the same bytes as numpy, and tensors that do not fit together are refused."""

import numpy as np
import pytest
import torch

from hf_sparse.formats.pack import pack_bitmask
from hf_sparse.runtime.cpu import layout, library, panels, panels_int8
from hf_sparse.runtime.cpu.arena import Arena

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1), (1, 64), (16, 4), (15, 3), (17, 5), (33, 130), (100, 67), (192, 576), (5, 1), (0, 8), (8, 0)]


def bits(tensor):
    return tensor.contiguous().view(torch.uint8) if tensor.numel() else tensor


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip(isa, random_weight, shape, dtype):
    for sparsity in (0, 0.5, 0.9, 1):
        weight = random_weight(*shape, sparsity, dtype)
        tensors = panels.pack(weight)
        panels.check(tensors, shape, dtype)
        assert torch.equal(bits(panels.unpack(tensors, shape, dtype)), bits(weight))
        pad = 64 // dtype.itemsize
        assert len(tensors["values"]) == int(weight.count_nonzero()) + pad and not tensors["values"][-pad:].any()


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8])
def test_every_path_writes_the_same_bytes(isa, random_weight, dtype, monkeypatch):
    weight = (random_weight(83, 45, 0.6) * 20).to(dtype)
    tensors = layout.pack_tiles([weight[:32], weight[32:]], (83, 45), dtype)
    monkeypatch.setattr(library, "isa_code", lambda: 0)
    by_numpy = layout.pack_tiles([weight], (83, 45), dtype)
    assert all(torch.equal(tensors[name], by_numpy[name]) for name in layout.NAMES)


def test_the_order_of_the_entries_is_the_documented_one():
    """Against the row-major bitmask of ``hf_sparse.formats``, on the blocks cut out by hand."""
    weight = (
        torch.arange(1.0, 16 * 8 + 1).view(16, 8).masked_fill_(torch.arange(128).view(16, 8) % 3 == 0, 0).bfloat16()
    )
    tensors = panels.pack(weight)
    blocks = [weight[:, k : k + 2].contiguous() for k in range(0, 8, 2)]
    expected = [pack_bitmask(block) for block in blocks]
    assert torch.equal(tensors["values"][:-32], torch.cat([part["values"] for part in expected]))
    assert torch.equal(tensors["masks"][0], torch.cat([part["bitmask"] for part in expected]))


@pytest.mark.parametrize("dtype", FLOATS)
def test_all_bit_patterns_survive(isa, dtype):
    """NaN with payload, -0.0, infinities, denormals: 65536 random patterns. Only +0.0 is left out."""
    integers = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    low, high = torch.iinfo(integers).min, torch.iinfo(integers).max
    patterns = torch.randint(low, high, (256, 256), dtype=integers, generator=torch.Generator().manual_seed(0))
    patterns[::2, ::3] = 0
    patterns[1, :4] = torch.tensor([low, 1, high, low + 1], dtype=integers)  # -0.0, a denormal, NaNs
    tensors = panels.pack(patterns.view(dtype))
    assert torch.equal(panels.unpack(tensors, (256, 256), dtype).view(integers), patterns)
    assert len(tensors["values"]) - 64 // dtype.itemsize == int((patterns != 0).sum())


def test_rows(isa, random_weight):
    weight = random_weight(75, 41, 0.7, torch.bfloat16)
    tensors = panels.pack(weight)
    for start, stop in ((0, 75), (0, 0), (3, 4), (15, 17), (16, 32), (31, 75), (74, 75)):
        assert torch.equal(panels.unpack_rows(tensors, (75, 41), torch.bfloat16, start, stop), weight[start:stop])
    scratch = torch.full((80, 41), 7.0, dtype=torch.bfloat16)
    panels.unpack_rows(tensors, (75, 41), torch.bfloat16, 20, 30, scratch)
    assert torch.equal(scratch[:10], weight[20:30]) and (scratch[10:] == 7).all()
    with pytest.raises(IndexError, match="rows 70 to 76 of a matrix with 75"):
        panels.unpack_rows(tensors, (75, 41), torch.bfloat16, 70, 76)


def test_tiles_give_the_whole(isa, random_weight):
    weight = random_weight(200, 33, 0.8, torch.float16)
    weight[:64] = 0  # the first tile's density misleads the buffer
    whole = panels.pack(weight)
    for rows in (16, 48, 64, 208):
        tiles = panels.pack_tiles((weight[top : top + rows] for top in range(0, 200, rows)), (200, 33), torch.float16)
        assert all(torch.equal(whole[name], tiles[name]) for name in layout.NAMES)
    for wrong in ([weight[:17], weight[17:]], [weight[:16]], [weight, weight[:1]], [weight[:, :32]]):
        with pytest.raises(ValueError, match="tile"):
            panels.pack_tiles(wrong, (200, 33), torch.float16)


def test_bytes(random_weight):
    """At 70% zeros in bfloat16 0.3625 of dense, and less than 0.38 from 512 x 512 on, whatever is added."""
    for shape in ((512, 512), (576, 1536), (2048, 2048)):
        tensors = panels.pack(random_weight(*shape, 0.7, torch.bfloat16))
        assert panels.nbytes(tensors) <= 0.38 * shape[0] * shape[1] * 2
        assert panels.nbytes(tensors) == sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())


def test_arena(random_weight):
    weights = [random_weight(48, 40, 0.5, torch.bfloat16, seed) for seed in range(3)]
    arena = Arena()
    placed = [arena.place(panels.pack(weight)) for weight in weights]
    for weight, tensors in zip(weights, placed, strict=True):
        panels.check(tensors, (48, 40), torch.bfloat16)
        assert torch.equal(panels.unpack(tensors, (48, 40), torch.bfloat16), weight)
    storages = {tensor.untyped_storage().data_ptr() for tensors in placed for tensor in tensors.values()}
    assert len(storages) == 1
    assert all(tensor.data_ptr() % 64 == 0 for tensors in placed for tensor in tensors.values())


def test_what_cannot_be_packed():
    with pytest.raises(ValueError, match="float64"):
        panels.pack(torch.zeros(4, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"\[4\]"):
        panels.pack(torch.zeros(4))
    with pytest.raises(ValueError, match="cannot be rounded"):
        panels_int8.pack(torch.tensor([[float("nan")]]))
    with pytest.raises(ValueError, match="131072"):
        panels_int8.pack(torch.zeros(1, 131073))


SHAPE, DTYPE = (
    (35, 21),
    torch.bfloat16,
)  # 3 panels, the last with 3 rows; 12 blocks, of which 11 are needed, the last half


def broken(name):
    """Tensors of a good weight with one thing wrong, and the words that say so."""
    generator = torch.Generator().manual_seed(0)
    weight = (
        torch.randn(SHAPE, generator=generator).masked_fill_(torch.rand(SHAPE, generator=generator) < 0.5, 0).to(DTYPE)
    )
    t = panels.pack(weight)
    masks = t["masks"].view(3, 12, 4)

    def move_bit(panel, block, byte, value):  # keep the number of bits: take away as many as are put outside
        flat = t["masks"][panel]
        for index in range(len(flat)):
            while value and flat[index]:
                flat[index] &= flat[index] - 1
                masks[panel, block, byte] |= value & -value
                value &= value - 1
        assert not value

    match name:
        case "missing":
            del t["offsets"]
        case "extra":
            t["more"] = torch.zeros(1)
        case "mask dtype":
            t["masks"] = t["masks"].to(torch.int8)
        case "mask shape":
            t["masks"] = t["masks"][:, :-1].contiguous()
        case "mask stride":
            t["masks"] = t["masks"].t().contiguous().t()
        case "values dtype":
            t["values"] = t["values"].half()
        case "values short":
            t["values"] = t["values"][:-1].clone()
        case "values long":
            t["values"] = torch.cat([t["values"], t["values"][:1]])
        case "values tiny":
            t["values"] = t["values"][:3].clone()
        case "values stride":
            t["values"] = t["values"].repeat_interleave(2)[::2]
        case "offsets dtype":
            t["offsets"] = t["offsets"].int()
        case "offsets length":
            t["offsets"] = t["offsets"][:-1].clone()
        case "offsets negative":
            t["offsets"][0] = -1
        case "offsets huge":
            t["offsets"][1] = 2**62
        case "offsets fall":
            t["offsets"][1], t["offsets"][2] = t["offsets"][2].clone(), t["offsets"][1].clone()
        case "offsets shifted":
            t["offsets"][1] += 1
        case "a bit more":
            free = int((t["masks"][0] != 255).nonzero()[0])
            t["masks"][0, free] |= ~t["masks"][0, free] & -~t["masks"][0, free] & 255
        case "row outside":
            move_bit(2, 0, 3, 128)
        case "column outside":
            move_bit(0, 10, 0, 0b10)
        case "block outside":
            move_bit(0, 11, 0, 0b11)
    return t


BROKEN = {
    "missing": "consist of",
    "extra": "consist of",
    "mask dtype": "masks of a weight",
    "mask shape": "masks of a weight",
    "mask stride": "masks of a weight",
    "values dtype": "values of a",
    "values short": "offsets must rise",
    "values long": "offsets must rise",
    "values tiny": "values of a",
    "values stride": "values of a",
    "offsets dtype": "offsets of a weight",
    "offsets length": "offsets of a weight",
    "offsets negative": "offsets must rise",
    "offsets huge": "offsets must rise",
    "offsets fall": "offsets must rise",
    "offsets shifted": "bits set and",
    "a bit more": "bits set and",
    "row outside": "outside",
    "column outside": "outside",
    "block outside": "outside",
}


@pytest.mark.parametrize("name", BROKEN)
def test_check_names_what_is_wrong(name):
    with pytest.raises(ValueError, match=BROKEN[name]):
        panels.check(broken(name), SHAPE, DTYPE)


def test_check_knows_shape_and_dtype(random_weight):
    tensors = panels.pack(random_weight(*SHAPE, 0.5, DTYPE))
    panels.check(tensors, SHAPE, DTYPE)
    for shape, dtype in (
        ((35, 33), DTYPE),
        ((51, 21), DTYPE),
        (SHAPE, torch.float16),
        (SHAPE, torch.float64),
        ((35,), DTYPE),
    ):
        with pytest.raises(ValueError):
            panels.check(tensors, shape, dtype)


def test_check_of_int8(random_weight):
    weight = random_weight(*SHAPE, 0.5)
    good = panels_int8.pack(weight)
    panels_int8.check(good, SHAPE, torch.float32)
    for name, value in (
        ("scales", good["scales"][:-1].clone()),
        ("scales", good["scales"].double()),
        ("sums", good["sums"] + 1),
        ("sums", good["sums"].long()),
        ("offsets", good["offsets"].flip(0)),
    ):
        with pytest.raises(ValueError, match=name):
            panels_int8.check(good | {name: value}, SHAPE, torch.float32)


def test_int8_rounding(random_weight):
    """At most half a step off, zeros stay zeros, and numpy rounds the same way."""
    weight = random_weight(40, 300, 0.6)
    weight[3] = 0
    weight[4, 0] = 1e-3 * weight[4].abs().max()  # below half a step: becomes zero
    q, scales = panels_int8.quantize(weight)
    assert ((q * scales[:, None] - weight).abs() <= scales[:, None] * 0.5000001).all()
    assert not q[weight == 0].any() and not q[3].any() and scales[3] == 0 and q[4, 0] == 0
    assert q.abs().max() == 127
    some = weight[5].numpy()
    step = np.float32(np.abs(some).max()) / np.float32(127)
    assert np.array_equal(q[5].numpy(), np.rint(some / step).astype(np.int8))
    dense = panels_int8.unpack(panels_int8.pack(weight), (40, 300), torch.float32)
    assert torch.equal(dense, q * scales[:, None])
