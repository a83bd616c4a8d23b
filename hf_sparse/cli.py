"""The command line: prune, distill, merge, recovery, inspect, eval, bench, bench speculative, pack, unpack, export,
push, card, compare, spectral.

Each command is one function that takes the parsed arguments and returns a dict; ``--json`` prints that dict as the only
thing on standard output, otherwise a table is shown. Progress goes to standard error. Anything wrong with the arguments is
said before work begins (exit code 2); an error during the work leaves nothing half-written (exit code 1).
"""

import argparse
import contextlib
import difflib
import json
import math
import os
import re
import shlex
import sys

from hf_sparse import commands
from hf_sparse.commands.bench import run_bench
from hf_sparse.commands.bench_speculative import run_bench_speculative
from hf_sparse.commands.compare import run_compare
from hf_sparse.commands.distill import run_distill
from hf_sparse.commands.export import run_export
from hf_sparse.commands.measure import run_eval, run_inspect
from hf_sparse.commands.pack import run_pack, run_unpack
from hf_sparse.commands.prune import run_prune
from hf_sparse.commands.push import run_card, run_push
from hf_sparse.commands.recovery import run_merge, run_recovery
from hf_sparse.commands.spectral import run_spectral

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["lm-eval"]:
        return _lm_eval(list(argv[1:]))
    # argparse takes one word for a command; a model directory may be called "speculative", so only the word right after counts
    words = ["bench-speculative", *argv[2:]] if list(argv[:2]) == ["bench", "speculative"] else argv
    parser = _parser()
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        _refuse(parser, arguments.command, unknown)
    arguments.command_line = commands.portable("hf-sparse " + shlex.join(argv))
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    stdout = commands.OUTPUT = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):  # libraries print; standard output is the result's alone
            result = arguments.run(arguments)
    except KeyboardInterrupt:
        return _fail(arguments, f"interrupted, nothing was written{_kept(arguments)}", 130, stdout)
    except (
        ValueError,
        FileNotFoundError,
        FileExistsError,
        ModuleNotFoundError,
        IsADirectoryError,
        PermissionError,
    ) as error:
        return _fail(arguments, f"{error}{_kept(arguments)}", 2, stdout)
    except Exception as error:
        if os.environ.get("HF_SPARSE_DEBUG"):
            raise
        hint = " (HF_SPARSE_DEBUG=1 shows where)"
        return _fail(arguments, f"{type(error).__name__}: {error}{hint}{_kept(arguments)}", 1, stdout)
    if arguments.json:
        print(json.dumps(_finite(result), default=str, allow_nan=False), file=stdout)
    return 0


class _Parser(argparse.ArgumentParser):
    """Says what was perhaps meant."""

    def error(self, message: str):
        found = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if found:
            names = re.findall(r"[\w.-]+", found[2])
            near = difflib.get_close_matches(found[1], names, n=1)
            message = f"unknown {'command' if 'COMMAND' in message else 'choice'} {found[1]!r}" + (
                f"; did you mean {near[0]}?" if near else f"; there are {', '.join(names)}"
            )
        super().error(message)


def _refuse(parser: argparse.ArgumentParser, command: str, unknown: list[str]):
    """Ends with the flags that were not understood, and what they are near to."""
    subparsers = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    one = subparsers.choices[command]
    flags = [flag for action in one._actions for flag in action.option_strings]
    hints = [
        f"{word} (did you mean {near[0]}?)" if (near := difflib.get_close_matches(word, flags, n=1)) else word
        for word in unknown
    ]
    one.error(f"not understood: {', '.join(hints)}")


def _lm_eval(words: list[str]) -> int:
    """All words go to lm-eval's own command line."""
    try:
        from hf_sparse.integrations.lm_eval_model import run_command_line
    except ModuleNotFoundError as error:
        print(
            f"hf-sparse lm-eval: error: it needs the evaluation harness: pip install 'hf-sparse[eval]' ({error})",
            file=sys.stderr,
        )
        return 2
    return run_command_line(words)


