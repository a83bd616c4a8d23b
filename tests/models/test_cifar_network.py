"""The CIFAR-10 example: its network against the paper's count, its data, its loop and its table."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_sparse.models.ift import sparse_ift
from hf_sparse.models.paper_flops import CIFAR_RESNET18_BUDGET, paper_flops
from hf_sparse.models.widths import wide_config
from hf_sparse.targets import find_targets

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLE = ROOT / "examples" / "sparse_ift_cifar10.py"
IMAGE = {"pixel_values": (1, 3, 32, 32)}
RECIPE = dict(width=4, epochs=2, batch=8, rate=0.05, every=100, budget="model", decay=5e-4, warmup=0.1)
RIGL = {"name": "wide75-rigl", "family": "wide", "sparsity": 0.75, "method": "rigl"}
STATIC = RIGL | {"name": "wide75-static", "method": "static"}


@pytest.fixture(scope="module", autouse=True)
def examples_on_the_path():
    sys.path.insert(0, str(EXAMPLE.parent))  # as for `python examples/sparse_ift_cifar10.py`
    yield
    sys.path.remove(str(EXAMPLE.parent))


def paper_network(sparsity: float = 0.0):
    from _cifar10_run import network

    with torch.device("meta"):
        model = network(64, classes=100)
        return type(model)(wide_config(model.config, sparsity)) if sparsity else model


# -- the network -----------------------------------------------------------------------------------------------------

# What the released profiler (cbsparse/sparse/utils/profiler_utils.py of CerebrasResearch/Sparse-IFT) says of the released
# network, run on it: base width -> dense FLOPs, parameters; with all convolutions but the stem at a density, FLOPs.
OFFICIAL = {
    0.5: (90, 2_200_876_690, 22_152_430, 1_106_018_778),
    0.75: (128, 4_445_052_912, 44_755_172, 1_123_168_476),
    0.9: (202, 11_055_835_586, 111_347_550, 1_128_129_639),
}


def test_flops_budget_of_the_paper():
    model = paper_network()
    assert paper_flops(model, IMAGE) == CIFAR_RESNET18_BUDGET == 1_115_226_800
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_220_132


@pytest.mark.parametrize("sparsity", OFFICIAL)
def test_flops_of_the_papers_wide_networks(sparsity):
    width, dense, parameters, sparse = OFFICIAL[sparsity]
    model = paper_network(sparsity)
    assert model.config.hidden_sizes == [width, 2 * width, 4 * width, 8 * width]
    assert paper_flops(model, IMAGE) == dense
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    stem = "resnet.embedder.embedder.convolution.weight"
    density = {0.5: 0.5, 0.75: 0.25, 0.9: 0.1}[sparsity]
    masked = {name: density for name in find_targets(model) if name != stem}
    assert len(masked) == 19  # two convolutions in each of eight blocks, and three shortcuts
    assert paper_flops(model, IMAGE, masked) == sparse


def test_paper_flops_refuses_what_it_does_not_count():
    model = paper_network()
    with pytest.raises(ValueError, match="resnet.nothing.weight is no weight of a convolution"):
        paper_flops(model, IMAGE, {"resnet.nothing.weight": 0.5})
    assert next(model.parameters()).is_meta and not any(m._forward_hooks for m in model.modules())


def test_the_model_budget_pays_for_wider_stem_and_head():
    from _cifar10_run import network

    report = sparse_ift(model := network(16), "wide", 0.9, budget="model", inputs=IMAGE)
    assert model.config.hidden_sizes == [50, 100, 200, 400]
    assert report.ratio == pytest.approx(1, abs=1e-9) and 0.9 < report.sparsity < 0.901


# -- the images ------------------------------------------------------------------------------------------------------


def test_images_of_a_hub_data_set_are_read(tmp_path):
    datasets, image = pytest.importorskip("datasets"), pytest.importorskip("PIL.Image")
    from _cifar10_data import read_cifar10

    pixels = torch.randint(256, (7, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for split in ("train", "test"):
        columns = {"img": [image.fromarray(one.numpy()) for one in pixels], "label": list(range(7))}
        features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
        datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / f"cifar10_{split}.parquet")
    train, test = read_cifar10(tmp_path)
    assert torch.equal(train.pixels, pixels.permute(0, 3, 1, 2)) and test.labels.tolist() == list(range(7))
    with pytest.raises(FileNotFoundError, match="--data names the folder"):
        read_cifar10(tmp_path / "elsewhere")


def test_augmented_images_are_crops_of_the_framed_ones():
    from _cifar10_data import Images, augmented, normalised

    pixels = torch.randint(1, 256, (12, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    epoch, labels = augmented(
        Images(pixels, torch.arange(12)), torch.Generator().manual_seed(2), torch.float32, chunk=5
    )
    assert sorted(labels.tolist()) == list(range(12)) and labels.tolist() != list(range(12))
    shifts, flips = set(), set()
    for image, label in zip(epoch, labels.tolist(), strict=True):
        framed = nn.functional.pad(pixels[label], (4, 4, 4, 4))
        crops = {
            (y, x, f): framed[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9) for f in (False, True)
        }
        crops = {(y, x, f): crop.flip(2) if f else crop for (y, x, f), crop in crops.items()}
        stacked = normalised(torch.stack(list(crops.values())), torch.float32)
        found = [place for place, same in zip(crops, (stacked == image).flatten(1).all(1), strict=True) if same]
        assert len(found) == 1
        shifts.add(found[0][:2])
        flips.add(found[0][2])
    assert len(shifts) > 6 and flips == {False, True}


# -- the loop --------------------------------------------------------------------------------------------------------


def test_the_rate_is_a_warmup_and_a_cosine():
    from _cifar10_run import rate_at

    recipe, steps = {"rate": 0.1, "warmup": 0.1}, 200
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 20, 1.0, 19)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 180)
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], [20])
    for step in range(steps):
        assert rate_at(step, steps, recipe) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        both.step()


def run(variant, **changes):
    from _cifar10_data import synthetic
    from _cifar10_run import train

    seen = {}
    result = train(variant, 0, RECIPE | changes, synthetic(96, 40), torch.device("cpu"), seen.__setitem__)
    return result, seen


def test_a_run_learns_keeps_its_masks_and_repeats():
    result, seen = run(RIGL, epochs=6)
    assert result["steps"] == 72 and result["mask"]["mask_updates"] == 3  # every 18 steps, up to 75% of training
    assert result["curve"][-1]["loss"] < 0.7 * result["curve"][0]["loss"] and result["accuracy"] > 0.3
    masks = [{n: b for n, b in seen[when].named_buffers() if n.endswith("weight_mask")} for when in ("start", "end")]
    assert len(masks[0]) == 19 and any((masks[0][name] != masks[1][name]).any() for name in masks[0])
    kept = sum(int(mask.sum()) for mask in masks[1].values())
    assert kept / sum(mask.numel() for mask in masks[1].values()) == pytest.approx(1 - result["sparsity"], abs=1e-3)
    assert result["density"] == pytest.approx(1 - result["sparsity"], abs=1e-3)
    assert result["iso_flop_ratio"] == pytest.approx(1, abs=1e-3)
    again, _ = run(RIGL, epochs=6)
    assert again["curve"] == result["curve"]


def test_what_a_run_costs_is_that_of_its_steps():
    static, seen = run(STATIC)
    rigl, _ = run(RIGL)
    assert static["training_flops_ratio"] == pytest.approx(static["iso_flop_ratio"])
    updates = rigl["mask"]["mask_updates"]  # each computes the whole weight gradient once
    whole = rigl["flops_without_zeros_skipped"] - rigl["flops"]
    extra = rigl["training_flops"] - static["training_flops"]
    assert updates > 0 and extra == pytest.approx(updates * RECIPE["batch"] * whole)
    masks = [dict(seen[when].named_buffers()) for when in ("start", "end")]
    assert all(torch.equal(masks[0][n], masks[1][n]) for n in masks[0] if n.endswith("weight_mask"))


@pytest.mark.gpu
def test_the_recorded_graph_gives_the_gradients_of_the_model():
    from _cifar10_data import synthetic
    from _cifar10_run import Step, prepare, time_steps, train

    device = torch.device("cuda")
    data = tuple(images.to(device) for images in synthetic(512, 256))
    recipe = RECIPE | {"batch": 64, "width": 16, "every": 4, "epochs": 3}
    assert time_steps(RIGL, recipe, data, device, 4)["gradient_error"] < 1e-2
    result = train(RIGL, 0, recipe, data, device)
    assert result["mask"]["mask_updates"] > 2 and result["curve"][-1]["loss"] < result["curve"][0]["loss"]

    run = prepare(RIGL, 0, recipe, 100, device)
    step = Step(run["model"].train(), (64, 3, 32, 32), device, torch.bfloat16)
    weight = run["training"].weights[0]
    weight.mask.copy_(~weight.mask)  # as an update does, in place: the graph has to see it
    step(torch.randn(64, 3, 32, 32, device=device), data[0].labels[:64], False)
    gradient = weight.parameter.grad
    assert gradient[weight.mask].any() and not gradient[~weight.mask].any()


# -- the command and the table ---------------------------------------------------------------------------------------


def command(*arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    line = [sys.executable, str(EXAMPLE), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.slow
def test_tiny_runs_and_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "out" / "cifar10.json"
    first = command("--tiny", "--cpu", "--runs", "dense", "wide75-rigl", "--output", path)
    assert first.returncode == 0, first.stderr
    kept = json.loads(path.read_text())
    assert set(kept["runs"]) == {"dense-0", "wide75-rigl-0"}
    rigl = kept["runs"]["wide75-rigl-0"]
    assert rigl["iso_flop_ratio"] == pytest.approx(1, abs=1e-3) and set(rigl["spectral"]) == {"start", "end"}
    assert rigl["spectral"]["end"]["ramanujan_gap"] != rigl["spectral"]["start"]["ramanujan_gap"]
    second = command("--tiny", "--cpu", "--runs", "dense", "wide75-rigl", "--seeds", "0", "1", "--output", path)
    assert "order: dense-1, wide75-rigl-1\n" in second.stdout, second.stderr
    kept = json.loads(path.read_text())
    assert kept["runs"]["wide75-rigl-0"] == rigl and kept["table"]["dense"]["seeds"] == 2
    other = command("--tiny", "--cpu", "--rate", "0.2", "--output", path)
    assert other.returncode == 1 and "another recipe: rate (0.1 -> 0.2)" in other.stderr


def test_the_table_the_claims_and_the_correlations():
    scipy = pytest.importorskip("scipy.stats")
    from _cifar10_report import claims, correlations, table

    facts = dict.fromkeys(("sparsity", "iso_flop_ratio", "training_flops_ratio", "paper_flops", "parameters"), 1)
    facts |= dict(nonzero_parameters=1, density=1, best_accuracy=0.95, seconds=1.0, nominal_sparsity=0.9)
    scores = {
        ("dense", None): [0.90, 0.92],
        ("wide90-rigl", "wide"): [0.93, 0.94, 0.95],
        ("wide90-static", "wide"): [0.94],
    }
    gaps, runs = iter([1.0, 4.0, 2.0, 2.0]), {}
    for (name, family), found in scores.items():
        for seed, score in enumerate(found):
            spectral = {"end": {"gap": next(gaps)}} if family else {}
            method = name.partition("-")[2] or None
            runs[f"{name}-{seed}"] = facts | dict(
                name=name, family=family, method=method, seed=seed, accuracy=score, spectral=spectral
            )
    rows = table(runs)
    assert rows["dense"]["accuracy"] == pytest.approx(0.91)
    assert rows["dense"]["spread"] == pytest.approx(statistics.stdev([0.90, 0.92]))
    assert rows["wide90-static"]["spread"] is None
    found = {claim["claim"]: (round(claim["gain"], 9), claim["holds"]) for claim in claims(rows)}
    assert found == {
        "wide90-rigl above dense": (3.0, True),
        "wide90-static above dense": (3.0, True),
        "wide90-rigl above wide90-static": (0.0, False),
    }
    spread = {claim["claim"]: claim["spread"] for claim in claims(rows)}["wide90-rigl above dense"]
    assert spread == pytest.approx(100 * (0.01**2 + statistics.variance([0.90, 0.92])) ** 0.5)
    measured = correlations(runs)["gap"]
    gap, score = [1.0, 4.0, 2.0, 2.0], [0.93, 0.94, 0.95, 0.94]
    assert measured["pearson"] == pytest.approx(scipy.pearsonr(gap, score).statistic)
    assert measured["spearman"] == pytest.approx(scipy.spearmanr(gap, score).statistic) and measured["runs"] == 4
