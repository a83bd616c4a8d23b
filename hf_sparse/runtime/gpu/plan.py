"""How a packed weight is called on a GPU: what its layouts share.

A plan holds the launches of one packed weight, made when they are first asked for, one for each number of tokens:

    up to `width` tokens      one launch
    up to `passes` of those   one launch for every `width` tokens
    more (a prompt)           the dense weight into memory that is given back at once, then F.linear: many tokens are
                              tensor-core work, and unpacking costs about what the dense product does for a few tokens

Which configuration of a kernel (warps, blocks, stages) is the fastest depends on the shape, so the few that are likely are
timed at the first call (``tune``). Outputs and scratch come from torch's allocator, and nothing waits for the device after
the first call with a number of tokens, so calls can be captured in a CUDA graph.
"""

import functools
from pathlib import Path

import torch

from hf_sparse.runtime.gpu.tune import fastest

__all__ = ["Plan", "block_limits", "check_tensors", "dtype_flag", "read_source", "rows_at_a_time"]

_AT_ONCE = 1 << 23  # entries of a dense weight that torch packs or unpacks at a time: bounds the memory that takes


def rows_at_a_time(columns: int, multiple: int = 1) -> int:
    """Rows of a dense weight to handle together, a multiple of ``multiple``."""
    return max(1, _AT_ONCE // max(1, columns) // multiple) * multiple


def dtype_flag(dtype: torch.dtype) -> int:
    """``HALF`` of the CUDA sources."""
    return {torch.bfloat16: 0, torch.float16: 1}[dtype]


@functools.cache
def read_source(name: str) -> str:
    """A CUDA source of this folder, after the primitives."""
    folder = Path(__file__).parent
    return "".join((folder / part).read_text(encoding="utf-8") for part in ("primitives.cuh", name))


@functools.cache
def block_limits(device: torch.device) -> tuple[int, int]:
    """(multiprocessors, bytes of shared memory that a block can ask for)."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, getattr(properties, "shared_memory_per_block_optin", 99 << 10)


def check_tensors(tensors: dict[str, torch.Tensor], dtypes: dict[str, torch.dtype]) -> None:
    """Raises ValueError unless these tensors are there, contiguous, aligned, on one device."""
    if set(tensors) != set(dtypes):
        raise ValueError(f"the packed weight has tensors {sorted(tensors)}; it must have {sorted(dtypes)}")
    for name, dtype in dtypes.items():
        if tensors[name].dtype != dtype or not tensors[name].is_contiguous():
            raise ValueError(f"{name} must be a contiguous tensor of {dtype}, it is {tensors[name].dtype}")
        if tensors[name].data_ptr() % 16:
            raise ValueError(f"{name} must begin at a multiple of 16 bytes")
    if len({tensor.device for tensor in tensors.values()}) > 1:
        raise ValueError(f"the tensors are on several devices: {[str(tensor.device) for tensor in tensors.values()]}")


class Plan:
    """See the module. A layout adds ``name``, ``passes``, ``candidates``, ``launch`` and ``make_unpack``."""

    name, device_type = "", "cuda"

    def __init__(self, tensors, shape, dtype, bias):
        self.device = next(iter(tensors.values())).device
        self.rows, self.columns = shape
        if self.device.type != self.device_type:
            raise ValueError(f"the {self.name} kernel runs on CUDA devices; the packed weight is on {self.device}")
        if bias is not None and (bias.dtype != dtype or bias.device != self.device or bias.shape != (self.rows,)):
            raise ValueError(
                f"the bias is {bias.dtype} {list(bias.shape)} on {bias.device}; "
                f"it must be {dtype} [{self.rows}] on {self.device}"
            )
        self.tensors, self.dtype, self.bias = tensors, dtype, None if bias is None else bias.detach()
        self.launches, self.unpack_launch = {}, None
        # Kernels that start before the one ahead has finished (compute capability 9.0) read the weight at once: it must
        # have been written by then.
        self.early = int(torch.cuda.get_device_capability(self.device)[0] >= 9)
        if not torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream(self.device).synchronize()

    @classmethod
    def of(cls, tensors, names, shape, dtype, bias) -> "Plan":
        """The plan of these very tensors, kept with the first of them."""
        key = [tuple(shape), dtype, None if bias is None else bias.data_ptr(), *(tensors[n].data_ptr() for n in names)]
        kept = getattr(tensors[names[0]], "_hf_sparse_plan", None)
        if kept is None or kept[0] != key:
            kept = key, cls({name: tensors[name] for name in names}, tuple(shape), dtype, bias)
            tensors[names[0]]._hf_sparse_plan = kept
        return kept[1]

    def __reduce__(self):
        return type(None), ()  # pointers into tensors: a copy or a pickle of a tensor goes without its plan

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != self.dtype or x.dim() != 2 or x.shape[1] != self.columns or x.device != self.device:
            raise ValueError(
                f"x is {x.dtype} {list(x.shape)} on {x.device}; "
                f"this packed weight takes {self.dtype} [tokens, {self.columns}] on {self.device}"
            )
        tokens = x.shape[0]
        if self.rows == 0 or tokens == 0:
            return x.new_zeros((tokens, self.rows))
        width = tokens if tokens in self.launches else self.passes(tokens)
        if width is None:
            return torch.nn.functional.linear(x, self.dense(), self.bias)
        x = self.ready(x)
        y = torch.empty((tokens, self.rows), dtype=self.dtype, device=self.device)
        source, target, columns = x.data_ptr(), y.data_ptr(), x.shape[1]
        for top in range(0, tokens, width):
            count = min(width, tokens - top)
            launch = self.launches.get(count)
            if launch is None:
                launch = self.launches[count] = self.make(count)
            launch(source + 2 * top * columns, target + 2 * top * self.rows)
        return y

    def ready(self, x: torch.Tensor) -> torch.Tensor:
        """x as the kernel reads it."""
        return x if x.is_contiguous() else x.contiguous()

    def make(self, tokens: int):
        """The launch for so many tokens, in the fastest configuration."""
        candidates = self.candidates(tokens)
        size = sum(tensor.nbytes for tensor in self.tensors.values())
        key = f"{self.name} {self.rows}x{self.columns} {str(self.dtype)[6:]} {self.bucket(tokens)} tokens {size >> 20} MiB"
        trials = functools.partial(self._trials, tokens, candidates)
        return self.launch(tokens, **fastest(key, candidates, trials, size, self.device))

    def bucket(self, tokens: int) -> int:
        """Numbers of tokens that share a choice."""
        return tokens

    def _trials(self, tokens: int, candidates: list[dict], copies: int) -> list[list]:
        """For each candidate a call on every one of so many copies of the weight."""
        x = torch.randn((tokens, -(-self.columns // 8) * 8), device=self.device).to(self.dtype)
        y = torch.empty((tokens, self.rows), dtype=self.dtype, device=self.device)
        clones = [{name: tensor.clone() for name, tensor in self.tensors.items()} for _ in range(copies - 1)]
        plans = [self, *(type(self)(clone, (self.rows, self.columns), self.dtype, self.bias) for clone in clones)]
        return [
            [functools.partial(_call, plan.launch(tokens, **choice), x, y) for plan in plans] for choice in candidates
        ]

    def dense(self) -> torch.Tensor:
        """The dense weight, in fresh memory."""
        dense = torch.empty((self.rows, self.columns), dtype=self.dtype, device=self.device)
        if dense.numel():
            if self.unpack_launch is None:
                self.unpack_launch = self.make_unpack()
            self.unpack_launch(dense.data_ptr())
        return dense


def _call(launch, x: torch.Tensor, y: torch.Tensor) -> None:
    launch(x.data_ptr(), y.data_ptr())
