"""The command line: prune, inspect, eval, pack, unpack.

Each command is one function that takes the parsed arguments and returns a dict; ``--json`` prints that dict as the only
thing on standard output, otherwise a table is shown. Progress goes to standard error. Anything wrong with the arguments is
said before work begins (exit code 2); an error during the work leaves nothing half-written (exit code 1).
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

__all__ = ["main"]

REPORT_FILE = "sparsity_report.json"
PLOT_FILE = "sparsity_report.png"


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = _parser().parse_args(argv)
    arguments.command_line = "hf-sparse " + shlex.join(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    stdout = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):  # libraries print; standard output is the result's alone
            result = arguments.run(arguments)
    except KeyboardInterrupt:
        progress = getattr(arguments, "progress_dir", None)
        kept = "; finished layers are kept, repeat the command with --resume to continue" if progress else ""
        return _fail(arguments, f"interrupted, nothing was written{kept}", 130, stdout)
    except (ValueError, FileNotFoundError, FileExistsError, ModuleNotFoundError, IsADirectoryError) as error:
        return _fail(arguments, str(error), 2, stdout)
    except Exception as error:
        if os.environ.get("HF_SPARSE_DEBUG"):
            raise
        hint = " (HF_SPARSE_DEBUG=1 shows where)"
        return _fail(arguments, f"{type(error).__name__}: {error}{hint}", 1, stdout)
    if arguments.json:
        print(json.dumps(result, default=str), file=stdout)
    return 0


def _fail(arguments, message: str, code: int, stdout) -> int:
    print(f"hf-sparse {arguments.command}: error: {message}", file=sys.stderr)
    if arguments.json:
        print(json.dumps({"error": message}), file=stdout)
    return code


# --------------------------------------------------------------------------------------------------------------- commands


def run_prune(arguments) -> dict[str, Any]:
    from hf_sparse.atomic import atomic_directory
    from hf_sparse.data import check_source, load_segments
    from hf_sparse.saliency import needs

    config = _config(arguments)
    output = Path(arguments.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())) and not arguments.overwrite:
        raise FileExistsError(f"{output} exists and is not empty; choose another --output or pass --overwrite")
    looks = needs(config.saliency) != "nothing" or config.repair or config.allocation == "owl"
    if looks and arguments.calibration is None:
        raise ValueError(
            f"--saliency {config.saliency} with --allocation {config.allocation}{' and --repair' if config.repair else ''} "
            "looks at data: give --calibration FILE.txt, FILE.jsonl or a Hub dataset id"
        )
    if arguments.calibration is not None:
        check_source(arguments.calibration)
    _check_device(arguments.device)

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
    config.provenance = {
        "base_model": arguments.model if not Path(arguments.model).exists() else Path(arguments.model).name,
        "calibration": text.description if text else None,
        "command": arguments.command_line,
    }
    # progress is always kept for runs that take long, so that --resume has something to continue
    arguments.progress_dir = output.parent / f".{output.name}.progress" if looks else None
    if arguments.progress_dir and not arguments.resume:
        if any(arguments.progress_dir.glob("layer-*")):
            raise ValueError(
                f"an earlier run to {output} was interrupted; continue it with --resume, or remove "
                f"{arguments.progress_dir} to start anew"
            )
        shutil.rmtree(arguments.progress_dir, ignore_errors=True)
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


# ---------------------------------------------------------------------------------------------------------------- helpers


def _config(arguments):
    """The SparsityConfig of the flags, over that of ``--config`` where both speak."""
    from hf_sparse.config import SparsityConfig

    content = SparsityConfig.from_file(arguments.config).to_dict() if arguments.config else {}
    if arguments.pattern is not None and arguments.sparsity is None:
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

    return Console(file=sys.__stdout__)


def _show_report(report, output: Path | None) -> None:
    console = _console()
    console.print(report.table())
    console.print(
        f"{report.model}: {report.sparsity:.2%} of {sum(p.numel for p in report.parameters) / 1e6:.1f} M weights are zero "
        f"({report.total_parameters / 1e6:.1f} M parameters in all); "
        f"{report.macs_sparse / 1e9:.4g} of {report.macs_dense / 1e9:.4g} GMACs per token; "
        f"{'runs as 2:4' if report.parameters and all(p.two_four for p in report.parameters) else 'not 2:4'}"
    )
    for note in [*report.notes, *sorted({f"{p.name}: {p.note}" for p in report.parameters if p.note})]:
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


# ----------------------------------------------------------------------------------------------------------------- parser


def _parser() -> argparse.ArgumentParser:
    from hf_sparse import __version__

    parser = argparse.ArgumentParser(
        prog="hf-sparse",
        description="Weight sparsity for Hugging Face models.",
        epilog="example: hf-sparse prune MODEL --sparsity 0.5 --saliency sparsegpt --calibration text.txt --output pruned",
    )
    parser.add_argument("--version", action="version", version=f"hf-sparse {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    prune = _command(
        commands,
        "prune",
        run_prune,
        "prune a model in one shot",
        "hf-sparse prune HuggingFaceTB/SmolLM2-135M-Instruct --sparsity 0.5 --saliency sparsegpt "
        "--calibration wikitext.txt --samples 128 --sequence-length 2048 --output smollm2-50",
    )
    prune.add_argument("model", metavar="MODEL", help="Hub id, directory or .gguf file")
    prune.add_argument("--output", required=True, metavar="DIR", help="where the pruned model goes")
    what = prune.add_argument_group("what is pruned, and how")
    what.add_argument("--config", metavar="FILE", help="a SparsityConfig as YAML or JSON; the flags below override it")
    what.add_argument("--sparsity", type=float, metavar="S", help="fraction of zeros in [0, 1); default 0.5")
    what.add_argument(
        "--pattern",
        metavar="P",
        help="unstructured, row, n:m such as 2:4, RxC such as 16x16, constant-fan-in or channel",
    )
    what.add_argument(
        "--saliency",
        metavar="NAME",
        help="magnitude (default), random, wanda, ria, obs, gradient, taylor; or the solvers sparsegpt and alps",
    )
    what.add_argument("--allocation", metavar="NAME", help="uniform (default), erk or owl")
    what.add_argument(
        "--allocation-option", action="append", metavar="K=V", help="an option of the allocation, e.g. lam=0.08 for owl"
    )
    what.add_argument(
        "--override",
        action="append",
        metavar="NAME=V",
        help="sparsity or pattern of some targets, e.g. 're:.*down_proj=0.3'",
    )
    what.add_argument(
        "--targets", nargs="+", metavar="NAME", help="names, re: patterns or class names; default: all linears"
    )
    what.add_argument("--ignore", nargs="+", metavar="NAME", help="targets to leave dense")
    what.add_argument("--repair", action="store_true", help="re-fit the kept weights by least squares")
    what.add_argument(
        "--permute", action="store_true", help="for n:m: reorder MLP units so that the pattern costs less"
    )
    what.add_argument(
        "--block-size", type=int, metavar="N", help="columns per block of the SparseGPT solve; default 128"
    )
    what.add_argument("--damp", type=float, metavar="D", help="ridge over the Hessian's mean diagonal; default 0.01")
    what.add_argument("--seed", type=int, metavar="N", help="seed of the random saliency; default 0")
    data = prune.add_argument_group("calibration data")
    data.add_argument("--calibration", metavar="TEXT", help="text file, JSON lines or Hub dataset id")
    data.add_argument("--samples", type=int, default=128, metavar="N", help="segments; default %(default)s")
    data.add_argument(
        "--sequence-length", type=int, default=2048, metavar="L", help="tokens in each; default %(default)s"
    )
    data.add_argument("--shuffle", type=int, metavar="SEED", help="choose segments at random instead of the first ones")
    run = prune.add_argument_group("the run")
    run.add_argument("--device", metavar="D", help="cpu, cuda or cuda:N; layers visit it one at a time; default: cpu")
    run.add_argument("--offload", action="store_true", help="keep hidden states in CPU memory between layers")
    run.add_argument("--resume", action="store_true", help="continue an interrupted run of the same command")
    run.add_argument(
        "--packed", action="store_true", help="save packed (smaller files, needs hf_sparse or remote code)"
    )
    run.add_argument("--max-shard-size", metavar="SIZE", help="largest weight file, e.g. 5GB")
    run.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    _model_flags(run)

    inspect = _command(
        commands,
        "inspect",
        run_inspect,
        "measure a checkpoint's sparsity, whoever made it",
        "hf-sparse inspect smollm2-50 --json",
    )
    inspect.add_argument("path", metavar="PATH_OR_REPO", help="directory with safetensors files, or Hub id")
    inspect.add_argument("--plot", metavar="FILE", help="density by depth as an image")
    inspect.add_argument("--trust-remote-code", action="store_true", help="run the model repository's own code")

    evaluate = _command(
        commands,
        "eval",
        run_eval,
        "perplexity and lm-eval tasks",
        "hf-sparse eval smollm2-50 --text wikitext_test.txt --sequence-length 2048",
    )
    evaluate.add_argument("path", metavar="PATH", help="Hub id, directory or .gguf file")
    evaluate.add_argument("--text", metavar="FILE", help="text for perplexity")
    evaluate.add_argument("--sequence-length", type=int, default=2048, metavar="L", help="window; default %(default)s")
    evaluate.add_argument("--max-windows", type=int, metavar="N", help="score only the first windows")
    evaluate.add_argument("--tasks", metavar="A,B", help="lm-eval tasks")
    evaluate.add_argument("--task-path", metavar="DIR", help="directory of local task files (works offline)")
    evaluate.add_argument("--num-fewshot", type=int, metavar="N", help="shots; default: each task's own")
    evaluate.add_argument("--limit", type=int, metavar="N", help="only the first documents of each task")
    evaluate.add_argument("--batch-size", type=int, default=1, metavar="N", help="lm-eval's batch; default %(default)s")
    evaluate.add_argument("--apply-chat-template", action="store_true", help="wrap prompts in the chat template")
    evaluate.add_argument("--output", metavar="FILE", help="write the result as JSON")
    evaluate.add_argument("--device", metavar="D", help="cpu, cuda or cuda:N; default: cpu")
    _model_flags(evaluate)

    pack = _command(
        commands,
        "pack",
        run_pack,
        "make a checkpoint's files smaller",
        "hf-sparse pack smollm2-50 --output smollm2-50-packed",
    )
    pack.add_argument("path", metavar="DIR", help="a dense checkpoint with zeros")
    pack.add_argument("--output", required=True, metavar="DIR")
    pack.add_argument(
        "--min-saving",
        type=float,
        default=0.1,
        metavar="F",
        help="pack a tensor if it saves this share; default %(default)s",
    )
    pack.add_argument("--overwrite", action="store_true", help="replace --output if it exists")

    unpack = _command(
        commands, "unpack", run_unpack, "the dense checkpoint of a packed one", "hf-sparse unpack packed --output dense"
    )
    unpack.add_argument("path", metavar="DIR", help="a packed checkpoint")
    unpack.add_argument("--output", required=True, metavar="DIR")
    unpack.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    return parser


def _command(commands, name: str, run, summary: str, example: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:], epilog=f"example: {example}"
    )
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output, nothing else there")
    return parser


def _model_flags(group) -> None:
    group.add_argument("--dtype", default="auto", metavar="T", help="auto (as stored), float32, bfloat16 or float16")
    group.add_argument("--trust-remote-code", action="store_true", help="run the model repository's own code")


if __name__ == "__main__":
    sys.exit(main())
