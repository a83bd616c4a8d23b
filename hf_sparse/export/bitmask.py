"""compressed-tensors' ``sparse-bitmask`` and ``sparse-24-bitmask``: a model directory whose sparse weights are values and bits.

    export("smollm2-50", "bitmask", "out")                      any zeros
    export("smollm2-24", "bitmask", "out", layout="24")         2:4 only

The files keep their names. ``<module>.weight [R, C]`` of a sparse linear becomes, in ``sparse-bitmask``

    <module>.shape        int64 [2]              R, C
    <module>.compressed   weight's dtype [N]     the nonzeros, row by row
    <module>.bitmask      uint8 [R, ceil(C/8)]   bits of weight != 0, each row on its own, least significant bit first
    <module>.row_offsets  int64 [R]              nonzeros before each row

and in ``sparse-24-bitmask``, which keeps exactly two of every four columns (the largest, so a zero where there are fewer)

    <module>.shape int64 [2, 1]     <module>.compressed [R, C/2]     <module>.bitmask as above

config.json says so under ``quantization_config.sparsity_config``, as that package wrote it. Its last version that reads these
layouts is 0.14; 0.15 removed them, and vLLM stopped loading 2:4 models in 0.19.
"""

import json
import os
from pathlib import Path

import numpy
import torch

from hf_sparse.atomic import atomic_write_text, require_free_space
from hf_sparse.export import Exporter
from hf_sparse.export.source import Source

__all__ = ["BITMASK", "compress", "decompress", "load_bitmask"]

_FORMATS = {"bitmask": "sparse-bitmask", "24": "sparse-24-bitmask"}
_VERSION = "0.14.0.1"  # of compressed-tensors, whose layout this is
_PARTS = {
    "sparse-bitmask": ("shape", "compressed", "bitmask", "row_offsets"),
    "sparse-24-bitmask": ("shape", "compressed", "bitmask"),
}


def compress(weight: torch.Tensor, layout: str = "bitmask") -> dict[str, torch.Tensor]:
    """The tensors that stand for a matrix ``[R, C]``, by the last part of their names.

    Raises:
        ValueError: layout ``24`` and a group of four columns with more than two nonzeros, or no whole number of groups.
    """
    if layout == "24":
        if not is_24(weight):
            raise ValueError(
                f"a weight of shape {tuple(weight.shape)} is not 2:4: at most 2 of every 4 columns may be nonzero"
            )
        groups = weight.reshape(-1, 4)
        places = groups.abs().topk(2, dim=1).indices
        kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, places, True).reshape(weight.shape)
        compressed = weight[kept].reshape(weight.shape[0], -1)
        return {"shape": torch.tensor(weight.shape).reshape(2, 1), "compressed": compressed, "bitmask": _pack(kept)}
    kept = weight != 0
    counts = kept.sum(dim=1)
    return {
        "shape": torch.tensor(weight.shape),
        "compressed": weight[kept],
        "bitmask": _pack(kept),
        "row_offsets": counts.cumsum(0) - counts,
    }


