"""The bytes of the GPU layouts: what goes in comes out, bit for bit, and nothing else is let in."""

import pytest
import torch

from hf_sparse.runtime.gpu import delta, paired

LAYOUTS = [pytest.param(delta, id="delta"), pytest.param(paired, id="paired")]
SHAPES = [(1, 1), (1, 17), (3, 5), (33, 300), (64, 1024), (65, 1030), (130, 2100)]


def random_weight(shape, sparsity, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(dtype)
    return weight.masked_fill(torch.rand(shape, generator=generator) < sparsity, 0)


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip(layout, shape, dtype):
    for sparsity in (0.0, 0.5, 0.8, 0.97, 1.0):
        weight = random_weight(shape, sparsity, dtype)
        packed = layout.pack(weight)
        assert tuple(packed) == layout.NAMES
        layout.check(packed, shape, dtype)
        assert same_bits(layout.unpack(packed, shape, dtype), weight)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_special_values(layout):
    """-0.0, NaN payloads, infinities and subnormals are weights; empty rows and columns cost nothing."""
    bits = torch.zeros(40, 1100, dtype=torch.int16)
    special = torch.tensor([-32768, 0x7FC1, -0x7F, 0x7F80, -0x80, 1, -32767], dtype=torch.int16)
    bits[3, 5 : 5 + len(special)] = special
    bits[3, 1099] = bits[39, 0] = -32768
    bits[17] = torch.arange(1100, dtype=torch.int16) + 1
    for dtype in (torch.bfloat16, torch.float16):
        packed = layout.pack(bits.view(dtype))
        layout.check(packed, (40, 1100), dtype)
        assert same_bits(layout.unpack(packed, (40, 1100), dtype), bits.view(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("step", [1, 7, 32, 50, 1000])
def test_tiles_of_any_height_make_the_same_bytes(layout, step, monkeypatch):
    weight = random_weight((131, 1500), 0.7)
    whole = layout.pack(weight)
    monkeypatch.setattr("hf_sparse.runtime.gpu.plan._AT_ONCE", 40 * 2048)
    tiles = layout.pack_tiles(iter(weight.split(step)), (131, 1500), torch.bfloat16)
    assert all(torch.equal(whole[name].view(torch.uint8), tiles[name].view(torch.uint8)) for name in layout.NAMES)
    assert same_bits(layout.unpack(tiles, (131, 1500), torch.bfloat16), weight)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiles_must_be_the_weight(layout):
    weight = random_weight((64, 100), 0.5)
    with pytest.raises(ValueError, match="64 rows together; 65"):
        layout.pack_tiles([weight], (65, 100), torch.bfloat16)
    with pytest.raises(ValueError, match=r"any, 101\] torch.bfloat16 was announced"):
        layout.pack_tiles([weight], (64, 101), torch.bfloat16)
    with pytest.raises(ValueError, match="not torch.float32"):
        layout.pack_tiles([weight.float()], (64, 100), torch.float32)


def test_delta_by_hand():
    """Eight entries an octet, nibbles of distance - 1, an inserted zero for a distance over 16."""
    weight = torch.zeros(3, 100, dtype=torch.bfloat16)
    weight[0, [0, 1, 3]] = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
    weight[2, [40, 41]] = torch.tensor([4.0, 5.0], dtype=torch.bfloat16)  # 40 = -1 + 16 + 16 + 9
    packed = delta.pack(weight)
    assert packed["row_start"].tolist() == [0, 1, 1, 2]
    assert packed["values"].tolist() == [1, 2, 3, 0, 0, 0, 0, 0, 0, 0, 4, 5, 0, 0, 0, 0]
    assert [hex(gaps) for gaps in packed["gaps"].tolist()] == ["0x100", "0x8ff"]
    assert packed["bases"].tolist() == [[0], [0], [0]]


def test_delta_bases_are_where_the_blocks_of_32_octets_begin():
    weight = torch.ones(2, 1000, dtype=torch.float16)
    weight[1, 100:400] = 0
    bases = delta.pack(weight)["bases"]
    assert bases[0].tolist() == [0, 256, 512, 768]
    # row 1: 100 weights, 18 inserted zeros (300 = 18 * 16 + 12), so 256 entries end 138 weights after column 400
    assert bases[1].tolist() == [0, 400 + 256 - 118, 400 + 512 - 118, 0]


def test_paired_by_hand():
    """Weight (row, column) is entry `place` of the stream of its lane and half (the module's table)."""
    for row, column in [(0, 0), (5, 3), (9, 6), (17, 77), (31, 255), (20, 700)]:
        weight = torch.zeros(32, 1024, dtype=torch.bfloat16)
        weight[row, column] = 3.0
        packed = paired.pack(weight)
        assert packed["starts"].tolist() == [0, 37]  # one line of entries after the header
        block, inside = divmod(column, 256)
        s, up, g = row // 16, row // 8 % 2, row % 8
        q, h, t, e, k, half = (
            inside // 64,
            inside // 32 % 2,
            inside // 8 % 4,
            inside // 4 % 2,
            inside // 2 % 2,
            inside % 2,
        )
        lane, r, i = 4 * g + t, up + 2 * k, 2 * h + e
        words = packed["data"][8 * block : 8 * block + 8].reshape(2, 32, 4)
        word = int(words[q // 2, lane, 2 * (q % 2) + s]) & 0xFFFFFFFF
        assert word == 1 << (8 * i + 2 * r + half)
        assert int((packed["data"][:32] != 0).sum()) == 1
        begin = packed["data"][32 + block].view(torch.int16).view(32, 2)[lane, half]
        line, bank = divmod(int(begin), 32)
        entries = packed["data"][36:].view(torch.bfloat16).view(-1, 32, 2)
        assert entries[line, bank, half] == 3.0


def test_paired_streams_stay_in_their_banks():
    """In each block the 32 low streams have 32 banks, and so have the 32 high ones: reads never meet in a bank."""
    packed = paired.pack(random_weight((64, 2048), 0.7))
    for unit in range(4):
        begins = packed["data"][packed["starts"][unit] + 32 : packed["starts"][unit] + 36].view(torch.int16)
        banks = begins.view(4, 32, 2) % 32
        assert torch.equal(banks.sort(1).values, torch.arange(32).view(1, 32, 1).expand(4, 32, 2).to(banks.dtype))


def test_bytes_at_70_percent():
    weight = random_weight((512, 4096), 0.7)
    assert delta.nbytes(delta.pack(weight)) < 0.38 * weight.nbytes
    assert paired.nbytes(paired.pack(weight)) < 0.386 * weight.nbytes
    half = random_weight((512, 4096), 0.5)
    assert paired.nbytes(paired.pack(half)) < 0.59 * half.nbytes < delta.nbytes(delta.pack(half))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_damage_is_noticed(layout):
    """Every change of the tensors is either refused or one to another valid weight (then it unpacks within bounds)."""
    shape, generator = (70, 1100), torch.Generator().manual_seed(1)
    weight = random_weight(shape, 0.8)
    good = layout.pack(weight)
    refused = 0
    for trial in range(300):
        damaged = {name: tensor.clone() for name, tensor in good.items()}
        name = layout.NAMES[trial % len(layout.NAMES)]
        flat = damaged[name].view(torch.uint8).view(-1)
        at = int(torch.randint(len(flat), (1,), generator=generator))
        flat[at] ^= 1 << int(torch.randint(8, (1,), generator=generator))
        try:
            layout.check(damaged, shape, torch.bfloat16)
        except ValueError:
            refused += 1
            continue
        dense = layout.unpack(damaged, shape, torch.bfloat16)
        assert (dense.view(torch.int16) != weight.view(torch.int16)).sum() <= 1 or layout is delta
        again = layout.pack(dense)
        layout.check(again, shape, torch.bfloat16)
    assert refused > 50


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lengths_and_dtypes_are_checked(layout):
    shape = (70, 1100)
    good = layout.pack(random_weight(shape, 0.8))
    for name in layout.NAMES:
        short = good | {name: good[name][:-1].clone()}
        with pytest.raises(ValueError, match=r"delta|paired"):
            layout.check(short, shape, torch.bfloat16)
        with pytest.raises(ValueError, match=name):
            layout.check(good | {name: good[name].double()}, shape, torch.bfloat16)
        with pytest.raises(ValueError, match="16 bytes"):
            moved = torch.cat([good[name].flatten()[:1], good[name].flatten()])[1:].view(good[name].shape)
            layout.check(good | {name: moved}, shape, torch.bfloat16)
        with pytest.raises(ValueError, match="must have"):
            layout.check({key: value for key, value in good.items() if key != name}, shape, torch.bfloat16)
    for wrong in [(69, 1100), (70, 1000), (102, 1100)]:
        with pytest.raises(ValueError):
            layout.check(good, wrong, torch.bfloat16)


def test_without_a_gpu_the_layouts_say_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "no CUDA device" in delta.unavailable(torch.device("cuda"))
    weight = random_weight((8, 16), 0.5)
    with pytest.raises(ValueError, match="CUDA devices"):
        paired.prepare(paired.pack(weight), (8, 16), torch.bfloat16, None)
