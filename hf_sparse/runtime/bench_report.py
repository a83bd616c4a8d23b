"""What a benchmark found, and how it is shown: a dict for the JSON and the model card, a table, a plot, a line."""

from dataclasses import asdict, dataclass, field
from statistics import median

from hf_sparse.instruments import versions

__all__ = ["BenchReport", "LayerRow", "Pair"]


@dataclass(frozen=True)
class Pair:
    """Seconds of the dense and the packed model, medians over the rounds; the ratio's median and range, round by round."""

    dense: float
    packed: float
    speedup: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, dense: list[float], packed: list[float]) -> "Pair":
        ratios = [a / b for a, b in zip(dense, packed, strict=True)]
        return cls(median(dense), median(packed), median(ratios), min(ratios), max(ratios))


@dataclass(frozen=True)
class LayerRow:
    """All layers of one kind (``mlp.down_proj``) and shape: seconds for all of them, bytes, and the layouts in use."""

    kind: str
    shape: tuple[int, int]
    count: int
    layouts: str
    sparsity: float
    dense_bytes: int
    packed_bytes: int
    time: Pair


@dataclass(frozen=True)
class BenchReport:
    """What ``bench.benchmark`` measured. Times in seconds, sizes in bytes, bandwidth in bytes per second."""

    device: str
    dtype: str
    runtime: str
    batch_size: int
    prompt: int
    new_tokens: int
    rounds: int
    prefill: Pair  # seconds of a prompt
    decode: Pair  # seconds of a step
    bandwidth: float
    dense_bytes: int  # the whole model in memory
    packed_bytes: int
    same_tokens: float  # share of greedy tokens on which both agree
    choices: str
    layers: list[LayerRow]
    versions: dict[str, str] = field(default_factory=versions)

    def to_dict(self) -> dict:
        result = asdict(self)
        result["dense_tokens_per_second"] = self.batch_size / self.decode.dense
        result["packed_tokens_per_second"] = self.batch_size / self.decode.packed
        linear = sum(row.packed_bytes for row in self.layers)
        result["share_of_byte_bound_in_linears"] = (
            linear / self.bandwidth / sum(row.time.packed for row in self.layers) if self.layers else None
        )
        return result

    def table(self):
        """Rich table: a line per kind of layer, then the model."""
        from rich.table import Table

        table = Table(title=f"{self.runtime} on {self.device}, {self.dtype}, {self.batch_size} token(s) a step")
        for name in ("", "layout", "zeros", "MB dense", "packed", "ms dense", "packed", "speed-up", "of byte bound"):
            table.add_column(name, justify="left" if name in ("", "layout") else "right")
        for row in self.layers:
            bound = row.packed_bytes / self.bandwidth / row.time.packed
            table.add_row(
                f"{row.count} x {row.kind} {row.shape[0]}x{row.shape[1]}",
                row.layouts,
                f"{row.sparsity:.0%}",
                f"{row.dense_bytes / 1e6:.1f}",
                f"{row.packed_bytes / 1e6:.1f}",
                *_times(row.time),
                f"{bound:.0%}",
            )
        sizes = f"{self.dense_bytes / 1e6:.1f}", f"{self.packed_bytes / 1e6:.1f}"
        table.add_section()
        table.add_row(f"prefill of {self.prompt} tokens", "", "", *sizes, *_times(self.prefill), "")
        table.add_row("decode, a step", "", "", *sizes, *_times(self.decode), "")
        return table

    def summary(self) -> str:
        rate = self.batch_size / self.decode.dense, self.batch_size / self.decode.packed
        return (
            f"decode {rate[0]:.1f} -> {rate[1]:.1f} tokens/s (x{self.decode.speedup:.2f}, {self.decode.lowest:.2f} to "
            f"{self.decode.highest:.2f}), prefill x{self.prefill.speedup:.2f}, memory "
            f"{self.dense_bytes / 1e6:.1f} -> {self.packed_bytes / 1e6:.1f} MB, {self.same_tokens:.0%} of greedy tokens "
            f"the same; memory reads at {self.bandwidth / 1e9:.0f} GB/s"
        )

    def plot(self, path) -> None:
        """Bars of the time of each kind of layer, dense, packed, and what reading the bytes takes.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 1.5 + 0.45 * len(self.layers)), layout="constrained")
        axes = figure.subplots()
        for index, row in enumerate(self.layers):
            axes.barh(index - 0.2, 1e3 * row.time.dense, 0.38, color="#b0b7c3", label="dense" if not index else None)
            axes.barh(index + 0.2, 1e3 * row.time.packed, 0.38, color="#2f6db5", label="packed" if not index else None)
            bound = 1e3 * row.packed_bytes / self.bandwidth
            axes.plot(
                [bound] * 2, [index, index + 0.4], color="black", label="bytes / bandwidth" if not index else None
            )
        axes.set_yticks(range(len(self.layers)), [f"{row.kind}\n{row.shape[0]}x{row.shape[1]}" for row in self.layers])
        axes.invert_yaxis()
        axes.set_xlabel(f"milliseconds for all layers of a kind, {self.batch_size} token(s)")
        axes.set_title(f"{self.device}: decode x{self.decode.speedup:.2f}, prefill x{self.prefill.speedup:.2f}")
        axes.legend()
        figure.savefig(path, dpi=130)


def _times(pair: Pair) -> tuple[str, str, str]:
    return f"{1e3 * pair.dense:.3f}", f"{1e3 * pair.packed:.3f}", f"{pair.speedup:.2f}"
