"""Codecs: exact for every bit pattern, as small as they claim, and no damaged tensor passes for a good one."""

import math
import struct

import pytest
import torch

from hf_sparse.formats.pack import choose, nbytes_bitmask, nbytes_nm, pack_bitmask, pack_nm, pack_tensor
from hf_sparse.formats.unpack import (
    HEADER,
    Header,
    PackedTensorError,
    check_packed,
    combinations,
    is_packed,
    rank_bits,
    read_header,
    unpack_bitmask,
    unpack_bits,
    unpack_nm,
    unpack_tensor,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def sparse(*shape, sparsity=0.5, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(dtype)
    weight[torch.rand(shape, generator=generator) < sparsity] = 0
    return weight


def patterned(*shape, n=2, m=4, dim=-1, dtype=torch.float32, seed=0):
    """A weight that keeps exactly n of every m along dim."""
    generator = torch.Generator().manual_seed(seed)
    turned = shape if dim == -1 else (*shape[:-2], shape[-1], shape[-2])
    groups = torch.randn(math.prod(shape) // m, m, generator=generator).to(dtype)
    drop = torch.rand(groups.shape, generator=generator).argsort(1)[:, n:]
    groups.scatter_(1, drop, 0)
    weight = groups.reshape(turned)
    return weight if dim == -1 else weight.transpose(-1, -2).contiguous()


def special(dtype):
    weight = sparse(8, 16, dtype=dtype)
    weight.view(-1)[:5] = torch.tensor([float("nan"), -0.0, float("inf"), float("-inf"), 0.0]).to(dtype)
    weight.view(-1)[5] = torch.finfo(dtype).smallest_normal / 4  # a subnormal
    return weight


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_survive(dtype):
    weight = special(dtype)
    assert same_bits(unpack_tensor(pack_tensor(weight)), weight)
    parts = pack_bitmask(weight)
    assert same_bits(unpack_bitmask(parts, weight.shape, dtype), weight)
    assert parts["bitmask"][0] & 0b11111 == 0b01111  # -0.0 is a value, +0.0 is not; least significant bit first
    dense = Header("n:m", dtype, (8, 16), 128, 4, 4)
    assert same_bits(unpack_tensor(pack_tensor(weight, dense)), weight)


def test_every_nan_of_half_precision_survives():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).reshape(256, 256)
    for dtype in (torch.float16, torch.bfloat16):
        weight = every.view(dtype)
        assert same_bits(unpack_tensor(pack_tensor(weight, choose(weight))), weight)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 9), (2, 3, 5), (1, 8), (4, 2, 3, 3), (64, 48)])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 1.0])
def test_bitmask_round_trip(shape, sparsity):
    weight = sparse(*shape, sparsity=sparsity, dtype=torch.bfloat16)
    assert same_bits(unpack_bitmask(pack_bitmask(weight), shape, weight.dtype), weight)
    packed = pack_tensor(weight)
    assert same_bits(unpack_tensor(packed), weight)
    header = read_header(packed)
    assert packed.numel() == header.nbytes and packed.numel() % 8 == 0 and header.shape == shape


