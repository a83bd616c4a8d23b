"""SparsityCard: a model card of what was measured, from a model directory and the reports beside it.

    SparsityCard("smollm2-50").save()           writes smollm2-50/README.md

Every number in it stands in a JSON file beside it, which the section names. A section without data is left out. The metadata
are those the Hub reads: base_model and its relation, library, task, tags, the licence, and results as ``model-index``; results
on benchmarks that the Hub knows also go into ``.eval_results``.
"""

import importlib
from importlib.resources import files
from pathlib import Path
from typing import Any

from hf_sparse.atomic import atomic_write_text
from hf_sparse.commands import portable
from hf_sparse.hub_cards.facts import REPORTS, Facts, gather

__all__ = ["MARK", "SparsityCard", "renew_card", "task_values"]

MARK = "<!-- written by hf_sparse from the files beside it -->"
_PAPERS = {  # saliency, allocation or training method -> (name, arXiv id)
    "wanda": ("Wanda", "2306.11695"),
    "sparsegpt": ("SparseGPT", "2301.00774"),
    "alps": ("ADMM in the manner of ALPS", "2406.07831"),
    "taylor": ("first-order Taylor", "1906.10771"),
    "owl": ("OWL", "2310.05175"),
    "erk": ("Erdős–Rényi-Kernel", "1911.11134"),
    "static": ("a static mask, as in SPDF", "2303.10464"),
    "set": ("SET", "1707.04780"),
    "rigl": ("RigL", "1911.11134"),
    "gmp": ("gradual magnitude pruning", "1710.01878"),
    "granet": ("GraNet", "2106.10404"),
    "srigl": ("SRigL", "2305.02299"),
    "chts": ("CHTs", "2501.19107"),
    "sr-ste": ("SR-STE", "2102.04010"),
    "top-kast": ("Top-KAST", "2106.03517"),
}
_EXPERT_SALIENCIES = {
    "reap": "REAP, the mean over its tokens of gate times output norm ([arXiv:2510.13999](https://arxiv.org/abs/2510.13999))",
    "ean_mean": "the mean norm of its outputs",
    "ean_sum": "the sum of the norms of its outputs",
    "frequency": "how many tokens were sent to it",
    "gate_sum": "the sum of its gates",
    "gated_sum": "the sum over its tokens of gate times output norm",
    "random": "chance",
}
_LAYER_SALIENCIES = {
    "angular": "the span that turns what goes through it least, by the angular distance between the inputs of its first layer "
    "and of the layer after it ([arXiv:2403.17887](https://arxiv.org/abs/2403.17887))",
    "block-influence": "what changes least what goes through it, by block influence "
    "(ShortGPT, [arXiv:2403.03853](https://arxiv.org/abs/2403.03853))",
}
_TAGS = {
    "layers": ["pruned", "layer-pruning"],
    "experts": ["moe", "pruned", "expert-pruning"],
    "ift": ["sparse", "sparse-ift"],
    "trained": ["sparse", "sparse-training"],
    "pruned": ["sparse", "pruned"],
    "distilled": ["self-data-distillation"],
    "drafter": ["drafter", "speculative-decoding"],
}
_BENCHMARKS = {  # lm-eval task -> the Hub's dataset and task
    "gsm8k": ("openai/gsm8k", "gsm8k"),
    "mmlu_pro": ("TIGER-Lab/MMLU-Pro", "mmlu_pro"),
    "gpqa_diamond_zeroshot": ("Idavidrein/gpqa", "diamond"),
}


