"""A Hugging Face model directory as files: which hold weights, which go along unchanged."""

import json
import os
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open

from hf_sparse.atomic import atomic_write_text
from hf_sparse.formats.unpack import PackedTensorError

__all__ = [
    "INDEX",
    "WEIGHTS",
    "copy_files",
    "open_weights",
    "other_files",
    "read_config",
    "require_apart",
    "weight_files",
    "write_json",
]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_config(src: Path) -> dict:
    if not (src / "config.json").is_file():
        raise FileNotFoundError(f"{src} is not a model directory: it has no config.json")
    return json.loads((src / "config.json").read_text(encoding="utf-8"))


def require_apart(src: Path, out: Path) -> None:
    """The output is a directory of its own: ``overwrite`` would delete a source that is the output or lies inside it
    (with its ``checkpoint-*`` folders, which are not copied), and a source would be copied into an output inside it."""
    src, out = src.resolve(), out.resolve()
    if src == out:
        raise ValueError(f"{out} is the source itself; choose another output directory")
    if src in out.parents or out in src.parents:
        raise ValueError(f"{src} and {out} lie inside one another; choose another output directory")


def weight_files(src: Path) -> list[str]:
    if (src / INDEX).is_file():
        files = sorted(set(json.loads((src / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        if missing := [file for file in files if not (src / file).is_file()]:
            raise FileNotFoundError(f"{src / INDEX} names files that do not exist: {', '.join(missing)}")
        return files
    if (src / WEIGHTS).is_file():
        return [WEIGHTS]
    found = sorted(f.name for f in src.iterdir() if f.suffix in (".safetensors", ".bin", ".pt", ".gguf"))
    raise FileNotFoundError(f"{src} has neither {WEIGHTS} nor {INDEX}; weights found: {', '.join(found) or 'none'}")


def open_weights(path: Path):
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise PackedTensorError(f"{path} is truncated or damaged: {error}") from None


def other_files(src: Path, weights) -> list[Path]:
    """All files to copy as they are: not the weights, their index and config.json, which are rewritten."""
    rewritten = {*weights, INDEX, "config.json"}
    files = []
    for folder, folders, names in os.walk(src):
        folders[:] = [f for f in folders if not f.startswith(".") and not re.fullmatch(r"checkpoint-\d+", f)]
        files += [Path(folder) / name for name in names]
    return sorted(file for file in files if file.relative_to(src).as_posix() not in rewritten)


def copy_files(src: Path, staging: Path, files: list[Path]) -> None:
    for file in files:
        target = staging / file.relative_to(src)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)  # the content: files of the Hub cache are links


def write_json(path: Path, content: dict) -> None:
    atomic_write_text(path, json.dumps(content, indent=2) + "\n")
