"""``hf-sparse prune --pattern layer``: whole decoder layers, those that change least what goes through them.

    hf-sparse prune MODEL --pattern layer --remove 6 --calibration text.txt --output DIR

The result is a stock checkpoint with fewer layers. Beside it lie layer_report.json with the scores of every layer and every
span, a plot of them, and a model card.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from hf_sparse import commands

__all__ = ["PLOT_FILE", "REPORT_FILE", "SALIENCIES", "run_prune_layers"]

REPORT_FILE = "layer_report.json"
PLOT_FILE = "layer_report.png"
SALIENCIES = ("angular", "block-influence")


def run_prune_layers(arguments) -> dict[str, Any]:
    from hf_sparse.atomic import atomic_directory
    from hf_sparse.commands.prune import check_output, check_shard_size, save_model
    from hf_sparse.data import check_source, load_segments
    from hf_sparse.hub_cards import SparsityCard
    from hf_sparse.instruments import device_name, peak_memory, reset_peak_memory, versions

    started = time.perf_counter()
    _check_flags(arguments)
    output = Path(arguments.output)
    check_output(output, arguments.overwrite)
    if arguments.calibration:
        check_source(arguments.calibration[0])
    commands.check_device(arguments.device)
    check_shard_size(arguments.max_shard_size)
    _check_before_loading(arguments)

    import torch

    from hf_sparse.loading import load_model, load_tokenizer
    from hf_sparse.pruning.layers import LAYERS_KEY, drop_layers, score_layers

    tokenizer = load_tokenizer(arguments.model, arguments.trust_remote_code)
    text = scores = None
    if arguments.calibration:
        size = (arguments.samples, arguments.sequence_length, arguments.shuffle)
        text = load_segments(arguments.calibration[0], tokenizer, *size)
    model = load_model(arguments.model, arguments.dtype, arguments.trust_remote_code)
    device = torch.device(arguments.device or next(model.parameters()).device)
    reset_peak_memory(device)
    if text:
        storage = "cpu" if arguments.offload else None
        scores = score_layers(model, text.ids, device=device, storage=storage, progress=not arguments.json)
    dropped = sorted(arguments.layers) if arguments.layers else _chosen(scores, arguments)
    report = drop_layers(model, dropped)
    report.notes += _notes(scores, report, arguments)
    facts = {
        "model": arguments.model if not Path(arguments.model).exists() else Path(arguments.model).name,
        "saliency": None if arguments.layers else arguments.saliency,
        "calibration": text.description if text else None,
        "command": arguments.command_line,
    }
    setattr(model.config, LAYERS_KEY, getattr(model.config, LAYERS_KEY) | {"provenance": facts})
    result = facts | report.to_dict() | _distance(scores, report) | {"versions": versions()}
    result |= {"device": device_name(device), "peak_memory_bytes": peak_memory(device)}
    result["scores"] = scores.to_dict() if scores else None
    with atomic_directory(output, overwrite=arguments.overwrite) as staging:
        save_model(model, tokenizer, staging, arguments)
        if scores is not None:
            _plot(scores, report.dropped, staging / PLOT_FILE)
        result["seconds"] = time.perf_counter() - started
        (staging / REPORT_FILE).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        SparsityCard(staging).save()
    if not arguments.json:
        _show(result, output)
    return {"output": str(output), "file_bytes": commands.weight_bytes(output)} | result


def _check_flags(arguments) -> None:
    """All that is wrong with the flags alone; fills in the defaults of this pattern."""
    from hf_sparse.commands.prune import ABOUT_EXPERTS, ABOUT_ZEROS, flags_given

    others = {"sparsity": None, "allocation": None, "seed": None, "resume": False}
    if wrong := flags_given(arguments, ABOUT_ZEROS | ABOUT_EXPERTS | others):
        raise ValueError(
            f"{', '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} of no use to --pattern layer, which removes whole "
            "layers: say --remove N or --layers I J. Zeros within the weights that stay are a second run with another pattern"
        )
    if (arguments.remove is None) == (arguments.layers is None):
        raise ValueError("give either --remove N (how many layers go) or --layers I J ... (which ones)")
    if arguments.layers is not None:
        if arguments.saliency is not None or arguments.allow_last:
            raise ValueError("--saliency and --allow-last choose layers; --layers says already which ones go")
        if len(set(arguments.layers)) != len(arguments.layers) or min(arguments.layers) < 0:
            raise ValueError(f"--layers takes different layer numbers from 0 on; got {arguments.layers}")
    else:
        if arguments.remove < 1:
            raise ValueError(f"--remove is the number of layers that go, at least 1; got {arguments.remove}")
        arguments.saliency = arguments.saliency or "angular"
        if arguments.saliency not in SALIENCIES:
            raise ValueError(f"--saliency {arguments.saliency}: layers are ranked by {' or '.join(SALIENCIES)}")
        if not arguments.calibration:
            raise ValueError(
                f"--saliency {arguments.saliency} looks at data: give --calibration FILE or a Hub dataset id"
            )
    if arguments.calibration and len(arguments.calibration) > 1:
        raise ValueError(f"one calibration text is taken, got {', '.join(arguments.calibration)}")


def _check_before_loading(arguments) -> None:
    """What the model's config tells; loading 16 GB to say that there are fewer layers would be late."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(arguments.model, trust_remote_code=arguments.trust_remote_code)
        layers = config.get_text_config().num_hidden_layers
    except Exception:  # a GGUF file, a repository that is not there, a foreign config: loading says it better
        return
    if not isinstance(layers, int):
        return
    if arguments.remove is not None and arguments.remove >= layers:
        raise ValueError(
            f"the model has {layers} layers; from 1 to {layers - 1} of them can go, not {arguments.remove}"
        )
    if arguments.layers is not None and max(arguments.layers) >= layers:
        raise ValueError(f"the model has layers 0 to {layers - 1}; --layers names {max(arguments.layers)}")


