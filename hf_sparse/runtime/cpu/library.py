"""The compiled kernel: found, or built once, and loaded through ctypes.

``kernel.cpp`` and its headers are plain C++ without headers of Python, torch or OpenMP: the library has a C interface, works
with every version of both, and compiles in about five seconds. It is looked for

1. beside this file, where the wheel puts it when a compiler was there to build it (``setup.py``);
2. in the cache, ``$HF_SPARSE_CACHE`` or ``$XDG_CACHE_HOME/hf_sparse`` or ``~/.cache/hf_sparse``, under a name that hashes the
   sources, the flags and the version of the compiler;
3. else it is compiled there by ``$CXX``, ``g++``, ``clang++`` or ``c++``, under a temporary name and moved into place, so that
   several processes may do it at once.

Where none of this works, packed layers compute with the dense weight; one warning says what is missing.

    HF_SPARSE_CPU_ISA=avx512|avx2|none     force the path; `none` is the dense weight, without a warning

The threads are those of torch's OpenMP library, found in the process (``threads.h``). Its defaults are right on a machine
with nothing else to do: a parallel region costs about 1 us. Where other programs want the same cores, waiting threads get in
each other's way for milliseconds; fewer threads help then (``torch.set_num_threads``), or OMP_WAIT_POLICY=PASSIVE, set before
torch is imported, at 60 to 80 us a layer on two virtual cores.

This module imports nothing but the standard library: ``setup.py`` uses it as well.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

__all__ = ["compile_kernel", "find_compiler", "isa", "isa_code", "load", "missing"]

logger = logging.getLogger(__name__)

HERE = Path(__file__).resolve().parent
SOURCES = (
    "kernel.cpp",
    "plan.h",
    "threads.h",
    "avx2.h",
    "avx2_dense.h",
    "avx512.h",
    "avx512_dense.h",
)  # the first is compiled
PREBUILT = "_kernel.so"
# The headers of gcc 12 warn about their own "undefined" registers. -ldl and -pthread matter before glibc 2.34.
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-pthread")
LIBRARIES = ("-Wl,--as-needed", "-ldl")
ISA_CODES = {"avx2": 1, "avx512": 2, "avx512_bf16": 3}  # plan.h
COMPILE_TIMEOUT = 300  # seconds


def supported_platform() -> bool:
    """Linux on x86-64, where the sources mean something."""
    return sys.platform == "linux" and platform.machine().lower() in ("x86_64", "amd64")


def find_compiler() -> str | None:
    """``$CXX`` if it is set (and only that), else the first of g++, clang++, c++; None if there is none."""
    if os.environ.get("CXX"):
        return shutil.which(os.environ["CXX"].split()[0]) and os.environ["CXX"]
    return next((found for name in ("g++", "clang++", "c++") if (found := shutil.which(name))), None)


def compile_kernel(target: str | os.PathLike, compiler: str) -> None:
    """Compile the kernel into the file ``target``, which appears whole or not at all.

    Raises:
        RuntimeError: the compiler failed; the message ends with what it said.
        OSError: ``target`` cannot be written.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        command = [*compiler.split(), *FLAGS, str(HERE / SOURCES[0]), "-o", temporary, *LIBRARIES]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise RuntimeError(f"{compiler}: {error}") from error
        if done.returncode:
            raise RuntimeError(f"{compiler} exited with {done.returncode}:\n{done.stderr[-2000:]}")
        os.chmod(temporary, 0o755)
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _cached_name(compiler: str) -> str:
    parts = [(HERE / name).read_bytes() for name in SOURCES]
    try:
        version = subprocess.run([*compiler.split(), "--version"], capture_output=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{compiler} --version: {error}") from error
    parts += [" ".join((*FLAGS, *LIBRARIES, compiler)).encode(), version]
    return f"kernel-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:20]}.so"


def _build() -> ctypes.CDLL:
    """The library from the cache, or compiled into it."""
    compiler = find_compiler()
    if compiler is None:
        wanted = os.environ.get("CXX")
        raise RuntimeError(
            f"$CXX is {wanted!r}, which is not there"
            if wanted
            else "no C++ compiler (g++, clang++, c++ or $CXX) was found"
        )
    name = _cached_name(compiler)
    from hf_sparse.runtime.cache import cache_directory  # setup.py loads this file alone, without the package

    path = cache_directory() / name
    if path.is_file():
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:  # made for another system that shares the home directory, or damaged
            logger.info("%s does not load (%s): compiled again", path, error)
    print(
        f"hf_sparse: compiling the CPU kernel with {compiler}, once (about 5 s) -> {path}", file=sys.stderr, flush=True
    )
    try:
        compile_kernel(path, compiler)
    except OSError as error:
        logger.info("%s cannot be written (%s): the kernel is compiled for this process alone", path, error)
        with tempfile.TemporaryDirectory(prefix="hf_sparse-") as folder:
            compile_kernel(Path(folder, name), compiler)
            return ctypes.CDLL(str(Path(folder, name)))  # stays mapped when the file is gone
    return ctypes.CDLL(str(path))


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Argument types of the functions of kernel.cpp; pointers are passed as plain integers."""
    pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    for name, arguments, result in (
        ("hfs_isa", (), integer),
        ("hfs_amx", (), integer),
        ("hfs_linear", (pointer, pointer, pointer, long, integer, integer), integer),
        ("hfs_dense", (pointer, pointer, pointer, long, integer), integer),
        ("hfs_unpack", (pointer, long, long, pointer, integer), integer),
        ("hfs_row_sums", (pointer, pointer), integer),
        ("hfs_pack_masks", (integer, integer, pointer, long, long, long, pointer, pointer, integer), integer),
        ("hfs_pack_values", (integer, integer, pointer, long, long, long, pointer, pointer, integer), integer),
        ("hfs_huge_pages", (pointer, long, integer), None),
        ("hfs_read", (pointer, long, integer), long),
    ):
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    return library


@functools.cache
def _found() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and what is missing."""
    if not supported_platform():
        return None, f"it runs on Linux on x86-64, and this is {platform.system()} on {platform.machine()}"
    try:
        library = _prebuilt() or _declare(_build())
    except (RuntimeError, OSError, AttributeError) as error:
        return None, str(error)
    return (library, "") if library.hfs_isa() else (None, "this processor has no AVX2 with FMA and F16C")


def _prebuilt() -> ctypes.CDLL | None:
    path = HERE / PREBUILT
    try:
        return _declare(ctypes.CDLL(str(path))) if path.is_file() else None
    except (OSError, AttributeError) as error:  # for another C library, or of another version
        logger.info("%s does not load (%s): compiled here instead", path, error)
        return None


@functools.cache
def _warn(missing: str) -> None:
    warnings.warn(
        f"hf_sparse has no CPU kernel for packed weights, the dense weight is used instead: {missing}",
        RuntimeWarning,
        stacklevel=4,
    )


def missing() -> str | None:
    """Why there is no kernel here, or None if there is one; says nothing by itself."""
    if os.environ.get("HF_SPARSE_CPU_ISA") == "none":
        return "HF_SPARSE_CPU_ISA is none"
    return _found()[1] or None


def load() -> ctypes.CDLL | None:
    """The library, or None where there is none (said once, by a warning) or HF_SPARSE_CPU_ISA=none."""
    if os.environ.get("HF_SPARSE_CPU_ISA") == "none":
        return None
    library, why = _found()
    if library is None:
        _warn(why)
    return library


def isa() -> str | None:
    """The instruction path that new kernels take: "avx512", "avx2", or None for the dense weight.

    Raises:
        ValueError: HF_SPARSE_CPU_ISA names none of these, or one that this machine does not have.
    """
    code = isa_code()
    return "avx512" if code >= ISA_CODES["avx512"] else "avx2" if code else None


def isa_code() -> int:
    """The same as the ``Isa`` of plan.h, 0 for none; tells whether AVX-512 comes with bfloat16."""
    forced = os.environ.get("HF_SPARSE_CPU_ISA") or None
    if forced not in (None, "none", *ISA_CODES):
        raise ValueError(f"HF_SPARSE_CPU_ISA is {forced!r}; it takes avx512, avx2 or none")
    library = load()
    if library is None:
        return 0
    code = library.hfs_isa()
    if forced is None or forced == "avx512" and code >= ISA_CODES["avx512"]:
        return code
    if code < ISA_CODES[forced]:
        best = max(name for name, value in ISA_CODES.items() if value <= code)
        raise ValueError(f"HF_SPARSE_CPU_ISA is {forced!r}, which this machine does not have; it has {best}")
    return ISA_CODES[forced]
