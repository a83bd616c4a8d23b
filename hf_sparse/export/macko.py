"""MACKO: CSR whose column indices are 4-bit gaps, for NVIDIA's consumer GPUs (arxiv.org/abs/2511.13061).

    export("llama-70", "macko", "llama-70.pt")
    macko_spmv.multiply(tuple(torch.load("llama-70.pt")[f"{module}.c_{i}"] for i in range(5)), x)    # on a GPU

A matrix ``W [R, C]`` in float16 is stored row by row. Every entry is a value and a gap: the number of columns between it
and the entry before it in its row (for the first, before it in the row). A gap holds 0 to 15, so longer runs of zeros are
bridged by entries of value 0 and gap 15, which step over 16 columns. Nothing is stored after a row's last nonzero.

    c_0  values   float16 [P], P = entries rounded up to a multiple of 8, the last ones 0
    c_1  deltas   uint8 [P / 2], two gaps a byte, the first in the low four bits
    c_2  rows     int32 [R + 1], the entry at which each row begins
    c_3, c_4      R and C, Python integers

Bytes a nonzero: 2.5 (1 + bridges), where a bridge is needed for one gap in 0.5^16 at 50 %, 0.9^16 = 19 % at 90 % zeros.
As macko_spmv's own script does, the file is a ``torch.save`` of the state dict, each sparse ``<module>.weight`` replaced by
``<module>.c_0`` to ``c_4``. Its kernel computes 32 rows at a time, so R should be a multiple of 32.
"""

import os
from pathlib import Path

import torch

from hf_sparse.export import Exporter
from hf_sparse.export.source import Source

__all__ = ["MACKO", "compress", "decompress", "load_macko"]

_PADDED, _LONGEST = 8, 15


