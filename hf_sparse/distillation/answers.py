"""What a response answers, so that a rewritten one is kept only if it answers the same.

    EXTRACTORS["number"]("... = <<2*36=72>>72 clips.\\n#### 72")  -> Fraction(72)
    EXTRACTORS["choice"]("So the answer is (B).")                -> "B"
    EXTRACTORS["yes_no"]("No. Mitochondria ...")                 -> "no"
    EXTRACTORS["exact"]("  The Same\\nWords. ")                  -> "the same words"
    passes_tests(response, tests)                                -> whether its code passes them, in a process of its own

An extractor returns None where a response gives no answer; two responses agree if their answers are equal and not None. Any
callable from text to a value (or None) can stand in for one.

Numbers are compared exactly, as fractions: 1,234 is 1234, -3.0 is -3, 3/4 is 0.75. What is marked as the answer goes before
what merely comes last: GSM8K's ``####``, ``\\boxed{}``, then the last number. GSM8K's calculator notes ``<<48/2=24>>`` are no
part of the text. (The rule of Self-Distillation Fine-Tuning, arxiv.org/abs/2402.13669, takes the last number and accepts
integers only; it is contained in this one.)
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Hashable
from fractions import Fraction
from pathlib import Path

__all__ = ["EXTRACTORS", "choice", "code_of", "exact", "number", "one_of", "passes_tests", "without_calculator_notes"]

_NOTES = re.compile(r"<<[^<>]*>>")
_DIGITS = r"(?:\d{1,3}(?:[,\u00a0\u202f]\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d{1,3})?|\.\d+"
# a sign counts where it does not subtract: not after a digit, a word or a closing bracket
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\]}}.])[-\u2212])?\s?[$\u20ac\u00a3]?(?P<top>{_DIGITS})(?:/(?P<bottom>{_DIGITS}))?"
)
_FRACTION = re.compile(r"\\d?frac\{([^{}]+)\}\{([^{}]+)\}")
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")


def without_calculator_notes(text: str) -> str:
    """The text without GSM8K's ``<<48/2=24>>``."""
    return _NOTES.sub("", text)


def number(text: str) -> Fraction | None:
    """The number a response answers: after the last ``####``, in the last ``\\boxed{}``, or the last one at all."""
    text = without_calculator_notes(text)
    if "####" in text:
        first = _numbers(text.rpartition("####")[2])
        return first[0] if first else None
    if boxed := _BOXED.findall(text):
        inside = _numbers(boxed[-1])
        return inside[-1] if inside else None
    found = _numbers(text)
    return found[-1] if found else None


def _numbers(text: str) -> list[Fraction]:
    text = _FRACTION.sub(r" \1/\2 ", text)
    found = []
    for match in _NUMBER.finditer(text):
        top, bottom = _fraction(match["top"]), _fraction(match["bottom"] or "1")
        if bottom:
            found.append(-top / bottom if match["sign"] else top / bottom)
    return found


def _fraction(digits: str) -> Fraction:
    return Fraction(re.sub(r"[,\u00a0\u202f]", "", digits))


def choice(text: str, letters: str = "ABCDEFGHIJ") -> str | None:
    """The letter of a multiple-choice answer.

    As stated last ("the answer is (B)", "Answer: B", ``\\boxed{B}``), else the one that stands alone on the last such line,
    else the one the response begins with ("B) because ...").
    """
    one = rf"[(\[]?\*{{0,2}}([{letters}])\*{{0,2}}[)\]]?(?![\w'])"
    stated = re.findall(
        rf"(?i:\banswer\b(?:\s+(?:is|would be|should be))?(?:\s+option)?)\s*:?\s*\*{{0,2}}\s*{one}", text
    )
    if boxed := re.findall(rf"\\boxed\{{(?:\\text\{{)?\s*{one}", text):
        stated.append(boxed[-1])
    alone = re.findall(rf"(?m)^\s*(?:Option\s+)?{one}[.:]?\s*$", text)
    begins = re.match(rf"\s*(?:\(([{letters}])\)|\*\*([{letters}])\*\*|([{letters}])[).:])", text)
    if stated or alone:
        return (stated or alone)[-1]
    return next(filter(None, begins.groups())) if begins else None


def one_of(words: list[str]) -> Callable[[str], str | None]:
    """An extractor of one of some words, whole and in any case: the one stated as the answer, else the only one there, else
    the one that the response begins with."""
    if not words:
        raise ValueError("one_of takes at least one word")
    any_word = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))

    def extract(text: str) -> str | None:
        stated = re.findall(rf"(?i)\banswer\b(?:\s+is)?\s*:?\s*\W{{0,3}}\b({any_word})\b", text)
        if stated:
            return stated[-1].casefold()
        found = [word.casefold() for word in re.findall(rf"(?i)\b({any_word})\b", text)]
        if len(set(found)) == 1:
            return found[0]
        begins = re.match(rf"(?i)\W*({any_word})\b", text)
        return begins[1].casefold() if begins else None

    return extract


def exact(text: str) -> str | None:
    """The whole response in lower case, with single spaces and no punctuation at its ends."""
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'`*") or None


EXTRACTORS: dict[str, Callable[[str], Hashable | None]] = {
    "number": number,
    "choice": choice,
    "yes_no": one_of(["yes", "no", "maybe"]),
    "exact": exact,
}


def code_of(response: str) -> str:
    """The program in a response: its last fenced block that is Python or says nothing else, or all of it."""
    blocks = re.findall(r"```[ \t]*(\w*)[^\n]*\n(.*?)(?:```|\Z)", response, re.S)
    mine = [body for language, body in blocks if language.lower() in ("", "python", "py", "python3")]
    return mine[-1] if mine else response


def passes_tests(response: str, tests: str, *, seconds: float = 10.0, memory: int = 2**30) -> bool:
    """Whether the code in a response, followed by ``tests``, runs to its end without an error.

    It runs in a fresh process in an empty folder, without this one's environment, with limits on time, memory, processes and
    file sizes. That guards against accidents, not against malice: run code of models you do not trust in a container.

    Args:
        response: text with a fenced block of Python, or Python alone.
        tests: Python that raises if the code is wrong.
        seconds: of wall clock and of processor time. memory: bytes of address space.
    """
    import resource  # not on Windows, where everything else of this file works

    def limit() -> None:
        for kind, value in (
            (resource.RLIMIT_AS, memory),
            (resource.RLIMIT_CPU, max(1, int(seconds + 0.999))),
            (resource.RLIMIT_FSIZE, 2**20),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(kind, (value, value))

    mark = "the tests have run to their end"
    program = f"{code_of(response)}\n\n{tests}\n\nprint()\nprint({mark!r})\n"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "program.py").write_text(program, encoding="utf-8")
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "program.py"],
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "HOME": folder},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=limit,
        )
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            output = b""
        finally:
            _end(process)
        # an exit in the midst of it is no pass, whatever its status
        return process.returncode == 0 and output.decode(errors="replace").endswith(f"\n{mark}\n")


def _end(process: subprocess.Popen) -> None:
    """Ends the process and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
