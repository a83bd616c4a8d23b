"""How much each expert of a mixture matters, measured on calibration data (REAP and what it is compared with).

    h(x) = sum over k in T(x) of g_k(x) f_k(x)         T(x): the top-k experts of token x;  X_j = {x : j in T(x)}

    reap        mean over X_j of  g_j(x) ||f_j(x)||    router-weighted expert activation (arxiv.org/abs/2510.13999)
    ean_mean    mean over X_j of  ||f_j(x)||           expert activation norm            ean_sum    its sum
    frequency   |X_j|                                  gate_sum   sum of g_j(x)          gated_sum  sum of g_j(x) ||f_j(x)||
    random      a number from 0 to 1                   an expert never routed to has 0 in all others

g is exactly what the experts module is given, so routers of every kind (softmax, sigmoid, normalised or not, a correction
bias that only chooses, groups, a scaling factor) are right by construction; a constant factor changes no order. f_j(x) is the
expert's output before the gate multiplies it. Where the gate scales an expert's input (Llama 4) its contribution f_j(g x) is
taken and g counts as 1.

The model's own experts code is called once per forward, with each (token, expert) pair as a token of its own and a gate of
one: its outputs are the f_j(x), and their gated sum over k is what the model goes on with. So every dispatch (eager, grouped,
batched) and layout works, only routed tokens are computed, and nothing twice. Sums are float64; padding is left out.
"""

import difflib
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from hf_sparse.atomic import atomic_write_text
from hf_sparse.capture import as_batches, capture, find_decoder_layers, visiting
from hf_sparse.instruments import progress_bar
from hf_sparse.mixtures import Mixture, find_mixtures
from hf_sparse.pruning.checks import check_placement, check_tokens
from hf_sparse.pruning.resume import fingerprint

__all__ = ["SALIENCIES", "ExpertScores", "observe", "score_experts"]

_STATISTICS = ("count", "gate", "norm", "gated", "peak")
_TOKENS_PER_STEP = {"cuda": 8192, "cpu": 2048}
_FORMAT = "hf_sparse expert scores"


def _mean(total: str) -> Callable[[dict], torch.Tensor]:
    return lambda s: s[total] / s["count"].clamp_min(1)


SALIENCIES: dict[str, Callable[[dict[str, torch.Tensor]], torch.Tensor] | None] = {
    "reap": _mean("gated"),
    "ean_mean": _mean("norm"),
    "ean_sum": lambda s: s["norm"],
    "frequency": lambda s: s["count"],
    "gate_sum": lambda s: s["gate"],
    "gated_sum": lambda s: s["gated"],
    "random": None,
}


