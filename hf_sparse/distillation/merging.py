"""Merging fine-tuned siblings of one model, tensor by tensor, from their files.

    merge_checkpoints(["distilled-on-math", "distilled-on-chat"], "merged", method="slerp")

    lerp          sum of w_i x_i                                                            any number of models
    slerp         sin((1-t) W) / sin W  a + sin(t W) / sin W  b,  cos W = <a, b> / (|a| |b|)
                  the tensor as one vector, not normalised; |cos W| > 0.9995 goes over to lerp, where the two agree
                  (as mergekit does; more than two one after the other: t_i = w_i / (w_1 + ... + w_i))
    task-slerp    base + slerp of the task vectors a - base, b - base

Siblings of one parent lie so close together that for nearly every tensor slerp of the weights *is* lerp; their task vectors do
not, so task-slerp is what turns on a sphere. Self-data distillation (arxiv.org/abs/2410.09982) merges two distilled models by
slerp.

An entry that is zero in all models stays zero, bit for bit, so siblings with one mask keep it. Weights are read and written one
tensor at a time: two 8B models merge in the memory of a few tensors. Arithmetic is float32.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hf_sparse.atomic import atomic_directory, require_free_space
from hf_sparse.formats.directory import (
    INDEX,
    copy_files,
    open_weights,
    other_files,
    read_config,
    require_apart,
    weight_files,
    write_json,
)
from hf_sparse.formats.safetensors_stream import Entry, write_safetensors
from hf_sparse.instruments import progress_bar

__all__ = ["METHODS", "MergeReport", "lerp", "merge_checkpoints", "merge_tensors", "slerp"]

METHODS = ("lerp", "slerp", "task-slerp")
PARALLEL = 0.9995  # beyond this |cosine| slerp divides by nearly nothing
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# of config.json: what two siblings may differ in
_MAY_DIFFER = (
    "_name_or_path",
    "transformers_version",
    "hf_sparse",
    "hf_sparse_experts",
    "hf_sparse_layers",
    "dtype",
    "torch_dtype",
    "use_cache",
)


@dataclass(frozen=True)
class MergeReport:
    """What a merge did: tensors in all, those that slerp turned, those copied since they are no floats; zeros in all models."""

    method: str
    weights: list[float]
    tensors: int
    turned: int
    copied: int
    zeros: int


def lerp(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """``sum of w_i x_i`` in float32."""
    total = torch.zeros_like(tensors[0], dtype=torch.float32)
    for tensor, weight in zip(tensors, weights, strict=True):
        total += weight * tensor.float()
    return total


def slerp(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """Spherical interpolation from ``a`` (t = 0) to ``b`` (t = 1), each tensor one vector; float32."""
    a, b = a.float(), b.float()
    cosine = _cosine(a, b)
    if abs(cosine) > PARALLEL:
        return (1 - t) * a + t * b
    angle = torch.tensor(cosine, dtype=torch.float64).acos()
    first, second = (float((x * angle).sin() / angle.sin()) for x in (1 - t, t))
    return first * a + second * b


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().flatten().double(), b.detach().flatten().double()
    norms = float(a.norm() * b.norm())
    return float(a @ b) / norms if norms > 0 else 1.0


def merge_tensors(
    tensors: Sequence[torch.Tensor], weights: Sequence[float], method: str, base: torch.Tensor | None = None
) -> tuple[torch.Tensor, bool]:
    """``(merged, whether slerp turned it)``: float32, and zero where all ``tensors`` are.

    Args:
        weights: one per tensor, of sum 1. base: the common parent, for ``task-slerp``.
    """
    turned = False
    if method == "lerp":
        merged = lerp(tensors, weights)
    else:
        vectors = (
            [t.float() - base.float() for t in tensors] if method == "task-slerp" else [t.float() for t in tensors]
        )
        merged, so_far = vectors[0], weights[0]
        for vector, weight in zip(vectors[1:], weights[1:], strict=True):
            so_far += weight
            turned |= abs(_cosine(merged, vector)) <= PARALLEL
            merged = slerp(merged, vector, weight / so_far) if so_far > 0 else merged
        if method == "task-slerp":
            merged = base.float() + merged
    zero = tensors[0] == 0
    for tensor in tensors[1:]:
        zero &= tensor == 0
    return merged.masked_fill_(zero, 0.0), turned


def merge_checkpoints(
    models: Sequence[str | Path],
    output: str | Path,
    *,
    method: str = "slerp",
    weights: Sequence[float] | None = None,
    base: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> MergeReport:
    """Merges model directories into a new one; config, tokenizer and other files are the first model's.

    Args:
        models: two or more directories with safetensors weights of the same names and shapes.
        output: appears only when it is complete.
        method: a name of :data:`METHODS`.
        weights: how much each model counts; they are divided by their sum. Default: equally.
        base: the directory of the model that all were fine-tuned from; for ``task-slerp``.

    Raises:
        FileNotFoundError, FileExistsError: a directory without config.json or weights; an ``output`` that is not empty.
        ValueError: before anything is written: an unknown method, weights that cannot be used, models whose tensors or
            architectures differ, quantized or packed models.
        OSError: not enough disk space.
    """
    shares = _shares(models, method, weights, base)
    folders = [Path(model) for model in models]
    parent = None if base is None else Path(base)
    for folder in [*folders, *([parent] if parent else [])]:
        require_apart(folder, Path(output))
    sources = [_Folder(folder) for folder in folders]
    origin = None if parent is None else _Folder(parent)
    for other in [*sources[1:], *([origin] if origin else [])]:
        _check_alike(sources[0], other)
    first = sources[0]
    counts = {"turned": 0, "copied": 0, "zeros": 0}

    def merged(name: str) -> torch.Tensor:
        tensors = [source.read(name) for source in sources]
        if not tensors[0].is_floating_point():
            if any(not torch.equal(tensors[0], tensor) for tensor in tensors[1:]):
                raise ValueError(
                    f"{name} holds {tensors[0].dtype} values that differ between the models; they cannot be merged"
                )
            counts["copied"] += 1
            return tensors[0]
        result, turned = merge_tensors(tensors, shares, method, None if origin is None else origin.read(name))
        counts["turned"] += turned
        result = result.to(tensors[0].dtype)
        counts["zeros"] += int((result == 0).sum())
        return result

    with atomic_directory(output, overwrite) as staging:
        others = other_files(first.path, first.files)
        nbytes = sum(size for tensors in first.files.values() for _, _, _, size in tensors)
        require_free_space(staging, nbytes + sum(file.stat().st_size for file in others))
        with progress_bar(progress, "merging", len(first.where)) as step:

            def entry(name, dtype, shape, size) -> Entry:
                def tensor():
                    step(name)
                    return merged(name)

                return Entry(name, dtype, shape, size, tensor)

            for file, tensors in first.files.items():
                (staging / file).parent.mkdir(parents=True, exist_ok=True)
                with open_weights(first.path / file) as reader:
                    metadata = reader.metadata()
                write_safetensors(staging / file, [entry(*tensor) for tensor in tensors], metadata)
        copy_files(first.path, staging, others)
        if (first.path / INDEX).is_file():
            copy_files(first.path, staging, [first.path / INDEX])
        write_json(staging / "config.json", first.config)
    return MergeReport(method, shares, len(first.where), **counts)


def _shares(models, method: str, weights, base) -> list[float]:
    if method not in METHODS:
        raise ValueError(f"unknown method of merging {method!r}; known are {', '.join(METHODS)}")
    if len(models) < 2:
        raise ValueError(f"merging takes two models or more, got {len(models)}")
    if (method == "task-slerp") != (base is not None):
        raise ValueError(
            "task-slerp works on differences to the model all were fine-tuned from: give base"
            if base is None
            else f"base is for task-slerp; {method} does not look at it"
        )
    weights = [1.0] * len(models) if weights is None else [float(weight) for weight in weights]
    if len(weights) != len(models) or min(weights) < 0 or not sum(weights) > 0:
        raise ValueError(f"weights are {len(models)} numbers from 0 on, one per model and not all 0; got {weights}")
    return [weight / sum(weights) for weight in weights]


class _Folder:
    """One model's files: ``files`` has ``(name, dtype, shape, bytes)`` per weight file in file order, ``where`` the file of
    every tensor."""

    def __init__(self, path: Path):
        self.path, self.config = path, read_config(path)
        if quantization := self.config.get("quantization_config"):
            raise ValueError(
                f"{path} is stored by {quantization.get('quant_method')}; only plain float weights are merged "
                "(`hf-sparse unpack` makes a packed checkpoint dense)"
            )
        self.files: dict[str, list[tuple]] = {}
        self.where: dict[str, str] = {}
        self.kinds: dict[str, tuple] = {}
        for file in weight_files(path):
            with open_weights(path / file) as reader:
                self.files[file] = []
                for name in reader.offset_keys():
                    view = reader.get_slice(name)
                    dtype, shape = view.get_dtype(), tuple(view.get_shape())
                    size = torch.Size(shape).numel() * _item_bytes(dtype)
                    self.files[file].append((name, dtype, shape, size))
                    self.where[name], self.kinds[name] = file, (shape, dtype in _FLOATS)

    def read(self, name: str) -> torch.Tensor:
        with open_weights(self.path / self.where[name]) as reader:
            return reader.get_tensor(name)


def _item_bytes(dtype: str) -> int:
    bits = {"BOOL": 8, "BF16": 16}.get(dtype) or int("".join(c for c in dtype.split("_")[0] if c.isdigit()))
    return bits // 8


def _check_alike(first: _Folder, other: _Folder) -> None:
    if first.config.get("model_type") != other.config.get("model_type"):
        raise ValueError(
            f"{first.path} is a {first.config.get('model_type')} model and {other.path} a {other.config.get('model_type')} "
            "model; only fine-tuned copies of one model are merged"
        )
    if missing := sorted(set(first.kinds) ^ set(other.kinds)):
        have = first.path if missing[0] in first.kinds else other.path
        raise ValueError(
            f"only {have} has {missing[0]} ({len(missing)} tensors are in one of the two); they are no copies of one model, or "
            "one of them is saved with its adapters apart"
        )
    for name, (shape, _) in first.kinds.items():
        if other.kinds[name][0] != shape:
            raise ValueError(
                f"{name} is {list(shape)} in {first.path} and {list(other.kinds[name][0])} in {other.path}; resize the "
                "embeddings of one if their vocabularies differ in padding, or choose models of one shape"
            )
    different = [
        key
        for key in sorted(set(first.config) | set(other.config))
        if key not in _MAY_DIFFER and json.dumps(first.config.get(key)) != json.dumps(other.config.get(key))
    ]
    shaping = [key for key in different if isinstance(first.config.get(key), (int, float, bool)) and "token" not in key]
    if shaping:
        key = shaping[0]
        raise ValueError(
            f"config.json says {key} is {first.config.get(key)} in {first.path} and {other.config.get(key)} in {other.path}; "
            "models that compute differently cannot be merged"
        )
