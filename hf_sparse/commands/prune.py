"""What each command of ``hf-sparse`` does: a function from parsed arguments to a dict, the one that ``--json`` prints.

All that can be wrong with the arguments is checked before a model is loaded; heavy modules are imported after that.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

__all__ = ["run_eval", "run_inspect", "run_pack", "run_prune", "run_unpack"]

REPORT_FILE = "sparsity_report.json"
PLOT_FILE = "sparsity_report.png"
OUTPUT = None  # where tables go; set by hf_sparse.cli.main


def run_prune(arguments) -> dict[str, Any]:
    from hf_sparse.atomic import atomic_directory
    from hf_sparse.data import check_source, load_segments
    from hf_sparse.pruning.plan import looks_at_data

    config = _config(arguments)
    output = Path(arguments.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())) and not arguments.overwrite:
        raise FileExistsError(f"{output} exists and is not empty; choose another --output or pass --overwrite")
    looks = looks_at_data(config)
    if looks and arguments.calibration is None:
        also = "".join(f" and --{name}" for name in ("repair", "permute") if getattr(config, name))
        raise ValueError(
            f"--saliency {config.saliency} with --allocation {config.allocation}{also} "
            "looks at data: give --calibration FILE.txt, FILE.jsonl or a Hub dataset id"
        )
    if arguments.calibration is not None:
        check_source(arguments.calibration)
    _check_device(arguments.device)
    _check_shard_size(arguments.max_shard_size)
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

    from hf_sparse.hub_cards import write_card
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
        _save_model(model, tokenizer, staging, arguments)
        report.save(staging / REPORT_FILE)
        plotted = _plot(report, staging / PLOT_FILE)
        write_card(staging, report, plot=PLOT_FILE if plotted else None)
    if arguments.progress_dir:
        shutil.rmtree(arguments.progress_dir, ignore_errors=True)
    result = {"output": str(output), "file_bytes": _weight_bytes(output)} | report.to_dict()
    if not arguments.json:
        _show_report(report, output)
    return result


def run_inspect(arguments) -> dict[str, Any]:
    from hf_sparse.inspection import inspect_checkpoint

    _check_parent(arguments.plot)
    report = inspect_checkpoint(arguments.path, arguments.trust_remote_code)
    if arguments.plot:
        report.plot(arguments.plot)
    if not arguments.json:
        _show_report(report, None)
    path = Path(arguments.path)
    return {"file_bytes": _weight_bytes(path) if path.is_dir() else None} | report.to_dict()


def run_eval(arguments) -> dict[str, Any]:
    from hf_sparse.data import check_source, load_tokens

    if not arguments.text and not arguments.tasks:
        raise ValueError("give --text FILE for perplexity, --tasks NAMES for lm-eval tasks, or both")
    if arguments.text:
        check_source(arguments.text)
        if not Path(arguments.text).is_file():
            raise FileNotFoundError(f"no such file: {arguments.text}")
    _check_parent(arguments.output)
    _check_device(arguments.device)

    from hf_sparse.evaluation import perplexity
    from hf_sparse.instruments import progress_bar, versions
    from hf_sparse.loading import load_model, load_tokenizer

    tokenizer = load_tokenizer(arguments.path, arguments.trust_remote_code)
    model = load_model(arguments.path, arguments.dtype, arguments.trust_remote_code)
    if arguments.device:
        model.to(arguments.device)
    result: dict[str, Any] = {"model": arguments.path}
    if arguments.text:
        tokens = load_tokens(arguments.text, tokenizer)
        windows = max(1, len(tokens) // max(1, arguments.sequence_length))
        windows = windows if arguments.max_windows is None else min(windows, arguments.max_windows)
        with progress_bar(not arguments.json, "perplexity", windows) as step:
            result |= perplexity(
                model,
                tokens,
                arguments.sequence_length,
                arguments.max_windows,
                on_window=lambda done, total: step(""),
            )
        result |= {"text": Path(arguments.text).name, "sequence_length": arguments.sequence_length}
    if arguments.tasks:
        from hf_sparse.integrations.lm_eval import evaluate_tasks

        result["tasks"] = evaluate_tasks(
            model,
            tokenizer,
            arguments.tasks.split(","),
            arguments.task_path,
            arguments.num_fewshot,
            arguments.limit,
            arguments.batch_size,
            arguments.apply_chat_template,
        )
    result["versions"] = versions()
    if arguments.output:
        from hf_sparse.atomic import atomic_write_text

        atomic_write_text(arguments.output, json.dumps(result, indent=1, default=str) + "\n")
    if not arguments.json:
        _show_evaluation(result)
    return result


def run_pack(arguments) -> dict[str, Any]:
    from hf_sparse.formats import pack_checkpoint

    report = pack_checkpoint(
        arguments.path, arguments.output, min_saving=arguments.min_saving, overwrite=arguments.overwrite
    )
    return _show_packing(report, arguments)


def run_unpack(arguments) -> dict[str, Any]:
    from hf_sparse.formats import unpack_checkpoint

    return _show_packing(unpack_checkpoint(arguments.path, arguments.output, overwrite=arguments.overwrite), arguments)


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


def _check_device(device: str | None) -> None:
    if device is None:
        return
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}; use cpu, cuda or cuda:N") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but torch sees no CUDA device here; use --device cpu")
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device!r} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices here"
        )


def _check_shard_size(size: str | None) -> None:
    if size is None:
        return
    from huggingface_hub import split_torch_state_dict_into_shards

    try:
        split_torch_state_dict_into_shards({}, max_shard_size=size)  # its parser has no public name
    except ValueError as error:
        raise ValueError(f"--max-shard-size {size!r} is no size, such as 5GB or 500MB: {error}") from error


def _check_parent(file: str | None) -> None:
    """A result is written after the work; that there is a place for it is known before."""
    if file and not Path(file).absolute().parent.is_dir():
        raise FileNotFoundError(f"no such directory for {file}: {Path(file).absolute().parent}")


def _save_model(model, tokenizer, directory: Path, arguments) -> None:
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


def _weight_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def _console():
    from rich.console import Console

    # the stream that was standard output before main() sent what libraries print elsewhere; a path may hold [brackets]
    return Console(file=OUTPUT or sys.stdout, markup=False)


def _show_report(report, output: Path | None) -> None:
    console = _console()
    console.print(report.table())
    console.print(
        f"{report.model}: {report.sparsity:.2%} of {sum(p.numel for p in report.parameters) / 1e6:.1f} M weights are zero "
        f"({report.total_parameters / 1e6:.1f} M parameters in all); "
        f"{report.macs_sparse / 1e9:.4g} of {report.macs_dense / 1e9:.4g} GMACs per token; "
        f"{'runs as 2:4' if report.parameters and all(p.two_four for p in report.parameters) else 'not 2:4'}"
    )
    for note in report.all_notes():
        console.print(f"note: {note}")
    if output is not None:
        spent = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in report.timings.items())
        console.print(
            f"{report.seconds:.1f} s ({spent}), peak memory {report.peak_memory_bytes / 2**30:.2f} GiB, {report.device}"
        )
        console.print(
            f"saved {output} ({_weight_bytes(output) / 1e6:.1f} MB of weights), with {REPORT_FILE} and a model card"
        )


def _show_evaluation(result: dict[str, Any]) -> None:
    console = _console()
    if "perplexity" in result:
        console.print(f"perplexity {result['perplexity']:.4f}  ({result['text']}: {result['protocol']})")
    for task, metrics in result.get("tasks", {}).get("results", {}).items():
        shown = ", ".join(
            f"{key.split(',')[0]} {value:.4f}" for key, value in metrics.items() if isinstance(value, float)
        )
        console.print(f"{task}: {shown}")


def _show_packing(report, arguments) -> dict[str, Any]:
    if not arguments.json:
        _console().print(f"saved {arguments.output}: {report}")
    return {
        "output": arguments.output,
        "dense_bytes": report.dense_bytes,
        "packed_bytes": report.packed_bytes,
        "ratio": report.ratio,
        "packed_tensors": {name: str(header) for name, header in report.tensors.items()},
    }
