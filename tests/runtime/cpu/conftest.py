"""``isa``: each test runs once for every instruction path of this machine, and once without a kernel."""

import pytest
import torch

from hf_sparse.runtime.cpu import library

CODES = library.ISA_CODES


@pytest.fixture(params=["avx512", "avx512 without bfloat16", "avx2", "none"])
def isa(request, monkeypatch):
    """Forces a path; the tests that take it skip where the machine does not have it."""
    monkeypatch.delenv("HF_SPARSE_CPU_ISA", raising=False)
    if request.param == "avx512 without bfloat16":  # such as Ice Lake
        if library.isa_code() < CODES["avx512"]:
            pytest.skip("this machine has no avx512, or there is no compiler")
        monkeypatch.setattr(library, "isa_code", lambda: CODES["avx512"])
        return request.param
    if request.param != "none" and library.isa_code() < CODES[request.param]:
        pytest.skip(f"this machine has no {request.param}, or there is no compiler")
    monkeypatch.setenv("HF_SPARSE_CPU_ISA", request.param)
    return request.param


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def random_weight():
    """``f(rows, columns, sparsity, dtype, seed=0)``: normal numbers and exact zeros."""

    def make(rows, columns, sparsity, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(rows, columns, generator=generator)
        return weight.masked_fill_(torch.rand(rows, columns, generator=generator) < sparsity, 0).to(dtype)

    return make
