"""What every export reads: a stock model directory with zeros, whatever the user handed in.

    with open_source("packed-or-dense", scratch) as source:
        source.config                     config.json as a dict
        source.names                      every tensor's name, in the order of the files
        source.tensor(name)               one tensor, from its file
        source.weights                    {name: its report}: every weight that could be sparse, zeros counted
        source.sparse(0.1)                the names of those with at least a tenth of zeros
        source.model(), source.tokenizer()   through transformers

A packed directory is unpacked and a model in memory saved into a temporary directory first, so that there is one kind of
source: tensor by tensor for the formats that need no more, a path for those whose own converter wants one.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from hf_sparse.masks import Masks, training_companions

__all__ = ["Source", "open_source"]

_KINDS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


class Source:
    """A dense model directory. Tensors are read when asked for; nothing is held.

    Attributes:
        path: the directory that is read: dense safetensors files with zeros, a stock config.json.
        origin: the directory the user named; None for a model in memory.
        config: config.json.
        files: ``{tensor name: file}``, in the order of the files.
    """

    def __init__(self, path: Path, origin: Path | None):
        self.path, self.origin = path, origin
        self.config: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
        self.files = {name: file for file in _weight_files(path) for name in _names(file)}
        if companions := training_companions(set(self.files)):
            raise ValueError(
                f"{path} is a checkpoint in the middle of sparse training: it holds {min(companions)} to resume. Save "
                "the trained model (trainer.save_model, or from_pretrained and save_pretrained) and export that"
            )

    @property
    def names(self) -> list[str]:
        return list(self.files)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of that name, dense, on the CPU, in the dtype it is stored in."""
        from safetensors import safe_open

        with safe_open(self.files[name], "pt") as reader:
            return reader.get_tensor(name)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor with its name, one in memory at a time."""
        for name in self.files:
            yield name, self.tensor(name)

    @cached_property
    def _shapes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        from safetensors import safe_open

        found = {}
        for file in dict.fromkeys(self.files.values()):
            with safe_open(file, "pt") as reader:
                for name in reader.offset_keys():
                    view = reader.get_slice(name)
                    kind = _KINDS.get(view.get_dtype()) or reader.get_tensor(name).dtype
                    found[name] = (kind, tuple(view.get_shape()))
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name][1]

    def dtype(self, name: str) -> torch.dtype:
        return self._shapes[name][0]

    @property
    def dense_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in self._shapes.values())

    @cached_property
    def weights(self) -> dict[str, Any]:
        """``{name: ParameterReport}`` of every stored weight that could be sparse (linear, convolution, expert)."""
        from hf_sparse.inspection import inspect_checkpoint

        return {entry.name: entry for entry in inspect_checkpoint(str(self.path)).parameters}

    def sparse(self, least: float = 0.0) -> list[str]:
        """Names of the weights with zeros, and with at least the fraction ``least`` of them."""
        return [name for name, entry in self.weights.items() if entry.density < 1 and 1 - entry.density >= least]

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in all weights that could be sparse; 0 where there are none."""
        total = sum(entry.numel for entry in self.weights.values())
        kept = sum(entry.density * entry.numel for entry in self.weights.values())
        return 1 - kept / total if total else 0.0

    def model(self, dtype: str = "auto"):
        """The model, loaded afresh by stock transformers, in evaluation mode: what is done to it, nobody else sees."""
        import transformers

        stated = getattr(transformers, (self.config.get("architectures") or [""])[0], None)
        loader = stated or transformers.AutoModelForCausalLM
        chosen = dtype if dtype == "auto" else getattr(torch, dtype)
        return loader.from_pretrained(self.path, dtype=chosen).eval()

    def tokenizer(self):
        """The tokenizer beside the weights; None if there is none."""
        from transformers import AutoTokenizer

        if not any(
            (self.path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
        ):
            return None
        return AutoTokenizer.from_pretrained(self.path)

    def other_files(self) -> list[Path]:
        """Files beside the weights (config.json, tokenizer, generation config, chat template, model card)."""
        return sorted(file for file in self.path.iterdir() if file.is_file() and not file.name.endswith(_WEIGHTS))

    def copy_other_files(self, output: Path, leave_out: tuple[str, ...] = ()) -> None:
        for file in self.other_files():
            if file.name not in leave_out:
                shutil.copyfile(file, output / file.name)


@contextmanager
def open_source(source: Any, scratch: str | os.PathLike) -> Iterator[Source]:
    """The :class:`Source` of a directory or a model, while the block runs.

    Args:
        source: a directory, dense or packed, or a transformers model.
        scratch: where a temporary directory may be made, for a packed source or a model.

    Raises:
        FileNotFoundError: no such directory, or no config.json or safetensors weights in it.
        ValueError: a file, a quantized checkpoint, a PEFT model, or a checkpoint in the middle of sparse training.
    """
    if not isinstance(source, (str, os.PathLike)):
        with _temporary(scratch) as folder:
            _save(source, folder)
            yield Source(folder, None)
        return
    path = Path(os.path.abspath(source))
    if not path.exists():
        raise FileNotFoundError(f"no such directory: {source} (a model of the Hub is downloaded first: hf download)")
    if path.is_file():
        raise ValueError(f"{source} is a file; give the directory that holds config.json and the safetensors files")
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} is not a model directory: it has no config.json")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    quantization = (config.get("quantization_config") or {}).get("quant_method")
    if quantization not in (None, "hf_sparse"):
        raise ValueError(f"{path} is quantized ({quantization}); only plain float weights are exported")
    if quantization is None:
        yield Source(path, path)
        return
    from hf_sparse.formats import unpack_checkpoint

    with _temporary(scratch) as folder:
        unpack_checkpoint(path, folder)
        yield Source(folder, path)


@contextmanager
def _temporary(scratch: str | os.PathLike) -> Iterator[Path]:
    Path(scratch).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".hf-sparse-export-", dir=scratch))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _save(model: Any, folder: Path) -> None:
    from hf_sparse.atomic import require_free_space

    if hasattr(model, "peft_config") or not hasattr(model, "save_pretrained"):
        hint = "; merge its adapters first (merge_and_unload)" if hasattr(model, "peft_config") else ""
        raise ValueError(f"a directory or a transformers model is exported, got {type(model).__name__}{hint}")
    if Masks.in_checkpoints(model):
        raise ValueError(
            "the model is in the middle of sparse training; finish it (SparseTraining.finish) and export then"
        )
    require_free_space(folder, sum(p.numel() * p.element_size() for p in model.parameters()))
    model.save_pretrained(folder)


def _weight_files(path: Path) -> list[Path]:
    """The safetensors files that make up the model."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        files = [path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise FileNotFoundError(f"{index} names files that do not exist: {', '.join(missing)}")
        return files
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    found = sorted(file.name for file in path.iterdir() if file.name.endswith(_WEIGHTS))
    raise FileNotFoundError(f"{path} has no model.safetensors; weights found: {', '.join(found) or 'none'}")


def _names(file: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as reader:
            return list(reader.offset_keys())
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or damaged: {error}") from None
