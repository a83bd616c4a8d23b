"""Packed checkpoints: a Hugging Face model directory whose sparse weights take the bytes of their nonzeros.

    save_packed(model, "out")             model -> packed directory
    pack_checkpoint("dense", "packed")    any directory of safetensors -> packed, file by file, one tensor in memory
    unpack_checkpoint("packed", "dense")  back, bit for bit, to a stock directory
    plan_checkpoint("dense")              what packing would save, without writing

A packed directory keeps its file and tensor names; a packed weight is a ``uint8`` tensor that describes itself (see
``unpack``). Tensors that would not shrink by ``min_saving`` (norms, embeddings, biases) stay as they are.

Its config.json changes so that nobody can load it wrongly. A stock loader that meets an unknown ``quant_method`` only
warns, and would go on with random weights; therefore ``model_type`` becomes ``hf_sparse``, which stock transformers
refuses, and the real one moves to ``base_model_type``. ``auto_map`` points to ``configuration_hf_sparse.py``, a copy of
our reading code, so that ``trust_remote_code=True`` loads the directory where hf_sparse is not installed. After
``import hf_sparse`` no flag is needed, and what comes out either way is the stock model class with plain dense weights.
"""

import ast
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hf_sparse.atomic import atomic_directory, atomic_write_text, require_free_space
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
from hf_sparse.formats.pack import GROUP_SIZES, choose, pack_tensor
from hf_sparse.formats.safetensors_stream import Entry, write_safetensors
from hf_sparse.formats.unpack import FORMAT_VERSION, Header, PackedTensorError, check_packed, is_packed, unpack_tensor
from hf_sparse.masks import training_companions

__all__ = ["PackReport", "pack_checkpoint", "plan_checkpoint", "remote_code", "save_packed", "unpack_checkpoint"]

REMOTE_CODE, CONFIG_CLASS = "configuration_hf_sparse.py", "HfSparseConfig"
MODEL_TYPE = QUANT_METHOD = "hf_sparse"
_CODES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class PackReport:
    """What packing did: bytes of the weight files before and after, and the packing of every packed tensor."""

    dense_bytes: int
    packed_bytes: int
    tensors: dict[str, Header] = field(repr=False)

    @property
    def ratio(self) -> float:
        """Packed bytes over dense bytes, all tensors of the checkpoint counted."""
        return self.packed_bytes / max(self.dense_bytes, 1)

    def __str__(self):
        kinds: dict[str, int] = {}
        for header in self.tensors.values():
            kinds[str(header)] = kinds.get(str(header), 0) + 1
        told = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "no"
        size = f"{self.dense_bytes / 1e6:.1f} MB -> {self.packed_bytes / 1e6:.1f} MB ({self.ratio:.1%})"
        return f"{told} tensors packed, {size}"


