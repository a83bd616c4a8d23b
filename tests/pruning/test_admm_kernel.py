"""The two fused passes of an ADMM iteration: against the iteration as it is written down, and the kernels against that."""

import pytest
import torch

from hf_sparse.pruning import admm_kernel

SCALARS = dict(penalty=0.8, previous=0.6)


def tensors(device="cpu", dtype=torch.float32, shape=(37, 50)):
    generator = torch.Generator().manual_seed(0)
    candidate, dense, change = (torch.randn(shape, generator=generator) for _ in range(3))
    mask = torch.rand(shape, generator=generator) < 0.4
    dead = torch.arange(shape[1]) % 7 == 0
    return candidate.to(device), mask.to(device), dense.to(device), change.to(device, dtype), dead.to(device)


def test_pull_and_step_are_the_iteration():
    candidate, mask, dense, change, dead = tensors()
    sparse, dual = candidate * mask, 0.6 * candidate * ~mask
    expected = (1.1 - 0.8) * change + 0.8 * (sparse - dense) - dual
    torch.testing.assert_close(admm_kernel.pull(candidate, mask, dense, change, anchor=1.1, **SCALARS), expected)
    new, scores = admm_kernel.step(candidate.clone(), mask, dense, change, dead=dead, **SCALARS)
    torch.testing.assert_close(new, dual / 0.8 + change + dense)
    torch.testing.assert_close(scores, new.square() * ~dead)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_equal_tensor_operations(dtype, monkeypatch):
    results = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(admm_kernel, "_has_triton", lambda tensor: False)
        candidate, mask, dense, change, dead = tensors("cuda", dtype, (1000, 777))
        pulled = admm_kernel.pull(candidate, mask, dense, change, anchor=1.1, **SCALARS)
        results.append((pulled, *admm_kernel.step(candidate, mask, dense, change, dead=dead, **SCALARS)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
