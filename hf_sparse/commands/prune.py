"""``hf-sparse prune``."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from hf_sparse import commands
from hf_sparse.commands import PLOT_FILE, REPORT_FILE

__all__ = [
    "ABOUT_EXPERTS",
    "ABOUT_LAYERS",
    "ABOUT_ZEROS",
    "check_output",
    "check_shard_size",
    "flags_given",
    "run_prune",
    "save_model",
]

# flags that only some patterns look at, and what they are where they are not given
ABOUT_ZEROS = {
    **dict.fromkeys(("config", "allocation_option", "override", "targets", "ignore", "block_size", "damp")),
    **dict.fromkeys(("repair", "permute", "packed"), False),
}
ABOUT_EXPERTS = {"keep": None, "keep_super": False, "scores": None}
ABOUT_LAYERS = {"remove": None, "layers": None, "allow_last": False}


def run_prune(arguments) -> dict[str, Any]:
    if arguments.pattern == "expert":
        from hf_sparse.commands.prune_experts import run_prune_experts

        return run_prune_experts(arguments)
    if arguments.pattern == "layer":
        from hf_sparse.commands.prune_layers import run_prune_layers

        return run_prune_layers(arguments)
    from hf_sparse.atomic import atomic_directory
    from hf_sparse.data import check_source, load_segments
    from hf_sparse.pruning.plan import looks_at_data

    _not_about_whole_parts(arguments)
    arguments.calibration = arguments.calibration and arguments.calibration[0]
    config = _config(arguments)
    output = Path(arguments.output)
    check_output(output, arguments.overwrite)
    looks = looks_at_data(config)
    if looks and arguments.calibration is None:
        also = "".join(f" and --{name}" for name in ("repair", "permute") if getattr(config, name))
        raise ValueError(
            f"--saliency {config.saliency} with --allocation {config.allocation}{also} "
            "looks at data: give --calibration FILE.txt, FILE.jsonl or a Hub dataset id"
        )
    if arguments.calibration is not None:
        check_source(arguments.calibration)
    commands.check_device(arguments.device)
    check_shard_size(arguments.max_shard_size)
    # progress is always kept for runs that take long, so that --resume has something to continue
    where = Path(os.path.abspath(output))
    progress_dir = where.parent / f".{where.name}.progress" if looks else None
    begun = progress_dir is not None and any(progress_dir.glob("layer-*"))
    if begun and not arguments.resume:
        raise ValueError(
            f"an earlier run to {output} was interrupted; continue it with --resume, or remove {progress_dir} to start anew"
        )
    if arguments.resume and not begun:
        print(f"no interrupted run to {output} is there to resume: starting with the first layer", file=sys.stderr)

    from hf_sparse.hub_cards import SparsityCard
    from hf_sparse.loading import load_model, load_tokenizer
    from hf_sparse.pruning.prune import prune

    tokenizer = load_tokenizer(arguments.model, arguments.trust_remote_code)
    text = None
    if looks:
        text = load_segments(
            arguments.calibration, tokenizer, arguments.samples, arguments.sequence_length, arguments.shuffle
        )
    model = load_model(arguments.model, arguments.dtype, arguments.trust_remote_code)
    config.provenance |= {
        "base_model": arguments.model if not Path(arguments.model).exists() else Path(arguments.model).name,
        "calibration": text.description if text else None,
        "command": arguments.command_line,
    }
    arguments.progress_dir = progress_dir
    if progress_dir and not begun:
        shutil.rmtree(progress_dir, ignore_errors=True)
    report = prune(
        model,
        config,
        text.ids if text else None,
        device=arguments.device,
        storage="cpu" if arguments.offload else None,
        progress=not arguments.json,
        resume_dir=arguments.progress_dir,
    )
    report.model = config.provenance["base_model"]
    if text:
        report.calibration |= text.description
    with atomic_directory(output, overwrite=arguments.overwrite) as staging:
        save_model(model, tokenizer, staging, arguments)
        report.save(staging / REPORT_FILE)
        _plot(report, staging / PLOT_FILE)
        SparsityCard(staging).save()
    if arguments.progress_dir:
        shutil.rmtree(arguments.progress_dir, ignore_errors=True)
    result = {"output": str(output), "file_bytes": commands.weight_bytes(output)} | report.to_dict()
    if not arguments.json:
        commands.show_report(report, output)
    return result


def flags_given(arguments, flags: dict[str, Any]) -> list[str]:
    """Those of ``flags`` (name -> value where not given) that the user gave, as they are written."""
    return [f"--{name.replace('_', '-')}" for name, empty in flags.items() if getattr(arguments, name) != empty]


def check_output(output: Path, overwrite: bool) -> None:
    """Raises FileExistsError where a result would go over something."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())) and not overwrite:
        raise FileExistsError(f"{output} exists and is not empty; choose another --output or pass --overwrite")


