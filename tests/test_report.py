"""The report: sums, JSON both ways, the table and the picture."""

import json

import pytest

from hf_sparse.report import ParameterReport, SparsityReport


def parameter(layer, kind, density, shape=(8, 16), **others) -> ParameterReport:
    size = 1
    for dimension in shape:
        size *= dimension
    usual = dict(conforms=True, two_four=False, error=None, note=None, pattern="unstructured")
    return ParameterReport(
        name=f"model.layers.{layer}.mlp.{kind}.weight",
        kind=kind,
        shape=list(shape),
        density=density,
        bytes_dense=2 * size,
        bytes_packed=size,
        macs_per_token=density * size,
        **(usual | others),
    )


@pytest.fixture
def report() -> SparsityReport:
    return SparsityReport(
        model="tiny",
        config={"sparsity": 0.5},
        parameters=[
            parameter(0, "up_proj", 0.5, error=0.1),
            parameter(0, "experts.down_proj", 0.25, shape=(4, 8, 16), note="2 of 4 experts fell back"),
            parameter(10, "up_proj", 0.75, error=0.3, conforms=False, two_four=True),
        ],
        total_parameters=1000,
        macs_dense=900.0,
        macs_sparse=500.0,
        layer_errors={0: 0.125, 10: 0.25},
        seconds=1.5,
        timings={"solve": 1.0},
        peak_memory_bytes=12345,
        device="cpu",
        calibration={"samples": 4},
        versions={"torch": "2"},
        notes=["a note"],
    )


def test_totals_are_weighted_by_size(report):
    nonzeros = 0.5 * 128 + 0.25 * 512 + 0.75 * 128
    assert report.density == nonzeros / 768 and report.sparsity == 1 - nonzeros / 768
    assert (report.bytes_dense, report.bytes_packed) == (2 * 768, 768)
    assert not report.conforms
    assert [p.numel for p in report.parameters] == [128, 512, 128]
    assert [p.layer for p in report.parameters] == [0, 0, 10]


def test_by_kind_sums_to_the_whole(report):
    kinds = report.by_kind()
    assert list(kinds) == ["up_proj", "experts.down_proj"]
    up = kinds["up_proj"]
    assert (up["count"], up["weights"], up["density"]) == (2, 256, 0.625)
    assert (up["min_density"], up["max_density"], up["conforms"], up["two_four"]) == (0.5, 0.75, False, False)
    assert up["error"] == pytest.approx(0.2) and kinds["experts.down_proj"]["error"] is None
    for key, whole in (("weights", 768), ("bytes_dense", report.bytes_dense), ("bytes_packed", report.bytes_packed)):
        assert sum(row[key] for row in kinds.values()) == whole
    assert sum(row["density"] * row["weights"] for row in kinds.values()) == report.density * 768


def test_a_report_without_parameters_is_dense_and_divides_by_nothing():
    empty = SparsityReport(model="m", config={}, parameters=[], total_parameters=5, macs_dense=1.0, macs_sparse=1.0)
    assert empty.by_kind() == {} and empty.to_dict()["two_four"] is False
    assert SparsityReport.from_dict(empty.to_dict()) == empty
    assert empty.sparsity == 0.0, "nothing is sparse"


def test_the_number_of_a_layer_is_read_from_the_name():
    names = ["lm_head.weight", "transformer.h.7.attn.c_attn.weight", "model.layers.12.mlp.experts.down_proj"]
    layers = []
    for name in names:
        one = parameter(0, "x", 0.5)
        one.name = name
        layers.append(one.layer)
    assert layers == [None, 7, 12]


def test_dict_round_trip_also_through_json(report):
    content = report.to_dict()
    assert SparsityReport.from_dict(content) == report
    assert SparsityReport.from_dict(json.loads(json.dumps(content))) == report, "layer numbers are integers again"


def test_the_dict_begins_with_the_totals_and_ends_with_the_parameters(report):
    content = report.to_dict()
    keys = list(content)
    assert keys[0] == "model" and keys[-1] == "parameters"
    assert content["sparsity"] == report.sparsity and content["two_four"] is False
    assert (content["macs_per_token_dense"], content["macs_per_token_sparse"]) == (900.0, 500.0)
    assert content["sparse_parameters"] == 768 and content["total_parameters"] == 1000


def test_saved_as_json(report, tmp_path):
    path = tmp_path / "report.json"
    report.save(path)
    assert SparsityReport.from_dict(json.loads(path.read_text())) == report
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"], "no temporary file is left"
    report.seconds = 2.0
    report.save(str(path))
    assert json.loads(path.read_text())["seconds"] == 2.0


def test_the_table_has_a_row_for_each_kind_and_the_total(report):
    from rich.console import Console

    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.table())
    lines = [line for line in console.export_text().splitlines() if line.strip()]
    (up,) = [line for line in lines if "up_proj" in line]
    assert "0.6250" in up and "0.2000" in up and " no " in up
    (experts,) = [line for line in lines if "experts.down_proj" in line]
    assert "0.2500" in experts and "–" in experts and " yes " in experts
    (total,) = [line for line in lines if "all" in line.split()]
    assert f"{report.density:.4f}" in total


def test_the_plot_is_a_picture(report, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "report.png"
    report.plot(path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 10_000


def test_without_matplotlib_the_plot_says_what_to_install(report, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'hf-sparse\[plot\]'"):
        report.plot(tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_a_measured_model_has_a_report_that_survives_json(tiny_llama):
    import torch

    from hf_sparse.pruning.measure import measure
    from hf_sparse.targets import find_targets

    with torch.no_grad():
        tiny_llama.model.layers[1].mlp.up_proj.weight[:, 1::2] = 0.0
    report = measure(tiny_llama, find_targets(tiny_llama))
    assert SparsityReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    (up,) = [p for p in report.parameters if p.name == "model.layers.1.mlp.up_proj.weight"]
    assert (up.density, up.two_four, up.layer) == (0.5, True, 1)
    assert report.macs_dense - report.macs_sparse == up.numel / 2
