"""Import floors: a lower floor never imports a higher one, at the top of a module or inside a function.

    nouns <- calibration <- methods <- runtime, export, integrations <- callbacks, hub_cards, cli

Two more rules keep the picture readable: nothing inside the package imports through the facade (``from hf_sparse import
prune`` hides which floor it asks for; only ``hf_sparse/__init__.py`` itself and the users of the package do), and imports are
absolute, so that ``callbacks/`` and ``hub_cards/`` are never loaded twice under two names. Files that travel with a checkpoint
as remote code import each other, and nothing else of the package, relatively: there is no ``hf_sparse`` where they arrive.
"""

import ast
import os
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Each entry is a module or a package directly inside hf_sparse; the order of the floors is from low to high.
FLOORS: dict[str, list[str]] = {
    "nouns": [
        "config",
        "targets",
        "patterns",
        "saliency",
        "allocation",
        "schedules",
        "methods",
        "masks",
        "flops",
        "mixtures",
        "atomic",
        "instruments",
    ],
    "calibration": ["capture", "calibration", "data", "loading", "evaluation"],
    "methods": [
        "pruning",
        "training",
        "models",
        "distillation",
        "speculative",
        "formats",
        "report",
        "recovery",
        "inspection",
    ],
    "runtime": ["runtime", "export", "integrations"],
    "surface": ["callbacks", "hub_cards", "metrics", "recipes", "cli", "commands", "__main__"],
}
TRAVELLING = [
    f"hf_sparse.models.{name}"
    for name in (
        "ranks",
        "layers",
        "widths",
        "sparse_configs",
        "sparse_model",
        "sparse_llama",
        "sparse_gpt2",
        "sparse_resnet",
    )
]
HEIGHT = {entry: height for height, floor in enumerate(FLOORS.values()) for entry in floor}
FLOOR_OF = {entry: name for name, floor in FLOORS.items() for entry in floor}


def source_files() -> dict[str, Path]:
    """Dotted module name -> file, for every module of the package except the lazy facade."""
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-dir"]
    files = {}
    for package, folder in folders.items():
        for current, _, names in os.walk(
            ROOT / folder
        ):  # does not follow the links: callbacks/ is seen once, as itself
            for path in (Path(current, name) for name in names if name.endswith(".py")):
                parts = path.relative_to(ROOT / folder).with_suffix("").parts
                files[".".join((package, *parts)).removesuffix(".__init__")] = path
    del files["hf_sparse"]
    return dict(sorted(files.items()))


FILES = source_files()


def imported(tree: ast.AST, module: str) -> list[tuple[int, str, str]]:
    """(line, module asked for, name asked of it or "") for every import of our own package in a file."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                package = module.rpartition(".")[0]
                beside = f"{package}.{node.module}"
                if node.level == 1 and module in TRAVELLING and beside in TRAVELLING:
                    found += [(node.lineno, beside, alias.name) for alias in node.names]
                    continue
                raise AssertionError(f"{module}, line {node.lineno}: relative import; write hf_sparse.… in full")
            found += [(node.lineno, node.module or "", alias.name) for alias in node.names]
    for line, name, _ in found:
        assert name.split(".")[0] not in ("callbacks", "hub_cards"), (
            f"{module}, line {line}: import hf_sparse.{name}, not {name}, which would be a second copy of the module"
        )
    return [(line, name, asked) for line, name, asked in found if name.split(".")[0] == "hf_sparse"]


def entry_of(module: str) -> str:
    """The part of ``hf_sparse.<part>.…`` that has a floor."""
    return module.split(".")[1]


def violations(module: str, source: str) -> list[str]:
    """What is wrong with the imports of one module, one sentence each."""
    here = entry_of(module)
    wrong = []
    for line, name, asked in imported(ast.parse(source), module):
        if name == "hf_sparse":
            if asked == "__version__":
                continue
            if f"hf_sparse.{asked}" not in FILES:
                what = f"from hf_sparse import {asked}" if asked else "import hf_sparse"
                wrong.append(f"{module}, line {line}: `{what}` goes through the facade; import from the module itself")
                continue
            name = f"hf_sparse.{asked}"
        there = entry_of(name)
        if there in HEIGHT and HEIGHT[there] > HEIGHT[here]:
            wrong.append(
                f"{module}, line {line}: floor {FLOOR_OF[here]!r} imports {name} from the higher floor {FLOOR_OF[there]!r}"
            )
    return wrong


@pytest.mark.parametrize("module", FILES)
def test_module_stands_on_a_floor_and_imports_nothing_higher(module):
    here = entry_of(module)
    assert here in HEIGHT, (
        f"{module} has no floor: add {here!r} to FLOORS in tests/invariants/test_floors.py, on the lowest floor that holds "
        "everything it imports"
    )
    assert not (wrong := violations(module, FILES[module].read_text(encoding="utf-8"))), "\n".join(wrong)


def test_every_floor_is_listed_once():
    entries = [entry for floor in FLOORS.values() for entry in floor]
    assert len(entries) == len(set(entries))


@pytest.mark.parametrize(
    "source",
    [
        "from hf_sparse.cli import main",
        "def late():\n    import hf_sparse.integrations.quantizer",
        "if TYPE_CHECKING:\n    from hf_sparse.pruning.prune import prune",
        "from hf_sparse import prune",
        "import hf_sparse",
    ],
)
def test_the_rule_catches(source):
    assert len(violations("hf_sparse.masks", source)) == 1


def test_the_rule_allows():
    source = "import torch\nfrom hf_sparse.patterns import parse\nfrom hf_sparse.masks import Masks\n"
    assert violations("hf_sparse.pruning.prune", source) == []


@pytest.mark.parametrize("module", TRAVELLING)
def test_what_travels_imports_only_what_travels(module):
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    absolute = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    names = [node.module for node in absolute]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert not [name for name in names if name.split(".")[0] == "hf_sparse"]
    with pytest.raises(AssertionError, match="relative import"):
        violations(module, "from .ift import sparse_ift")


@pytest.mark.parametrize("source", ["from . import masks", "from ..patterns import parse", "import callbacks.rigl"])
def test_relative_imports_and_second_copies_are_errors(source):
    with pytest.raises(AssertionError):
        violations("hf_sparse.callbacks.rigl", source)
