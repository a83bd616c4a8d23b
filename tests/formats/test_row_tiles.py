"""Row tiles joined are the tensor that ``unpack_tensor`` gives, whatever the codec, shape and tile."""

import pytest
import torch

from hf_sparse.formats.pack import pack_tensor
from hf_sparse.formats.row_tiles import row_tiles
from hf_sparse.formats.unpack import HEADER, Header, PackedTensorError, unpack_tensor


def sparse(shape, keep, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    return weight.masked_fill(torch.rand(shape, generator=generator) >= keep, 0).to(dtype)


@pytest.mark.parametrize("shape", [(1, 1), (16, 3), (17, 5), (48, 64), (100, 33), (31, 129)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
def test_bitmask_tiles_join_to_the_tensor(shape, dtype, keep):
    weight = sparse(shape, keep, dtype)
    packed = pack_tensor(weight, Header("bitmask", dtype, shape, int((weight != 0).sum())))
    tiles = list(row_tiles(packed, rows=16))
    assert [len(tile) for tile in tiles] == [min(16, shape[0] - top) for top in range(0, shape[0], 16)]
    assert torch.equal(torch.cat(tiles), unpack_tensor(packed))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 8), (4, 16)])
@pytest.mark.parametrize("rows", [1, 16, 40])
def test_group_tiles_join_to_the_tensor(n, m, rows):
    scores = torch.rand(rows, 48 // m, m, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros_like(scores).scatter_(-1, scores.topk(n).indices, 1)
    weight = (scores * mask).reshape(rows, 48)
    packed = pack_tensor(weight, Header("n:m", weight.dtype, (rows, 48), rows * 48 // m * n, n, m))
    assert torch.equal(torch.cat(list(row_tiles(packed, rows=16))), weight)
    transposed = weight.t().contiguous()
    packed = pack_tensor(transposed, Header("n:m", weight.dtype, (48, rows), rows * 48 // m * n, n, m, -2))
    assert torch.equal(torch.cat(list(row_tiles(packed))), transposed)


def test_the_default_tile_is_about_four_megabytes_and_values_are_cast():
    weight = sparse((4096, 1024), 0.3)
    tiles = list(row_tiles(pack_tensor(weight), dtype=torch.float32))
    assert [len(tile) for tile in tiles] == [2048, 2048]
    assert tiles[0].dtype == torch.float32 and torch.equal(torch.cat(tiles), weight.float())


def test_positions_that_disagree_with_the_values_are_refused():
    weight = sparse((64, 64), 0.3)
    packed = pack_tensor(weight, Header("bitmask", weight.dtype, (64, 64), int((weight != 0).sum())))
    at = HEADER.size + 16 + int((weight != 0).sum()) * 2
    packed[at] = 255 - packed[at]
    with pytest.raises(PackedTensorError, match="keep"):
        list(row_tiles(packed, rows=16))
    with pytest.raises(ValueError, match="multiple of 16"):
        list(row_tiles(packed, rows=8))
