"""Triton's interpreter runs the fallback kernel on the CPU; NVRTC compiles the sources without a GPU where it is installed."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_layouts import random_weight

from hf_sparse.runtime.gpu import delta, nvrtc, paired

ROOT = Path(__file__).parents[3]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
INTERPRETED = """
import torch
from test_kernel_source import assert_product, case
from hf_sparse.runtime.gpu import delta, delta_triton

for shape in [(5, 3, 0.3), (9, 304, 0.7), (4, 1030, 0.97), (6, 520, 1.0)]:
    for tokens in (1, 2, 3, 4):
        weight, x, bias, _ = case(*shape, tokens, torch.float16)  # the interpreter cuts bfloat16 off instead of rounding it
        y = delta_triton.linear(x, delta.pack(weight), shape[:2], bias)
        assert_product(y, weight, x, bias)
"""


@needs_triton
def test_triton_fallback_interpreted():
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    result = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


needs_nvrtc = pytest.mark.skipif(nvrtc.nvrtc_library() is None, reason="NVRTC is not installed")


@needs_nvrtc
def test_compiler_errors_carry_the_log():
    with pytest.raises(RuntimeError, match="undefined_name"):
        nvrtc.compile_source("__global__ void f(int* p) { *p = undefined_name; }", [], "sm_90")


@needs_nvrtc
@pytest.mark.parametrize(("arch", "capability", "shared"), [("sm_80", (8, 0), 166912), ("sm_90", (9, 0), 232448)])
@pytest.mark.parametrize("layout", [delta, paired])
def test_everything_a_plan_launches_compiles(layout, arch, capability, shared, monkeypatch):
    """Plans as on a GPU, up to the machine code: every candidate, for every number of tokens, and the unpacking."""
    built, asked = {}, []

    def build(source, name, defines, device):
        options = tuple(f"-D{key}={value}" for key, value in sorted(defines.items()))
        if (source, options) not in built:
            built[source, options] = nvrtc.compile_source(source, options, arch)
        assert name.encode() in built[source, options]

    def launch(function, grid, block, size, *rest, **more):
        asked.append((grid, block, size))

    monkeypatch.setattr(nvrtc, "build", build)
    monkeypatch.setattr(nvrtc, "Launch", launch)
    monkeypatch.setattr(layout, "block_limits", lambda device: (108, shared))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    weight = random_weight((64, 5000), 0.7)
    plan_class = delta.DeltaPlan if layout is delta else paired.PairedPlan
    monkeypatch.setattr(plan_class, "device_type", "cpu")
    plan = plan_class(layout.pack(weight), (64, 5000), torch.bfloat16, None)
    for tokens in (1, 2, 3, 4) if layout is delta else (8, 16):
        candidates = plan.candidates(tokens)
        assert candidates
        for choice in candidates[:2]:
            plan.launch(tokens, **choice)
    plan.make_unpack()
    assert len(asked) > 4
    assert all(0 < block <= 1024 and size <= shared and min(grid) > 0 for grid, block, size in asked)