@pytest.mark.parametrize("m", range(1, 17))
def test_nm_round_trip(m):
    for n in range(1, m + 1):
        for dim, shape in ((-1, (3, 4 * m)), (-2, (2 * m, 5)), (-2, (2, m, 3)), (-1, (2, 3, m))):
            weight = patterned(*shape, n=n, m=m, dim=dim, dtype=torch.float16, seed=n)
            parts = pack_nm(weight, n, m, dim)
            assert parts["values"].numel() == weight.numel() // m * n
            assert parts["ranks"].numel() == -(-weight.numel() // m * rank_bits(n, m) // 8)
            assert same_bits(unpack_nm(parts, shape, weight.dtype, n, m, dim), weight)


def test_nm_with_emptier_groups():
    weight = patterned(16, 32, n=2, m=4)
    weight[3] = 0
    weight[5, ::3] = 0
    weight[6, 1] = -0.0
    header = Header("n:m", weight.dtype, (16, 32), 256, 2, 4)
    assert same_bits(unpack_tensor(pack_tensor(weight, header)), weight)


def test_combinations_are_all_different():
    table = combinations(2, 4)
    assert table.shape == (6, 4) and (table.sum(1) == 2).all() and len(table.unique(dim=0)) == 6
    assert (rank_bits(2, 4), rank_bits(1, 4), rank_bits(4, 8), rank_bits(8, 16), rank_bits(4, 4)) == (3, 2, 7, 14, 0)


def test_pattern_is_found_along_either_dimension():
    for n, m in ((2, 4), (1, 4), (4, 8), (1, 16), (1, 2)):
        for dim in (-1, -2):
            header = choose(patterned(64, 64, n=n, m=m, dim=dim, dtype=torch.bfloat16))
            assert (header.n, header.m, header.dim) == (n, m, dim)
    assert str(choose(sparse(64, 64))) == "bitmask"
    assert str(choose(patterned(60, 60, n=2, m=5))) == "bitmask"
    assert str(choose(patterned(60, 60, n=2, m=5), (5,))) == "2:5"
    hidden = patterned(256, 256, n=2, m=4, dtype=torch.bfloat16)
    hidden[200, 200:204] = 1.0  # one group breaks the pattern, outside the sampled rows
    assert str(choose(hidden)) == "bitmask"
    assert same_bits(unpack_tensor(pack_tensor(hidden)), hidden)


def test_what_is_never_packed():
    assert choose(torch.zeros(64)) is None  # 1-D: packed bytes could have the shape of a bias
    assert choose(torch.zeros(8, 8, dtype=torch.int32)) is None
    assert choose(torch.zeros(0, 8)) is None
    with pytest.raises(ValueError, match="2 to 8 dimensions"):
        pack_tensor(torch.zeros(64))


@pytest.mark.parametrize(
    ("sparsity", "most"), [(0.5, 0.57), (0.75, 0.32), (0.9, 0.17)], ids=["half", "three quarters", "ninety percent"]
)
def test_size_targets(sparsity, most):
    weight = sparse(1024, 1024, sparsity=sparsity, dtype=torch.bfloat16)
    size = pack_tensor(weight).numel()
    assert size <= most * weight.numel() * 2
    assert size == nbytes_bitmask(weight.shape, weight.dtype, int((weight != 0).sum()))


def test_size_of_two_four():
    weight = patterned(512, 512, dtype=torch.bfloat16)
    size = pack_tensor(weight).numel()
    assert size == nbytes_nm(weight.shape, weight.dtype, 2, 4)
    assert 0.54 < size / (weight.numel() * 2) < 0.5625


def test_cast_on_the_way_equals_cast_after():
    weight = special(torch.float32) * 1e30
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert same_bits(unpack_tensor(pack_tensor(weight), dtype), weight.to(dtype))


def test_packed_bytes_at_any_offset():
    weight = sparse(9, 33)
    packed = pack_tensor(weight)
    for shift in range(8):
        room = torch.zeros(packed.numel() + 8, dtype=torch.uint8)
        room[shift : shift + packed.numel()] = packed
        assert same_bits(unpack_tensor(room[shift : shift + packed.numel()]), weight)


def test_non_contiguous_and_gradient_weights_pack():
    weight = sparse(12, 20)
    assert same_bits(unpack_tensor(pack_tensor(weight.t())), weight.t().contiguous())
    assert same_bits(unpack_tensor(pack_tensor(torch.nn.Parameter(weight))), weight)


def test_another_default_device_changes_nothing():
    """from_pretrained builds models under the meta device; what is cached there must serve everybody."""
    combinations.cache_clear()
    weight = patterned(16, 32)
    for device in ("meta", "cpu"):
        with torch.device(device):
            assert same_bits(unpack_tensor(pack_tensor(weight)), weight)
            assert same_bits(unpack_tensor(pack_tensor(weight[:, :30])), weight[:, :30].contiguous())


def test_pack_nm_errors():
    with pytest.raises(ValueError, match="not 2:4: 32 groups have more than 2"):
        pack_nm(torch.ones(8, 16), 2, 4)
    with pytest.raises(ValueError, match="not made of groups of 4"):
        pack_nm(torch.ones(8, 15), 2, 4)
    with pytest.raises(ValueError, match="0 < n <= m <= 16"):
        pack_nm(torch.ones(8, 64), 2, 32)
    with pytest.raises(ValueError, match="announces"):
        pack_tensor(sparse(8, 8), Header("bitmask", torch.float32, (8, 8), 3))


def test_parts_are_validated_before_use():
    weight = sparse(6, 10)
    good = pack_bitmask(weight)
    with pytest.raises(PackedTensorError, match="keep .* entries, but there are"):
        unpack_bitmask({**good, "values": good["values"][:-1]}, weight.shape, weight.dtype)
    with pytest.raises(PackedTensorError, match="60 bits are 8 bytes"):
        unpack_bitmask({**good, "bitmask": good["bitmask"][:-1]}, weight.shape, weight.dtype)
    past = good["bitmask"].clone()
    past[-1] |= 0x80
    with pytest.raises(PackedTensorError, match="past the end"):
        unpack_bitmask({**good, "bitmask": past}, weight.shape, weight.dtype)
    with pytest.raises(PackedTensorError, match="bits are"):
        unpack_bits(torch.zeros(2, dtype=torch.int32), 16)

    weight = patterned(4, 16)
    good = pack_nm(weight, 2, 4)
    with pytest.raises(PackedTensorError, match="has only 6 combinations"):
        unpack_nm({**good, "ranks": torch.full_like(good["ranks"], 255)}, weight.shape, weight.dtype, 2, 4)
    with pytest.raises(PackedTensorError, match="there are"):
        unpack_nm({**good, "values": good["values"][:-1]}, weight.shape, weight.dtype, 2, 4)
    with pytest.raises(PackedTensorError, match="no 2:4 pattern"):
        unpack_nm(good, (4, 15), weight.dtype, 2, 4)


def test_header_errors():
    packed = pack_tensor(sparse(16, 16))
    assert is_packed(packed) and not is_packed(packed.float()) and not is_packed(packed[:8])
    with pytest.raises(PackedTensorError, match="without the HFSPARSE header"):
        unpack_tensor(torch.zeros(100, dtype=torch.uint8))
    newer = packed.clone()
    newer[8:10] = torch.tensor(list(struct.pack("<H", 2)), dtype=torch.uint8)
    with pytest.raises(PackedTensorError, match="upgrade hf_sparse"):
        read_header(newer)
    with pytest.raises(PackedTensorError, match=r"takes \d+ bytes, got"):
        unpack_tensor(packed[:-8])
    giant = packed.clone()
    giant[HEADER.size : HEADER.size + 8] = torch.tensor(list(struct.pack("<Q", 2**60)), dtype=torch.uint8)
    with pytest.raises(PackedTensorError, match="takes"):  # before anything of that size is allocated
        unpack_tensor(giant, verify=False)


@pytest.mark.parametrize("weight", [sparse(8, 24), patterned(8, 24, dtype=torch.bfloat16)], ids=["bitmask", "2:4"])
def test_every_flipped_bit_is_noticed(weight):
    packed = pack_tensor(weight)
    for at in range(packed.numel()):
        for bit in range(8):
            damaged = packed.clone()
            damaged[at] ^= 1 << bit
            with pytest.raises(PackedTensorError):
                unpack_tensor(damaged)


def test_unverified_damage_never_breaks_memory():
    """Without the checksum a changed value may pass, but the shape is right or an error is raised."""
    generator = torch.Generator().manual_seed(0)
    for weight in (sparse(8, 24), patterned(8, 24, n=3, m=8), patterned(24, 8, dim=-2)):
        packed = pack_tensor(weight)
        for _ in range(300):
            damaged = packed.clone()
            where = torch.randint(0, packed.numel(), (3,), generator=generator)
            damaged[where] = torch.randint(0, 256, (3,), generator=generator).to(torch.uint8)
            cut = int(torch.randint(0, 2, (1,), generator=generator)) * 8
            try:
                dense = unpack_tensor(damaged[: damaged.numel() - cut], verify=False)
            except PackedTensorError:
                continue
            assert dense.numel() == read_header(damaged).numel


def test_fuzz_round_trips():
    generator = torch.Generator().manual_seed(1)

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    for seed in range(150):
        shape = tuple(draw(1, 20) for _ in range(draw(2, 5)))
        dtype = DTYPES[draw(0, len(DTYPES))]
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        noise = torch.randint(-(2**15), 2**15, shape, generator=generator).to(bits).view(dtype)
        noise = torch.where(torch.rand(shape, generator=generator) < draw(0, 100) / 100, torch.zeros_like(noise), noise)
        packed = pack_tensor(noise)
        assert same_bits(unpack_tensor(packed), noise), seed
        assert check_packed(packed) == choose(noise)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_unpack_on_the_gpu(dtype):
    for weight in (special(dtype), sparse(257, 129, dtype=dtype), patterned(64, 64, dtype=dtype, dim=-2)):
        dense = unpack_tensor(pack_tensor(weight).cuda())
        assert dense.is_cuda and same_bits(dense.cpu(), weight)
        assert same_bits(unpack_tensor(pack_tensor(weight.cuda())), weight)
