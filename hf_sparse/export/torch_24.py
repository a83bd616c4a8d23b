"""2:4 weights for torch's semi-structured sparsity, in a safetensors file, and the loader that puts them on a GPU.

    export("smollm2-24", "torch-2:4", "smollm2-24.safetensors")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).cuda()
    load_torch_24(model, "smollm2-24.safetensors")       # 2:4 weights become torch.sparse.SparseSemiStructuredTensor

A weight ``W [R, C]`` (float16 or bfloat16, at most two nonzeros in every four consecutive columns) is stored as

    <name>.values    W's dtype [R, C/2]   the two kept entries of each group of four, in order
    <name>.indices   uint8 [R, C/8]       two bits an entry: where in its group it lies. A group's first index is in the two
                                          low bits of its four, the first of two groups in the low four bits of the byte

Indices ascend within a group; where it has fewer than two nonzeros, zeros are kept so that the four bits are those of torch
(``torch/sparse/_semi_structured_conversions.py``): 9 bits an entry of the dense matrix instead of 16.

torch has two compressed layouts on the GPU, CUTLASS's interleaved metadata and cuSPARSELt's opaque block, which only the
library on the GPU can write. The file is neither: the loader expands a weight on the GPU and hands it to
``torch.sparse.to_sparse_semi_structured``. torch's CUTLASS path takes float32 as 1:2, not 2:4, so float32 is refused here.
"""

import json
import os
from pathlib import Path

import torch
from torch import nn

from hf_sparse.export import Exporter
from hf_sparse.export.bitmask import is_24
from hf_sparse.export.files import read_file
from hf_sparse.export.source import Source

__all__ = ["TORCH_24", "compress", "decompress", "load_torch_24", "read_torch_24"]

