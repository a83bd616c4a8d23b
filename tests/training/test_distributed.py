"""Sparse training on several processes: two train what one trains, and what cannot be masked is refused.

Two processes of this machine, on CPUs, over gloo. Every start of processes checks many things; ``_sparse_loop.py`` and
``_trainer.py`` are what they run.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

HERE = Path(__file__).parent


def run(script: str, *arguments, gpus: bool = False, timeout: int = 240) -> None:
    command = [sys.executable, HERE / script, *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    if not gpus:
        env["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_two_processes_train_what_one_trains(wrap):
    """All methods in a custom loop: masks equal, weights, densities, metrics and clipped norms close."""
    run("_sparse_loop.py", wrap)


@pytest.mark.slow
def test_refusals_and_what_is_particular_to_several_processes():
    run("_several.py")


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """What one process trains through the Trainer."""
    folder = tmp_path_factory.mktemp("alone")
    run("_trainer.py", "alone", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "full", "sharded"])
def test_trainer_on_two_processes_trains_what_one_trains(kind, alone, tmp_path):
    """The script itself compares a training resumed in the middle with one that was not interrupted, bit for bit."""
    run("_trainer.py", kind, tmp_path)
    for method in ("static", "rigl", "top-kast"):
        one, two = torch.load(alone / f"alone-{method}.pt"), torch.load(tmp_path / f"{kind}-{method}.pt")
        assert one["masks"].keys() == two["masks"].keys()
        for name, mask in one["masks"].items():
            assert torch.equal(mask, two["masks"][name]), f"{method}: the mask of {name} differs"
        for name, weight in one["weights"].items():
            torch.testing.assert_close(two["weights"][name], weight, rtol=1e-6, atol=1e-9, msg=name)
        check_log(one["log"], two["log"])
        check_checkpoint(tmp_path / f"{kind}-{method}" / "final", two)


def check_log(one: list[dict], two: list[dict]) -> None:
    """Both report the same density, mask changes and FLOPs of the whole job."""
    for mine, theirs in zip(one, two, strict=True):
        assert mine.keys() == theirs.keys()
        for what in mine.keys() & {"loss", "grad_norm", "density", "mask_updates", "mask_change", "ever_active"}:
            assert mine[what] == pytest.approx(theirs[what], rel=1e-4), what
        for what in mine.keys() & {"flops_spent", "flops_dense"}:
            assert mine[what] == pytest.approx(theirs[what], rel=1e-6), what


def check_checkpoint(folder: Path, trained: dict) -> None:
    """A stock checkpoint: loads without hf_sparse, no key too many, zeros in place."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float64)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, trained["weights"][name]), name
        if name in trained["masks"]:
            assert not parameter[~trained["masks"][name]].any(), name


def test_deepspeed_ids_are_refused(tiny_llama):
    from hf_sparse.config import SparsityConfig
    from hf_sparse.training.sparse_training import sparsify

    weight = tiny_llama.model.layers[0].mlp.up_proj.weight
    weight.ds_id = 0
    before = weight.detach().clone()
    with pytest.raises(ValueError, match="ZeRO-3.*use DDP or FSDP2"):
        sparsify(tiny_llama, SparsityConfig(method="static"))
    assert torch.equal(weight, before) and not hasattr(tiny_llama.config, "hf_sparse")


@pytest.fixture
def same_environment():
    """TrainingArguments tell accelerate by environment variables; they are put back."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(deepspeed="ds.json"), "DeepSpeed steps the optimizer inside backward"),
        (dict(fsdp=True, fsdp_config={"version": 1}), "FSDP1 flattens weights into one buffer.*use FSDP2: fsdp_config"),
        (
            dict(fsdp=True, fsdp_config={"version": 2, "cpu_ram_efficient_loading": True}),
            "only one process has the weights",
        ),
    ],
)
def test_what_hides_the_weights_is_refused_by_the_callback(arguments, message, tiny_llama, tmp_path, same_environment):
    """Before the model is touched."""
    from transformers import TrainingArguments

    from hf_sparse.callbacks import SparsityCallback
    from hf_sparse.config import SparsityConfig

    if "deepspeed" in arguments:  # its arguments cannot be made where DeepSpeed is not installed
        args = SimpleNamespace(fsdp=None, fsdp_config=None, **arguments)
    else:
        args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **arguments)
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        SparsityCallback(SparsityConfig(method="static")).on_init_end(args, None, None, model=tiny_llama)
    after = tiny_llama.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("version", ["1", None])
def test_fsdp1_from_the_accelerate_config_is_refused(version, tiny_llama, monkeypatch):
    """``accelerate launch`` says FSDP by environment variables; its default version is 1."""
    from hf_sparse.callbacks import SparsityCallback
    from hf_sparse.config import SparsityConfig

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.delenv("FSDP_VERSION", raising=False)
    if version:
        monkeypatch.setenv("FSDP_VERSION", version)
    args = SimpleNamespace(deepspeed=None, fsdp=None, fsdp_config=None)
    with pytest.raises(ValueError, match="FSDP1"):
        SparsityCallback(SparsityConfig(method="static")).on_init_end(args, None, None, model=tiny_llama)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_trainer_under_fsdp2_on_two_gpus(kind, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    run("_trainer.py", kind, tmp_path, gpus=True)
    check_checkpoint(tmp_path / f"{kind}-rigl" / "final", torch.load(tmp_path / f"{kind}-rigl.pt"))
