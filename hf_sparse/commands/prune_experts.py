"""``hf-sparse prune --pattern expert``: whole experts of a mixture, by rankings per domain of the calibration data.

    hf-sparse prune MODEL --pattern expert --sparsity 0.5 --calibration code=code.txt math=math.jsonl --output DIR

Each domain is scored on its own; the decision is taken on the sum, and the retention table says what it means to each.
Beside the model lie expert_report.json, its plot, and the scores, from which any other sparsity is cut without calibrating.
"""

import json
import os
import shutil
import sys
import time
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from hf_sparse import commands
from hf_sparse.commands.domains import load_texts, parse_sources, read_scores

__all__ = ["PLOT_FILE", "REPORT_FILE", "SCORES_FILE", "run_prune_experts"]

REPORT_FILE = "expert_report.json"
PLOT_FILE = "expert_report.png"
SCORES_FILE = "expert_scores.jsonl"

GENERIC_TEXT = (
    "calibrated on one text without a domain: calibrated on generic text (C4), code models collapsed at 50% in the paper, "
    "where text of their own domain kept them (arXiv 2510.13999); mix the domains you need: --calibration code=FILE math=FILE"
)


def run_prune_experts(arguments) -> dict[str, Any]:
    from hf_sparse.atomic import atomic_directory
    from hf_sparse.commands.prune import check_output, check_shard_size, save_model
    from hf_sparse.hub_cards import SparsityCard
    from hf_sparse.instruments import device_name, peak_memory, versions

    started = time.perf_counter()
    _check_flags(arguments)
    texts = parse_sources("--calibration", arguments.calibration, arguments.samples)
    given = read_scores(parse_sources("--scores", arguments.scores), arguments.saliency)
    output = Path(arguments.output)
    check_output(output, arguments.overwrite)
    commands.check_device(arguments.device)
    check_shard_size(arguments.max_shard_size)
    progress_dir = _progress_dir(arguments, output, bool(texts))
    _check_before_loading(arguments, given)

    from hf_sparse.loading import load_model, load_tokenizer
    from hf_sparse.pruning.experts import prune_experts

    tokenizer = load_tokenizer(arguments.model, arguments.trust_remote_code)
    segments = load_texts(texts, tokenizer, arguments.sequence_length, arguments.shuffle)
    model = load_model(arguments.model, arguments.dtype, arguments.trust_remote_code)
    _dry_run(_without_memory(model), arguments, given)
    arguments.progress_dir = progress_dir
    seconds = {}
    if segments or not given:
        began = time.perf_counter()
        given = _score(model, segments, arguments)
        seconds["scoring"] = time.perf_counter() - began
    total = reduce(add, given.values())
    report = prune_experts(model, total, **_amount(arguments))
    if len(texts) == 1 and texts[0].name is None:
        report.notes.append(GENERIC_TEXT)
    rows = _retention(given, report)
    facts = _provenance(arguments, segments)
    model.config.hf_sparse_experts |= {"provenance": facts}
    device = _device(arguments, model)
    result = report.to_dict() | facts | {"retention": rows, "versions": versions()}
    result |= {"device": device_name(device), "peak_memory_bytes": peak_memory(device), "timings": seconds}
    with atomic_directory(output, overwrite=arguments.overwrite) as staging:
        save_model(model, tokenizer, staging, arguments)
        _save_scores(staging, given, total)
        result["seconds"] = time.perf_counter() - started
        (staging / REPORT_FILE).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        _plot(staging / PLOT_FILE, total, report, rows)
        SparsityCard(staging).save()
    if progress_dir:
        shutil.rmtree(progress_dir, ignore_errors=True)
    if not arguments.json:
        _show(result, output)
    return {"output": str(output), "file_bytes": commands.weight_bytes(output)} | result


