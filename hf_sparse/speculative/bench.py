"""How much faster a target gets with which drafter and policy: tokens a second per text, side by side in one run.

    report = benchmark(target, {"sparse": drafter}, {"tapout": TapOut(), "static:5": StaticLength(5)}, prompts)

Every text is written by the target alone and then with every pair of drafter and policy, one after the other, so that whatever
else the machine does hits all alike; the order turns from text to text. A policy that learns keeps what it learned from text to
text. Greedy outputs are compared with the target's own; where they differ (rounding in half precision) the number of texts is
told.

    tokens/s     new tokens over wall clock, prompt included, mean over the texts
    speed-up     mean tokens/s over that of the target alone (as Spec-Bench reports it), with a bootstrap interval over the
    texts
    MAL          tokens emitted per forward of the target, over all of them; acceptance: accepted per drafted token
    predicted    MAL / (drafted per round * c + 1), with c measured in the same run: the speed-up if nothing else
                 cost time and verifying d + 1 tokens took no longer than writing one
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_sparse.instruments import device_name, progress_bar, tables_side_by_side, versions
from hf_sparse.speculative.decoding import SpeculativeDecoding
from hf_sparse.speculative.metrics import Speculation, bootstrap, improvement_factor
from hf_sparse.speculative.tapout import TapOut

__all__ = ["SpeculationReport", "benchmark"]

ALONE = "target alone"


@dataclass
class SpeculationReport:
    """What :func:`benchmark` measured.

    Attributes:
        speeds: tokens a second ``{run: [per text]}``, ``target alone`` first; a run is ``drafter, policy``.
        speculation: counts ``{run: [per text]}``. equal: texts whose greedy output was the target's own.
        learned: mean rewards of TapOut's rules after each text, ``{run: [{rule: mean}]}``.
        groups: a name per text, e.g. where it comes from. facts: settings, versions, hardware.
    """

    speeds: dict[str, list[float]]
    speculation: dict[str, list[Speculation]]
    equal: dict[str, int]
    learned: dict[str, list[dict[str, float]]]
    groups: list[str]
    facts: dict[str, Any] = field(default_factory=dict)

    def row(self, run: str, group: str | None = None) -> dict[str, Any]:
        """One run's figures, of all texts or of one group."""
        texts = [i for i, name in enumerate(self.groups) if group in (None, name)]
        pairs = [(self.speeds[run][i], self.speeds[ALONE][i]) for i in texts]
        ratio = lambda chosen: sum(a for a, _ in chosen) / sum(b for _, b in chosen)  # noqa: E731
        result: dict[str, Any] = {"tokens_per_second": sum(a for a, _ in pairs) / len(pairs)}
        if run == ALONE:
            return result
        result |= {"speed_up": ratio(pairs), "speed_up_95": bootstrap(pairs, ratio)}
        parts = [self.speculation[run][i] for i in texts]
        total = sum(parts, Speculation())
        lengths = lambda chosen: sum(sum(p.emitted) for p in chosen) / sum(p.rounds for p in chosen)  # noqa: E731
        rates = lambda chosen: sum(sum(p.accepted) for p in chosen) / max(1, sum(sum(p.drafted) for p in chosen))  # noqa: E731
        result |= total.to_dict() | {"mean_accepted_length_95": bootstrap(parts, lengths)}
        result |= {"acceptance_95": bootstrap(parts, rates), "drafted_per_round": sum(total.drafted) / total.rounds}
        if total.cost_ratio:
            result["predicted"] = improvement_factor(
                total.mean_accepted_length, result["drafted_per_round"], total.cost_ratio
            )
        return result

    def to_dict(self) -> dict[str, Any]:
        """All figures, and what is needed to draw them again."""
        groups = list(dict.fromkeys(self.groups))
        runs = {}
        for run in self.speeds:
            runs[run] = self.row(run) | {"tokens_per_second_per_text": [round(speed, 2) for speed in self.speeds[run]]}
            if len(groups) > 1:
                runs[run]["groups"] = {group: self.row(run, group) for group in groups}
            if run != ALONE:
                total = sum(self.speculation[run], Speculation())
                runs[run]["lengths"] = _histogram(total.drafted)
                runs[run]["equal_texts"] = self.equal.get(run)
            if run in self.learned:
                runs[run]["learned"] = self.learned[run]
        return {"texts": len(self.groups), "groups": self.groups, "runs": runs} | self.facts

    def tables(self, width: int = 100) -> list:
        """Rich Tables, a column per run, the fastest first; as many beside each other as fit into ``width`` characters."""
        rows = {run: self.row(run) for run in self.speeds}
        columns = {}
        for run in sorted(rows, key=lambda run: -rows[run]["tokens_per_second"]):
            row = rows[run]
            cells = [f"{row['tokens_per_second']:.1f}"]
            if run != ALONE:
                low, high = row["speed_up_95"]
                cells += [f"{row['speed_up']:.2f}", f"{low:.2f}–{high:.2f}", f"{row['mean_accepted_length']:.2f}"]
                cells += [f"{row['acceptance']:.0%}", f"{row['drafted_per_round']:.1f}"]
                cells += ["–" if row["cost_ratio"] is None else f"{row['cost_ratio']:.3f}"]
                cells += [f"{row['predicted']:.2f}" if "predicted" in row else "–"]
            columns[run] = cells + [""] * (8 - len(cells))
        names = ["tokens/s", "speed-up", "95%", "MAL", "accepted", "drafted a round", "c", "predicted"]
        return tables_side_by_side(names, columns, width)

    def plot(self, path: str | Path) -> None:
        """Speed-up of all runs, with static lengths as a curve; draft lengths; and what TapOut learned, text by text.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("the plot needs matplotlib: pip install 'hf-sparse[plot]'") from error
        drafters = list(dict.fromkeys(run.rpartition(", ")[0] for run in self.speculation))
        panels = 2 + bool(self.learned)
        figure = Figure(figsize=(6.0 * panels, 3.6 * len(drafters) + 0.4), layout="constrained")
        axes = figure.subplots(len(drafters), panels, squeeze=False)
        for (speed, lengths, *rest), drafter in zip(axes, drafters, strict=True):
            runs = {run.rpartition(", ")[2]: run for run in self.speculation if run.rpartition(", ")[0] == drafter}
            self._draw_speeds(speed, drafter, runs)
            for policy, run in runs.items():
                if not policy.startswith("static:"):
                    histogram = _histogram(sum(self.speculation[run], Speculation()).drafted)
                    shares = [count / sum(histogram.values()) for count in histogram.values()]
                    lengths.plot(list(histogram), shares, marker=".", label=policy)
            lengths.set_xlabel("tokens drafted in a round")
            lengths.set_ylabel("share of rounds")
            lengths.legend(fontsize=7)
            if rest:
                for policy, run in runs.items():
                    for rule in self.learned.get(run, [{}])[0]:
                        values = [means[rule] for means in self.learned[run]]
                        rest[0].plot(range(1, len(values) + 1), values, label=f"{policy}: {rule}")
                rest[0].set_xlabel("texts")
                rest[0].set_ylabel("mean reward of a rule so far")
                rest[0].legend(fontsize=6)
        figure.savefig(path, dpi=110)

    def _draw_speeds(self, axis, drafter: str, runs: dict[str, str]) -> None:
        static = sorted((int(policy[7:]), run) for policy, run in runs.items() if policy.startswith("static:"))
        rows = {policy: self.row(run) for policy, run in runs.items()}
        if static:
            points = [(k, rows[f"static:{k}"]["speed_up"]) for k, _ in static]
            axis.plot(*zip(*points, strict=True), "k.-", label="static length")
        span = (static[0][0], static[-1][0]) if static else (0, 1)
        for policy, row in rows.items():
            if not policy.startswith("static:"):
                (line,) = axis.plot(span, [row["speed_up"]] * 2, label=policy)
                axis.fill_between(
                    span, *([bound] * 2 for bound in row["speed_up_95"]), color=line.get_color(), alpha=0.1
                )
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set_xlabel("tokens drafted in a round, at a static length")
        axis.set_ylabel("speed-up over the target alone")
        axis.set_title(drafter, fontsize=10)
        axis.legend(fontsize=7)


def _histogram(lengths: Sequence[int]) -> dict[int, int]:
    return {length: lengths.count(length) for length in sorted(set(lengths))}


def benchmark(
    target,
    drafters: Mapping[str, Any],
    policies: Mapping[str, Any],
    prompts: Sequence[list[int]],
    *,
    groups: Sequence[str] | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    tokenizers: Mapping[str, tuple] | None = None,
    progress: bool = False,
) -> SpeculationReport:
    """Times the target alone and with every drafter and policy on the device it is on.

    Args:
        target: a causal language model. drafters: ``{name: model}``.
        policies: ``{name: policy}``, see :mod:`hf_sparse.speculative.policies`; every drafter gets copies.
        prompts: token ids of the target.
        groups: a name per prompt.
        temperature: 0 is greedy.
        tokenizers: ``{drafter: (target's, drafter's)}`` where they differ.

    Raises:
        ValueError: no prompts, drafters or policies.
    """
    import copy

    if not prompts or not drafters or not policies:
        raise ValueError("a benchmark needs at least one prompt, one drafter and one policy")
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    options = {"max_new_tokens": max_new_tokens, **sampling}
    runs: dict[str, SpeculativeDecoding | None] = {ALONE: None}
    for name, drafter in drafters.items():
        pair = (tokenizers or {}).get(name, (None, None))
        for policy_name, policy in policies.items():
            runs[f"{name}, {policy_name}"] = SpeculativeDecoding(
                drafter, copy.deepcopy(policy), tokenizer=pair[0], draft_tokenizer=pair[1]
            )
    labels = list(runs)
    speeds: dict[str, list[float]] = {label: [] for label in labels}
    counts: dict[str, list[Speculation]] = {label: [] for label in labels[1:]}
    equal = dict.fromkeys(labels[1:], 0)
    learned = {label: [] for label in labels[1:] if isinstance(runs[label].policy, TapOut)}

    def write(label: str, ids: torch.Tensor, limit: dict) -> tuple[list[int], float]:
        torch.manual_seed(seed)
        more = {} if runs[label] is None else {"custom_generate": runs[label]}
        _wait(target)
        started = time.perf_counter()
        output = target.generate(ids, **limit, **more)
        _wait(target)
        return output[0, ids.shape[1] :].tolist(), time.perf_counter() - started

    with progress_bar(progress, "decoding", len(prompts) * len(labels)) as step:
        first = torch.tensor([prompts[0]], device=target.device)
        for label in labels:  # what a first call sets up is nobody's time
            kept = runs[label] and copy.deepcopy(runs[label].policy)
            write(label, first, options | {"max_new_tokens": min(8, max_new_tokens)})
            if runs[label] is not None:
                runs[label].policy = kept
        for number, prompt in enumerate(prompts):
            ids = torch.tensor([prompt], device=target.device)
            outputs = {}
            for turn in range(len(labels)):
                label = labels[(turn + number) % len(labels)]
                outputs[label], seconds = write(label, ids, options)
                speeds[label].append(len(outputs[label]) / seconds)
                if runs[label] is not None:
                    counts[label].append(runs[label].last)
                if label in learned:
                    learned[label].append(runs[label].policy.means())
                step(f"text {number + 1}, {label}, {speeds[label][-1]:.0f} tokens/s")
            for label in labels[1:]:
                equal[label] += outputs[label] == outputs[ALONE]
    facts = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "dtype": str(target.dtype).removeprefix("torch."),
        "hardware": device_name(target.device),
        "versions": versions(),
    }
    if temperature > 0:
        equal = {}
    return SpeculationReport(speeds, counts, equal, learned, list(groups or [""] * len(prompts)), facts)


def _wait(model) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