def _not_about_whole_parts(arguments) -> None:
    """Flags that only mean something to --pattern expert or layer."""
    from hf_sparse.commands.prune_layers import SALIENCIES as LAYER_SALIENCIES
    from hf_sparse.pruning.expert_scores import SALIENCIES as EXPERT_SALIENCIES

    experts = flags_given(arguments, ABOUT_EXPERTS)
    if arguments.saliency in EXPERT_SALIENCIES and arguments.saliency != "random":
        experts.append(f"--saliency {arguments.saliency}")
    if experts:
        raise ValueError(f"{', '.join(experts)} ranks or keeps whole experts of a mixture: add --pattern expert")
    layers = flags_given(arguments, ABOUT_LAYERS)
    if arguments.saliency in LAYER_SALIENCIES:
        layers.append(f"--saliency {arguments.saliency}")
    if layers:
        raise ValueError(f"{', '.join(layers)} chooses whole layers: add --pattern layer")
    if arguments.calibration and len(arguments.calibration) > 1:
        raise ValueError(
            f"one calibration text is taken, got {', '.join(arguments.calibration)}; a mix of domains is for --pattern expert"
        )


def _config(arguments):
    """The SparsityConfig of the flags, over that of ``--config`` where both speak."""
    from hf_sparse.config import SparsityConfig, read_fields
    from hf_sparse.patterns import parse

    content: dict[str, Any] = {}
    if arguments.config:
        SparsityConfig.from_file(arguments.config)  # what is wrong with it on its own is said first
        # what it leaves open stays open: another saliency brings its own pattern, another pattern its own sparsity
        content = {name: value for name, value in read_fields(arguments.config).items() if value is not None}
    if arguments.pattern is not None and parse(arguments.pattern).implied_sparsity is not None:
        content.pop("sparsity", None)  # an n:m pattern brings its own
    flags = {
        name: getattr(arguments, name)
        for name in ("sparsity", "pattern", "saliency", "allocation", "targets", "block_size", "damp", "seed")
    }
    content |= {name: value for name, value in flags.items() if value is not None}
    if arguments.ignore:
        content["ignore"] = [*content.get("ignore", []), *arguments.ignore]
    content["repair"] = arguments.repair or content.get("repair", False)
    content["permute"] = arguments.permute or content.get("permute", False)
    for name, flag in (("overrides", arguments.override), ("allocation_options", arguments.allocation_option)):
        for entry in flag or []:
            key, separator, value = entry.rpartition("=")
            if not separator or not key:
                raise ValueError(f"--{name.replace('_', '-').rstrip('s')} takes NAME=VALUE, got {entry!r}")
            try:
                number: float | str = float(value)
            except ValueError:
                number = value
            content.setdefault(name, {})[key] = number
    return SparsityConfig.from_dict(content)


def check_shard_size(size: str | None) -> None:
    if size is None:
        return
    from huggingface_hub import split_torch_state_dict_into_shards

    try:
        split_torch_state_dict_into_shards({}, max_shard_size=size)  # its parser has no public name
    except ValueError as error:
        raise ValueError(f"--max-shard-size {size!r} is no size, such as 5GB or 500MB: {error}") from error


def save_model(model, tokenizer, directory: Path, arguments) -> None:
    from hf_sparse.formats import save_packed

    options = {"max_shard_size": arguments.max_shard_size} if arguments.max_shard_size else {}
    if arguments.packed:
        save_packed(model, directory, processing_class=tokenizer, overwrite=True, **options)
        return
    from hf_sparse.atomic import require_free_space

    require_free_space(directory, sum(p.numel() * p.element_size() for p in model.parameters()))
    model.save_pretrained(directory, **options)
    tokenizer.save_pretrained(directory)


def _plot(report, path: Path) -> bool:
    try:
        report.plot(path)
    except ModuleNotFoundError:
        return False  # the plot is an extra; the numbers are in the JSON
    return True
