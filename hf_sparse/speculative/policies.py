"""Policies by name, as the command line and configuration files write them.

    static:5   heuristic   confidence:0.4   max-confidence:0.8   margin:0.2   svip:0.3   svip-difference:0.2   adaedl:0.4
    tapout     tapout-paper     tapout-token     tapout-thompson     a .json file that TapOut.save wrote

A number after the colon replaces the default; ``static:1-8`` is eight policies.
"""

import difflib
import re
from pathlib import Path

from hf_sparse.speculative.rules import (
    SVIP,
    AdaEDL,
    DrawnConfidence,
    Heuristic,
    LogitMargin,
    MaxConfidence,
    Rule,
    StaticLength,
    SVIPDifference,
)
from hf_sparse.speculative.tapout import TapOut

__all__ = ["POLICIES", "parse_policies", "parse_policy"]

POLICIES = {
    "static": StaticLength,
    "heuristic": Heuristic,
    "confidence": DrawnConfidence,
    "max-confidence": MaxConfidence,
    "margin": LogitMargin,
    "svip": SVIP,
    "svip-difference": SVIPDifference,
    "adaedl": AdaEDL,
    "tapout": TapOut,
    "tapout-paper": TapOut.paper,
    "tapout-token": lambda max_draft: TapOut(bandit="BetaThompson", level="token", max_draft=max_draft),
    "tapout-thompson": lambda max_draft: TapOut(
        bandit="GaussianThompson", bandit_options={"variance": 0.05}, max_draft=max_draft
    ),
}


def parse_policy(text: str, max_draft: int = 32) -> Rule | TapOut:
    """The policy of a name.

    Args:
        max_draft: tokens in a draft, at most; a static length may be longer.

    Raises:
        ValueError: an unknown name, or a number it does not take.
    """
    if text.endswith(".json"):
        return TapOut.load(Path(text))
    name, _, number = text.partition(":")
    if name not in POLICIES:
        near = difflib.get_close_matches(name, POLICIES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown policy {text!r}; known are {', '.join(POLICIES)}, or a .json file of TapOut{hint}")
    kind = POLICIES[name]
    if not number:
        return kind(max_draft=max_draft)
    if not (isinstance(kind, type) and issubclass(kind, Rule)):
        raise ValueError(f"{name} takes no number; got {text!r}")
    try:
        value = int(number) if kind is StaticLength else float(number)
    except ValueError:
        raise ValueError(
            f"policy {text!r}: after the colon comes a {'whole ' if kind is StaticLength else ''}number"
        ) from None
    return kind(value, max_draft=max(max_draft, int(value)) if kind is StaticLength else max_draft)


def parse_policies(texts: list[str], max_draft: int = 32) -> dict[str, Rule | TapOut]:
    """``{name: policy}``, ranges of static lengths written out."""
    found: dict[str, Rule | TapOut] = {}
    for text in texts:
        if lengths := re.fullmatch(r"static:(\d+)-(\d+)", text):
            names = [f"static:{k}" for k in range(int(lengths[1]), int(lengths[2]) + 1)]
        else:
            names = [text]
        for name in names:
            if name in found:
                raise ValueError(f"policy {name} is given twice")
            found[name] = parse_policy(name, max_draft)
    return found
