"""What ``hf-sparse spectral`` does: the spectra of a checkpoint's layers, or how they changed over those of a training."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from hf_sparse import commands

__all__ = ["run_spectral"]


def run_spectral(arguments) -> dict[str, Any]:
    paths = [found for given in arguments.path for found in _checkpoints(given)]
    if all(_step(path) is not None for path in paths):
        paths.sort(key=_step)  # a shell lists checkpoint-1000 before checkpoint-200
    for file in (arguments.output, arguments.plot):
        commands.check_parent(file)
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("--plot needs matplotlib: pip install 'hf-sparse[plot]'")
    commands.check_device(arguments.device)

    from hf_sparse.atomic import atomic_write_text
    from hf_sparse.instruments import progress_bar
    from hf_sparse.models.spectral import plot_checkpoints, spectrum

    reports = []
    with progress_bar(not arguments.json, "spectra", len(paths)) as step:
        for path in paths:
            model = _load(path, arguments.trust_remote_code).to(arguments.device or "cpu")
            reports.append(spectrum(model, arguments.targets, arguments.ignore or [], cheeger=arguments.cheeger))
            del model  # before the next one is loaded
            step(_name(path))
    entries = [
        {"path": path, "step": _step(path)} | report.to_dict() for path, report in zip(paths, reports, strict=True)
    ]
    result = {"command": arguments.command_line, "checkpoints": entries}
    if arguments.output:
        atomic_write_text(arguments.output, json.dumps(result, indent=1) + "\n")
    if arguments.plot and len(reports) == 1:
        reports[0].plot(arguments.plot)
    elif arguments.plot:
        places = [_step(path) if _step(path) is not None else _name(path) for path in paths]
        plot_checkpoints(places, reports, arguments.plot)
    if not arguments.json:
        commands.console().print(reports[0].table() if len(reports) == 1 else _table(paths, reports))
    return result


def _checkpoints(given: str) -> list[str]:
    """The model directories a path stands for: itself, or those of a training it is the output directory of.

    Raises:
        FileNotFoundError, ValueError: there is none.
    """
    path = Path(given)
    if path.is_file() and not given.endswith(".gguf"):
        raise ValueError(f"{given} is a file; give the directory that holds config.json and the weights")
    if path.is_dir() and not (path / "config.json").is_file():
        inside = [str(below.parent) for below in path.glob("checkpoint-*/config.json") if _step(str(below.parent))]
        if not inside:
            raise ValueError(f"{given} has no config.json and no checkpoint-N directories with one")
        return sorted(inside, key=_step)
    if not path.exists() and (given.startswith((".", "/", "~")) or given.count("/") != 1):
        raise FileNotFoundError(f"no such directory: {given}")
    return [given]


def _step(path: str) -> int | None:
    found = re.fullmatch(r"checkpoint-(\d+)", Path(path).name)
    return int(found[1]) if found else None


def _name(path: str) -> str:
    return Path(path).name if Path(path).exists() else path


def _load(path: str, trust_remote_code: bool):
    """The model of the class its config names, with the masks that its checkpoint holds beside the weights."""
    import transformers

    from hf_sparse.loading import load_model

    if path.endswith(".gguf"):
        return load_model(path)
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    name = (config.architectures or [""])[0]
    options: dict[str, Any] = {"dtype": "auto"}
    kind = getattr(transformers, name, None)
    if kind is None:  # a class of the repository, or one that a package has registered
        options["trust_remote_code"] = trust_remote_code
        own = {value.rpartition(".")[2]: auto for auto, value in (getattr(config, "auto_map", None) or {}).items()}
        kinds = [own.get(name), "AutoModelForCausalLM", "AutoModelForImageClassification"]
        autos = [getattr(transformers, each) for each in kinds if each]
        known = (auto for auto in autos if own.get(name) == auto.__name__ or type(config) in auto._model_mapping)
        kind = next(known, transformers.AutoModel)  # which says itself what it does not know
    model = kind.from_pretrained(path, **options).eval()
    _attach_masks(model, Path(path))
    return model


def _attach_masks(model, directory: Path) -> None:
    """In the middle of a training a weight that was grown a moment ago is still zero: its mask tells."""
    from safetensors import safe_open

    from hf_sparse.masks import Masks

    parameters = dict(model.named_parameters(remove_duplicate=False))
    for file in sorted(directory.glob("*.safetensors")) if directory.is_dir() else []:
        with safe_open(file, "pt") as reader:
            for name in reader.keys():  # noqa: SIM118 (a reader is not a dict)
                weight = parameters.get(name.removesuffix("_mask")) if name.endswith("_mask") else None
                if weight is not None and tuple(reader.get_slice(name).get_shape()) == tuple(weight.shape):
                    Masks({name.removesuffix("_mask"): reader.get_tensor(name).bool()}).attach(model)


def _table(paths, reports):
    """A row per checkpoint: the means over its layers."""
    from rich.table import Table

    from hf_sparse.models.spectral import HEADINGS

    table = Table()
    for column in ("checkpoint", *HEADINGS):
        table.add_column(column, justify="right" if table.columns else "left", overflow="fold")
    for path, report in zip(paths, reports, strict=True):
        table.add_row(_name(path), *("–" if v is None else f"{v:.4g}" for v in report.mean.values()))
    return table
