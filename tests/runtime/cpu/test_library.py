"""Finding, compiling and loading the kernel, each in a process of its own; threads and forks."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hf_sparse.runtime.cpu import library, panels

needs_compiler = pytest.mark.skipif(
    not library.supported_platform() or library.find_compiler() is None,
    reason="no C++ compiler, or not Linux on x86-64",
)
needs_kernel = pytest.mark.skipif(library.missing() is not None, reason=f"{library.missing()}")

PROGRAM = """
import torch
from hf_sparse.runtime.cpu import library, panels
library.PREBUILT = "not-there.so"
library.FLAGS = tuple("-O0" if flag == "-O2" else flag for flag in library.FLAGS)  # a third of the time
torch.manual_seed(0)
weight, x = torch.randn(40, 24).masked_fill_(torch.rand(40, 24) < 0.5, 0), torch.randn(3, 24)
calls = [panels.prepare(panels.pack(weight), (40, 24), torch.float32) for _ in range(3)]
for call in calls:
    torch.testing.assert_close(call(x), x @ weight.t())
print(library.isa(), library.missing())
"""


def run(program=PROGRAM, **environment):
    kept = {name: value for name, value in os.environ.items() if name not in ("CXX", "HF_SPARSE_CPU_ISA")}
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env=kept | {name: str(value) for name, value in environment.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process):
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return out, error


def test_the_name_in_the_cache_hashes_all_sources():
    assert set(library.SOURCES) == {path.name for path in library.HERE.iterdir() if path.suffix in (".cpp", ".h")}


@pytest.mark.slow
@needs_compiler
def test_two_processes_compile_at_once_and_a_third_finds_it(tmp_path):
    both = [run(HF_SPARSE_CACHE=tmp_path) for _ in range(2)]
    for out, error in map(result, both):
        assert out.strip().endswith("None") and "Warning" not in error
    files = list(tmp_path.iterdir())
    assert len(files) == 1 and files[0].name.startswith("kernel-"), files
    out, error = result(run(HF_SPARSE_CACHE=tmp_path, PATH=os.environ["PATH"]))
    assert "compiling" not in error

    files[0].write_bytes(b"not a library")  # a damaged cache is replaced
    out, error = result(run(HF_SPARSE_CACHE=tmp_path))
    assert error.count("compiling") == 1 and out.strip().endswith("None")


def test_without_a_compiler(tmp_path):
    out, error = result(run(HF_SPARSE_CACHE=tmp_path, PATH=""))
    assert error.count("Warning") == 1, error
    assert "no C++ compiler (g++, clang++, c++ or $CXX) was found" in error or not library.supported_platform()
    assert out.startswith("None") and not list(tmp_path.iterdir())


@needs_compiler
@pytest.mark.parametrize(
    ("compiler", "says"), [("no-such-compiler", "'no-such-compiler', which is not there"), ("false", "exited with 1")]
)
def test_a_compiler_that_does_not_work(tmp_path, compiler, says):
    out, error = result(run(HF_SPARSE_CACHE=tmp_path, CXX=compiler))
    assert error.count("Warning") == 1 and says in error, error
    assert out.startswith("None") and not list(tmp_path.iterdir())


@needs_compiler
def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    out, _ = result(run(HF_SPARSE_CACHE=tmp_path / "file" / "cache"))
    assert out.strip().endswith("None")


def test_another_platform_is_left_alone(tmp_path):
    program = "import platform, sys; platform.machine = lambda: 'aarch64'\n" + PROGRAM
    out, error = result(run(program, HF_SPARSE_CACHE=tmp_path))
    assert error.count("Warning") == 1 and "aarch64" in error
    assert out.startswith("None") and not list(tmp_path.iterdir())


def test_forced_paths(monkeypatch):
    monkeypatch.setenv("HF_SPARSE_CPU_ISA", "none")
    assert library.isa() is None and library.load() is None and "none" in library.missing()
    assert "none" in panels.unavailable("cpu") and "cuda" in panels.unavailable("cuda")
    monkeypatch.setenv("HF_SPARSE_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match="avx512, avx2 or none"):
        library.isa()


@needs_kernel
def test_a_path_that_the_machine_does_not_have(monkeypatch):
    monkeypatch.setenv("HF_SPARSE_CPU_ISA", "avx2")
    assert library.isa() == "avx2"

    class Small:
        def hfs_isa(self):
            return 1

    monkeypatch.setenv("HF_SPARSE_CPU_ISA", "avx512")
    monkeypatch.setattr(library, "load", Small)
    with pytest.raises(ValueError, match="it has avx2"):
        library.isa()


@needs_kernel
def test_the_processor_says_what_the_system_says():
    flags = set()
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("flags"):
                flags = set(line.partition(":")[2].split())
                break
    if not flags:
        pytest.skip("/proc/cpuinfo has no flags here")
    vectors = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vbmi2", "avx512_vnni"}
    expected = 3 if vectors | {"avx512_bf16"} <= flags else 2 if vectors <= flags else 1
    assert library.load().hfs_isa() == expected
    assert library.load().hfs_amx() == ("amx_bf16" in flags)


@needs_kernel
def test_from_several_threads(two_threads, random_weight):
    weight = random_weight(512, 512, 0.5)
    call = panels.prepare(panels.pack(weight), (512, 512), torch.float32)
    inputs = [torch.randn(tokens, 512) for tokens in (1, 2, 7, 16, 33) * 8]
    expected = [call(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for y, right in zip(pool.map(call, inputs * 3), expected * 3, strict=True):
            assert torch.equal(y, right)


@needs_kernel
def test_after_a_fork():
    """The child of a process whose OpenMP threads are running: they do not exist in it, and nothing waits for them."""
    program = """
import os, signal, torch
from hf_sparse.runtime.cpu import panels
torch.set_num_threads(2)
weight = torch.randn(512, 512)
call = panels.prepare(panels.pack(weight), (512, 512), torch.float32)
x = torch.randn(1, 512)
before = call(x)
child = os.fork()
if child == 0:
    signal.alarm(30)
    same = before.tolist() == call(x).tolist()
    os._exit(0 if same else 1)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert before.tolist() == call(x).tolist()
print("child", code)
"""
    out, _ = result(run(program))
    assert out.strip() == "child 0"