def _chosen(scores, arguments) -> list[int]:
    choose = scores.best_span if arguments.saliency == "angular" else scores.least_influential
    return choose(arguments.remove, keep_last=not arguments.allow_last)


def _distance(scores, report) -> dict[str, float | None]:
    """How far apart the ends of the span that went are, if it is one."""
    first, last = report.dropped[0], report.dropped[-1]
    if scores is None or last - first + 1 != len(report.dropped):
        return {"distance": None}
    return {"distance": float(scores.distance[first, last + 1])}


def _notes(scores, report, arguments) -> list[str]:
    notes = []
    if scores is not None and arguments.remove and not arguments.allow_last:
        without, last = _chosen(scores, arguments), len(scores.influence) - 1
        choose = scores.best_span if arguments.saliency == "angular" else scores.least_influential
        if (better := choose(arguments.remove, keep_last=False)) != without:
            notes.append(
                f"{commands.layer_names(better)} scored lower still, but the last layer ({last}) is among them and stays: the "
                "final norm and the output head expect what it makes (--allow-last lets it go)"
            )
    return notes


def _plot(scores, dropped: list[int], path: Path) -> bool:
    from hf_sparse.pruning.layer_plots import plot_layers

    try:
        plot_layers(scores, dropped, path)
    except ModuleNotFoundError:
        return False  # the plot is an extra; the numbers are in the JSON
    return True


def _show(result: dict[str, Any], output: Path) -> None:
    out = commands.console()
    before, after = (result[f"parameters_{when}"] / 1e6 for when in ("before", "after"))
    kept, gone = len(result["kept"]), len(result["dropped"])
    how = "as asked for" if result["saliency"] is None else f"least {result['saliency'].replace('-', ' ')}"
    distance = "" if result["distance"] is None else f", angular distance {result['distance']:.4f} of at most 1"
    out.print(
        f"{result['model']}: {commands.layer_names(result['dropped'])} went ({how}{distance}); {kept} of {kept + gone} are "
        f"left; {before:.4g} M parameters became {after:.4g} M"
    )
    for note in result["notes"]:
        out.print(f"note: {note}")
    peak = result["peak_memory_bytes"] / 2**30
    out.print(f"{result['seconds']:.1f} s, peak memory {peak:.2f} GiB, {result['device']}")
    weights = commands.weight_bytes(output) / 1e6
    out.print(f"saved {output} ({weights:.1f} MB of weights), with {REPORT_FILE} and a model card")
    print(
        "such a model is meant to be fine-tuned; hf-sparse distill makes data in the words of the original",
        file=sys.stderr,
    )