def _check_flags(arguments) -> None:
    """All that is wrong with the flags alone; fills in the defaults of this pattern."""
    from hf_sparse.commands.prune import ABOUT_LAYERS, ABOUT_ZEROS, flags_given
    from hf_sparse.pruning.expert_scores import check_saliency

    if layers := flags_given(arguments, ABOUT_LAYERS):
        raise ValueError(
            f"{', '.join(layers)} chooses whole layers; it goes with --pattern layer, not with --pattern expert"
        )
    if wrong := flags_given(arguments, ABOUT_ZEROS):
        raise ValueError(
            f"{', '.join(wrong)} shape{'s' if len(wrong) == 1 else ''} zeros within weights; --pattern expert removes whole "
            "experts and leaves no zeros. Prune the experts first, then the result a second time with another pattern"
        )
    if arguments.allocation not in (None, "uniform", "global"):
        raise ValueError(f"--allocation {arguments.allocation}: experts are shared among layers by uniform or global")
    arguments.allocation = arguments.allocation or "uniform"
    if arguments.sparsity is not None and arguments.keep is not None:
        raise ValueError(
            "give either --sparsity (the fraction of experts to remove) or --keep (how many stay in a layer)"
        )
    if arguments.sparsity is None and arguments.keep is None:
        arguments.sparsity = 0.5
    if arguments.sparsity is not None and not 0 <= arguments.sparsity < 1:
        near = f"; did you mean {arguments.sparsity / 100:g}?" if 1 < arguments.sparsity < 100 else ""
        raise ValueError(
            f"--sparsity is the fraction of experts to remove and lies in [0, 1), got {arguments.sparsity:g}{near}"
        )
    if arguments.keep is not None and arguments.keep < 1:
        raise ValueError(f"--keep is the number of experts that stay in each layer, at least 1; got {arguments.keep}")
    if arguments.saliency is not None:
        check_saliency(arguments.saliency)
    if arguments.scores and arguments.calibration:
        raise ValueError("give either --calibration (to score experts) or --scores (to read rankings), not both")
    if not arguments.scores:
        arguments.saliency = arguments.saliency or "reap"
        if not arguments.calibration and (arguments.saliency != "random" or arguments.keep_super):
            why = f"--saliency {arguments.saliency}" if arguments.saliency != "random" else "--keep-super"
            raise ValueError(
                f"{why} looks at data: give --calibration NAME=FILE, once for each domain the model is for, or --scores FILE"
            )


def _progress_dir(arguments, output: Path, looks: bool) -> Path | None:
    """Where finished layers are kept; one directory a domain."""
    where = Path(os.path.abspath(output))
    progress_dir = where.parent / f".{where.name}.progress" if looks else None
    begun = progress_dir is not None and any(progress_dir.glob("*/scores.jsonl"))
    if begun and not arguments.resume:
        raise ValueError(
            f"an earlier run to {output} was interrupted; continue it with --resume, or remove {progress_dir} to start anew"
        )
    if arguments.resume and not begun:
        print(f"no interrupted run to {output} is there to resume: starting with the first layer", file=sys.stderr)
    return progress_dir


def _amount(arguments) -> dict[str, Any]:
    names = ("sparsity", "keep", "allocation", "keep_super")
    return {name: getattr(arguments, name) for name in names}