@dataclass
class _Tensor:
    """A tensor of the source: where it is, what it takes as it is, and how it will be packed (None: not)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    header: Header | None


def plan_checkpoint(src_dir: str | os.PathLike, *, min_saving: float = 0.1) -> PackReport:
    """What :func:`pack_checkpoint` would do to ``src_dir``, reading every weight once and writing nothing."""
    src = Path(src_dir)
    config = read_config(src)
    _require_plain(src, config)
    return _report(_plan(src, min_saving, config))


def pack_checkpoint(
    src_dir: str | os.PathLike, out_dir: str | os.PathLike, *, min_saving: float = 0.1, overwrite: bool = False
) -> PackReport:
    """Write a packed copy of a model directory. ``out_dir`` appears only when it is complete.

    All other files (tokenizer, generation config, README, …) and subdirectories are copied, except hidden
    subdirectories and ``checkpoint-*``.

    Args:
        min_saving: a tensor is packed if that takes at least this share of its bytes away.

    Raises:
        FileNotFoundError: no config.json or no safetensors weights in ``src_dir``.
        FileExistsError: ``out_dir`` is not empty and ``overwrite`` is off.
        ValueError: the checkpoint is packed or quantized already, needs custom code, or a file is damaged; or one
            directory lies inside the other.
        OSError: not enough disk space.
    """
    src = Path(src_dir)
    config = read_config(src)
    _require_plain(src, config)
    if not 0.0 <= min_saving < 1.0:
        raise ValueError(f"min_saving is a share of the bytes and lies in [0, 1), got {min_saving}")
    require_apart(src, Path(out_dir))
    with atomic_directory(out_dir, overwrite) as staging:
        plan = _plan(src, min_saving, config)
        report = _report(plan)
        others = other_files(src, plan)
        require_free_space(staging, report.packed_bytes + sum(file.stat().st_size for file in others))

        def entry(tensor: _Tensor, read: Callable[[], torch.Tensor]) -> Entry:
            if tensor.header is None:
                return Entry(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes, read)
            size = tensor.header.nbytes
            return Entry(tensor.name, "U8", (size,), size, lambda: pack_tensor(read(), tensor.header))

        _rewrite(src, staging, plan, entry, report.packed_bytes)
        copy_files(src, staging, others)
        packed = {
            **config,
            "model_type": MODEL_TYPE,
            "base_model_type": config["model_type"],
            "auto_map": {"AutoConfig": f"{Path(REMOTE_CODE).stem}.{CONFIG_CLASS}"},
            "quantization_config": {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION},
            "sparse_runtime": None,  # so that from_pretrained(..., sparse_runtime=...) reaches the config of any class
        }
        if "auto_map" in config:
            packed["base_auto_map"] = config["auto_map"]
        write_json(staging / "config.json", packed)
        atomic_write_text(staging / REMOTE_CODE, remote_code())
    return report


def unpack_checkpoint(src_dir: str | os.PathLike, out_dir: str | os.PathLike, *, overwrite: bool = False) -> PackReport:
    """Write the dense copy of a packed directory: the same tensors bit for bit, and the config it was packed from.

    Raises:
        FileNotFoundError: no config.json or no safetensors weights in ``src_dir``.
        FileExistsError: ``out_dir`` is not empty and ``overwrite`` is off.
        ValueError: the checkpoint is not packed, newer than this hf_sparse, or damaged (the file and tensor are named).
        OSError: not enough disk space.
    """
    src = Path(src_dir)
    config = read_config(src)
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") != QUANT_METHOD:
        raise ValueError(f"{src} is not a packed checkpoint: its config.json has no {QUANT_METHOD} quantization_config")
    version = quantization.get("format_version", 1)
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{src} is packed in format {version}, this hf_sparse reads up to {FORMAT_VERSION}: upgrade hf_sparse"
        )
    require_apart(src, Path(out_dir))
    with atomic_directory(out_dir, overwrite) as staging:
        plan = _plan(src, None, config)
        report = _report(plan)
        others = [file for file in other_files(src, plan) if file.name != REMOTE_CODE]
        require_free_space(staging, report.dense_bytes + sum(file.stat().st_size for file in others))

        def entry(tensor: _Tensor, read: Callable[[], torch.Tensor]) -> Entry:
            if tensor.header is None:
                return Entry(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes, read)
            dense = tensor.header
            # the plan has verified the checksum
            unpacked = lambda: unpack_tensor(read(), verify=False)  # noqa: E731
            return Entry(tensor.name, _CODES[dense.dtype], dense.shape, dense.dense_bytes, unpacked)

        _rewrite(src, staging, plan, entry, report.dense_bytes)
        copy_files(src, staging, others)
        write_json(staging / "config.json", base_config(config))
    return report


def save_packed(
    model,
    out_dir: str | os.PathLike,
    *,
    processing_class=None,
    min_saving: float = 0.1,
    overwrite: bool = False,
    **kwargs,
) -> PackReport:
    """Save a transformers model packed: ``model.save_pretrained`` into a temporary directory, then pack that.

    transformers writes the dense files, so every family's own layout on disk is kept (experts un-fused, prefixes
    restored, tied weights once). Needs room for the dense files while it works.

    Args:
        processing_class: a tokenizer or processor to save beside the model.
        kwargs: passed to ``model.save_pretrained`` (``max_shard_size``, …).

    Raises:
        FileExistsError, ValueError, OSError: as :func:`pack_checkpoint`.
    """
    out = Path(os.path.abspath(out_dir))
    if out.is_dir() and any(out.iterdir()) and not overwrite:  # before the long work, not after
        raise FileExistsError(f"{out} is not empty; pass overwrite=True to replace it, or choose another directory")
    out.parent.mkdir(parents=True, exist_ok=True)
    dense = Path(tempfile.mkdtemp(prefix=f".{out.name}.dense-", dir=out.parent))
    try:
        require_free_space(dense, sum(p.numel() * p.element_size() for p in model.parameters()))
        model.save_pretrained(dense, **kwargs)
        if processing_class is not None:
            processing_class.save_pretrained(dense)
        return pack_checkpoint(dense, out, min_saving=min_saving, overwrite=overwrite)
    finally:
        shutil.rmtree(dense, ignore_errors=True)


def base_config(config: dict) -> dict:
    """The config.json of the dense checkpoint that a packed config.json was made from.

    Raises:
        ValueError: it does not say which architecture that was.
    """
    if "base_model_type" not in config:
        raise ValueError("a packed config.json names its architecture in base_model_type; this one does not")
    base = {key: value for key, value in config.items() if key not in ("quantization_config", "sparse_runtime")}
    base["model_type"] = base.pop("base_model_type")
    base.pop("auto_map", None)
    if "base_auto_map" in base:
        base["auto_map"] = base.pop("base_auto_map")
    return base


def remote_code() -> str:
    """The text of ``configuration_hf_sparse.py``: the three modules that reading takes, one after the other, without
    their imports from each other. One file, because the Hub loads remote code file by file."""
    package = Path(__file__).parent.parent
    pieces = [
        '"""Reads packed sparse weights (hf_sparse). Written by hf_sparse beside every packed checkpoint; do not edit."""\n'
    ]
    for name in ("formats/unpack.py", "integrations/packed_config.py", "integrations/quantizer.py"):
        source = (package / name).read_text(encoding="utf-8")
        lines = source.splitlines(keepends=True)
        for node in ast.parse(source).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_sparse"):
                lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
        pieces.append(f"\n# ---- hf_sparse/{name} ----\n" + "".join(lines))
    return "".join(pieces)


def _require_plain(src: Path, config: dict) -> None:
    quantization = config.get("quantization_config")
    if quantization and quantization.get("quant_method") == QUANT_METHOD:
        raise ValueError(f"{src} is packed already; unpack_checkpoint makes it dense again")
    if quantization:
        raise ValueError(
            f"{src} is quantized ({quantization.get('quant_method')}); only plain float weights are packed"
        )
    if not config.get("model_type"):
        raise ValueError(f"{src}/config.json names no model_type")
    if "auto_map" in config:
        from transformers import CONFIG_MAPPING

        if config["model_type"] not in CONFIG_MAPPING:
            raise ValueError(
                f"{src} needs custom code (model_type {config['model_type']!r}); only architectures known to "
                "transformers, or registered with AutoConfig.register, are packed: keep this one dense"
            )


def _plan(src: Path, min_saving: float | None, config: dict) -> dict[str, list[_Tensor]]:
    """For every weight file its tensors in file order, with their packing: chosen from the values where ``min_saving``
    is a number, read from the packed tensors (and verified) where it is None."""
    plan: dict[str, list[_Tensor]] = {}
    sizes = GROUP_SIZES
    if found := re.fullmatch(r"\d+:(\d+)", str((config.get("hf_sparse") or {}).get("pattern", ""))):
        sizes = tuple(sorted({*GROUP_SIZES, int(found[1])}))  # an unusual m that we were told of
    for file in weight_files(src):
        plan[file] = []
        with open_weights(src / file) as reader:
            for name in reader.offset_keys():
                view = reader.get_slice(name)
                dtype, shape = view.get_dtype(), tuple(view.get_shape())
                tensor = reader.get_tensor(name)
                header = None
                if min_saving is not None:
                    header = choose(tensor, sizes)
                    if header and header.nbytes > (1.0 - min_saving) * header.dense_bytes:
                        header = None
                elif is_packed(tensor):
                    try:
                        header = check_packed(tensor)
                    except PackedTensorError as error:
                        raise PackedTensorError(f"{src / file}: tensor {name}: {error}") from None
                plan[file].append(_Tensor(name, dtype, shape, tensor.numel() * tensor.element_size(), header))
    if companions := training_companions({tensor.name for tensors in plan.values() for tensor in tensors}):
        raise ValueError(
            f"{src} is a checkpoint in the middle of sparse training: it holds {min(companions)} to resume. Save the trained "
            "model (trainer.save_model, or from_pretrained and save_pretrained) and pack that"
        )
    return plan


def _report(plan: dict[str, list[_Tensor]]) -> PackReport:
    tensors = [tensor for file in plan.values() for tensor in file]
    return PackReport(
        dense_bytes=sum(t.header.dense_bytes if t.header else t.nbytes for t in tensors),
        packed_bytes=sum(t.header.nbytes if t.header else t.nbytes for t in tensors),
        tensors={t.name: t.header for t in tensors if t.header},
    )


def _rewrite(src: Path, staging: Path, plan: dict[str, list[_Tensor]], entry: Callable, total_size: int) -> None:
    """Write every weight file again, each tensor through ``entry``, and the index with its new total."""
    for file, tensors in plan.items():
        (staging / file).parent.mkdir(parents=True, exist_ok=True)
        with open_weights(src / file) as reader:
            entries = [entry(t, lambda reader=reader, name=t.name: reader.get_tensor(name)) for t in tensors]
            write_safetensors(staging / file, entries, reader.metadata())
    if (src / INDEX).is_file():
        index = json.loads((src / INDEX).read_text(encoding="utf-8"))
        index.setdefault("metadata", {})["total_size"] = total_size
        write_json(staging / INDEX, index)