_FORMAT, _VERSION = "hf_sparse.torch-2:4", 1
_ROWS, _COLUMNS = 32, 64  # what CUTLASS, the stricter of torch's two, takes multiples of in 16 bits
_SPARSE = 0.4  # from this share of zeros on a weight was meant to be sparse, and must be 2:4
_DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def compress(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``(values [R, C/2], indices uint8 [R, C/8])`` of a 2:4 matrix ``[R, C]``, C a multiple of 8.

    Raises:
        ValueError: it is not 2:4, or C is no multiple of 8.
    """
    if not is_24(weight) or weight.shape[1] % 8:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} is not 2:4 with a multiple of 8 columns")
    rows, columns = weight.shape
    groups = weight.reshape(rows, columns // 4, 4)
    first, second, _, last = (groups != 0).unbind(-1)
    low = torch.where(first, 0, torch.where(second, 1, 2))
    high = torch.where(first & second, 1, torch.where(last | ~(first | second), 3, 2))
    values = groups.gather(-1, torch.stack([low, high], dim=-1)).reshape(rows, columns // 2)
    fours = (low | high << 2).to(torch.uint8)
    return values, fours[:, 0::2] | fours[:, 1::2] << 4


def decompress(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The dense matrix ``[R, C]`` on the device of ``values``.

    Raises:
        ValueError: the shapes do not go together, or the indices of a group do not ascend.
    """
    if (
        values.dim() != 2
        or indices.dtype != torch.uint8
        or tuple(indices.shape) != (values.shape[0], values.shape[1] // 4)
    ):
        raise ValueError(
            f"values {tuple(values.shape)} and indices {tuple(indices.shape)} {indices.dtype} do not go together"
        )
    if values.shape[1] % 4:
        raise ValueError(f"{values.shape[1]} values a row are no whole bytes of indices")
    rows, groups = values.shape[0], values.shape[1] // 2
    fours = torch.stack([indices & 15, indices >> 4], dim=-1).reshape(rows, groups)
    places = torch.stack([fours & 3, fours >> 2], dim=-1).long()
    if not bool((places[..., 0] < places[..., 1]).all()):
        raise ValueError("the indices of a group do not ascend")
    dense = torch.zeros(rows, groups, 4, dtype=values.dtype, device=values.device)
    return dense.scatter_(-1, places, values.reshape(rows, groups, 2)).reshape(rows, 4 * groups)


def read_torch_24(path: str | os.PathLike, device: str = "cpu") -> tuple[dict[str, torch.Tensor], set[str]]:
    """``(state dict with every weight dense, names of the 2:4 weights)`` of a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is none of this format, truncated, or a weight is damaged (it is named).
    """
    stored, _, names = read_file(path, _FORMAT, _VERSION, "weights", device)
    for name in names:
        try:
            stored[name] = decompress(stored.pop(f"{name}.values"), stored.pop(f"{name}.indices"))
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {name}: {error}") from None
    return stored, set(names)


def load_torch_24(model: nn.Module, path: str | os.PathLike) -> list[str]:
    """Loads a file into a model on a GPU, in place: dense tensors as they are, 2:4 weights as semi-structured sparse ones.

    Returns:
        The names of the 2:4 weights.

    Raises:
        RuntimeError: the model is not on a CUDA device.
        ValueError: the file is damaged, or is of another architecture or dtype than the model, which stays as it was.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise RuntimeError(
            f"torch's 2:4 kernels run on NVIDIA GPUs only, the model is on {device}: move it with model.cuda()"
        )
    state, names = read_torch_24(path, str(device))
    own = model.state_dict()
    for name, tensor in state.items():
        if name not in own:
            raise ValueError(f"{path} holds {name}, which {type(model).__name__} does not have")
        if own[name].shape != tensor.shape or own[name].dtype != tensor.dtype:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype} in {path}, but {tuple(own[name].shape)} {own[name].dtype} "
                "in the model"
            )
    model.load_state_dict({name: state[name] for name in state if name not in names}, strict=False)
    for name in sorted(names):
        owner, _, attribute = name.rpartition(".")
        sparse = torch.sparse.to_sparse_semi_structured(state.pop(name))
        setattr(model.get_submodule(owner), attribute, nn.Parameter(sparse, requires_grad=False))
    return sorted(names)


def _cast(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    chosen = _DTYPES[dtype]
    return tensor.to(chosen) if chosen is not None and tensor.is_floating_point() else tensor


def _chosen(source: Source) -> tuple[list[str], list[str]]:
    """(2:4 weights that torch's kernels take, names of those whose shape they do not take)."""
    fit, unfit = [], []
    for name in source.sparse(_SPARSE):
        rows, columns = source.shape(name)
        (unfit if rows % _ROWS or columns % _COLUMNS else fit).append(name)
    return fit, unfit


def check_torch_24(source: Source, *, dtype: str = "auto") -> None:
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {', '.join(_DTYPES)}, got {dtype!r}")
    candidates = source.sparse(_SPARSE)
    if source.config.get("model_type") == "gpt2":
        raise ValueError("GPT-2 stores its weights [in, out]; torch's 2:4 kernels take a sparse [out, in] matrix")
    if not candidates:
        raise ValueError("no weight of this model is sparse enough to be 2:4 (half of its entries zero)")
    wrong = [name for name in candidates if len(source.shape(name)) != 2 or not is_24(source.tensor(name))]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(candidates)} sparse weights are not 2:4, such as {wrong[0]}: prune with --pattern 2:4, or "
            "export to a format for unstructured zeros"
        )
    fit, unfit = _chosen(source)
    if not fit:
        raise ValueError(
            f"no weight has a shape that torch's 2:4 kernels take, multiples of {_ROWS} x {_COLUMNS}: {unfit[0]} is "
            f"{source.shape(unfit[0])}"
        )
    if dtype == "auto" and (other := [name for name in fit if source.dtype(name).itemsize != 2]):
        raise ValueError(
            f"{other[0]} is {source.dtype(other[0])}, which torch's kernels do not take as 2:4: give dtype=bfloat16 or float16"
        )


def write_torch_24(source: Source, output: Path, *, dtype: str = "auto") -> dict:
    from safetensors.torch import save_file

    fit, unfit = _chosen(source)
    stored = {}
    for name, tensor in source.tensors():
        tensor = _cast(tensor, dtype)
        if name in fit:
            stored[f"{name}.values"], stored[f"{name}.indices"] = compress(tensor)
        else:
            stored[name] = tensor
    save_file(stored, output, {"format": _FORMAT, "version": str(_VERSION), "weights": json.dumps(fit)})
    notes = [f"the file takes {output.stat().st_size / source.dense_bytes:.0%} of the dense bytes"]
    if unfit:
        notes.append(
            f"{len(unfit)} 2:4 weights are no multiples of {_ROWS} x {_COLUMNS} and stay dense, such as {unfit[0]}"
        )
    return {"tensors": len(fit), "notes": notes}


def verify_torch_24(source: Source, output: Path, *, dtype: str = "auto") -> str:
    state, names = read_torch_24(output)
    for name, tensor in source.tensors():
        if name not in state or not torch.equal(state[name], _cast(tensor, dtype)):
            raise RuntimeError(f"{name} read back from {output.name} is not the model's")
    told = f"read back: {len(state)} tensors, {len(names)} of them 2:4, equal the model's"
    if not torch.cuda.is_available():
        return f"{told} (torch's kernels need an NVIDIA GPU, there is none here)"
    name = min(names)
    weight = state[name].cuda()
    x = torch.randn(128, weight.shape[1], dtype=weight.dtype, device="cuda")
    sparse = nn.functional.linear(x, torch.sparse.to_sparse_semi_structured(weight))
    dense = nn.functional.linear(x.float(), weight.float())
    error = float((sparse.float() - dense).norm() / dense.norm())
    if error > 0.01:
        raise RuntimeError(f"{name}: torch's 2:4 product differs from the dense one by {error:.2%}")
    return f"{told}; the product with {name} on {torch.cuda.get_device_name()} is off by {error:.1e}"


TORCH_24 = Exporter(
    what="2:4 weights as values and 2-bit indices in a safetensors file; hf_sparse.export.torch_24.load_torch_24 loads it.",
    zeros="torch multiplies 2:4 weights on NVIDIA GPUs from compute capability 8.0 on: faster than dense for large batches "
    "(prefill, 1.3 to 1.6 times a kernel), slower at batch 1 (decoding), where it pads the batch.",
    checked="2026-11-23, torch 2.13.0 (CUTLASS and cuSPARSELt); decoding: pytorch issues 111339 and 153825",
    options={"dtype": "auto (as stored), bfloat16 or float16"},
    write=write_torch_24,
    check=check_torch_24,
    verify=verify_torch_24,
)
