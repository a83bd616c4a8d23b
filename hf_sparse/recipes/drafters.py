"""SD^2, self-distilled sparse drafters (arxiv.org/abs/2504.08838): a drafter that says what the target would, at a part of the
cost.

    report = make_drafter(model, dataset, "drafter", processing_class=tokenizer, target=target, sparsity=0.5)

    1  data      the target answers the prompts of a dataset (template=None), or rewrites its answers: what the drafter is to
    say 2  pruning   in one shot: unstructured, n:m, or whole layers (the baseline); calibrated on that very data
    3  tuning    on the data, in full, with the zeros fixed

Each stage leaves a folder in ``output_dir`` and is not repeated: a call that was ended goes on. The paper's cost is MACs per
token (nonzeros of the linear layers, the output head dense); with c, those of the drafter over those of the target, a draft of
g tokens of which a are accepted on average makes generation (a + 1) / (g c + 1) times as fast, if time goes with MACs.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hf_sparse.atomic import atomic_directory, atomic_write_text
from hf_sparse.flops import macs_per_token
from hf_sparse.targets import find_targets

__all__ = ["DrafterReport", "make_drafter", "model_macs"]


@dataclass(frozen=True)
class DrafterReport:
    """What :func:`make_drafter` made.

    Attributes:
        path: the drafter's directory. macs: per token; dense_macs: of the model it was made from.
        layers: of the drafter. zeros: fraction of the decoder's linear weights. rows, taken: of the data, and how many are the
            teacher's words. losses: of the fine-tuning, as logged.
    """

    path: str
    macs: float
    dense_macs: float
    layers: int
    zeros: float
    rows: int
    taken: int
    losses: list[float]


def model_macs(model) -> float:
    """MACs per token of a model's nonzero weights, the output head included, embedding lookups not (SD^2's count)."""
    targets = find_targets(model, ["re:.*"])
    densities = {name: float((model.get_parameter(name) != 0).float().mean()) for name in targets}
    return macs_per_token(model, targets, densities)


def make_drafter(
    model,
    dataset,
    output_dir: str | Path,
    *,
    processing_class,
    target=None,
    sparsity: float | None = None,
    pattern: str | None = None,
    remove: int | None = None,
    saliency: str = "sparsegpt",
    template: str | Path | None = None,
    words: str = "target",
    tune: bool = True,
    args: Any = None,
    samples: int = 64,
    sequence_length: int = 512,
    device: str | torch.device | None = None,
    progress: bool = True,
    **generation: Any,
) -> DrafterReport:
    """Makes a drafter of ``model``, which is changed in place.

    Args:
        model: what the drafter is made of: the target's function, or a smaller model of its tokenizer.
        dataset: prompts with responses (:mod:`hf_sparse.distillation.rows`), a ``datasets.Dataset``.
        processing_class: the tokenizer, of both.
        target: who writes the data; None: ``model`` itself before it is pruned.
        sparsity, pattern: of the zeros, e.g. 0.5, or pattern="2:4"; remove: instead, layers to drop (a dense baseline).
        saliency: of the zeros.
        template: None: the target answers for itself; or a template by which it rewrites the dataset's responses.
        words: ``target``, who writes the responses; or ``dataset``: they are taken as they are, written already or to compare
        with. tune: False leaves the fine-tuning out (and the data are for calibration only).
        args: a ``trl.SFTConfig``; default: one epoch, learning rate 1e-4, batches of 8.
        samples, sequence_length: of the calibration.
        device: for writing and pruning; default: where the models are.
        generation: of :func:`hf_sparse.distillation.self_data.self_distill`, e.g. ``max_new_tokens``.

    Raises:
        ValueError: before any work: not exactly one of ``sparsity``, ``pattern`` and ``remove``; and what the stages raise.
    """
    given = [
        name for name, value in (("sparsity", sparsity), ("pattern", pattern), ("remove", remove)) if value is not None
    ]
    if len(given) != 1:
        raise ValueError(
            f"give exactly one of sparsity=0.5, pattern='2:4' and remove=15 (layers); got {', '.join(given) or 'none'}"
        )
    if words not in ("target", "dataset"):
        raise ValueError(f"words are the target's or the dataset's, got {words!r}")
    output = Path(output_dir)
    if (output / "report.json").is_file():
        return DrafterReport(**json.loads((output / "report.json").read_text()))
    output.mkdir(parents=True, exist_ok=True)
    dense = model_macs(model)
    writer = (target if target is not None else model) if words == "target" else None
    rows = _data(writer, dataset, output, processing_class, template, device, progress, generation)
    _prune(
        model,
        rows,
        output,
        processing_class,
        sparsity,
        pattern,
        remove,
        saliency,
        samples,
        sequence_length,
        device,
        progress,
    )
    losses = _tune(model, rows, output, processing_class, args) if tune else []
    folder = output / "drafter"
    if not folder.is_dir():
        with atomic_directory(folder) as staging:
            model.save_pretrained(staging)
            processing_class.save_pretrained(staging)
    weights = [model.get_parameter(name) for name in find_targets(model)]
    report = DrafterReport(
        path=str(folder),
        macs=model_macs(model),
        dense_macs=dense,
        layers=model.config.get_text_config().num_hidden_layers,
        zeros=sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights),
        rows=len(rows),
        taken=sum(row["source"] == "model" for row in rows),
        losses=losses,
    )
    atomic_write_text(output / "report.json", json.dumps(asdict(report), indent=1) + "\n")
    return report


def _data(writer, dataset, output: Path, tokenizer, template, device, progress: bool, generation: dict):
    """The rows in the target's words."""
    import datasets

    from hf_sparse.distillation.self_data import self_distill

    file = output / "data.jsonl"
    if file.is_file():
        return datasets.Dataset.from_list([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()])
    if writer is None:
        rows = _as_they_are(dataset)
        atomic_write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return datasets.Dataset.from_list(rows)
    place = None if isinstance(writer, str) else writer.device
    if device is not None and place is not None:
        writer.to(device)
    rows = self_distill(
        writer,
        dataset,
        processing_class=tokenizer,
        template=template,
        output_dir=output / "rows",
        progress=progress,
        **generation,
    )
    if place is not None:
        writer.to(place)
    atomic_write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return rows