def _check_before_loading(arguments, given: dict) -> None:
    """What the model's config tells: no experts, or fewer than the router needs. Loading 60 GB to say so would be late."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(arguments.model, trust_remote_code=arguments.trust_remote_code)
        if getattr(config, "quantization_config", None) is not None:
            return  # its layers are not what the config's numbers say
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=arguments.trust_remote_code)
    except Exception:  # a GGUF file, a repository that is not there, a foreign config: loading says it better
        return
    _dry_run(skeleton, arguments, given)


def _dry_run(skeleton, arguments, given: dict) -> None:
    """Prunes a model without memory, by the scores if they are there, so that whatever is wrong is said now."""
    import torch

    from hf_sparse.mixtures import find_mixtures
    from hf_sparse.pruning.experts import prune_experts

    flat = {name: torch.ones(mixture.count) for name, mixture in find_mixtures(skeleton).items()}
    amount = _amount(arguments) if given else _amount(arguments) | {"keep_super": False}
    prune_experts(skeleton, reduce(add, given.values()) if given else flat, **amount)


def _without_memory(model):
    """A copy on the meta device."""
    import copy

    from torch import nn

    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(model, memo)


def _score(model, segments: dict, arguments) -> dict[str, Any]:
    """``{domain: ExpertScores}``; one entry without a domain where nothing is looked at."""
    from hf_sparse.instruments import reset_peak_memory
    from hf_sparse.pruning.expert_scores import score_experts

    options = {
        "device": arguments.device,
        "storage": "cpu" if arguments.offload else None,
        "progress": not arguments.json,
        "seed": arguments.seed or 0,
    }
    if not segments:
        return {"calibration": score_experts(model, None, arguments.saliency, **options)}
    reset_peak_memory(_device(arguments, model))
    if not arguments.resume:
        shutil.rmtree(arguments.progress_dir, ignore_errors=True)
    scores = {}
    for number, (domain, text) in enumerate(segments.items(), start=1):
        if len(segments) > 1:
            print(f"{domain}, {number} of {len(segments)} domains", file=sys.stderr)
        arguments.progress_dir.mkdir(parents=True, exist_ok=True)
        kept = arguments.progress_dir / domain
        scores[domain] = score_experts(model, text.ids, arguments.saliency, resume_dir=kept, **options)
    return scores


def _device(arguments, model):
    import torch

    return torch.device(arguments.device or next(model.parameters()).device)


def _retention(given: dict, report) -> list[dict[str, Any]]:
    from hf_sparse.pruning.expert_plots import retention

    return retention({domain: scores for domain, scores in given.items() if scores.tokens}, report.kept)


def _provenance(arguments, segments: dict) -> dict[str, Any]:
    return {
        "model": arguments.model if not Path(arguments.model).exists() else Path(arguments.model).name,
        "calibration": {domain: text.description for domain, text in segments.items()},
        "scores": [Path(entry).name for entry in arguments.scores or []],
        "command": arguments.command_line,
    }


def _save_scores(directory: Path, given: dict, total) -> None:
    total.save(directory / SCORES_FILE)
    if len(given) > 1:
        for domain, scores in given.items():
            scores.save(directory / f"{Path(SCORES_FILE).stem}.{domain}.jsonl")


def _plot(path: Path, scores, report, rows: list[dict]) -> bool:
    from hf_sparse.pruning.expert_plots import heat_map

    if not scores.tokens and scores.saliency != "random":
        return False
    try:
        heat_map(scores, path, report, rows)
    except ModuleNotFoundError:
        return False  # the plot is an extra; the numbers are in the JSON
    return True


def _show(result: dict, output: Path) -> None:
    from hf_sparse.pruning.expert_plots import retention_table

    out = commands.console()
    counts = sorted({len(indices) for indices in result["kept"].values()})
    before = sorted(set(result["experts_before"].values()))
    stay, had = ("–".join(dict.fromkeys(map(str, (numbers[0], numbers[-1])))) for numbers in (counts, before))
    out.print(
        f"{result['model']}: {stay} of {had} experts stay in each of {len(result['kept'])} layers ({result['saliency']}, "
        f"{result['allocation']}); {result['parameters_before'] / 1e6:.4g} M parameters became "
        f"{result['parameters_after'] / 1e6:.4g} M"
    )
    if result["retention"]:
        out.print(retention_table(result["retention"]))
    for note in result["notes"]:
        out.print(f"note: {note}")
    out.print(
        f"{result['seconds']:.1f} s, peak memory {result['peak_memory_bytes'] / 2**30:.2f} GiB, {result['device']}\n"
        f"saved {output} ({commands.weight_bytes(output) / 1e6:.1f} MB of weights), with {REPORT_FILE}, {SCORES_FILE} and a "
        "model card"
    )
