"""Inspecting a checkpoint, whoever made it: true densities, patterns, bytes, and whether it could run as 2:4.

Tensors are read one at a time from the safetensors files, packed ones are unpacked on the way, and the model itself is
never built: transformers makes it without memory (on the meta device) to learn which tensors are weights and how they are
laid out; tensors it stores under other names (experts saved one by one) are recognised by their shape.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from hf_sparse.config import CONFIG_KEY
from hf_sparse.flops import active_share, macs_per_token
from hf_sparse.formats.unpack import is_packed, unpack_tensor
from hf_sparse.patterns import parse
from hf_sparse.pruning.measure import measure_parameter
from hf_sparse.report import SparsityReport
from hf_sparse.targets import Target, find_targets

__all__ = ["inspect_checkpoint"]

_NEVER_SPARSE = re.compile(r"(embed|wte|wpe|norm|ln_|lm_head|router|\.gate\.weight$|position)")


def inspect_checkpoint(
    source: str, trust_remote_code: bool = False, on_tensor: Callable[[str, int, int], None] | None = None
) -> SparsityReport:
    """The report of a checkpoint on disk or on the Hub.

    Args:
        source: a directory with ``config.json`` and safetensors files, or a Hub id.
        on_tensor: called with (name, tensors done, tensors in all).

    Raises:
        FileNotFoundError, ValueError: no such checkpoint, no safetensors files in it, or a damaged file.
    """
    directory = _local_directory(source)
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        others = ", ".join(sorted(p.name for p in directory.iterdir())[:10])
        raise ValueError(f"{source} has no .safetensors files to inspect; it has {others}")
    config = json.loads((directory / "config.json").read_text()) if (directory / "config.json").is_file() else {}
    model, known = _skeleton(directory, trust_remote_code)
    recorded = config.get(CONFIG_KEY) or {}
    default = parse(recorded.get("pattern") or "unstructured")
    parameters, total, macs_other = [], 0, 0.0
    names = [(file, name) for file in files for name in _names(file)]
    for done, (name, tensor) in enumerate(_tensors(names), start=1):
        total += tensor.numel()
        target, share = _target(name, tensor, known, model)
        if target is not None:
            pattern = default if default.fits(target.shape) is None else parse("unstructured")
            entry = measure_parameter(target, tensor, pattern, share)
            if entry.density == 1.0:  # a dense weight follows no pattern; it is just dense
                entry.pattern, entry.conforms = "unstructured", True
            parameters.append(entry)
        if on_tensor is not None:
            on_tensor(name, done, len(names))
    macs_sparse = sum(p.macs_per_token for p in parameters)
    macs_dense = sum(p.macs_per_token / p.density if p.density else 0.0 for p in parameters)
    if model is not None:  # the head is not listed, but it is work
        listed = {p.name for p in parameters}
        rest = {n: t for n, t in find_targets(model, ["re:.*"]).items() if n not in known}
        macs_other = macs_per_token(model, {n: t for n, t in rest.items() if n not in listed}, {})
    return SparsityReport(
        model=source,
        config=recorded,
        parameters=parameters,
        total_parameters=total,
        macs_dense=macs_dense + macs_other,
        macs_sparse=macs_sparse + macs_other,
    )


def _local_directory(source: str) -> Path:
    path = Path(source)
    if path.is_dir():
        return path
    if path.is_file():
        raise ValueError(f"{source} is a file; give the directory that holds config.json and the safetensors files")
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise FileNotFoundError(f"no such directory: {source}")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json", "*.py"]))


def _skeleton(directory: Path, trust_remote_code: bool):
    """(model without memory, its default targets by name); (None, {}) for a config transformers does not know."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        return model, find_targets(model)
    except (ValueError, KeyError, OSError, ImportError):
        return None, {}


def _names(file: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as reader:
            return list(reader.keys())
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _tensors(names: list[tuple[Path, str]]) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    opened, reader = None, None
    for file, name in names:
        if file != opened:
            opened, reader = file, safe_open(file, "pt")
        tensor = reader.get_tensor(name)
        yield name, unpack_tensor(tensor) if is_packed(tensor) else tensor


def _target(name: str, tensor: torch.Tensor, known: dict[str, Target], model) -> tuple[Target | None, float]:
    """How to see a stored tensor as a matrix, and the share of tokens that use it; (None, 0) if it is no such weight."""
    prefix = getattr(model, "base_model_prefix", "") if model is not None else ""
    for candidate in (name, f"{prefix}.{name}"):
        if candidate in known:
            return known[candidate], active_share(model, known[candidate])
    module, _, attribute = name.rpartition(".")
    if attribute != "weight" or tensor.dim() != 2 or not tensor.is_floating_point() or _NEVER_SPARSE.search(name):
        return None, 0.0
    if model is not None and not re.search(r"\.\d+\.", module):  # e.g. a head the model does not list as sparse
        return None, 0.0
    experts = [t for t in known.values() if t.is_experts and module.startswith(t.module + ".")]
    if model is not None and not experts:
        return None, 0.0
    kind = re.sub(r"\.\d+\.", ".", module.rpartition("experts.")[2]) if experts else module.rpartition(".")[2]
    share = active_share(model, experts[0]) if experts else 1.0
    target = Target(
        name, module if not experts else f"{experts[0].module}.{kind}", "Linear", tuple(tensor.shape), "matrix"
    )
    return target, share
