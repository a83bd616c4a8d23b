"""Every code block of README.md runs, at small size, in the order in which it stands there.

One temporary directory serves all blocks, and python blocks share one namespace, so a later block may use what an earlier
one made, as a reader would who pastes them one after the other. ``SMALLER`` names what is replaced to make that quick:
the model by a tiny random one, the numbers by small ones; the rest of a block runs as it is written.

    ```python   executed as it is
    ```bash     `hf-sparse …` runs; `make TARGET` and `pip install …` are checked against Makefile and pyproject.toml;
                `python examples/x.py …`: the file exists and knows the flags (tests/invariants/test_examples.py runs it);
                anything else runs in bash
    <!-- not run: the reason --> on the line before a block leaves it out (a block that needs a GPU or the Hub)

Other fences (```text, ```json) are output, not code.
"""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]

# (pattern, replacement); {model} is the directory of a tiny model. Applied to python and bash blocks alike.
SMALLER = [
    (r"\b(?:HuggingFaceTB|meta-llama|Qwen|google|openai-community)/[\w.-]+", "{model}"),
    (r"[\w./~$-]*SmolLM2[\w.-]*\.gguf", "{model}"),
    (r"--samples[ =]\d+", "--samples 4"),
    (r"--sequence-length[ =]\d+", "--sequence-length 64"),
    (r"--remove[ =]\d+", "--remove 1"),
    (r"--limit[ =]\d+", "--limit 4"),
    (r"--max-new-tokens[ =]\d+", "--max-new-tokens 4"),
    (r"\bsamples=\d+", "samples=4"),
    (r"\bsequence_length=\d+", "sequence_length=64"),
    (r"\bmax_new_tokens=\d+", "max_new_tokens=4"),
]
WITHOUT_EFFECT = re.compile(r"git clone \S+( \S+)?|cd [\w-]+|source \.venv/bin/activate|python3? -m venv \S+")


class Block(NamedTuple):
    line: int  # of the first line of code, counted from 1
    language: str
    code: str
    reason: str | None  # why it is not run


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a markdown text."""
    found, lines, i = [], text.splitlines(), 0
    while i < len(lines):
        if fence := re.fullmatch(r"\s*```(\w*).*", lines[i]):
            end = next((j for j in range(i + 1, len(lines)) if lines[j].strip() == "```"), None)
            assert end is not None, f"line {i + 1}: the block is never closed"
            before = next((line for line in reversed(lines[:i]) if line.strip()), "")
            reason = re.fullmatch(r"\s*<!-- not run: (.+) -->\s*", before)
            found.append(Block(i + 2, fence[1], "\n".join(lines[i + 1 : end]), reason and reason[1]))
            i = end
        i += 1
    return found


def smaller(code: str, model: Path) -> str:
    for pattern, replacement in SMALLER:
        code = re.sub(pattern, lambda _, new=replacement: new.format(model=model), code)
    return code


def extras() -> set[str]:
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"])


def make_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def checked_only(command: str) -> bool:
    """True for a command that is checked against the files of the repository instead of run; asserts that it is right."""
    words = command.split()
    if words[0] == "make":
        goals = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
        assert set(goals) <= make_targets(), f"`{command}`: the Makefile has {sorted(make_targets())}"
        return True
    if re.match(r"(\S*python3? -m )?(uv )?(\S*/)?pip install", command):
        for names in re.findall(r"(?:hf[-_]sparse|\.)\[([\w,-]+)\]", command):
            assert set(names.split(",")) <= extras(), f"`{command}`: the extras are {sorted(extras())}"
        return True
    if example := re.match(r"(?:\S*/)?python3? (examples/\S+\.py)", command):
        source = (ROOT / example[1]).read_text(encoding="utf-8")
        for flag in re.findall(r"--[\w-]+", command):
            assert flag in source, f"`{command}`: {example[1]} has no {flag}"
        return True
    return bool(WITHOUT_EFFECT.fullmatch(command))


def run_bash(code: str, directory: Path) -> None:
    """Run the commands of one block, but for those that are only checked; stop at the first that fails."""
    kept = []
    for command in re.sub(r"\\\n\s*", " ", code).splitlines():
        bare = re.sub(r"^\$ |(^|\s)#.*$", "", command).strip()
        if bare and not checked_only(bare):
            kept.append(bare)
    if not kept:
        return
    program = "import sys; from hf_sparse.cli import main; sys.exit(main())"
    entry = f"hf-sparse() {{ '{sys.executable}' -c '{program}' \"$@\"; }}"  # also where the package is not installed
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join([entry, *kept])],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.mark.slow
def test_every_block_runs(tiny_model_dir, tmp_path, monkeypatch):
    found = blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    code = [block for block in found if block.language in ("python", "bash")]
    assert {block.language for block in code} == {"python", "bash"}, "README.md shows both the command and the library"
    assert any(block.reason is None for block in code)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    namespace: dict = {"__name__": "readme"}
    for block in code:
        if block.reason:
            continue
        text = smaller(block.code, tiny_model_dir)
        try:
            if block.language == "python":
                program = "\n" * (block.line - 1) + text  # so that a traceback names the line of the README
                exec(compile(program, "README.md", "exec"), namespace)
            else:
                run_bash(text, tmp_path)
        except Exception as error:
            raise AssertionError(f"README.md, block at line {block.line}: {type(error).__name__}: {error}") from error


def test_shell_languages_are_all_bash():
    """A block marked `sh` or `shell` would escape the test above."""
    found = blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    odd = [block.line for block in found if block.language in ("", "sh", "shell", "console", "py", "python3")]
    assert not odd, f"README.md: fences at lines {odd} need a language: python, bash, or text for output"


def test_the_reader_finds_blocks_and_reasons():
    text = (
        "a\n```bash\nmake test\n```\n<!-- not run: needs a GPU -->\n```python\nx = 1\ny = 2\n```\n```text\nout\n```\n"
    )
    assert blocks(text) == [
        Block(3, "bash", "make test", None),
        Block(7, "python", "x = 1\ny = 2", "needs a GPU"),
        Block(11, "text", "out", None),
    ]


def test_wrong_commands_are_caught(tmp_path):
    for command in ["make no-such-target", "pip install 'hf-sparse[no-such-extra]'", "false"]:
        with pytest.raises(AssertionError):
            run_bash(command, tmp_path)
    run_bash("make test  # all of it\npip install -e '.[gguf]'\n# a remark\necho \\\n  two", tmp_path)