def decompress(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """The dense matrix of either layout.

    Raises:
        ValueError: sizes disagree, or the bits do not count as many weights as there are values.
    """
    rows, columns = (int(size) for size in parts["shape"].flatten())
    bits, values = parts["bitmask"], parts["compressed"].flatten()
    if rows < 0 or columns < 0 or bits.dtype != torch.uint8 or tuple(bits.shape) != (rows, -(-columns // 8)):
        raise ValueError(f"the bitmask has shape {tuple(bits.shape)}, a matrix of {rows} x {columns} needs another")
    flags = numpy.unpackbits(bits.numpy(), axis=-1, bitorder="little")
    kept = torch.from_numpy(flags[:, :columns].astype(bool))
    if flags[:, columns:].any() or int(kept.sum()) != values.numel():
        raise ValueError(f"the bitmask counts {int(flags.sum())} weights, there are {values.numel()} values")
    if "row_offsets" in parts:
        counts = kept.sum(dim=1)
        if not torch.equal(parts["row_offsets"], counts.cumsum(0) - counts):
            raise ValueError("the row offsets are not those of the bitmask")
    dense = torch.zeros(rows, columns, dtype=values.dtype)
    dense[kept] = values
    return dense


def load_bitmask(directory: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The dense state dict of a directory in either layout, whoever wrote it.

    Raises:
        FileNotFoundError: no config.json, or no safetensors files.
        ValueError: its config names neither layout, a file is truncated, or a tensor damaged (it is named).
    """
    from safetensors import SafetensorError, safe_open

    directory = Path(directory)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    layout = ((config.get("quantization_config") or {}).get("sparsity_config") or {}).get("format")
    if layout not in _PARTS:
        raise ValueError(f"{directory} has the sparsity format {layout!r}; known are {', '.join(_PARTS)}")
    stored = {}
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{directory} has no safetensors files")
    for file in files:
        try:
            with safe_open(file, "pt") as reader:
                stored |= {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 (no dict)
        except SafetensorError as error:
            raise ValueError(f"{file} is truncated or damaged: {error}") from None
    for module in [name.removesuffix(".compressed") for name in stored if name.endswith(".compressed")]:
        try:
            parts = {part: stored.pop(f"{module}.{part}") for part in _PARTS[layout]}
            stored[f"{module}.weight"] = decompress(parts)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{directory} is damaged: {module}: {error}") from None
    return stored


def is_24(weight: torch.Tensor) -> bool:
    """Whether every four consecutive columns hold at most two nonzeros."""
    if weight.dim() != 2 or weight.shape[1] % 4:
        return False
    return bool(((weight != 0).reshape(-1, 4).sum(dim=1) <= 2).all())


def _pack(kept: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(numpy.packbits(kept.numpy(), axis=-1, bitorder="little"))


def _linears(source: Source) -> set[str]:
    """Names of the weights of ``nn.Linear`` modules, which are what that package compresses."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(source.path)
    stated = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        model = stated(config) if stated else transformers.AutoModelForCausalLM.from_config(config)
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def _chosen(source: Source) -> list[str]:
    linears = _linears(source)
    return [name for name in source.sparse() if name in linears]


def check_bitmask(source: Source, *, layout: str = "bitmask") -> None:
    if layout not in _FORMATS:
        raise ValueError(f"layout is {' or '.join(_FORMATS)}, got {layout!r}")
    chosen = _chosen(source)
    if not chosen:
        raise ValueError(
            "no weight of an nn.Linear of this model, by the name it has there, has a zero: nothing to compress"
        )
    if layout == "24" and (other := [name for name in chosen if not is_24(source.tensor(name))]):
        raise ValueError(
            f"layout 24 takes 2:4 weights only, and {len(other)} of {len(chosen)} sparse weights are not, such as {other[0]}: "
            "prune with --pattern 2:4, or use layout=bitmask"
        )


def write_bitmask(source: Source, output: Path, *, layout: str = "bitmask") -> dict:
    from safetensors.torch import save_file

    chosen, linears = set(_chosen(source)), _linears(source)
    require_free_space(output, source.dense_bytes)
    place, total = {}, 0
    for file in dict.fromkeys(source.files.values()):
        stored = {}
        for name in (name for name, where in source.files.items() if where == file):
            tensor = source.tensor(name)
            if name in chosen:
                stored |= {f"{name.removesuffix('weight')}{part}": t for part, t in compress(tensor, layout).items()}
            else:
                stored[name] = tensor
        save_file(stored, output / file.name, {"format": "pt"})
        place |= dict.fromkeys(stored, file.name)
        total += sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    if len(set(place.values())) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": place}
        atomic_write_text(output / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    source.copy_other_files(output, leave_out=("config.json",))
    sparsity = {
        "format": _FORMATS[layout],
        "global_sparsity": source.sparsity,
        "ignore": sorted(name.removesuffix(".weight") for name in linears - chosen),
        "registry_requires_subclass": False,
        "sparsity_structure": "2:4" if layout == "24" else "unstructured",
        "targets": ["Linear"],
    }
    config = source.config | {
        "quantization_config": {"quant_method": "compressed-tensors", "version": _VERSION, "sparsity_config": sparsity}
    }
    atomic_write_text(output / "config.json", json.dumps(config, indent=2) + "\n")
    notes = [f"the weights take {total / source.dense_bytes:.0%} of the dense bytes"]
    if kept := sorted(set(source.sparse()) - chosen):
        notes.append(
            f"{len(kept)} sparse weights belong to no nn.Linear of that name and stay dense, such as {kept[0]}"
        )
    return {"tensors": len(chosen), "notes": notes}


def verify_bitmask(source: Source, output: Path, **_: object) -> str:
    loaded = load_bitmask(output)
    _compare(source, loaded, "hf_sparse")
    try:
        from compressed_tensors import __version__
        from compressed_tensors.compressors import BaseCompressor

        layout = json.loads((output / "config.json").read_text())["quantization_config"]["sparsity_config"]["format"]
        theirs = dict(BaseCompressor.load_from_registry(layout).decompress(str(output)))
    except (ImportError, KeyError):  # not installed, or a version without these layouts
        return (
            f"read back by hf_sparse: {len(loaded)} tensors equal the model's (compressed-tensors up to 0.14 is not installed "
            "here)"
        )
    _compare(source, theirs, "compressed-tensors")
    return f"decompressed by compressed-tensors {__version__}: {len(theirs)} tensors equal the model's"


def _compare(source: Source, loaded: dict[str, torch.Tensor], reader: str) -> None:
    for name, tensor in source.tensors():
        if name not in loaded or not torch.equal(loaded[name], tensor):
            raise RuntimeError(f"{name} as {reader} reads it from the output is not the model's")


BITMASK = Exporter(
    what="A model directory in compressed-tensors' sparse-bitmask (or sparse-24-bitmask) layout.",
    zeros="A smaller file, nothing more: compressed-tensors up to 0.14 unpacks it to dense when it loads; 0.15 (2026-03) and "
    "later do not read it, vLLM from 0.19 refuses 2:4 models, and no kernel of either used unstructured zeros.",
    checked="2026-11-23, compressed-tensors 0.14.0.1 with transformers 4.57.6; removals: its PR 610, vLLM PR 36799",
    output="directory",
    options={"layout": "bitmask (default, any zeros) or 24 (2:4 weights only)"},
    write=write_bitmask,
    check=check_bitmask,
    verify=verify_bitmask,
)