def _kept(arguments) -> str:
    """What a run that ended early left to continue from."""
    progress = getattr(arguments, "progress_dir", None)
    kinds = {"layer-*": "layers", "*/scores.jsonl": "layers", "rows-*.jsonl": "rows", "measures-*.json": "models"}
    for pattern, what in kinds.items():
        if progress is not None and any(progress.glob(pattern)):
            return f"; finished {what} are kept in {progress}: repeat the command with --resume to continue"
    return ""


def _finite(value):
    """NaN and infinities as null: JSON has no words for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _fail(arguments, message: str, code: int, stdout) -> int:
    print(f"hf-sparse {arguments.command}: error: {message}", file=sys.stderr)
    if arguments.json:
        print(json.dumps({"error": message}), file=stdout)
    return code


def _parser() -> argparse.ArgumentParser:
    from hf_sparse import __version__

    parser = _Parser(
        prog="hf-sparse",
        description="Weight sparsity for Hugging Face models.",
        epilog="example: hf-sparse prune MODEL --sparsity 0.5 --saliency sparsegpt --calibration text.txt --output pruned",
    )
    parser.add_argument("--version", action="version", version=f"hf-sparse {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    prune = _command(
        subparsers,
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
        help="unstructured, row, n:m such as 2:4, RxC such as 16x16, constant-fan-in or channel; whole experts: expert; whole "
        "layers: layer",
    )
    what.add_argument(
        "--saliency",
        metavar="NAME",
        help="magnitude (default), random, wanda, ria, obs, gradient, taylor; or the solvers sparsegpt and alps; of experts: "
        "reap (default), ean_mean, ean_sum, frequency, gate_sum, gated_sum, random; of layers: angular (default), "
        "block-influence",
    )
    what.add_argument("--allocation", metavar="NAME", help="uniform (default), erk or owl; of experts: uniform, global")
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
    experts = prune.add_argument_group("experts of a mixture (--pattern expert)")
    experts.add_argument("--keep", type=int, metavar="N", help="experts that stay in each layer, instead of --sparsity")
    experts.add_argument("--keep-super", action="store_true", help="never drop experts with extreme activations")
    experts.add_argument(
        "--scores",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="rankings (expert_scores.jsonl), FILE or one NAME=FILE a domain, instead of --calibration",
    )
    layers = prune.add_argument_group("layers (--pattern layer)")
    layers.add_argument(
        "--remove", type=int, metavar="N", help="layers to remove: the span, or the ones, of least saliency"
    )
    layers.add_argument("--layers", type=int, nargs="+", metavar="I", help="these layers, counted from 0")
    layers.add_argument("--allow-last", action="store_true", help="the last layer may be among them; default: it stays")
    data = prune.add_argument_group("calibration data")
    data.add_argument(
        "--calibration",
        nargs="+",
        action="extend",
        metavar="TEXT",
        help="text file, JSON lines or Hub dataset (name or name:config); for experts one NAME=TEXT (or NAME:SEGMENTS=TEXT) "
        "a domain",
    )
    data.add_argument(
        "--samples", type=int, default=128, metavar="N", help="segments, of all domains together; default %(default)s"
    )
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

    distill = _command(
        subparsers,
        "distill",
        run_distill,
        "let a model rewrite a dataset's answers in its own words, to fine-tune it on once it is pruned",
        "hf-sparse distill HuggingFaceTB/SmolLM2-135M-Instruct gsm8k_train.jsonl --template math --extractor number "
        "--output gsm8k-in-its-words",
    )
    distill.add_argument(
        "model", metavar="MODEL", help="Hub id, directory, .gguf file, or http address of a server (vLLM)"
    )
    distill.add_argument(
        "dataset", metavar="DATASET", help=".jsonl, .json, .csv or .parquet file, or a Hub id (name:config)"
    )
    distill.add_argument("--output", required=True, metavar="DIR", help="where the rows go")
    rows = distill.add_argument_group("the rows")
    rows.add_argument("--split", default="train", metavar="S", help="of a Hub dataset; default %(default)s")
    rows.add_argument("--limit", type=int, metavar="N", help="only the first rows")
    rows.add_argument(
        "--columns", nargs=2, metavar="KEY=COLUMN", help="prompt=COLUMN response=COLUMN; default: recognised"
    )
    asked = distill.add_argument_group("what is asked, and what is taken")
    asked.add_argument(
        "--template",
        default="instruction",
        metavar="T",
        help="instruction (default), question, math, code, rewrite, rewrite_math, or a text file of your own",
    )
    asked.add_argument(
        "--extractor",
        metavar="E",
        help="number, choice, yes_no or exact: take a response only if it gives the reference's answer; default: take any",
    )
    asked.add_argument("--tests", metavar="COLUMN", help="take code only if it passes the Python tests in this column")
    words = distill.add_argument_group("generation")
    words.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="default %(default)s")
    words.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: greedy")
    words.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default %(default)s")
    words.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling; default %(default)s")
    words.add_argument("--backend", metavar="B", help="generate (default) or continuous (CUDA)")
    words.add_argument(
        "--tokens-per-batch",
        type=int,
        default=16384,
        metavar="N",
        help="padded, prompts and answers; default %(default)s",
    )
    words.add_argument("--server-model", metavar="NAME", help="the model of a server; default: the first it lists")
    words.add_argument(
        "--requests-in-flight", type=int, default=32, metavar="N", help="to a server; default %(default)s"
    )
    run = distill.add_argument_group("the run")
    run.add_argument("--device", metavar="D", help="cpu, cuda or cuda:N; default: cpu")
    run.add_argument("--resume", action="store_true", help="continue an interrupted run of the same command")
    run.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    _model_flags(run)

    merge = _command(
        subparsers,
        "merge",
        run_merge,
        "merge fine-tuned siblings of one model",
        "hf-sparse merge distilled-math distilled-chat --method task-slerp --base pruned --output merged",
    )
    merge.add_argument("models", nargs="+", metavar="DIR", help="two or more model directories")
    merge.add_argument("--output", required=True, metavar="DIR")
    merge.add_argument("--method", default="slerp", metavar="M", help="lerp, slerp (default) or task-slerp")
    merge.add_argument("--weights", type=float, nargs="+", metavar="W", help="one a model; default: equal")
    merge.add_argument("--base", metavar="DIR", help="what all were fine-tuned from; for task-slerp")
    merge.add_argument("--overwrite", action="store_true", help="replace --output if it exists")

    recovery = _command(
        subparsers,
        "recovery",
        run_recovery,
        "what is left of a model after pruning and fine-tuning, in percent with standard errors",
        "hf-sparse recovery HuggingFaceTB/SmolLM2-135M-Instruct pruned=DIR distilled=DIR --text wikitext_test.txt "
        "--tasks arc_easy,hellaswag --output recovery.json --plot recovery.png",
    )
    recovery.add_argument("original", metavar="ORIGINAL", help="Hub id, directory or .gguf file")
    recovery.add_argument("models", nargs="+", metavar="NAME=MODEL", help="what was made of it, one column each")
    measures = recovery.add_argument_group("measured are")
    measures.add_argument("--text", metavar="FILE", help="text for perplexity")
    measures.add_argument("--tasks", metavar="A,B", help="lm-eval tasks")
    measures.add_argument(
        "--responses",
        nargs="+",
        metavar="NAME=FILE",
        help="question-answer or chat rows: the perplexity of their responses and the divergence from ORIGINAL on them",
    )
    measures.add_argument("--task-path", metavar="DIR", help="directory of local task files (works offline)")
    measures.add_argument("--num-fewshot", type=int, metavar="N", help="shots; default: each task's own")
    measures.add_argument(
        "--limit", type=int, metavar="N", help="only the first documents of each task, rows of each file"
    )
    measures.add_argument(
        "--sequence-length",
        type=int,
        default=2048,
        metavar="L",
        help="window of text, longest row; default %(default)s",
    )
    measures.add_argument("--max-windows", type=int, metavar="N", help="score only the first windows of the text")
    run = recovery.add_argument_group("the run")
    run.add_argument("--batch-size", type=int, default=8, metavar="N", help="lm-eval's batch; default %(default)s")
    run.add_argument("--output", metavar="FILE", help="write the report as JSON")
    run.add_argument("--plot", metavar="FILE", help="the recoveries as an image")
    run.add_argument("--device", metavar="D", help="cpu, cuda or cuda:N; default: cpu")
    run.add_argument(
        "--resume", action="store_true", help="continue an interrupted run of the same command (with --output)"
    )
    _model_flags(run)

    inspect = _command(
        subparsers,
        "inspect",
        run_inspect,
        "measure a checkpoint's sparsity, whoever made it",
        "hf-sparse inspect smollm2-50 --json",
    )
    inspect.add_argument("path", metavar="PATH_OR_REPO", help="directory with safetensors files, or Hub id")
    inspect.add_argument("--plot", metavar="FILE", help="density by depth as an image")
    inspect.add_argument("--trust-remote-code", action="store_true", help="run the model repository's own code")

    evaluate = _command(
        subparsers,
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
    evaluate.add_argument(
        "--record", action="store_true", help="keep the result beside the model (evaluation.json) and in its card"
    )
    evaluate.add_argument("--device", metavar="D", help="cpu, cuda or cuda:N; default: cpu")
    _model_flags(evaluate)

    bench = _command(
        subparsers,
        "bench",
        run_bench,
        "measure how much faster a model runs packed",
        "hf-sparse bench smollm2-70 --new-tokens 64 --output bench.json --plot bench.png",
    )
    bench.add_argument("path", metavar="PATH", help="Hub id, directory or .gguf file of a model with zeros")
    bench.add_argument(
        "--runtime",
        default="auto",
        metavar="R",
        help="auto (default): packed layers where they measure faster; packed: all that get smaller; int8",
    )
    bench.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="sequences decoded together; default %(default)s"
    )
    bench.add_argument("--prompt", type=int, default=128, metavar="N", help="tokens of the prompt; default %(default)s")
    bench.add_argument("--new-tokens", type=int, default=64, metavar="N", help="tokens decoded; default %(default)s")
    bench.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="repetitions, dense and packed in turn; default %(default)s"
    )
    bench.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: what torch takes")
    bench.add_argument("--device", metavar="D", help="cpu, cuda or cuda:N; default: cpu")
    bench.add_argument("--output", metavar="FILE", help="write the result as JSON")
    bench.add_argument("--plot", metavar="FILE", help="time by kind of layer as an image")
    _model_flags(bench)

    speculative = _command(
        subparsers,
        "bench-speculative",
        run_bench_speculative,
        "measure speculative decoding: drafters and policies beside the target alone (also: bench speculative)",
        "hf-sparse bench speculative TARGET --drafter sparse=DIR dense=DIR --prompts gsm8k.jsonl --policies static:1-8 svip "
        "tapout "
        "--output bench.json --plot bench.png",
    )
    speculative.add_argument("target", metavar="TARGET", help="Hub id, directory or .gguf file")
    speculative.add_argument(
        "--drafter",
        nargs="+",
        required=True,
        action="extend",
        metavar="NAME=MODEL",
        help="one or more, of any tokenizer",
    )
    speculative.add_argument(
        "--prompts",
        nargs="+",
        required=True,
        action="extend",
        metavar="NAME=FILE",
        help="JSON lines, or a text of one prompt a line",
    )
    speculative.add_argument(
        "--policies",
        nargs="+",
        default=["static:5", "confidence", "svip", "tapout"],
        metavar="P",
        help="static:K or static:A-B, heuristic, confidence:H, max-confidence:H, margin:H, svip:H, svip-difference:H, "
        "adaedl:H, tapout, tapout-paper, tapout-token, tapout-thompson, or a file of TapOut.save; default: %(default)s",
    )
    speculative.add_argument(
        "--max-draft", type=int, default=16, metavar="N", help="tokens in a draft; default %(default)s"
    )
    speculative.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="of a text; default %(default)s"
    )
    speculative.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: greedy")
    speculative.add_argument("--limit", type=int, metavar="N", help="only the first prompts of each file")
    speculative.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling; default %(default)s")
    speculative.add_argument("--device", metavar="D", help="cpu, cuda or cuda:N; default: cpu")
    speculative.add_argument("--output", metavar="FILE", help="write the result as JSON")
    speculative.add_argument(
        "--plot", metavar="FILE", help="speed-ups, draft lengths and what TapOut learned, as an image"
    )
    _model_flags(speculative)

    pack = _command(
        subparsers,
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
        subparsers,
        "unpack",
        run_unpack,
        "make a packed checkpoint dense",
        "hf-sparse unpack packed --output out",
    )
    unpack.add_argument("path", metavar="DIR", help="a packed checkpoint")
    unpack.add_argument("--output", required=True, metavar="DIR")
    unpack.add_argument("--overwrite", action="store_true", help="replace --output if it exists")

    export = _command(
        subparsers,
        "export",
        run_export,
        "write a sparse model in the format of another runtime",
        "hf-sparse export smollm2-50 --to gguf --output smollm2-50.gguf --option dtype=f16",
    )
    export.add_argument("path", metavar="PATH", nargs="?", help="a checkpoint directory, dense with zeros or packed")
    export.add_argument("--to", metavar="TARGET", help="the format; --list shows them")
    export.add_argument("--output", metavar="OUT", help="the file or directory to write")
    export.add_argument("--option", action="append", metavar="K=V", help="an option of the target, e.g. dtype=f16")
    export.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    export.add_argument("--no-verify", action="store_true", help="do not load the output to compare it with the source")
    export.add_argument("--list", action="store_true", help="the targets, and what their runtimes do with zeros")

    comparison = _command(
        subparsers,
        "compare",
        run_compare,
        "models side by side: size, zeros, speed, quality, as far as they are known",
        "hf-sparse compare dense smollm2-50 smollm2-50-packed --plot comparison.png",
    )
    comparison.add_argument("paths", nargs="+", metavar="NAME=DIR", help="model directories")
    comparison.add_argument("--output", metavar="FILE", help="write the comparison as JSON")
    comparison.add_argument("--plot", metavar="FILE", help="bars with 95%% intervals, as an image")

    push = _command(
        subparsers,
        "push",
        run_push,
        "upload a model to the Hub in one commit, with its card and reports",
        "hf-sparse push smollm2-50 me/smollm2-50 --packed --private",
    )
    push.add_argument("path", metavar="DIR", help="a model directory, dense or packed")
    push.add_argument("repo", metavar="REPO", help="user/name; made if it is not there")
    push.add_argument("--packed", action="store_true", help="pack the weights on the way")
    push.add_argument("--private", action="store_true", help="make a new repository private")
    push.add_argument("--revision", metavar="BRANCH", help="a branch other than main")
    push.add_argument("--message", metavar="TEXT", help="of the commit")

    card = _command(
        subparsers,
        "card",
        run_card,
        "write the model card of a directory from its reports",
        "hf-sparse card smollm2-50",
    )
    card.add_argument("path", metavar="DIR", help="a model directory")
    card.add_argument("--license", metavar="L", help="of the model, e.g. apache-2.0; default: what the reports state")
    card.add_argument("--print", action="store_true", dest="show", help="show it instead of writing README.md")

    subparsers.add_parser(
        "lm-eval",
        help="lm-eval's own command line, with the model type hf-sparse",
        epilog="example: hf-sparse lm-eval run --model hf-sparse --model_args pretrained=DIR,draft=DIR --tasks gsm8k",
    )

    spectral = _command(
        subparsers,
        "spectral",
        run_spectral,
        "measure how well the masks of a model connect its layers (Ramanujan gaps)",
        "hf-sparse spectral run/checkpoint-* --output spectra.json --plot spectra.png",
    )
    spectral.add_argument(
        "path",
        metavar="PATH",
        nargs="+",
        help="Hub id or model directory; several checkpoints of one training, or the directory that holds them",
    )
    spectral.add_argument("--targets", nargs="+", metavar="NAME", help="layers; default: all that could be sparse")
    spectral.add_argument("--ignore", nargs="+", metavar="NAME", help="layers to leave out")
    spectral.add_argument(
        "--cheeger", action="store_true", help="weigh sub-graphs by max(nL, nR) / (nL + nR - 1), as some code does"
    )
    spectral.add_argument("--output", metavar="FILE", help="write the result as JSON")
    spectral.add_argument("--plot", metavar="FILE", help="the gaps over layers, or over checkpoints, as an image")
    spectral.add_argument("--device", metavar="D", help="cpu, cuda or cuda:N; default: cpu")
    spectral.add_argument("--trust-remote-code", action="store_true", help="run the model repository's own code")
    return parser


def _command(subparsers, name: str, run, summary: str, example: str) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
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
