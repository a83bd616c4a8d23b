"""Exports: a sparse model in the format of another runtime.

    export("smollm2-50", "gguf", "smollm2-50.gguf")          a directory (dense with zeros, or packed)
    export(model, "masks", "masks.safetensors")              a transformers model in memory

One file of this package per format. It ends with an :class:`Exporter`, plain functions under one name:

    GGUF = Exporter(what="...", zeros="...", checked="...", output="file",
                    options={"dtype": "..."}, write=write_gguf, check=check_gguf, verify=verify_gguf, consumer="gguf")

    check(source, **options)                   raises ValueError for what the format cannot represent; before any work
    write(source, output, **options) -> dict   writes ``output`` (a file or an empty directory, as ``output`` says) and
                                               returns facts: ``tensors`` (how many were written), ``notes`` (a list)
    verify(source, output, **options) -> str   loads ``output`` with the real consumer, compares it with the source, says
                                               what was compared; raises RuntimeError where they differ

The options of a format are the keyword-only parameters of its ``write``, with defaults (a value that comes as text is read
as the type of its default); all three functions receive them all. ``source`` is a :class:`hf_sparse.export.source.Source`:
always a stock directory with zeros. ``output`` is a temporary place: what a user sees appears when it is complete and
verified, or not at all. A new format is a file here and a line in :data:`TARGETS`.
"""

import difflib
import importlib
import importlib.util
import inspect
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_sparse.atomic import atomic_directory

__all__ = ["TARGETS", "Exporter", "export", "exporter"]

# target -> the module that has it and the name it has there
TARGETS: dict[str, str] = {
    "masks": "hf_sparse.export.masks:MASKS",
    "bitmask": "hf_sparse.export.bitmask:BITMASK",
    "cerebras": "hf_sparse.export.cerebras:CEREBRAS",
    "torch-2:4": "hf_sparse.export.torch_24:TORCH_24",
    "gguf": "hf_sparse.export.gguf:GGUF",
    "csr": "hf_sparse.export.tensors:CSR",
    "bsr": "hf_sparse.export.tensors:BSR",
    "coo": "hf_sparse.export.tensors:COO",
    "macko": "hf_sparse.export.macko:MACKO",
    "onnx": "hf_sparse.export.onnx:ONNX",
    "openvino": "hf_sparse.export.openvino:OPENVINO",
    "vllm": "hf_sparse.export.vllm:VLLM",
}


@dataclass(frozen=True, kw_only=True)
class Exporter:
    """A format, in plain functions (see the module).

    Attributes:
        what: one sentence: what the output is.
        zeros: one or two sentences: what the runtime does with zeros today, for users to read.
        checked: the date, versions and sources that ``zeros`` was checked against.
        output: ``file`` or ``directory``. suffix: what a file's name must end with, if its readers want that.
        options: ``{name: explanation}`` of every keyword-only parameter of ``write``.
        consumer: the module whose presence verification needs; None: it needs nothing but hf_sparse's dependencies.
        requires: the module that writing needs, with the way to install it in ``install``.
    """

    what: str
    zeros: str
    checked: str
    write: Callable[..., dict]
    check: Callable[..., None] | None = None
    verify: Callable[..., str] | None = None
    output: str = "file"
    suffix: str = ""
    options: dict[str, str] = field(default_factory=dict)
    consumer: str | None = None
    requires: str | None = None
    install: str | None = None


def exporter(target: str) -> Exporter:
    """The :class:`Exporter` of a target.

    Raises:
        ValueError: there is no such target; the message names near matches.
    """
    if target not in TARGETS:
        near = difflib.get_close_matches(target.lower(), TARGETS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"no export target {target!r}; {hint}there are {', '.join(TARGETS)}")
    module, _, name = TARGETS[target].partition(":")
    return getattr(importlib.import_module(module), name)