@dataclass
class ExpertScores:
    """What was measured of every expert; ``a + b`` is what both data sets together would have given.

    Attributes:
        statistics: ``{block: {name: float64 [experts]}}`` with ``count`` (tokens routed), ``gate`` (sum of g), ``norm`` (sum
            of ||f||), ``gated`` (sum of g ||f||) and ``peak`` (largest |f|).
        saliency: what :meth:`scores` gives unless told otherwise. tokens: seen, padding excluded.
        top_k: ``{block: experts a token is sent to}``. seed: of ``random``.
    """

    statistics: dict[str, dict[str, torch.Tensor]]
    saliency: str = "reap"
    tokens: int = 0
    top_k: dict[str, int] = field(default_factory=dict)
    seed: int = 0

    def scores(self, saliency: str | Callable | None = None) -> dict[str, torch.Tensor]:
        """``{block: float64 [experts]}``; higher is kept.

        Args:
            saliency: a name of :data:`SALIENCIES`, or a function of one block's statistics; default: the one scored for.

        Raises:
            ValueError: an unknown name, or one that needs data where none was seen.
        """
        saliency = saliency or self.saliency
        if callable(saliency):
            return {name: saliency(statistics) for name, statistics in self.statistics.items()}
        check_saliency(saliency)
        if saliency == "random":
            generator = torch.Generator().manual_seed(self.seed)
            return {
                name: torch.rand(len(one["count"]), generator=generator, dtype=torch.float64)
                for name, one in self.statistics.items()
            }
        if not self.tokens:
            raise ValueError(f"expert saliency {saliency!r} needs calibration data; these scores have seen none")
        return {name: SALIENCIES[saliency](statistics) for name, statistics in self.statistics.items()}

    def __add__(self, other: "ExpertScores") -> "ExpertScores":
        if not isinstance(other, ExpertScores):
            return NotImplemented
        sizes, others = ({n: len(s["count"]) for n, s in x.statistics.items()} for x in (self, other))
        if sizes != others:
            different = sorted(name for name in sizes | others if sizes.get(name) != others.get(name))
            raise ValueError(f"scores of different models cannot be added: {different[0]} differs")
        both = {
            name: {
                key: torch.maximum(value, other.statistics[name][key])
                if key == "peak"
                else value + other.statistics[name][key]
                for key, value in one.items()
            }
            for name, one in self.statistics.items()
        }
        return ExpertScores(both, self.saliency, self.tokens + other.tokens, self.top_k | other.top_k, self.seed)

    def never_routed(self) -> int:
        """How many experts no token was sent to."""
        return sum(int((one["count"] == 0).sum()) for one in self.statistics.values()) if self.tokens else 0

    def all_reduce(self, group=None) -> "ExpertScores":
        """Adds the scores of all processes of a torch.distributed group, each of which saw its own data, in place."""
        import torch.distributed as dist

        device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend(group) else "cpu"
        names = list(self.statistics)
        for keys, operation in ((_STATISTICS[:-1], dist.ReduceOp.SUM), (("peak",), dist.ReduceOp.MAX)):
            flat = torch.cat([self.statistics[name][key] for name in names for key in keys]).to(device)
            dist.all_reduce(flat, operation, group)
            parts = iter(flat.cpu().split([len(self.statistics[n]["count"]) for n in names for _ in keys]))
            for name in names:
                self.statistics[name].update({key: next(parts) for key in keys})
        tokens = torch.tensor([self.tokens], device=device)
        dist.all_reduce(tokens, group=group)
        self.tokens = int(tokens)
        return self

    def save(self, path: str | Path) -> None:
        """Writes JSON lines: a header, then one line per expert with its statistics, score and rank within its block."""
        atomic_write_text(Path(path), "\n".join(json.dumps(line) for line in self._lines()) + "\n")

    def _lines(self, **more) -> Iterator[dict]:
        known = self.scores() if self.tokens or self.saliency == "random" else {}
        header = {"format": _FORMAT, "version": 1, "saliency": self.saliency, "tokens": self.tokens, "seed": self.seed}
        yield header | {"top_k": self.top_k} | more
        for name, one in self.statistics.items():
            scores = known.get(name, torch.zeros(len(one["count"])))
            ranks = scores.argsort(descending=True, stable=True).argsort().tolist()
            for expert, (score, rank) in enumerate(zip(scores.tolist(), ranks, strict=True)):
                line = {key: value[expert].item() for key, value in one.items()}
                yield {"layer": name, "expert": expert, "score": score, "rank": rank} | line

    @classmethod
    def load(cls, path: str | Path) -> "ExpertScores":
        """Reads what :meth:`save` wrote, or what another tool wrote in its form.

        Raises:
            ValueError: not such a file; the message says which line is wrong.
        """
        return _read(Path(path))[0]


def _read(path: Path) -> tuple[ExpertScores, dict]:
    lines = path.read_text().splitlines()
    rows: dict[str, dict[int, dict]] = {}
    header: dict = {}
    for number, line in enumerate(lines, 1):
        try:
            content = json.loads(line)
            if number == 1:
                header = content
                if header.get("format") != _FORMAT:
                    raise ValueError(f"it should begin with a line that has format {_FORMAT!r}")
                check_saliency(header["saliency"])
            else:
                one = {key: float(content[key]) for key in _STATISTICS}
                rows.setdefault(content["layer"], {})[int(content["expert"])] = one
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} holds no expert scores: line {number}: {error}") from error
    if not header:
        raise ValueError(f"{path} holds no expert scores: it is empty")
    statistics = {}
    for name, experts in rows.items():
        if sorted(experts) != list(range(len(experts))):
            raise ValueError(f"{path}: {name} has lines for experts {sorted(experts)}; some are missing")
        statistics[name] = {
            key: torch.tensor([experts[i][key] for i in range(len(experts))], dtype=torch.float64)
            for key in _STATISTICS
        }
    more = header.get("tokens", 0), header.get("top_k", {}), header.get("seed", 0)
    return ExpertScores(statistics, header["saliency"], *more), header


