"""Runs the CUDA sources of the packed layouts on the CPU (``emulator.h``): a shared library for each set of definitions."""

import ctypes
import functools
import hashlib
import shutil
import subprocess
from pathlib import Path

import torch

import hf_sparse.runtime.gpu as package

HERE, SOURCES = Path(__file__).parent, Path(package.__file__).parent
COMPILER = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
WRAPPERS = {
    "delta.cu": """
extern "C" void run_linear(int grid, u32 shared, u16* x, u16* y, uint4* v, u32* g, int* r, u16* b, u16* bias, int rows,
                           int columns, int blocks) {
  launch(grid, 1, WARPS * 32, shared, [=] { delta_linear(x, y, v, g, r, b, bias, rows, columns, blocks); });
}
extern "C" void run_unpack(int grid, u32 shared, u16* out, uint4* v, u32* g, int* r, u16* b, int rows, int columns,
                           int blocks) {
  launch(grid, 1, WARPS * 32, shared, [=] { delta_unpack(out, v, g, r, b, rows, columns, blocks); });
}""",
    "paired.cu": """
extern "C" void run_linear(int grid, u32 shared, u16* x, u16* y, u32* d, int* s, u16* bias, int tokens, int rows,
                           int columns, int across, int slot) {
  launch(grid, 1, GROUPS * 128, shared, [=] { paired_linear(x, y, d, s, bias, tokens, rows, columns, across, slot); });
}
extern "C" void run_unpack(int grid, u32 shared, u16* out, u32* d, int* s, int rows, int columns, int across, int slot) {
  launch(grid, 1, 128, shared, [=] { paired_unpack(out, d, s, rows, columns, across, slot); });
}""",
}


@functools.cache
def library(source: str, folder: Path, **defines) -> ctypes.CDLL:
    """The kernels of ``source``, compiled for this machine with these definitions."""
    text = "".join(f"#define {k} {v}\n" for k, v in defines.items())
    text += f'#include "{HERE / "emulator.h"}"\n#include "{SOURCES / source}"\n{WRAPPERS[source]}\n'
    path = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
    path.with_suffix(".cpp").write_text(text)
    command = [
        COMPILER,
        "-std=c++17",
        "-O1",
        "-w",
        "-shared",
        "-fPIC",
        str(path.with_suffix(".cpp")),
        "-o",
        f"{path}.so",
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return ctypes.CDLL(f"{path}.so")


def arguments(*values):
    """Tensors as pointers to their data, None as null, ints as they are."""
    return [
        ctypes.c_void_p(None if v is None else v.data_ptr())
        if v is None or isinstance(v, torch.Tensor)
        else ctypes.c_int(v)
        for v in values
    ]
