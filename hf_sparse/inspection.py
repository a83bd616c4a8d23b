"""Inspecting a checkpoint, whoever made it: true densities, patterns, bytes, and whether it could run as 2:4.

Tensors are read one at a time from the safetensors files, packed ones are unpacked on the way, and the model itself is
never built: transformers makes it without memory (on the meta device) to learn which tensors are weights and how they are
laid out. Names in a file are not always those in the model (experts saved one by one, the parts of a vision-language model
in another order); such tensors are recognised by their layer and the end of their name.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from hf_sparse.config import CONFIG_KEY
from hf_sparse.flops import active_share, macs_per_token
from hf_sparse.formats.unpack import is_packed, unpack_tensor
from hf_sparse.masks import training_companions
from hf_sparse.patterns import NM, Pattern, parse
from hf_sparse.pruning.measure import measure_parameter
from hf_sparse.report import SparsityReport
from hf_sparse.targets import Target, find_targets, match_names

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
        FileNotFoundError, ValueError: no such checkpoint, no safetensors files in it, one missing, or a damaged file.
    """
    directory = _local_directory(source)
    names = [(file, name) for file in _weight_files(directory, source) for name in _names(file)]
    companions = training_companions({name for _, name in names})  # of a checkpoint in the middle of sparse training
    names = [(file, name) for file, name in names if name not in companions]
    config = json.loads((directory / "config.json").read_text()) if (directory / "config.json").is_file() else {}
    recorded = config.get(CONFIG_KEY) or {}
    model, known = _skeleton(directory, trust_remote_code, recorded.get("targets"))
    owners = {name: _owner(name, known, _aliases(model, known)) for _, name in names}
    if 2 * len({owner.name for owner in owners.values() if owner}) < len(known):
        model, known, owners = None, {}, dict.fromkeys(owners)  # stored under names that are not the model's at all
    pattern_of = _patterns(recorded, known)
    parameters, total, macs_dense = [], 0, 0.0
    for done, (name, tensor) in enumerate(_tensors(names), start=1):
        total += tensor.numel()
        owner = owners[name]
        target = _target(name, tensor, owner, model)
        if target is not None:
            share = 1.0 if owner is None else active_share(model, owner)
            pattern = pattern_of((owner or target).name, target.matrix(tensor))
            entry = measure_parameter(target, tensor, pattern, share)
            if entry.density == 1.0:  # a dense weight follows no pattern; it is just dense
                entry.pattern, entry.conforms = "unstructured", True
            parameters.append(entry)
            macs_dense += target.numel * share
        if on_tensor is not None:
            on_tensor(name, done, len(names))
    macs_sparse, macs_other = sum(p.macs_per_token for p in parameters), 0.0
    if model is not None:  # the head is not listed, but it is work
        rest = {n: t for n, t in find_targets(model, ["re:.*"]).items() if n not in known}
        macs_other = macs_per_token(model, rest, {})
    return SparsityReport(
        model=source,
        config=recorded,
        parameters=parameters,
        total_parameters=total,
        macs_dense=macs_dense + macs_other,
        macs_sparse=macs_sparse + macs_other,
        notes=["in the middle of sparse training: its masks lie beside the weights and are not counted"]
        if companions
        else [],
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


def _weight_files(directory: Path, source: str) -> list[Path]:
    """The files that make up the model: those its index names, or the one of the usual name, or all there are."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        files = [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise FileNotFoundError(f"{index} names files that are not there: {', '.join(missing)}")
        return files
    if (directory / "model.safetensors").is_file():  # what lies beside it holds the same weights in another layout
        return [directory / "model.safetensors"]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        others = ", ".join(sorted(p.name for p in directory.iterdir())[:10])
        raise ValueError(f"{source} has no .safetensors files to inspect; it has {others}")
    return files


def _skeleton(directory: Path, trust_remote_code: bool, targets: list[str] | None):
    """(model without memory; its default targets and those that the config records, by name); (None, {}) where
    transformers cannot make the model."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        stated = getattr(transformers, (config.architectures or [""])[0], None)
        with torch.device("meta"):
            if stated is not None:
                model = stated(config)
            else:
                model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        known = find_targets(model)
    except Exception:  # whatever a foreign config makes transformers raise, the tensors can still be measured
        return None, {}
    with contextlib.suppress(ValueError):  # recorded for another layout of the model
        known |= {} if targets is None else find_targets(model, targets)
    return model, known


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


def _aliases(model, known: dict[str, Target]) -> dict[str, Target]:
    """The targets by every name they have in the model, that of a tied weight included."""
    if model is None:
        return {}
    owned = {id(model.get_parameter(name)): target for name, target in known.items()}
    pairs = model.named_parameters(remove_duplicate=False)
    names = {name: owned[id(parameter)] for name, parameter in pairs if id(parameter) in owned}
    prefix = f"{model.base_model_prefix}."
    return {name.removeprefix(prefix): target for name, target in names.items()} | names


def _owner(name: str, known: dict[str, Target], aliases: dict[str, Target]) -> Target | None:
    """The target a stored tensor is, or is one expert of.

    Tried in turn: its name; the fused experts of the same layer; the target of the same layer and end of name, of several
    (the layers of a text and of a vision model) the one that shares most of the beginning too.
    """
    if name in aliases:
        return aliases[name]
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal() and i), None)
    if number is None:
        return None
    if re.search(r"\.experts\.\d+\.", name):
        return next((t for t in known.values() if t.is_experts and f".{parts[number]}." in t.name), None)
    end = ".".join(["", *parts[number - 1 :]])
    alike = [t for t in known.values() if f".{t.name}".endswith(end)]
    ranked = sorted(alike, key=lambda t: len(set(parts[: number - 1]) & set(t.name.split("."))), reverse=True)
    return ranked[0] if ranked else None


def _target(name: str, tensor: torch.Tensor, owner: Target | None, model) -> Target | None:
    """How to see a stored tensor as a matrix; None if it is no weight that could be sparse."""
    if owner is not None and tuple(owner.matrix(tensor).shape) == owner.shape:
        return owner
    module, _, attribute = name.rpartition(".")
    if attribute != "weight" or tensor.dim() != 2 or not tensor.is_floating_point() or _NEVER_SPARSE.search(name):
        return None
    if model is not None and owner is None:  # the model knows its weights, and this is none that is sparse
        return None
    return Target(name, module, "Linear", tuple(tensor.shape), "matrix")


def _patterns(recorded: dict, known: dict[str, Target]) -> Callable[[str, torch.Tensor], Pattern]:
    """A function from (target name, matrix) to the pattern the config says it was pruned to."""
    default, unstructured = parse(recorded.get("pattern") or "unstructured"), parse("unstructured")
    mixed = isinstance(default, NM) and recorded.get("allocation", "uniform") != "uniform"
    overrides: dict[str, Pattern] = {}
    for entry, value in (recorded.get("overrides") or {}).items():
        try:
            matched = match_names(entry, known)
        except ValueError:
            continue  # recorded for another layout of the model
        for name in matched:
            overrides.setdefault(name, parse(value) if isinstance(value, str) else default)

    def pattern_of(name: str, matrix: torch.Tensor) -> Pattern:
        pattern = overrides.get(name, default)
        if pattern.fits(tuple(matrix.shape)) is not None:
            return unstructured
        if mixed and name not in overrides:  # the allocation chose n for each matrix: the smallest that holds
            return NM(max(1, int((matrix != 0).reshape(-1, default.m).sum(dim=1).max())), default.m)
        return pattern

    return pattern_of
