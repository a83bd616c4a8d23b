"""CUDA C++ compiled when it is first needed, and launched, with nothing but ctypes.

Triton cannot say everything a sparse kernel wants to say, and a compiled extension would need the CUDA toolkit on the
user's machine. But every CUDA build of torch brings NVRTC, NVIDIA's compiler as a library, and every NVIDIA driver
brings ``libcuda``. So:

    source text --NVRTC--> cubin (machine code for one architecture) --driver--> function --driver--> launch

``build`` does the first two steps; the cubin is kept on disk (``hf_sparse.runtime.cache.cache_directory``) under a hash of
source, options, architecture and compiler version, so that a kernel is compiled once per machine (half a second each). Sources
use no CUDA header: 16-bit floats travel as raw bits, special instructions as inline PTX.

``Launch`` holds one launch with all its arguments in place; calling it sets the pointers that change and queues the
kernel on torch's current stream: no allocation, no synchronisation, so it can be captured in a CUDA graph.
"""

import ctypes
import functools
import glob
import hashlib
import os
import sys
import threading
from collections.abc import Sequence

import torch

from hf_sparse.runtime.cache import cache_directory

__all__ = ["Function", "Launch", "build", "compile_source", "missing"]

_lock = threading.Lock()
_PROGRAMMATIC = 6  # CUlaunchAttributeID
_MAX_DYNAMIC_SHARED = 8  # CUfunction_attribute


