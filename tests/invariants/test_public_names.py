"""The public surface is frozen: names of the package, commands and flags of ``hf-sparse``.

It is recorded in ``public_surface.json``. A change that was meant is recorded anew with

    python tests/invariants/test_public_names.py --update

and then shows in the diff, where a reader can ask whether old scripts still run; CHANGELOG.md names it.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

RECORD = Path(__file__).with_name("public_surface.json")
HOW = "if this was meant, run `python tests/invariants/test_public_names.py --update` and name it in CHANGELOG.md"
MODULES = ["hf_sparse", "hf_sparse.callbacks", "hf_sparse.hub_cards"]


def describe_parser(parser: argparse.ArgumentParser) -> dict:
    """Positionals, flags (all spellings, with their choices) and, by name, the commands below."""
    described: dict = {"arguments": [], "flags": [], "commands": {}}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            described["commands"] = {name: describe_parser(below) for name, below in sorted(action.choices.items())}
            continue
        choices = "" if action.choices is None else " {" + ",".join(map(str, action.choices)) + "}"
        if action.option_strings:
            described["flags"].append(" ".join(action.option_strings) + choices)
        else:
            described["arguments"].append(action.dest + choices)
    described["flags"].sort()
    return {key: value for key, value in described.items() if value}


def public_surface() -> dict:
    from hf_sparse.cli import _parser

    names = {module: sorted(importlib.import_module(module).__all__) for module in MODULES}
    return {"names": names, "cli": describe_parser(_parser())}


def flatten(surface: dict, path: str = "") -> set[str]:
    """One line for everything a user can write, so that a difference reads as what was added and removed."""
    lines = set()
    for key, value in surface.items():
        if isinstance(value, dict):
            lines |= flatten(value, f"{path} {key}".strip())
        else:
            lines |= {f"{path} {key}: {item}".strip() for item in value}
    return lines


def test_public_surface_is_the_recorded_one():
    recorded, found = flatten(json.loads(RECORD.read_text(encoding="utf-8"))), flatten(public_surface())
    changes = [f"- {line}" for line in sorted(recorded - found)] + [f"+ {line}" for line in sorted(found - recorded)]
    assert not changes, "the public surface changed:\n" + "\n".join(changes) + f"\n{HOW}"


def test_every_public_name_resolves():
    for module in MODULES:
        package = importlib.import_module(module)
        assert len(set(package.__all__)) == len(package.__all__)
        for name in package.__all__:
            assert getattr(package, name) is not None, f"{module}.{name}"
        assert set(package.__all__) <= set(dir(package)), f"dir({module}) hides public names from completion"


def test_every_command_takes_json():
    commands = public_surface()["cli"]["commands"]
    commands.pop("lm-eval")  # its words are lm-eval's own
    assert not [name for name, command in commands.items() if not any("--json" in flag for flag in command["flags"])]


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit(__doc__)
    sys.path.insert(0, str(RECORD.parents[2]))
    RECORD.write_text(json.dumps(public_surface(), indent=2) + "\n", encoding="utf-8")
    print(f"wrote {RECORD.name}")
