"""What the files of the repository say about each other, and what they must not say about the machine they were made on."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

MACHINE_PATH = re.compile(r"(?<![\w.$}~-])/(?:tmp|root|home|work|Users)/[A-Za-z0-9_]")
REGISTRY_HOST = re.compile(
    r"\b(?:pypi|pythonhosted|npmjs|debian)\.(?:org|com)\b|--(?:(?:extra-)?index-url|find-links)\b"
)


def project_files() -> list[Path]:
    """Every file that is tracked or about to be: not ignored, not a link."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / line for line in listed.stdout.splitlines()]
    return [path for path in files if path.is_file() and not path.is_symlink()]


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""  # a picture


def test_no_machine_paths_and_no_registry_hosts():
    found = []
    for path in project_files():
        for number, line in enumerate(text_of(path).splitlines(), start=1):
            if MACHINE_PATH.search(line) or REGISTRY_HOST.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("folder", ["tmp", "root", "home", "work"])
def test_machine_paths_are_recognised(folder):
    assert MACHINE_PATH.search(f"open('/{folder}/models/x')")
    assert not MACHINE_PATH.search(f"docs/{folder}/models, ./{folder}/x, $HOME/{folder}/y, owner/{folder}/z")


def test_files_are_small():
    """Models and results of runs do not belong into the repository; shipped text and recorded tables are below 1 MB."""
    assert not [str(path) for path in project_files() if path.stat().st_size > 1_000_000]


def test_every_example_is_mentioned():
    """An example nobody is led to is not an example: README.md or PAPERS.md names each file (data/ and cards/ as folders)."""
    guide = text_of(ROOT / "README.md") + text_of(ROOT / "PAPERS.md")
    examples = {path.relative_to(ROOT) for path in project_files() if ROOT / "examples" in path.parents}
    named = {path for path in examples if str(path) in guide}
    folders = {path for path in examples if path.parts[1] in ("data", "cards") and f"examples/{path.parts[1]}" in guide}
    helpers = {path for path in examples if path.name.startswith("_")}
    results = {path for path in examples if path.suffix == ".json" and path.with_suffix(".py") in named}
    missing = examples - named - folders - helpers - results
    assert not missing, f"name them in README.md or PAPERS.md: {sorted(map(str, missing))}"


REFERENCE = re.compile(r"(?<![\w/])((?:hf_sparse|callbacks|hub_cards|tests|examples)/[\w./-]*\w)(?:::(\w+))?")


def paper_rows() -> list[tuple[int, str]]:
    """(line number, text) of every row in the tables of PAPERS.md, their headings left out."""
    lines = text_of(ROOT / "PAPERS.md").splitlines()
    rows = []
    for i, line in enumerate(lines):
        heading = i + 1 < len(lines) and re.fullmatch(r"\|[\s:|-]+\|", lines[i + 1].strip())
        if line.startswith("|") and not heading and not re.fullmatch(r"\|[\s:|-]+\|", line.strip()):
            rows.append((i + 1, line))
    return rows


def test_papers_name_what_exists():
    wrong = []
    for number, line in enumerate(text_of(ROOT / "PAPERS.md").splitlines(), start=1):
        for path, name in REFERENCE.findall(line):
            if not (ROOT / path).exists():
                wrong.append(f"PAPERS.md:{number}: {path} does not exist")
            elif name and not re.search(rf"^\s*(?:def|class) {name}\b", text_of(ROOT / path), re.MULTILINE):
                wrong.append(f"PAPERS.md:{number}: {path} has no {name}")
    assert not wrong, "\n".join(wrong)


def test_every_paper_has_code_a_test_and_an_example():
    """The rule of CONTRIBUTING.md: a method is a paper, its code, a test that pins it and an example that shows it."""
    rows = paper_rows()
    assert rows, "PAPERS.md has no table"
    wrong = []
    for number, row in rows:
        if not re.search(r"\b\d{4}\.\d{4,5}\b", row):
            continue  # a table of results or of papers without an arXiv id
        folders = {path.split("/")[0] for path, _ in REFERENCE.findall(row)}
        tests = [name for path, name in REFERENCE.findall(row) if path.startswith("tests/")]
        if not folders & {"hf_sparse", "callbacks", "hub_cards"}:
            wrong.append(f"PAPERS.md:{number}: names no code")
        if not any(tests):
            wrong.append(f"PAPERS.md:{number}: names no test (tests/….py::test_name)")
        if "examples" not in folders:
            wrong.append(f"PAPERS.md:{number}: names no example")
    assert not wrong, "\n".join(wrong)
