"""Sparse tensors of torch in a safetensors file: CSR, blocked CSR (BSR) and coordinates (COO).

    export("smollm2-90", "csr", "csr.safetensors")
    weights = load_sparse_tensors("csr.safetensors")      # torch sparse tensors; dense ones as they were

safetensors holds dense tensors only, so a sparse weight ``W [R, C]`` with N nonzeros becomes several:

    csr   W.crow_indices int32 [R + 1], W.col_indices int32 [N], W.values [N]
    bsr   W.crow_indices int32 [R/r + 1], W.col_indices int32 [K], W.values [K, r, c]   for K stored blocks of r x c
    coo   W.indices int32 [2, N], W.values [N]                (torch itself wants int64 there: the loader widens them)

All other tensors lie under their own names. Metadata: ``format`` (hf_sparse.tensors), ``version``, ``layout``, ``weights``
(JSON: ``{name: {"shape": [R, C]}}``). Bytes a nonzero for 16-bit values: 6 in CSR, 10 in COO, against 2 an entry of the
dense matrix, so CSR is smaller than dense above 67 % zeros, COO above 80 %; BSR, where whole blocks are zero.
"""

import json
import os
import re
import warnings
from functools import partial
from pathlib import Path

import torch

from hf_sparse.export import Exporter
from hf_sparse.export.files import read_file
from hf_sparse.export.source import Source

__all__ = ["BSR", "COO", "CSR", "load_sparse_tensors"]

_FORMAT, _VERSION = "hf_sparse.tensors", 1
_PARTS = {
    "csr": ("crow_indices", "col_indices", "values"),
    "bsr": ("crow_indices", "col_indices", "values"),
    "coo": ("indices", "values"),
}