def compress(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
    """``(values, deltas, rows, R, C)`` of a float16 matrix ``[R, C]``, on the CPU.

    Raises:
        ValueError: it is no float16 matrix.
    """
    if weight.dim() != 2 or weight.dtype != torch.float16:
        raise ValueError(f"MACKO stores float16 matrices, got {tuple(weight.shape)} {weight.dtype}")
    kept = weight != 0
    row, column = kept.nonzero(as_tuple=True)
    before = torch.full_like(column, -1)  # the column of the entry before, -1 at the beginning of a row
    before[1:] = torch.where(row[1:] == row[:-1], column[:-1], -1)
    gap = column - before - 1
    bridges = gap // (_LONGEST + 1)
    place = torch.arange(len(gap)) + bridges.cumsum(0)  # bridges come before the entry they lead to
    count = len(gap) + int(bridges.sum())
    padded = -(-count // _PADDED) * _PADDED
    values = torch.zeros(padded, dtype=torch.float16)
    values[place] = weight[row, column]
    gaps = torch.zeros(padded, dtype=torch.uint8)
    gaps[:count] = _LONGEST
    gaps[place] = (gap % (_LONGEST + 1)).to(torch.uint8)
    entries = torch.zeros(weight.shape[0], dtype=torch.int64).index_add_(0, row, bridges + 1)
    rows = torch.zeros(weight.shape[0] + 1, dtype=torch.int32)
    rows[1:] = entries.cumsum(0)
    return values, gaps[0::2] | gaps[1::2] << 4, rows, weight.shape[0], weight.shape[1]


def decompress(
    values: torch.Tensor, deltas: torch.Tensor, rows: torch.Tensor, row_count: int, column_count: int
) -> torch.Tensor:
    """The float16 matrix ``[R, C]``, on the CPU.

    Raises:
        ValueError: lengths or dtypes disagree, rows do not ascend, or an entry lies outside its row.
    """
    if values.dtype != torch.float16 or deltas.dtype != torch.uint8 or rows.dtype != torch.int32:
        raise ValueError(
            f"values, deltas and rows are float16, uint8 and int32, got {[t.dtype for t in (values, deltas, rows)]}"
        )
    if not all(isinstance(count, int) and count >= 0 for count in (row_count, column_count)):
        raise ValueError(f"{row_count!r} x {column_count!r} is no shape")
    if values.numel() % _PADDED or 2 * deltas.numel() != values.numel() or rows.numel() != row_count + 1:
        raise ValueError(
            f"{values.numel()} values, {deltas.numel()} bytes of deltas and {rows.numel()} rows do not go together"
        )
    starts = rows.long()
    count = int(starts[-1])
    if starts[0] != 0 or (starts.diff() < 0).any() or -(-count // _PADDED) * _PADDED != values.numel():
        raise ValueError("the rows do not ascend from 0 to the number of values")
    gaps = torch.stack([deltas & 15, deltas >> 4], dim=1).reshape(-1)[:count].long()
    row = torch.repeat_interleave(torch.arange(row_count), starts.diff())
    steps = torch.cat([torch.zeros(1, dtype=torch.int64), (gaps + 1).cumsum(0)])
    column = steps[1:] - 1 - steps[starts[:-1]][row]
    if count and int(column.max()) >= column_count:
        raise ValueError(f"an entry lies in column {int(column.max())} of {column_count}")
    matrix = torch.zeros(row_count, column_count, dtype=torch.float16)
    matrix[row, column] = values[:count]
    return matrix


def load_macko(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The state dict of a file with every MACKO matrix dense again, under ``<module>.weight``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, or a matrix in it is damaged (it is named).
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a zip file or a pickle that is damaged raises
        raise ValueError(f"{path} is truncated or damaged: {error}") from None
    if not isinstance(stored, dict):
        raise ValueError(f"{path} holds a {type(stored).__name__}, not a state dict")
    modules = [name.removesuffix(".c_0") for name in stored if name.endswith(".c_0")]
    for module in modules:
        try:
            stored[f"{module}.weight"] = decompress(*(stored.pop(f"{module}.c_{i}") for i in range(5)))
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{path} is damaged: {module}: {error}") from None
    return stored


def _chosen(source: Source, min_sparsity: float) -> list[str]:
    return [
        name
        for name in source.sparse(min_sparsity)
        if len(source.shape(name)) == 2 and name.endswith(".weight") and not _is_transposed(source)
    ]


def _is_transposed(source: Source) -> bool:
    return source.config.get("model_type") == "gpt2"  # Conv1D: stored [in, out], and the kernel multiplies [out, in]


def check_macko(source: Source, *, min_sparsity: float = 0.0) -> None:
    if _is_transposed(source):
        raise ValueError("GPT-2 stores its weights [in, out]; MACKO multiplies matrices [out, in]")
    chosen = _chosen(source, min_sparsity)
    if not chosen:
        raise ValueError(f"no matrix of this model has zeros (at least {min_sparsity:.0%} of them); nothing is sparse")
    largest = torch.finfo(torch.float16).max
    for name in source.names:
        tensor = source.tensor(name)
        if tensor.is_floating_point() and tensor.dtype != torch.float16 and not bool((tensor.abs() <= largest).all()):
            raise ValueError(f"{name} has values that float16, the only dtype of MACKO, cannot hold")


def write_macko(source: Source, output: Path, *, min_sparsity: float = 0.0) -> dict:
    chosen, stored, lost, uneven, entries, nonzeros = set(_chosen(source, min_sparsity)), {}, 0, [], 0, 0
    for name, tensor in source.tensors():
        half = tensor.half() if tensor.is_floating_point() else tensor
        if name not in chosen:
            stored[name] = half
            continue
        parts = compress(half)
        stored |= {f"{name.removesuffix('.weight')}.c_{i}": part for i, part in enumerate(parts)}
        kept = int(half.count_nonzero())
        lost += int(tensor.count_nonzero()) - kept
        nonzeros, entries = nonzeros + kept, entries + int(parts[2][-1])
        if tensor.shape[0] % 32:
            uneven.append(name)
    torch.save(stored, output)
    notes = [
        f"{entries / max(nonzeros, 1) - 1:.1%} of bridging entries on top of the nonzeros",
        f"the file takes {output.stat().st_size / max(source.dense_bytes, 1):.0%} of the dense bytes",
    ]
    if lost:
        notes.append(f"{lost} weights are too small for float16 and became zero")
    if any(source.dtype(name) != torch.float16 for name in chosen):
        notes.append("the weights were rounded to float16, the only dtype of MACKO")
    if uneven:
        notes.append(
            f"{len(uneven)} weights have rows that are no multiple of 32, where its kernel reads past c_2: {uneven[0]}"
        )
    return {"tensors": len(chosen), "notes": notes}


def verify_macko(source: Source, output: Path, *, min_sparsity: float = 0.0) -> str:
    loaded = load_macko(output)
    for name, tensor in source.tensors():
        expected = tensor.half() if tensor.is_floating_point() else tensor
        if name not in loaded or not torch.equal(loaded[name], expected):
            raise RuntimeError(f"{name} read back from {output.name} is not the model's")
    return (
        f"read back: {len(loaded)} tensors equal the model's in float16 (its kernel needs an NVIDIA GPU and a compiler)"
    )


MACKO = Exporter(
    what="A torch.save of the float16 state dict, every sparse matrix as CSR with 4-bit gaps, as its own script does.",
    zeros="macko_spmv multiplies it with one vector at a time on NVIDIA GPUs: by its authors 1.3 to 1.5 times cuBLAS at 50 % "
    "zeros and 3.5 to 4.5 at 90 % on consumer cards; not tuned for H100 and the like, no larger batches, prefill as slow as "
    "decoding.",
    checked="2026-11-23, macko_spmv 0.2.0 (commit afa7033, 2025-12-17): layout equal to its own compressor's byte for byte",
    options={"min_sparsity": "share of zeros from which a matrix is compressed; default 0: every matrix with a zero"},
    write=write_macko,
    check=check_macko,
    verify=verify_macko,
)