class SparsityCard:
    """The card of a model directory.

    Args:
        directory: of the model. licence: default: what the reports or the config state; left out if nothing does.
        count: count the zeros where no report has.
    """

    def __init__(self, directory: str | Path, *, license: str | None = None, count: bool = True):
        self.facts: Facts = gather(directory, count)
        self.license = license

    def render(self) -> str:
        """The card as Markdown with its metadata."""
        facts = self.facts
        shared = self._shared()
        what = [self._template(f"what_{kind}.md", **shared).strip() for kind in facts.kinds]
        sections = [(heading, parts) for heading, parts in self._sections(shared) if parts]
        return self._template(
            "card.md",
            metadata=self._metadata(),
            mark=MARK,
            title=self._title(),
            what=what,
            imports=self._imports(),
            auto_class=self._auto_class(),
            text=self._auto_class() == "AutoModelForCausalLM",
            sections=sections,
        )

    def save(self) -> Path:
        """Writes README.md into the directory (an existing one is replaced), and ``.eval_results``; returns its path."""
        path = self.facts.directory / "README.md"
        atomic_write_text(path, self.render())
        self._save_eval_results()
        return path

    # ------------------------------------------------------------------------------------------------------------- parts

    def _title(self) -> str:
        facts = self.facts
        base, parts = facts.base or facts.directory.name, []
        if "layers" in facts.kinds:
            report = facts.reports["layers"]
            parts.append(f"with {len(report['kept'])} of {len(report['kept']) + len(report['dropped'])} layers")
        if "experts" in facts.kinds:
            report = facts.reports["experts"]
            left, had = sum(map(len, report["kept"].values())), sum(report["experts_before"].values())
            parts.append(f"with {left} of {had} experts")
        if {"pruned", "trained"} & set(facts.kinds):
            parts.append(f"{100 * facts.reports['sparsity']['sparsity']:.0f}% sparse")
        if "ift" in facts.kinds:
            parts.append(f"Sparse-IFT {facts.ift.get('family', '')}".strip())
        title = f"{base}, {', '.join(parts)}" if parts else str(base)
        return title.replace(", with", " with", 1) + (", a drafter" if "drafter" in facts.kinds else "")

    def _shared(self) -> dict[str, Any]:
        """What the templates look at."""
        from hf_sparse.commands import layer_names
        from hf_sparse.report import SparsityReport

        facts = self.facts
        report = SparsityReport.from_dict(facts.reports["sparsity"]) if "sparsity" in facts.reports else None
        config = facts.sparsity
        chosen = config.get("method") or config.get("saliency")
        shared: dict[str, Any] = {
            "report": report,
            "config": _Missing(config),
            "two_four": bool(report and report.parameters) and all(p.two_four for p in report.parameters),
            "method": _PAPERS.get(chosen) if isinstance(chosen, str) else None,
            "allocation": _PAPERS.get(config["allocation"]) if isinstance(config.get("allocation"), str) else None,
            "kinds": report.by_kind() if report else {},
            "trained": "training" in facts.reports or bool(facts.reports.get("drafter", {}).get("losses")),
            "training": _Missing(facts.reports.get("training", {})),
            "drafter": facts.reports.get("drafter"),
            "ift": _Missing(facts.ift or {}),
            "family": (facts.ift or {}).get("family"),
            "source": None if facts.counted else REPORTS["sparsity"],
        }
        if "experts" in facts.reports:
            experts = facts.reports["experts"]
            shared["experts"] = {
                "facts": experts,
                "left": sum(map(len, experts["kept"].values())),
                "had": sum(experts["experts_before"].values()),
                "how": _EXPERT_SALIENCIES.get(experts["saliency"], f"`{experts['saliency']}`"),
            }
        if "layers" in facts.reports:
            layers = facts.reports["layers"]
            influence = (layers.get("scores") or {}).get("influence")
            shared["layers"] = {
                "facts": layers,
                "dropped": layer_names(layers["dropped"]).capitalize(),
                "how": _LAYER_SALIENCIES.get(layers["saliency"]),
                "most_of_dropped": max(influence[layer] for layer in layers["dropped"]) if influence else None,
                "median": sorted(influence)[len(influence) // 2] if influence else None,
            }
        return shared

    def _sections(self, shared: dict[str, Any]) -> list[tuple[str, list[str]]]:
        facts, reports = self.facts, self.facts.reports
        part = lambda name, **more: self._template(f"part_{name}.md", **shared | more).strip()  # noqa: E731
        measured = []
        if "layers" in reports and (
            reports["layers"]["distance"] is not None or shared["layers"]["most_of_dropped"] is not None
        ):
            measured.append(part("layers", **shared["layers"]))
        if reports.get("experts", {}).get("retention"):
            measured.append(part("experts", **shared["experts"]))
        if (
            {"pruned", "trained", "ift", "drafter"} & set(facts.kinds)
            and shared["report"]
            and shared["report"].sparsity > 0
        ):
            measured.append(part("zeros"))
        measured += [f"Note: {note}." for note in self._notes(shared)]
        quality = []
        if "evaluation" in reports:
            quality.append(part("quality", rows=self._quality_rows(), harness=self._harness()))
        if "recovery" in reports:
            quality.append(part("recovery", **_recovery(reports["recovery"])))
        speed = [part("speed", bench=reports["bench"])] if "bench" in reports else []
        if "speculative" in reports:
            runs = sorted(reports["speculative"]["runs"].items(), key=lambda item: -item[1]["tokens_per_second"])
            speed.append(part("speculative", speculative=_Missing(reports["speculative"]), runs=runs))
        training = [part("training", rows=_training_rows(reports["training"]))] if "training" in reports else []
        places = {
            "recovery.png": quality,
            "bench.png": speed,
            "speculative.png": speed,
            "training_report.png": training,
        }
        for file, what in facts.plots.items():
            places.get(file, measured).append(f"![{what}]({file})")
        return [
            ("Measured", measured),
            ("Quality", quality),
            ("Speed", speed),
            ("Training", training),
            ("How it was made", [part("how", **self._how())]),
        ]

    def _notes(self, shared: dict[str, Any]) -> list[str]:
        reports = self.facts.reports
        notes = [*reports.get("layers", {}).get("notes", []), *reports.get("experts", {}).get("notes", [])]
        if {"pruned", "trained"} & set(self.facts.kinds):
            notes += shared["report"].all_notes()
        return notes

    def _how(self) -> dict[str, Any]:
        facts, reports = self.facts, self.facts.reports
        commands, calibrations, runs = [], [], []
        for name in ("layers", "experts"):
            report = reports.get(name)
            if report is None:
                continue
            commands.append(report.get("command"))
            given = report.get("calibration") or {}
            several = {"": given} if "samples" in given else given
            calibrations += [_calibration(text, domain if len(several) > 1 else "") for domain, text in several.items()]
            if report.get("scores") and name == "experts":
                calibrations.append(f"Rankings read from {', '.join(report['scores'])}.")
            runs.append(_run(report))
        if "pruned" in facts.kinds and not facts.counted:
            report = reports["sparsity"]
            commands.append((facts.sparsity.get("provenance") or {}).get("command"))
            if report.get("calibration"):
                calibrations.append(_calibration(report["calibration"]))
            runs.append(_run(report))
        for name in ("training", "evaluation", "recovery", "bench", "speculative"):
            if reports.get(name, {}).get("command"):
                commands.append(reports[name]["command"])
        written = [name for name in reports if not (name == "sparsity" and facts.counted)]
        return {
            "commands": [portable(command) for command in dict.fromkeys(filter(None, commands))],
            "calibrations": calibrations,
            "runs": list(filter(None, runs)),
            "files": [f"`{REPORTS[name]}`" for name in written],
            "config_keys": [
                f"`{key}`" for key in ("hf_sparse", "hf_sparse_experts", "hf_sparse_layers") if key in facts.config
            ],
        }

    def _quality_rows(self) -> list[dict[str, str]]:
        evaluation, rows = self.facts.reports["evaluation"], []
        if "perplexity" in evaluation:
            rows.append(
                {
                    "name": f"perplexity, {evaluation.get('text', 'text')}",
                    "value": f"{evaluation['perplexity']:.4g}",
                    "about": str(evaluation.get("protocol", "")),
                }
            )
        for task, metric, value, error in task_values(evaluation):
            shots = (evaluation.get("tasks", {}).get("protocol", {}).get("num_fewshot") or {}).get(task)
            about = f"{metric}{'' if shots is None else f', {shots} shots'}"
            rows.append({"name": task, "value": f"{value:.4f}" + (f" ± {error:.4f}" if error else ""), "about": about})
        return rows

    def _harness(self) -> str | None:
        return self.facts.reports["evaluation"].get("tasks", {}).get("protocol", {}).get("harness")

    def _imports(self) -> list[str]:
        if self.facts.packed:
            return ["import hf_sparse  # reads packed weights; without the package: trust_remote_code=True"]
        if (self.facts.config.get("quantization_config") or {}).get("quant_method") == "uneven_experts":
            return ["import hf_sparse  # layers with different numbers of experts load with it only"]
        if self.facts.ift is not None:
            return ["import hf_sparse  # knows the sparse layers; without the package: trust_remote_code=True"]
        return []

    def _auto_class(self) -> str:
        architectures = " ".join(self.facts.config.get("architectures") or [])
        return "AutoModelForImageClassification" if "ImageClassification" in architectures else "AutoModelForCausalLM"

    def _metadata(self) -> str:
        from huggingface_hub import EvalResult, ModelCardData

        facts = self.facts
        tags = list(dict.fromkeys(tag for kind in facts.kinds for tag in _TAGS[kind])) + ["hf_sparse"]
        base, text = facts.base, self._auto_class() == "AutoModelForCausalLM"
        data: dict[str, Any] = {"library_name": "transformers", "tags": tags}
        data["pipeline_tag"] = "text-generation" if text else "image-classification"
        if base and base.count("/") == 1 and not base.endswith(".gguf"):
            data |= {"base_model": base, "base_model_relation": "quantized" if facts.packed else "finetune"}
        if licence := self.license or self._licence():
            data["license"] = licence
        results = []
        evaluation = facts.reports.get("evaluation", {})
        if "perplexity" in evaluation:
            results.append(("perplexity", evaluation.get("text", "text"), "perplexity", evaluation["perplexity"]))
        results += [(task, task, metric, value) for task, metric, value, _ in task_values(evaluation)]
        if results:
            kind = data["pipeline_tag"]
            data["model_name"] = facts.directory.name
            data["eval_results"] = [
                EvalResult(
                    task_type=kind, dataset_type=dataset, dataset_name=dataset, metric_type=metric, metric_value=value
                )
                for _, dataset, metric, value in results
            ]
        return ModelCardData(**data).to_yaml()

    def _licence(self) -> str | None:
        stated = (self.facts.sparsity.get("provenance") or {}).get("license")
        return stated or self.facts.reports.get("training", {}).get("license") or self.facts.config.get("license")

    def _save_eval_results(self) -> None:
        known = [row for row in task_values(self.facts.reports.get("evaluation", {})) if row[0] in _BENCHMARKS]
        hub = importlib.import_module("huggingface_hub")
        if not known or not hasattr(hub, "EvalResultEntry"):
            return
        import yaml

        entries = []
        for task, _, value, _ in known:
            dataset, name = _BENCHMARKS[task]
            entries.append(hub.EvalResultEntry(dataset_id=dataset, task_id=name, value=round(100 * value, 2)))
        folder = self.facts.directory / ".eval_results"
        folder.mkdir(exist_ok=True)
        atomic_write_text(folder / "hf_sparse.yaml", yaml.safe_dump(hub.eval_result_entries_to_yaml(entries)))

    def _template(self, name: str, **values) -> str:
        import jinja2

        loader = jinja2.FileSystemLoader(str(files("hf_sparse.hub_cards").joinpath("templates")))
        environment = jinja2.Environment(
            loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        nested = values.get(name.removeprefix("what_").removesuffix(".md"))
        if name.startswith("what_") and isinstance(nested, dict) and "facts" in nested:
            values = values | nested
        return environment.get_template(name).render(**values)


def renew_card(directory: str | Path) -> None:
    """Writes the card of a directory anew if the one there is ours."""
    path = Path(directory) / "README.md"
    if path.is_file() and MARK in path.read_text(encoding="utf-8"):
        SparsityCard(directory).save()


class _Missing(dict):
    """A dict that says None for what it does not have, so that templates can ask for anything."""

    def __missing__(self, key):
        return None

    def __getattr__(self, key):
        return self[key]


def _calibration(text: dict[str, Any], domain: str = "") -> str:
    parts = f"Calibration{f' for {domain}' if domain else ''}: {text.get('samples')} segments"
    parts += f" of {text['sequence_length']} tokens" if text.get("sequence_length") else ""
    parts += f" of {text['source']}" if text.get("source") else ""
    return parts + (f" (shuffled, seed {text['shuffle']})." if text.get("shuffle") is not None else ".")


def _run(report: dict[str, Any]) -> str:
    if not report.get("device"):
        return ""
    memory = report.get("peak_memory_bytes")
    peak = f" and at most {memory / 2**30:.2f} GiB of memory" if memory else ""
    versions = ", ".join(f"{name} {version}" for name, version in report.get("versions", {}).items())
    return f"It took {report.get('seconds', 0):.0f} s{peak} on {report['device']}, with {versions}."


def task_values(evaluation: dict[str, Any]) -> list[tuple[str, str, float, float | None]]:
    """``(task, metric, value, standard error)``, one metric a task."""
    from hf_sparse.integrations.lm_eval import METRICS

    found = []
    for task, metrics in (evaluation.get("tasks", {}).get("results") or {}).items():
        plain = {key.split(",")[0]: (key, value) for key, value in metrics.items() if isinstance(value, (int, float))}
        name = next(
            (metric for metric in (*METRICS, *plain) if metric in plain and not metric.endswith("_stderr")), None
        )
        if name is not None:
            key, value = plain[name]
            error = metrics.get(key.replace(name, f"{name}_stderr", 1))
            found.append((task, name, float(value), error if isinstance(error, float) else None))
    return found


def _recovery(report: dict[str, Any]) -> dict[str, Any]:
    def percent(value, error) -> str:
        return "–" if value is None else f"{value:.1f}%" + (f" ± {error:.1f}" if error else "")

    def shown(measure) -> str:
        if measure is None:
            return "–"
        value = f"{measure['mean']:.1%}" if measure["kind"] == "accuracy" else f"{measure['value']:.4g}"
        left = percent(measure.get("recovery_percent"), measure.get("recovery_stderr"))
        return value if left == "–" else f"{value} ({left})"

    names = list(
        dict.fromkeys([*report["original"]["measures"], *(n for m in report["models"].values() for n in m["measures"])])
    )
    tasks = any(measure["kind"] == "accuracy" for measure in report["original"]["measures"].values())
    return {"recovery": report, "names": names, "tasks": tasks, "shown": shown, "percent": percent}


def _training_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What of a training is told, in words."""
    rows = []
    labels = {
        "dataset": "data",
        "rows": "rows",
        "steps": "steps",
        "batch_size": "rows a step",
        "learning_rate": "learning rate",
        "final_loss": "loss at the end",
        "eval_loss": "held-out loss",
        "density": "density at the end",
        "ever_active": "share of weights ever active",
        "flops": "training FLOPs",
        "flops_dense": "of dense training",
        "seconds": "seconds",
        "device": "hardware",
    }
    for key, label in labels.items():
        value = report.get(key)
        if value is not None:
            rows.append((label, f"{value:.4g}" if isinstance(value, float) else str(value)))
    if report.get("versions"):
        rows.append(("with", ", ".join(f"{name} {version}" for name, version in report["versions"].items())))
    return rows
