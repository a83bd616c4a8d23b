"""Masks alone: which weights a sparse model keeps, one bit each, and back onto a dense model of the same architecture.

    export("smollm2-50", "masks", "masks.safetensors")
    masks = apply_masks(dense_model, "masks.safetensors")      # the same zeros, exactly

One safetensors file. Under each parameter's name in the model lies a ``uint8`` tensor of ``ceil(numel / 8)`` bytes: the
bits of ``weight != 0`` in the parameter's stored order, least significant bit first (``numpy.packbits(...,
bitorder="little")``). The file's metadata, all strings:

    format    hf_sparse.masks            version   1
    model     the model's class          pattern   what it was pruned to, if its config says so
    masks     JSON: {name: {"shape": [...], "kept": nonzeros, "pattern": ..., "tied": [other names of the tensor]}}

A mask takes 1/16 of the bytes of its bf16 weight. Names, shapes and counts are checked before a weight is touched.
"""

import difflib
import json
import os
from pathlib import Path

import numpy
import torch
from torch import nn

from hf_sparse.config import CONFIG_KEY
from hf_sparse.export import Exporter
from hf_sparse.export.files import read_file
from hf_sparse.export.source import Source
from hf_sparse.masks import Masks
from hf_sparse.patterns import parse
from hf_sparse.targets import find_targets

__all__ = ["MASKS", "apply_masks", "read_masks"]

_FORMAT, _VERSION = "hf_sparse.masks", 1


def apply_masks(model: nn.Module, path: str | os.PathLike) -> Masks:
    """Sets the weights of ``model`` that the file does not keep to exactly zero, in place; returns the masks.

    Raises:
        ValueError: the file is damaged or no mask file; a name is not in the model, a shape differs, or a tensor is tied to
            others than it was in the model that the masks are from. The model is then as it was.
    """
    masks, entries, metadata = _read(path)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if missing := [name for name in masks if name not in parameters]:
        near = difflib.get_close_matches(missing[0], parameters, n=1)
        hint = f" (near match: {near[0]})" if near else ""
        raise ValueError(
            f"{len(missing)} of {len(masks)} masks of {path} are of parameters that {type(model).__name__} does not have, "
            f"such as {missing[0]}{hint}; they are from a {metadata.get('model', 'model')}"
        )
    tied = _tied_names(model)
    for name, mask in masks.items():
        shape = tuple(parameters[name].shape)
        if shape != tuple(mask.shape):
            raise ValueError(f"the mask of {name} has shape {tuple(mask.shape)}, the parameter of this model {shape}")
        if tied[name] != (were := sorted(entries[name].get("tied", []))):
            raise ValueError(
                f"{name} is tied to {', '.join(tied[name]) or 'nothing'} in this model, but was to "
                f"{', '.join(were) or 'nothing'} where its mask is from: zeros would reach dense weights, or miss some"
            )
    masks.apply(model)
    return masks


def read_masks(path: str | os.PathLike) -> Masks:
    """The masks of a file: ``{parameter name: boolean mask in the parameter's stored shape}``, True = kept.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no mask file, from a newer version, or damaged.
    """
    return _read(path)[0]


def _read(path: str | os.PathLike) -> tuple[Masks, dict, dict]:
    packed, metadata, entries = read_file(path, _FORMAT, _VERSION, "masks")
    if set(entries) != set(packed):
        raise ValueError(
            f"{path} is damaged: {min(set(entries) ^ set(packed))} is only in its metadata or only in its data"
        )
    masks = Masks()
    for name, entry in entries.items():
        try:
            shape, kept = torch.Size(entry["shape"]), int(entry["kept"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: the entry of {name} cannot be read: {error!r}") from None
        size = -(-shape.numel() // 8)
        if packed[name].dtype != torch.uint8 or tuple(packed[name].shape) != (size,):
            raise ValueError(f"{path} is damaged: {name} has {packed[name].numel()} bytes, its mask takes {size}")
        bits = numpy.unpackbits(packed[name].numpy(), bitorder="little")
        if bits[shape.numel() :].any() or int(bits.sum()) != kept:
            raise ValueError(f"{path} is damaged: the mask of {name} keeps {int(bits.sum())} weights, not {kept}")
        masks[name] = torch.from_numpy(bits[: shape.numel()].astype(bool)).reshape(shape)
    return masks, entries, metadata


def _masks_of(model: nn.Module, config: dict) -> tuple[Masks, dict[str, str]]:
    """The masks of every target that has zeros, with the pattern each keeps to."""
    recorded = config.get(CONFIG_KEY) or {}
    targets = find_targets(model, recorded.get("targets"))
    stated = parse(recorded.get("pattern") or "unstructured")
    masks = Masks({name: mask for name, mask in Masks.from_zeros(model, targets).items() if not mask.all()})
    patterns = {}
    for name, mask in masks.items():
        matrix = targets[name].matrix(mask)
        holds = stated.fits(tuple(matrix.shape)) is None and stated.check(matrix)
        patterns[name] = str(stated) if holds else "unstructured"
    return masks, patterns


def _tied_names(model: nn.Module) -> dict[str, list[str]]:
    """``{parameter name: the other names of the same tensor}``."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: sorted(set(group) - {name}) for group in names.values() for name in group}


def check_masks(source: Source) -> None:
    if not source.sparse():
        raise ValueError("no weight of this model has a zero; there is no mask to write")


def write_masks(source: Source, output: Path) -> dict:
    from safetensors.torch import save_file

    model = source.model()
    masks, patterns = _masks_of(model, source.config)
    tied = _tied_names(model)
    packed, entries = {}, {}
    for name, mask in masks.items():
        packed[name] = torch.from_numpy(numpy.packbits(mask.reshape(-1).cpu().numpy(), bitorder="little"))
        entries[name] = {
            "shape": list(mask.shape),
            "kept": int(mask.sum()),
            "pattern": patterns[name],
            "tied": tied[name],
        }
    metadata = {
        "format": _FORMAT,
        "version": str(_VERSION),
        "model": type(model).__name__,
        "pattern": str((source.config.get(CONFIG_KEY) or {}).get("pattern") or ""),
        "masks": json.dumps(entries),
    }
    save_file(packed, output, metadata)
    return {"tensors": len(packed), "notes": []}


def verify_masks(source: Source, output: Path) -> str:
    expected, _ = _masks_of(source.model(), source.config)
    found = read_masks(output)
    if set(expected) != set(found) or not all(torch.equal(expected[name].cpu(), found[name]) for name in expected):
        raise RuntimeError(f"the masks read back from {output.name} are not the model's zeros")
    return f"read back: {len(found)} masks equal the zeros of the model"


MASKS = Exporter(
    what="The masks alone, one bit a weight, in a safetensors file; hf_sparse.export.masks.apply_masks puts them on a model.",
    zeros="No runtime reads this file; it carries zeros to a dense model of the same architecture, e.g. to train on.",
    checked="a format of hf_sparse, version 1",
    write=write_masks,
    check=check_masks,
    verify=verify_masks,
)
