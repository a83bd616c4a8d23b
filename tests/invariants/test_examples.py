"""Every example explains itself, has ``--help``, and runs at small size on a CPU without a network.

The convention for a file in ``examples/``: the module docstring teaches the story and shows the command; ``--tiny`` makes
everything small (a few samples and steps; a run takes seconds); an example about a model takes ``--model`` (a Hub id, a
directory or a GGUF file), and the test gives it a tiny one. What an example writes goes below the current directory.
Modules that only help other examples start with an underscore.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = [path for path in sorted((ROOT / "examples").rglob("*.py")) if not path.name.startswith("_")]

each_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT / "examples")))


def run(example: Path, *arguments: str, cwd: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(example), *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_the_demo_exists():
    assert ROOT / "examples" / "demo.py" in EXAMPLES  # `make demo` runs it


@each_example
def test_docstring_shows_the_command(example):
    source = example.read_text(encoding="utf-8")
    docstring = compile(source, example.name, "exec", dont_inherit=True).co_consts[0]
    assert isinstance(docstring, str) and f"python {example.relative_to(ROOT)}" in docstring


@pytest.mark.slow
@each_example
def test_runs_tiny(example, tiny_model_dir, tmp_path):
    usage = run(example, "--help", cwd=tmp_path)
    assert "--tiny" in usage
    assert not list(tmp_path.iterdir()), "--help wrote files"
    model = ["--model", str(tiny_model_dir)] if "--model" in usage else []
    before = set((ROOT / "examples").rglob("*"))
    assert run(example, "--tiny", *model, cwd=tmp_path).strip(), "it prints what it found"
    assert set((ROOT / "examples").rglob("*")) == before, "it wrote beside the example instead of the current directory"
