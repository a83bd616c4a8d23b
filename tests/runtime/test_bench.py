"""The benchmark: what it reports follows from what it measured. The layout is one in plain torch."""

import json

import pytest
import torch

from hf_sparse import SparsityConfig, prune
from hf_sparse.cli import main
from hf_sparse.runtime.bench import benchmark, read_bandwidth
from hf_sparse.runtime.bench_report import Pair
from hf_sparse.runtime.packed_linear import PackedLinear

pytestmark = pytest.mark.usefixtures("plain_layout")


def test_a_pair_has_the_median_of_the_rounds_ratios():
    pair = Pair.of([2.0, 6.0, 4.0], [1.0, 2.0, 4.0])
    assert (pair.dense, pair.packed, pair.speedup, pair.lowest, pair.highest) == (4.0, 2.0, 2.0, 1.0, 3.0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_report(tiny_model, family, tmp_path):
    model = tiny_model(family).eval()
    prune(model, SparsityConfig(sparsity=0.75), progress=False)
    report = benchmark(model, "packed", batch_size=2, prompt=5, new_tokens=4, rounds=2)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    assert report.same_tokens == 1.0  # the layout multiplies with the same weights
    linears = 8 if family == "gpt2" else 14
    assert sum(row.count for row in report.layers) == linears
    assert {row.sparsity for row in report.layers} == {0.75} and {row.layouts for row in report.layers} == {"plain"}
    saved = sum(row.dense_bytes - row.packed_bytes for row in report.layers)
    assert report.dense_bytes - report.packed_bytes == saved - linears > 0  # the handle of a packed layer is a byte
    for pair in [report.prefill, report.decode, *(row.time for row in report.layers)]:
        assert 0 < pair.lowest <= pair.speedup <= pair.highest and pair.dense > 0
    result = report.to_dict()
    assert result["packed_tokens_per_second"] == 2 / report.decode.packed
    json.dumps(result)
    report.plot(tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 10_000


def test_bandwidth_is_that_of_memory_not_of_a_cache():
    measured = read_bandwidth(torch.device("cpu"), rounds=3)
    assert 1e9 < measured < 1e12


def test_command(tiny_model_dir, tmp_path, capsys):
    output = tmp_path / "bench.json"
    sizes = ["--prompt", "4", "--new-tokens", "3", "--rounds", "1", "--runtime", "packed"]
    assert main(["bench", str(tiny_model_dir), *sizes, "--output", str(output), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads(output.read_text())
    assert result["model"] == tiny_model_dir.name and result["runtime"] == "packed"
    assert main(["bench", str(tiny_model_dir), *sizes]) == 0
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--runtime", "fast"], "one of auto, packed, int8, got 'fast'"),
        (["--output", "nowhere/bench.json"], "no such directory"),
        (["--threads", "0"], "--threads is at least 1"),
        (["--rounds", "0"], "rounds is at least 1"),
    ],
)
def test_bad_arguments_are_said_before_the_work(tiny_model_dir, capsys, flags, message):
    assert main(["bench", str(tiny_model_dir), *flags]) == 2
    assert message in capsys.readouterr().err