@functools.cache
def missing(device: torch.device | str | int | None = None) -> str | None:
    """Why kernels cannot be compiled and run on ``device`` (default: the current CUDA device), or None if they can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.hip:
        return "this is a ROCm build of torch: NVRTC is NVIDIA's"
    if torch.cuda.get_device_capability(device)[0] < 8:
        return f"compute capability {torch.cuda.get_device_capability(device)} is below 8.0, the first with bf16 and cp.async"
    if nvrtc_library() is None:
        return "libnvrtc was found neither beside torch (the nvidia-cuda-nvrtc package) nor on the library path"
    if driver() is None:
        return "the NVIDIA driver's libcuda was not found on the library path"
    return None


# ------------------------------------------------------------------------------------------------ the two libraries


@functools.cache
def nvrtc_library() -> ctypes.CDLL | None:
    """libnvrtc: the one packaged for torch's CUDA version if there is one, else any that the loader finds."""
    major = (torch.version.cuda or "").split(".")[0]
    names = [f"libnvrtc.so.{major}"] if major else []
    names += [n for n in ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so") if n not in names]
    folders = [os.path.join(p, "nvidia", part, "lib") for p in sys.path if p for part in ("*", "cuda_nvrtc")]
    folders += [os.path.join(os.path.dirname(torch.__file__), "lib")]
    folders += [os.path.join(os.environ[v], "lib64") for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    for name in names:
        found = [path for folder in folders for path in sorted(glob.glob(os.path.join(folder, name + "*")))]
        for candidate in [*(path for path in found if ".alt." not in path), name]:
            try:
                for part in glob.glob(os.path.join(os.path.dirname(candidate) or "-", "libnvrtc-builtins.so*")):
                    if ".alt." not in part:  # NVRTC opens it by name, which finds a library that is already loaded
                        ctypes.CDLL(part, ctypes.RTLD_GLOBAL)
                library = ctypes.CDLL(candidate)
                library.nvrtcGetErrorString.restype = ctypes.c_char_p
                return library
            except (OSError, AttributeError):
                continue
    return None


@functools.cache
def driver() -> ctypes.CDLL | None:
    """libcuda with the few signatures used here."""
    for name in ("libcuda.so.1", "libcuda.so", "nvcuda.dll"):
        try:
            library = ctypes.CDLL(name)
            break
        except OSError:
            continue
    else:
        return None
    pointer = ctypes.c_void_p
    library.cuLaunchKernelEx.argtypes = [pointer, pointer, pointer, pointer]
    library.cuModuleGetFunction.argtypes = [pointer, pointer, ctypes.c_char_p]
    library.cuFuncSetAttribute.argtypes = [pointer, ctypes.c_int, ctypes.c_int]
    library.cuModuleLoadData.argtypes = [pointer, ctypes.c_char_p]
    return library


def _check_driver(code: int, what: str) -> None:
    if code:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"{what} failed: CUDA error {code} ({(text.value or b'unknown').decode()})")


def _check_nvrtc(code: int, what: str, log: str = "") -> None:
    if code:
        text = nvrtc_library().nvrtcGetErrorString(code).decode()
        raise RuntimeError(f"{what} failed: {text}" + (f"\n{log}" if log else ""))


# ------------------------------------------------------------------------------------------------ compile and keep


def compile_source(source: str, options: Sequence[str], arch: str) -> bytes:
    """Machine code of ``source`` for ``arch`` ("sm_90"). Needs the compiler, not a GPU.

    Raises:
        RuntimeError: there is no NVRTC, or the source does not compile; the message carries the compiler's log.
    """
    library = nvrtc_library()
    if library is None:
        raise RuntimeError("libnvrtc was not found; install the nvidia-cuda-nvrtc package of torch's CUDA version")
    program = ctypes.c_void_p()
    create = library.nvrtcCreateProgram(
        ctypes.byref(program), ctypes.c_char_p(source.encode()), b"hf_sparse.cu", 0, None, None
    )
    _check_nvrtc(create, "nvrtcCreateProgram")
    try:
        flags = [f"--gpu-architecture={arch}", "--std=c++17", "-default-device", *options]
        array = (ctypes.c_char_p * len(flags))(*[flag.encode() for flag in flags])
        code = library.nvrtcCompileProgram(program, len(flags), array)
        if code:
            size = ctypes.c_size_t()
            library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, log)
            _check_nvrtc(
                code, f"compiling a kernel for {arch} with {list(options)}", log.value.decode(errors="replace")
            )
        size = ctypes.c_size_t()
        _check_nvrtc(library.nvrtcGetCUBINSize(program, ctypes.byref(size)), "nvrtcGetCUBINSize")
        cubin = ctypes.create_string_buffer(size.value)
        _check_nvrtc(library.nvrtcGetCUBIN(program, cubin), "nvrtcGetCUBIN")
        return cubin.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc_library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def _target(device: int) -> str:
    """The newest architecture this compiler knows that the device runs: its own, else an older one of the same major."""
    major, minor = torch.cuda.get_device_capability(device)
    count = ctypes.c_int()
    nvrtc_library().nvrtcGetNumSupportedArchs(ctypes.byref(count))
    known = (ctypes.c_int * count.value)()
    nvrtc_library().nvrtcGetSupportedArchs(known)
    usable = [arch for arch in known if arch // 10 == major and arch <= major * 10 + minor]
    if not usable:
        raise RuntimeError(
            f"NVRTC {_version()} has no target for compute capability {major}.{minor}: it knows {list(known)}"
        )
    return f"sm_{max(usable)}"


def _cubin(source: str, options: Sequence[str], arch: str) -> bytes:
    key = hashlib.sha256(repr((source, tuple(options), arch, _version())).encode()).hexdigest()[:32]
    path = cache_directory() / "cubin" / f"{key}.cubin"
    try:
        kept = path.read_bytes()
        if kept[:4] == b"\x7fELF":
            return kept
    except OSError:
        pass
    cubin = compile_source(source, options, arch)
    try:  # a cache that cannot be written costs time, not the run
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{key}.{os.getpid()}.{threading.get_ident()}")
        temporary.write_bytes(cubin)
        os.replace(temporary, path)
    except OSError:
        pass
    return cubin


class Function:
    """A compiled kernel on one device: its handle, its shared-memory limit raised as launches ask for it."""

    def __init__(self, handle: ctypes.c_void_p, module: ctypes.c_void_p, device: int):
        self.handle, self.module, self.device = handle, module, device
        self._dynamic = 48 << 10

    def allow_shared(self, size: int) -> None:
        """Let launches use ``size`` bytes of dynamic shared memory (beyond 48 KiB only after asking)."""
        if size > self._dynamic:
            _check_driver(
                driver().cuFuncSetAttribute(self.handle, _MAX_DYNAMIC_SHARED, size), f"{size} bytes of shared memory"
            )
            self._dynamic = size


@functools.cache
def _function(source: str, name: str, options: tuple[str, ...], device: int) -> Function:
    with _lock, torch.cuda.device(device):
        torch.cuda.current_stream()  # creates torch's context, the one the module is loaded into
        torch.zeros(1, device=device)
        module, handle = ctypes.c_void_p(), ctypes.c_void_p()
        cubin = _cubin(source, options, _target(device))
        _check_driver(driver().cuModuleLoadData(ctypes.byref(module), cubin), f"loading the kernel {name}")
        found = driver().cuModuleGetFunction(ctypes.byref(handle), module, name.encode())
        _check_driver(found, f"looking up the kernel {name}")
        return Function(handle, module, device)


def build(source: str, name: str, defines: dict[str, int | str], device: torch.device | int) -> Function:
    """The kernel ``name`` of ``source`` compiled with ``-DKEY=VALUE`` for ``device``: from memory, disk or NVRTC.

    Raises:
        RuntimeError: NVRTC is missing or rejects the source (the log is in the message), or the driver rejects the code.
    """
    index = device if isinstance(device, int) else device.index
    index = torch.cuda.current_device() if index is None else index
    return _function(source, name, tuple(f"-D{key}={value}" for key, value in sorted(defines.items())), index)


# ------------------------------------------------------------------------------------------------ launch


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_char * 64)]