def check_saliency(saliency: str) -> None:
    """Raises ValueError for a saliency of experts that is not known."""
    if saliency not in SALIENCIES:
        near = difflib.get_close_matches(str(saliency), SALIENCIES, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown expert saliency {saliency!r}; known are {', '.join(SALIENCIES)}{hint}")


@torch.no_grad()
def score_experts(
    model: nn.Module,
    batches,
    saliency: str = "reap",
    *,
    device: str | torch.device | None = None,
    storage: str | torch.device | None = None,
    progress: bool = False,
    resume_dir: str | Path | None = None,
    seed: int = 0,
) -> ExpertScores:
    """Scores every expert of a model on calibration data; the model is not changed.

    One pass gathers all statistics, so other saliencies cost nothing more: ``scores.scores("frequency")``. In a distributed
    run each process scores its share of the data and calls :meth:`ExpertScores.all_reduce`.

    Args:
        model: a decoder-only transformers model with mixtures of experts.
        batches: token ids, see :func:`hf_sparse.capture.as_batches`; None for ``random``, which looks at nothing.
        saliency: a name of :data:`SALIENCIES`.
        device: where a layer is while it runs; default: where the model is. Layers visit it one at a time, so the model may
            be larger than the device's memory.
        storage: where hidden states wait between layers; default: ``device``.
        progress: show a bar.
        resume_dir: a directory that records finished layers; an interrupted run called again goes on after the last one.
        seed: of ``random``.

    Raises:
        ValueError: before any work: an unknown saliency, no mixture of experts, no data, tokens the model does not have,
            another run's ``resume_dir``.
    """
    check_saliency(saliency)
    mixtures = find_mixtures(model)
    scores = ExpertScores({}, saliency, 0, {name: m.top_k for name, m in mixtures.items()}, seed)
    if batches is None:
        if saliency != "random":
            raise ValueError(f"expert saliency {saliency!r} looks at data; give calibration batches")
        scores.statistics = {name: _zeros(m.count, "cpu") for name, m in mixtures.items()}
        return scores
    check_placement(model)
    device = torch.device(device or next(model.parameters()).device)
    storage = torch.device(storage or device)
    name, layers = find_decoder_layers(model)
    for mixture in mixtures.values():
        if not mixture.name.startswith(f"{name}."):
            raise ValueError(f"{mixture.name} lies outside the decoder layers ({name}); its experts cannot be scored")
    batches = as_batches(batches, _TOKENS_PER_STEP.get(device.type, 2048))
    check_tokens(model, batches)
    kept = None
    if resume_dir is not None:
        kept = _Kept(Path(resume_dir), fingerprint(model, batches, {"experts": list(mixtures)}), scores)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        captured = capture(model, name, layers, batches, device, storage)
        with progress_bar(progress, "scoring experts", len(layers)) as step:
            for index, layer in enumerate(layers):
                mine = {
                    n: m for n, m in mixtures.items() if n.startswith(f"{name}.{index}.") and n not in scores.statistics
                }
                last = index == len(layers) - 1
                with visiting(layer, device):
                    if mine:
                        scores.statistics |= _score_layer(model, captured, index, layer, mine, advance=not last)
                    elif not last:
                        captured.advance(index, layer)
                if mine and kept:
                    kept.save(scores)
                step(f"layer {index + 1}/{len(layers)}")
    finally:
        for module, mode in modes:
            module.training = mode
    masks = captured.keep
    scores.tokens = sum(
        batch["input_ids"].numel() if keep is None else int(keep.sum())
        for batch, keep in zip(batches, masks, strict=True)
    )
    scores.statistics = {name: scores.statistics[name] for name in mixtures}
    return scores


class _Kept:
    """The statistics of finished layers in a file, and the mark of the run they belong to."""

    def __init__(self, path: Path, mark: dict[str, str], scores: ExpertScores):
        self.file, self.mark = path / "scores.jsonl", mark
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is no directory; progress is kept in one")
        path.mkdir(parents=True, exist_ok=True)
        if self.file.is_file():
            earlier, header = _read(self.file)
            different = [key for key, value in mark.items() if header.get("run", {}).get(key) != value]
            if different:
                raise ValueError(
                    f"{path} holds the progress of another run: its {' and '.join(different)} differ. Repeat that run's "
                    "arguments to continue it, or remove the directory to start anew"
                )
            scores.statistics |= earlier.statistics

    def save(self, scores: ExpertScores) -> None:
        atomic_write_text(self.file, "\n".join(json.dumps(line) for line in scores._lines(run=self.mark)) + "\n")


def _zeros(count: int, device) -> dict[str, torch.Tensor]:
    return {key: torch.zeros(count, dtype=torch.float64, device=device) for key in _STATISTICS}


def _score_layer(model, captured, index: int, layer, mine: dict[str, Mixture], advance: bool) -> dict[str, dict]:
    """The statistics of one decoder layer's mixtures; its outputs become the next layer's inputs on the way."""
    sums = {name: _zeros(mixture.count, captured.device) for name, mixture in mine.items()}
    for batch in range(len(captured.hidden)):
        keep = captured.keep[batch]
        with _observed(model, mine, sums, keep):
            output = captured.run(index, batch, layer)
        if advance:
            captured.hidden[batch].copy_(output)
    return {name: {key: value.cpu() for key, value in one.items()} for name, one in sums.items()}


@contextmanager
def _observed(model, mine, sums, keep) -> Iterator[None]:
    from contextlib import ExitStack

    with ExitStack() as stack:
        for name, mixture in mine.items():
            add = _adder(sums[name], keep)
            parts = model.get_submodule(mixture.experts), mixture, model.get_submodule(mixture.router)
            stack.enter_context(observe(*parts, add))
        yield


def _adder(sums: dict[str, torch.Tensor], keep: torch.Tensor | None):
    def add(index, weights, outputs):
        norms = torch.linalg.vector_norm(outputs, dim=-1, dtype=torch.float32).double()
        peaks = torch.linalg.vector_norm(outputs, ord=float("inf"), dim=-1).double()
        gates, ones = weights.double(), torch.ones_like(norms)
        if keep is not None:
            seen = keep.to(norms.device).unsqueeze(-1)  # where() and not a product: padding may hold NaN
            norms, peaks, gates, ones = (x.where(seen, 0.0) for x in (norms, peaks, gates, ones))
        where = index.flatten().long()
        for key, values in (("count", ones), ("gate", gates), ("norm", norms), ("gated", gates * norms)):
            sums[key].index_add_(0, where, values.flatten())
        sums["peak"].scatter_reduce_(0, where, peaks.flatten(), "amax")

    return add


@contextmanager
def observe(
    experts: nn.Module,
    mixture: Mixture,
    router: nn.Module,
    callback: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None],
) -> Iterator[None]:
    """While it lasts, every forward of ``experts`` also shows each routed expert's own output.

    Args:
        callback: called with ``index [tokens, k]``, ``weights [tokens, k]`` (the gates) and ``outputs [tokens, k, hidden]``,
            the experts' outputs before their gates multiply them.
    """
    own, original = vars(experts).get("forward"), experts.forward  # accelerate and others set a forward on the instance
    handles, routed = [], []

    def pairs(*args, **kwargs):
        """The stock forward on (token, expert) pairs with gates of one; then the gated sum."""
        hidden, index, weights, *rest = inspect.signature(original).bind(*args, **kwargs).arguments.values()
        tokens, k = index.shape
        flat = hidden.reshape(tokens, -1)
        ones = weights.new_ones(tokens * k, 1)
        outputs = original(flat.repeat_interleave(k, 0), index.reshape(-1, 1), ones, *rest).view(tokens, k, -1)
        callback(index, weights, outputs)
        return (outputs * weights.unsqueeze(-1)).sum(1).to(hidden.dtype).view(hidden.shape)

    def all_tokens(hidden):
        """Llama 4: each expert has all tokens, scaled by their gates; those not sent to it are zeros."""
        outputs = original(hidden)
        index = routed.pop().topk(mixture.top_k, -1).indices
        by_token = outputs.view(mixture.count, len(index), -1).transpose(0, 1)
        chosen = by_token.gather(1, index.unsqueeze(-1).expand(-1, -1, by_token.shape[-1]))
        callback(index, torch.ones_like(index, dtype=torch.float32), chosen)
        return outputs

    if mixture.input_scaled:
        handles.append(router.register_forward_hook(lambda module, args, output: routed.append(output[0])))
    experts.forward = all_tokens if mixture.input_scaled else pairs
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        if own is None:
            del experts.forward
        else:
            experts.forward = own
