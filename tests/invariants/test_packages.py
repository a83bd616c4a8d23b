"""The package list, the links and the version say the same as the tree.

The list in pyproject.toml is explicit because `callbacks/` and `hub_cards/` live at the top of the repository; a folder that
is missing there would work in a checkout and be absent from the wheel.
"""

import ast
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
OUTSIDE = {package: folder for package, folder in SETUPTOOLS["package-dir"].items() if package != "hf_sparse"}


def test_package_list_is_the_tree():
    on_disk = set()
    for package, folder in SETUPTOOLS["package-dir"].items():
        for current, folders, files in os.walk(ROOT / folder):  # does not follow the links
            folders[:] = [name for name in folders if name != "__pycache__"]
            if any(name.endswith(".py") for name in files):
                assert "__init__.py" in files, f"{current} holds modules and no __init__.py"
                on_disk.add(".".join((package, *Path(current).relative_to(ROOT / folder).parts)))
    assert set(SETUPTOOLS["packages"]) == on_disk, (
        "bring [tool.setuptools] packages in pyproject.toml in line with the tree"
    )
    assert SETUPTOOLS["packages"] == sorted(SETUPTOOLS["packages"])


@pytest.mark.parametrize("package", OUTSIDE)
def test_outside_folders_are_linked_into_the_package(package):
    link = ROOT.joinpath(*package.split("."))
    assert link.is_symlink(), (
        f"{link.relative_to(ROOT)} is not a symbolic link; on Windows: git config core.symlinks true"
    )
    assert os.readlink(link) == f"../{OUTSIDE[package]}"
    assert (link / "__init__.py").is_file()


def test_package_data_is_the_tree():
    """A template that no pattern matches would be missing from the wheel, and a pattern without a file is a leftover."""
    packaged, on_disk = set(), set()
    for package, patterns in SETUPTOOLS["package-data"].items():
        folder = ROOT / SETUPTOOLS["package-dir"].get(package, package.replace(".", "/"))
        for pattern in patterns:
            matched = set(folder.glob(pattern))
            assert matched, f"{package}: no file matches {pattern}"
            packaged |= matched
    for folder in SETUPTOOLS["package-dir"].values():
        for current, _, files in os.walk(ROOT / folder):
            on_disk |= {Path(current, name) for name in files if not name.endswith((".py", ".pyc"))}
    assert on_disk == packaged, f"not packaged: {sorted(map(str, on_disk - packaged))}"


def test_the_version_is_written_in_one_place():
    assert "version" in PROJECT["project"]["dynamic"]
    assert SETUPTOOLS["dynamic"]["version"] == {"attr": "hf_sparse.__version__"}
    tree = ast.parse((ROOT / "hf_sparse" / "__init__.py").read_text(encoding="utf-8"))
    values = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__version__" for t in node.targets)
    ]
    assert len(values) == 1 and isinstance(values[0], ast.Constant), (
        "__version__ is one literal in hf_sparse/__init__.py"
    )
    version = values[0].value
    assert re.fullmatch(r"\d+\.\d+\.\d+([ab.]\S+)?", version)
    assert f"[{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), (
        f"CHANGELOG.md has no section for {version}"
    )


def test_constraints_pin_every_direct_dependency():
    """`make` installs under constraints.txt: what it does not pin would be whatever is newest that day."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert not [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", pin)]

    def canonical(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    pinned = {canonical(pin.split("==")[0]) for pin in pins}
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = PROJECT["project"]["dependencies"] + [requirement for extra in extras.values() for requirement in extra]
    names = {canonical(re.match(r"[A-Za-z0-9._-]+", requirement)[0]) for requirement in wanted}
    assert names <= pinned, f"constraints.txt lacks {sorted(names - pinned)}"


def test_links_are_links_in_git():
    listed = subprocess.run(["git", "ls-files", "-s", "hf_sparse"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        pytest.skip("not a git checkout")
    modes = {line.split("\t")[1]: line.split()[0] for line in listed.stdout.splitlines()}
    for package in OUTSIDE:
        assert modes.get(package.replace(".", "/")) == "120000"