def _as_they_are(dataset) -> list[dict]:
    """The rows with the responses they have, and where those come from, as far as it is known."""
    from hf_sparse.distillation.rows import row_reader

    read, rows = row_reader(dataset.column_names), []
    for row in dataset:
        prompt, response = read(row)
        completion = [{"role": "assistant", "content": response}]
        rows.append({"prompt": prompt, "completion": completion, "source": row.get("source", "reference")})
    return rows


def _prune(
    model, rows, output: Path, tokenizer, sparsity, pattern, remove, saliency, samples, length, device, progress
) -> None:
    """Zeros, or fewer layers; by the conversations of the data, one after the other."""
    from hf_sparse.config import SparsityConfig
    from hf_sparse.distillation.generation import chat_ids
    from hf_sparse.pruning.layers import drop_layers, score_layers
    from hf_sparse.pruning.prune import prune

    done = output / "pruned"
    if (done / "dropped.json").is_file():
        drop_layers(model, json.loads((done / "dropped.json").read_text()))
        return
    ids: list[int] = []
    for row in rows:
        ids += [*chat_ids(tokenizer, row["prompt"]), *tokenizer(row["completion"][0]["content"])["input_ids"]]
        if len(ids) >= samples * length:
            break
    count = max(1, min(samples, len(ids) // length))
    batches = torch.tensor(ids[: count * length]).view(count, -1)
    done.mkdir(exist_ok=True)
    if remove is not None:
        scores = score_layers(model, batches, device=device, progress=progress)
        dropped = scores.best_span(remove)
        drop_layers(model, dropped)
        atomic_write_text(done / "dropped.json", json.dumps(dropped))
        return
    config = SparsityConfig(sparsity=sparsity, pattern=pattern, saliency=saliency)
    prune(model, config, batches, device=device, progress=progress, resume_dir=done)


def _tune(model, rows, output: Path, tokenizer, args) -> list[float]:
    """In full, with the zeros that are there."""
    from trl import SFTConfig

    from hf_sparse.callbacks.fine_tuning import plain_model, sft_trainer

    if args is None:
        cuda = torch.cuda.is_available()
        args = SFTConfig(
            str(output / "trainer"),
            num_train_epochs=1,
            per_device_train_batch_size=8,
            learning_rate=1e-4,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            logging_steps=10,
            save_strategy="no",
            bf16=cuda,
            use_cpu=not cuda,
            report_to=[],
        )
    trainer = sft_trainer(model, args, rows, processing_class=tokenizer)
    trainer.train()
    plain_model(trainer)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
