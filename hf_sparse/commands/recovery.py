"""``hf-sparse merge`` and ``hf-sparse recovery``: siblings made one, and what is left of the original.

hf-sparse merge distilled-math distilled-chat --method task-slerp --base pruned --output merged
hf-sparse recovery ORIGINAL pruned=DIR sft=DIR merged=DIR --text test.txt --tasks arc_challenge,hellaswag --output recovery.json
"""

import hashlib
import importlib.util
import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_sparse import commands

__all__ = ["run_merge", "run_recovery"]


def run_merge(arguments) -> dict[str, Any]:
    from hf_sparse.distillation.merging import merge_checkpoints

    report = merge_checkpoints(
        arguments.models,
        arguments.output,
        method=arguments.method,
        weights=arguments.weights,
        base=arguments.base,
        overwrite=arguments.overwrite,
        progress=not arguments.json,
    )
    if not arguments.json:
        turned = f", {report.turned} of them turned on a sphere" if report.method != "lerp" else ""
        commands.console().print(
            f"saved {arguments.output}: {report.tensors} tensors of {len(arguments.models)} models by {report.method}{turned}; "
            f"{report.zeros} entries are zero"
        )
        if report.method == "slerp" and report.turned <= report.tensors // 20:
            print(
                "note: the models lie so close together that slerp is linear interpolation for nearly all tensors; "
                "--method task-slerp --base PARENT turns their differences to the parent",
                file=sys.stderr,
            )
    return {"output": arguments.output} | asdict(report)


def run_recovery(arguments) -> dict[str, Any]:
    from hf_sparse.data import check_source, load_tokens
    from hf_sparse.recovery import RecoveryReport

    models = _models(arguments.models)
    responses = dict(_named(entry, "responses") for entry in arguments.responses or [])
    if not arguments.text and not arguments.tasks and not responses:
        raise ValueError("give --text FILE, --tasks NAMES, --responses FILE, or more than one of them")
    for file in (*([arguments.text] if arguments.text else []), *responses.values()):
        check_source(file)
        if not Path(file).is_file():
            raise FileNotFoundError(f"no such file: {file}")
    for file in (arguments.output, arguments.plot):
        commands.check_parent(file)
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("--plot needs matplotlib: pip install 'hf-sparse[plot]'")
    commands.check_device(arguments.device)
    progress_dir = arguments.progress_dir = _progress_dir(arguments)

    from hf_sparse.distillation.rows import load_rows
    from hf_sparse.instruments import device_name, versions
    from hf_sparse.integrations.assessment import assess, response_rows
    from hf_sparse.loading import load_model, load_tokenizer

    tokenizer = load_tokenizer(arguments.original, arguments.trust_remote_code)
    options: dict[str, Any] = {
        "texts": {Path(arguments.text).stem: load_tokens(arguments.text, tokenizer)} if arguments.text else {},
        "responses": {
            name: response_rows(load_rows(file, limit=arguments.limit), tokenizer, max_length=arguments.sequence_length)
            for name, file in responses.items()
        },
        "sequence_length": arguments.sequence_length,
        "max_windows": arguments.max_windows,
        "tasks": arguments.tasks.split(",") if arguments.tasks else [],
        "task_path": arguments.task_path,
        "num_fewshot": arguments.num_fewshot,
        "limit": arguments.limit,
        "batch_size": arguments.batch_size,
        "progress": not arguments.json,
    }

    def load(path: str):
        model = load_model(path, arguments.dtype, arguments.trust_remote_code)
        return model.to(arguments.device) if arguments.device else model

    original = load(arguments.original)
    device = device_name(original.device)
    measures = {}
    for number, (label, path) in enumerate({"": arguments.original, **models}.items()):
        kept = progress_dir / f"measures-{number}.json" if progress_dir else None
        measures[label] = _read(kept)
        if not measures[label]:
            print(f"{label or 'the original'}, {number + 1} of {len(models) + 1}", file=sys.stderr)
            model, reference = (load(path), original if responses else None) if label else (original, None)
            measures[label] = assess(model, tokenizer, reference=reference, **options)
            _write(kept, measures[label])
            del model
    facts = {"command": arguments.command_line, "hardware": device, "versions": versions()}
    name = Path(arguments.original).name if Path(arguments.original).exists() else arguments.original
    report = RecoveryReport(name, {label: measures[label] for label in models}, measures[""], facts)
    if arguments.output:
        report.save(arguments.output)
    if arguments.plot:
        report.plot(arguments.plot)
    if progress_dir:
        shutil.rmtree(progress_dir, ignore_errors=True)
    if not arguments.json:
        out = commands.console()
        out.print(*report.tables(out.width))
        for note in report.notes():
            out.print(f"note: {note}")
    return report.to_dict()


def _named(entry: str, what: str) -> tuple[str, str]:
    """``(name, path)`` of ``NAME=PATH`` or ``PATH``."""
    name, separator, path = entry.partition("=")
    if separator and (not name or not path):
        raise ValueError(f"{what} are given as NAME=PATH or PATH, got {entry!r}")
    return (name, path) if separator else (Path(entry).stem, entry)


def _models(entries: list[str]) -> dict[str, str]:
    models: dict[str, str] = {}
    for entry in entries:
        name, path = _named(entry, "models")
        if name in models:
            raise ValueError(f"two models are called {name}: {models[name]} and {path}; name them, e.g. sft={path}")
        if path.startswith((".", "/", "~")) and not Path(path).exists():
            raise FileNotFoundError(f"no such directory: {path}")
        models[name] = path
    return models


def _progress_dir(arguments) -> Path | None:
    """Where what is measured is kept until the report is written; measures of other arguments are not mixed in."""
    if not arguments.output:
        return None
    where = Path(os.path.abspath(arguments.output))
    said = {
        key: str(value)
        for key, value in vars(arguments).items()
        if key not in ("run", "command_line", "json", "resume", "plot")
    }
    mark = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    folder = where.parent / f".{where.name}.progress"
    begun = (folder / "measures-0.json").is_file()
    if begun and not arguments.resume:
        raise ValueError(
            f"an earlier run to {arguments.output} was interrupted; continue it with --resume, or remove {folder} to start anew"
        )
    if begun and (folder / "arguments").read_text() != mark:
        raise ValueError(
            f"the interrupted run to {arguments.output} had other arguments; repeat those, or remove {folder}"
        )
    if arguments.resume and not begun:
        print(
            f"no interrupted run to {arguments.output} is there to resume: starting with the original", file=sys.stderr
        )
    folder.mkdir(exist_ok=True)
    (folder / "arguments").write_text(mark)
    return folder


def _read(file: Path | None) -> dict[str, Any] | None:
    from hf_sparse.recovery import Measure

    if file is None or not file.is_file():
        return None
    return {name: Measure.from_dict(content) for name, content in json.loads(file.read_text()).items()}


def _write(file: Path | None, measures: dict[str, Any]) -> None:
    from hf_sparse.atomic import atomic_write_text

    if file is not None:
        atomic_write_text(file, json.dumps({name: measure.to_dict() for name, measure in measures.items()}))