def load_sparse_tensors(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """``{name: tensor}`` of a file: torch sparse tensors (CSR, BSR or COO) for the sparse weights, dense for the rest.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is none of this format, truncated, or its indices do not make a matrix of the stated shape.
    """
    stored, metadata, weights = read_file(path, _FORMAT, _VERSION, "weights")
    layout = metadata.get("layout")
    if layout not in _PARTS:
        raise ValueError(f"{path} has the layout {layout!r}; known are {', '.join(_PARTS)}")
    loaded = {}
    for name, entry in weights.items():
        try:
            parts = {part: stored.pop(f"{name}.{part}") for part in _PARTS[layout]}
            loaded[name] = _assemble(layout, parts, tuple(entry["shape"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {name} is incomplete: {error!r}") from None
        except (RuntimeError, ValueError, IndexError) as error:
            raise ValueError(f"{path} is damaged: {name} is no {layout.upper()} matrix: {error}") from None
    return loaded | stored


def _assemble(layout: str, parts: dict[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """The sparse tensor; torch checks every index against the shape."""
    if layout == "coo":
        coordinates = parts["indices"].long()
        return torch.sparse_coo_tensor(coordinates, parts["values"], shape, check_invariants=True, is_coalesced=True)
    make = torch.sparse_csr_tensor if layout == "csr" else torch.sparse_bsr_tensor
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta")
        return make(parts["crow_indices"], parts["col_indices"], parts["values"], shape, check_invariants=True)


def to_parts(weight: torch.Tensor, layout: str, block: tuple[int, int] = (1, 1)) -> dict[str, torch.Tensor]:
    """The tensors that stand for a matrix ``[R, C]``, by the names of the module's table."""
    rows, columns = weight.shape
    if layout == "bsr":
        blocks = weight.reshape(rows // block[0], block[0], columns // block[1], block[1]).transpose(1, 2)
        kept = (blocks != 0).any(dim=-1).any(dim=-1)
    else:
        blocks, kept = weight, weight != 0
    row, column = kept.nonzero(as_tuple=True)
    values = blocks[row, column].contiguous()
    if layout == "coo":
        return {"indices": torch.stack([row, column]).int(), "values": values}
    crow = torch.zeros(kept.shape[0] + 1, dtype=torch.int32)
    crow[1:] = kept.sum(dim=1).cumsum(0)
    return {"crow_indices": crow, "col_indices": column.int(), "values": values}


def _chosen(source: Source, min_sparsity: float) -> list[str]:
    """The matrices to store sparse; weights of more dimensions (fused experts, convolutions) stay dense."""
    return [name for name in source.sparse(min_sparsity) if len(source.shape(name)) == 2]


def _block(text: str) -> tuple[int, int]:
    if not (found := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)):
        raise ValueError(f"block is rows x columns such as 16x16, got {text!r}")
    return int(found[1]), int(found[2])


def check_tensors(source: Source, *, min_sparsity: float = 0.0, block: str = "1x1") -> None:
    if not 0.0 <= min_sparsity < 1.0:
        raise ValueError(f"min_sparsity is a fraction of zeros in [0, 1), got {min_sparsity}")
    rows, columns = _block(block)
    chosen = _chosen(source, min_sparsity)
    if not chosen:
        raise ValueError(f"no matrix of this model has zeros (at least {min_sparsity:.0%} of them); nothing is sparse")
    uneven = [name for name in chosen if source.shape(name)[0] % rows or source.shape(name)[1] % columns]
    if uneven:
        raise ValueError(
            f"blocks of {block} do not divide {uneven[0]} {source.shape(uneven[0])}"
            f"{f' and {len(uneven) - 1} more weights' if len(uneven) > 1 else ''}; choose a block size that does"
        )
    if too_long := [name for name in chosen if torch.Size(source.shape(name)).numel() >= 2**31]:
        raise ValueError(f"{too_long[0]} has more entries than int32 indices can count")


def _write(layout: str, source: Source, output: Path, min_sparsity: float, block: str = "1x1") -> dict:
    from safetensors.torch import save_file

    chosen, size = set(_chosen(source, min_sparsity)), _block(block)
    stored, weights, nonzeros = {}, {}, 0
    for name, tensor in source.tensors():
        if name not in chosen:
            stored[name] = tensor
            continue
        parts = to_parts(tensor, layout, size)
        stored |= {f"{name}.{part}": value for part, value in parts.items()}
        weights[name] = {"shape": list(tensor.shape)}
        nonzeros += int(tensor.count_nonzero())
    metadata = {"format": _FORMAT, "version": str(_VERSION), "layout": layout, "weights": json.dumps(weights)}
    save_file(stored, output, metadata)
    values = sum(stored[f"{name}.values"].numel() for name in weights)
    entries = sum(torch.Size(entry["shape"]).numel() for entry in weights.values())
    notes = [f"the file takes {output.stat().st_size / max(source.dense_bytes, 1):.0%} of the dense bytes"]
    if layout == "bsr":
        notes.append(
            f"{values / entries:.0%} of the weights lie in stored blocks of {block}, {nonzeros / max(values, 1):.0%} of "
            "those are nonzero"
        )
        if nonzeros < 0.9 * values:
            notes.append(
                "blocks are far from full: prune in blocks of this size (--pattern) for BSR to be small or fast"
            )
    if kept := sorted(set(source.sparse(min_sparsity)) - chosen):
        notes.append(f"{len(kept)} sparse weights are no matrices and stay dense, such as {kept[0]}")
    return {"tensors": len(weights), "notes": notes}


def write_csr(source: Source, output: Path, *, min_sparsity: float = 0.0) -> dict:
    return _write("csr", source, output, min_sparsity)


def write_coo(source: Source, output: Path, *, min_sparsity: float = 0.0) -> dict:
    return _write("coo", source, output, min_sparsity)


def write_bsr(source: Source, output: Path, *, block: str = "16x16", min_sparsity: float = 0.0) -> dict:
    return _write("bsr", source, output, min_sparsity, block)


def verify_tensors(source: Source, output: Path, **options) -> str:
    """torch itself is the consumer: every tensor dense again, and the product of one matrix with a vector."""
    loaded, sparse = load_sparse_tensors(output), 0
    if set(loaded) != set(source.names):
        raise RuntimeError(f"{output.name} does not hold the tensors of the model")
    for name, tensor in source.tensors():
        found = loaded[name]
        sparse += found.layout != torch.strided
        if not torch.equal(found.to_dense(), tensor):
            raise RuntimeError(f"{name} read back from {output.name} is not the model's")
    return f"loaded by torch {torch.__version__}: {sparse} sparse tensors, dense again, equal the model's"


_SIZES = "share of zeros from which a matrix is stored sparse; default 0: every matrix with a zero"
_CHECKED = "2026-11-23, torch 2.13.0 on CPU (MKL)"
_make = partial(Exporter, checked=_CHECKED, check=check_tensors, verify=verify_tensors)

CSR = _make(
    what="torch CSR tensors in a safetensors file; hf_sparse.export.tensors.load_sparse_tensors makes them again.",
    zeros="torch multiplies CSR on the CPU in float32 only (no bfloat16), and slower than dense below about 80 % zeros "
    "(0.3 times dense at 50 %, 0.5 to 0.9 at 70 %, about 1 at 80 %, 2.8 at 90 %).",
    options={"min_sparsity": _SIZES},
    write=write_csr,
)
BSR = _make(
    what="torch BSR tensors (CSR of blocks) in a safetensors file; hf_sparse.export.tensors.load_sparse_tensors reads it.",
    zeros="torch multiplies BSR faster than dense only where whole blocks are zero: about 1.5 times at 70 %, 6 at 90 % "
    "of 16x16 blocks (float32, CPU). Unstructured zeros leave nearly every block stored.",
    options={"block": "rows x columns of a block; default 16x16", "min_sparsity": _SIZES},
    write=write_bsr,
)
COO = _make(
    what="torch COO tensors in a safetensors file; hf_sparse.export.tensors.load_sparse_tensors makes them again.",
    zeros="A format for exchange: torch turns it into CSR to multiply, and it is larger than dense below 80 % zeros.",
    options={"min_sparsity": _SIZES},
    write=write_coo,
)