class _Config(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")],
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


class Launch:
    """One launch with its arguments in place. ``launch(x_pointer, y_pointer, ...)`` sets the first ones and queues it.

    Args:
        function: from :func:`build`.
        grid, block: numbers of blocks (x, y) and of threads.
        shared: bytes of dynamic shared memory.
        varying: how many leading kernel arguments are pointers given at each call.
        fixed: the rest: tensors (kept alive here), None for a null pointer, or ints (32 bits).
        early: launch programmatically dependent (compute capability 9.0 and up): the kernel may start while the kernel
            before it still runs, and itself waits (griddepcontrol.wait) before it touches what that one writes.
    """

    def __init__(
        self, function: Function, grid: tuple[int, int], block: int, shared: int, varying: int, fixed, early=False
    ):
        function.allow_shared(shared)
        self._keep = [value for value in fixed if isinstance(value, torch.Tensor)]
        self._slots = [ctypes.c_void_p() for _ in range(varying)]
        values = list(self._slots)
        for value in fixed:
            if isinstance(value, int):
                values.append(ctypes.c_int(value))
            else:
                values.append(ctypes.c_void_p(None if value is None else value.data_ptr()))
        self._values = values
        self._arguments = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
        self._device, self._function = function.device, function
        self._call_lock = threading.Lock()
        self._stream = _raw_stream_getter()
        self._attribute = _Attribute(_PROGRAMMATIC, b"", (1).to_bytes(4, sys.byteorder))
        self._config = _Config(grid[0], grid[1], 1, block, 1, 1, shared)
        self._config.attributes, self._config.count = ctypes.pointer(self._attribute), int(early)
        self._config_pointer = ctypes.addressof(self._config)
        self._queue = driver().cuLaunchKernelEx

    def __call__(self, *pointers: int) -> None:
        with self._call_lock:  # the slots are shared by every caller of this layer
            for slot, pointer in zip(self._slots, pointers, strict=True):
                slot.value = pointer
            self._config.stream = self._stream(self._device)
            code = self._queue(self._config_pointer, self._function.handle, self._arguments, None)
        if code:
            _check_driver(code, "cuLaunchKernelEx")


@functools.cache
def _raw_stream_getter():
    quick = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # what Triton and Inductor use: 0.1 us instead of 1
    return quick or (lambda device: torch.cuda.current_stream(device).cuda_stream)
