"""No kernel touches a byte outside its tensors: they lie between pages that must not be read or written.

A subprocess does it, because a mistake ends it by SIGSEGV. There every tensor ends at such a page, or begins right behind
one; then tensors are damaged at random, and whatever ``check`` lets pass is multiplied with and unpacked.
"""

import subprocess
import sys

import pytest

from hf_sparse.runtime.cpu import library

PROGRAM = """
import ctypes, mmap, random, sys
import torch
from hf_sparse.runtime.cpu import layout, library, multiply, panels, panels_int8
from hf_sparse.runtime.cpu.dense import prepare_dense

torch.set_num_threads(1)
libc, PAGE, kept = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE, []

def guarded(tensor, at_end):
    "A copy of the tensor between two pages that cannot be touched."
    pages = -(-max(1, tensor.nbytes) // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (start, start + (pages + 1) * PAGE):
        assert libc.mprotect(ctypes.c_void_p(page), PAGE, 0) == 0
    kept.append(memory)
    if not tensor.numel():
        return tensor
    offset = PAGE + (pages * PAGE - tensor.nbytes if at_end else 0)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
    return copy.copy_(tensor)

def times(call_address, function, x, rows, code, at_end, dense=False):
    y = guarded(torch.zeros(len(x), rows, dtype=x.dtype), at_end)
    arguments = (call_address, x.data_ptr(), y.data_ptr(), len(x)) + (() if dense else (code,)) + (1,)
    assert function(*arguments) == 0
    return y

def mutate(tensors, rng):
    copy = {name: tensor.clone() for name, tensor in tensors.items()}
    name = rng.choice(list(copy))
    tensor = copy[name]
    if rng.random() < 0.1:
        cut = rng.randrange(tensor.shape[0]) if tensor.shape[0] else 0
        copy[name] = tensor[:cut].clone()
    elif tensor.numel():
        raw = tensor.view(torch.uint8).view(-1)
        for _ in range(rng.choice([1, 1, 2, 8])):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        if rng.random() < 0.3:                       # swap two bytes: the number of bits stays
            i, j = rng.randrange(len(raw)), rng.randrange(len(raw))
            raw[i], raw[j] = raw[j].clone(), raw[i].clone()
    return copy

code, kernel = library.isa_code(), library.load()
rng, passed, refused = random.Random(0), 0, 0
for round in range(int(sys.argv[1])):
    dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16, torch.int8])
    shape = rng.randint(1, 70), rng.choice([1, 2, 3, 5, 16, 31, 64, rng.randint(1, 200)])
    at_end = rng.random() < 0.7
    weight = torch.randn(shape).masked_fill_(torch.rand(shape) < rng.choice([0, 0.5, 0.9, 1]), 0)
    module = panels_int8 if dtype == torch.int8 else panels
    stored = torch.float32 if dtype == torch.int8 else dtype
    good = module.pack(guarded(weight.to(stored), at_end))
    for damaged in [good] + [mutate(good, rng) for _ in range(6)]:
        try:
            module.check(damaged, shape, stored)
        except ValueError:
            refused += 1
            continue
        passed += 1
        tensors = {name: guarded(tensor, at_end) for name, tensor in damaged.items()}
        bias = guarded(torch.randn(shape[0]), at_end)
        plan = layout.plan(tensors, shape, dtype, code, bias)
        x_dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16])
        x = guarded(torch.randn(rng.choice([1, 1, 2, 3, 4, 9, 16, 17]), shape[1]).to(x_dtype), at_end)
        times(ctypes.addressof(plan), kernel.hfs_linear, x, shape[0], multiply.X_CODES[x_dtype], at_end)
        out = guarded(torch.empty(shape, dtype=dtype), at_end)
        layout.unpack_rows(tensors, shape, dtype, 0, shape[0], out)
        reference = layout.unpack_rows_reference(damaged, shape, dtype, 0, shape[0])
        assert torch.equal(out.contiguous().view(torch.uint8), reference.view(torch.uint8))
    if dtype in (torch.float32, torch.bfloat16):
        dense, bias = guarded(weight.to(dtype), at_end), guarded(torch.randn(shape[0]), at_end)
        plan = layout.Plan(masks=dense.data_ptr(), bias=bias.data_ptr(), rows=shape[0], columns=shape[1],
                           type=layout.TYPE_CODES[dtype], isa=code)
        x = guarded(torch.randn(rng.randint(1, 8), shape[1]).to(dtype), at_end)
        y = times(ctypes.addressof(plan), kernel.hfs_dense, x, shape[0], 0, at_end, dense=True)
        torch.testing.assert_close(y, x @ dense.t() + bias.to(dtype), atol=0.2, rtol=0.1)
    kept.clear()
print(passed, refused)
"""


@pytest.mark.skipif(library.missing() is not None, reason=f"{library.missing()}")
@pytest.mark.parametrize("path", ["avx512", "avx2"])
def test_nothing_outside_is_touched(path, monkeypatch):
    if library.isa_code() < library.ISA_CODES[path]:
        pytest.skip(f"this machine has no {path}")
    monkeypatch.setenv("HF_SPARSE_CPU_ISA", path)
    done = subprocess.run([sys.executable, "-c", PROGRAM, "300"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr[-2000:]}"
    passed, refused = map(int, done.stdout.split())
    assert passed > 400 and refused > 400  # both happened, often