def export(
    source: Any,
    target: str,
    output: str | os.PathLike,
    *,
    overwrite: bool = False,
    verify: bool | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Write a sparse model in another runtime's format; ``output`` appears only when it is complete and verified.

    Args:
        source: a directory with config.json and safetensors files, dense with zeros or packed; or a transformers model
            in memory (it is saved to a temporary directory beside ``output`` while this works, as a packed one is unpacked).
        target: one of :data:`TARGETS`.
        output: the file or directory to write.
        verify: load the output with the format's real consumer and compare. None: where the consumer is installed;
            True: the consumer must be there; False: do not.
        options: those of the target, see ``exporter(target).options``.

    Returns:
        ``target``, ``output``, ``files`` (names), ``bytes``, ``dense_bytes`` (of the source's tensors), ``tensors``,
        ``sparsity`` (of the weights that could be sparse), ``zeros`` and ``checked`` (what the runtime does with zeros),
        ``verified`` (how, or why not), ``notes``.

    Raises:
        ValueError: unknown target or option; the model is none that the format can represent.
        FileNotFoundError, FileExistsError, ModuleNotFoundError: no source; an output in the way; a package is missing.
        RuntimeError: the consumer reads something else than was written; nothing is left behind.
    """
    from hf_sparse.export.source import open_source

    chosen = exporter(target)
    options = _read_options(target, chosen, options)
    if chosen.requires is not None and importlib.util.find_spec(chosen.requires) is None:
        hint = chosen.install or f"pip install {chosen.requires}"
        raise ModuleNotFoundError(f"{target} needs {chosen.requires}: {hint}")
    output = Path(os.path.abspath(output))
    if not output.name.endswith(chosen.suffix):
        raise ValueError(f"a {target} file ends in {chosen.suffix}, got {output.name}")
    _check_output(output, chosen.output, overwrite)
    unverified = _why_unverified(target, chosen, verify)
    with ExitStack() as stack:
        opened = stack.enter_context(open_source(source, scratch=output.parent))
        _require_apart(opened.origin, output, chosen.output)
        if chosen.check is not None:
            chosen.check(opened, **options)
        if chosen.output == "directory":
            place = stack.enter_context(atomic_directory(output, overwrite))
        else:
            place = stack.enter_context(_staged_file(output))
        facts = chosen.write(opened, place, **options)
        verified = unverified or chosen.verify(opened, place, **options)
        files = sorted(file for file in place.rglob("*") if file.is_file()) if place.is_dir() else [place]
        return {
            "target": target,
            "output": str(output),
            "files": [file.relative_to(place).as_posix() if place.is_dir() else output.name for file in files],
            "bytes": sum(file.stat().st_size for file in files),
            "dense_bytes": opened.dense_bytes,
            "sparsity": opened.sparsity,
            **({"notes": []} | facts),
            "zeros": chosen.zeros,
            "checked": chosen.checked,
            "verified": verified,
        }


def _read_options(target: str, chosen: Exporter, given: dict[str, Any]) -> dict[str, Any]:
    """Every option of the target: its default, or what was given (text is read as the default's type)."""
    parameters = inspect.signature(chosen.write).parameters.values()
    options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    for name, value in given.items():
        if name not in options:
            near = difflib.get_close_matches(name, options, n=1)
            known = ", ".join(options) or "none"
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"{target} has no option {name!r}; {hint}its options: {known}")
        options[name] = _read_as(options[name], value, f"{target}: option {name}")
    return options


def _read_as(default: Any, value: Any, what: str) -> Any:
    if not isinstance(value, str) or isinstance(default, str) or default is None:
        return value
    if isinstance(default, bool):
        if value.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise ValueError(f"{what} is true or false, got {value!r}")
        return value.lower() in ("true", "1", "yes")
    try:
        return type(default)(value)
    except ValueError:
        raise ValueError(f"{what} is a number such as {default}, got {value!r}") from None


def _check_output(output: Path, kind: str, overwrite: bool) -> None:
    if kind == "directory":
        if output.exists() and not output.is_dir():
            raise FileExistsError(f"{output} exists and is not a directory; this target writes a directory")
        if output.is_dir() and any(output.iterdir()) and not overwrite:
            raise FileExistsError(
                f"{output} is not empty; pass overwrite=True (--overwrite) to replace it, or choose another"
            )
    elif output.is_dir():
        raise FileExistsError(f"{output} is a directory; this target writes a file: add a file name")
    elif output.exists() and not overwrite:
        raise FileExistsError(
            f"{output} exists; pass overwrite=True (--overwrite) to replace it, or choose another name"
        )


def _require_apart(origin: Path | None, output: Path, kind: str) -> None:
    """A source must survive its export: no output directory around or inside it, no output file in the place of one of its
    own."""
    if origin is None:
        return
    origin, output = origin.resolve(), output.resolve()
    if kind == "directory" and (output == origin or origin in output.parents or output in origin.parents):
        raise ValueError(f"{output} and the source {origin} lie inside one another; choose another output directory")
    if kind == "file" and output.parent == origin and output.exists():
        raise FileExistsError(f"{output} is a file of the source; choose another name")


def _why_unverified(target: str, chosen: Exporter, verify: bool | None) -> str | None:
    """Why the output will not be verified; None where it will be."""
    if verify is False:
        return "no: switched off"
    if chosen.verify is None:
        return "no: there is nothing here that could load it"
    if chosen.consumer is not None and importlib.util.find_spec(chosen.consumer) is None:
        if verify:
            raise ModuleNotFoundError(f"verifying {target} needs {chosen.consumer}, which is not installed here")
        return f"no: {chosen.consumer} is not installed here"
    return None


@contextmanager
def _staged_file(output: Path) -> Iterator[Path]:
    """A path of the same name in a hidden directory beside ``output``, moved into place when the block ends well."""
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.tmp-", dir=output.parent))
    try:
        yield folder / output.name
        os.replace(folder / output.name, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
