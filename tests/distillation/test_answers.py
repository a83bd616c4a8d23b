"""Answers of responses: hard cases by hand, real references of GSM8K's form, and code that misbehaves."""

import time
from fractions import Fraction

import pytest

from hf_sparse.distillation.answers import EXTRACTORS, choice, code_of, exact, number, one_of, passes_tests


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("72", 72),
        ("He paid $1,234.", 1234),
        ("1,234,567 people", 1234567),
        ("3,14", 14),  # no group of three: two numbers
        ("The change is -3.0", -3),
        ("It fell to \u22125 degrees.", -5),
        ("5-3", 3),  # a difference, not minus three
        ("x = (4)-2", 2),
        ("Sold 48/2 = <<48/2=24>>24 clips.\nSold 48+24 = <<48+24=72>>72 in all.\n#### 72", 72),
        ("#### 1,000 dollars, or 10 a day", 1000),
        ("First #### 1\nno, #### 2", 2),
        ("so <<5*5=25>>", None),  # notes are not text
        ("The answer is 18.", 18),
        ("It costs 0.50", Fraction(1, 2)),
        (".5 of it", Fraction(1, 2)),
        ("three quarters, 3/4", Fraction(3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"\boxed{42} because 6 * 7 was asked", 42),
        (r"we get \boxed{\frac{1}{2}}.", Fraction(1, 2)),
        ("1e3 meters", 1000),
        ("the ratio is 1/0", None),
        ("no idea", None),
        ("", None),
        ("#### none", None),
        ("$ 12", 12),
        ("-$5", -5),
        ("20% of it", 20),
        ("version 3.11.2", Fraction("0.2")),  # what comes last; nobody asks for versions
    ],
)
def test_number(text, expected):
    assert number(text) == expected


def test_numbers_agree_however_they_are_written():
    assert number("#### 1,500") == number("1500.00") == number("so 3000/2")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        ("(C)", "C"),
        ("**D**", "D"),
        ("The answer is (B).", "B"),
        ("the answer is B because A is wrong", "B"),
        ("Answer: C", "C"),
        ("**Answer:** C", "C"),
        ("The correct answer would be option D", "D"),
        ("I thought the answer is A. No, the answer is B.", "B"),
        ("A) is too hot.\nB) is too cold.\nAnswer: B", "B"),
        ("B) because it is cold", "B"),
        ("B. Cold", "B"),
        ("Let me think.\nC\n", "C"),
        (r"\boxed{A}", "A"),
        (r"\boxed{\text{E}}", "E"),
        ("A dog is a mammal.", None),  # an article
        ("I would say none.", None),
        ("the answer is Bread", None),
        ("The answer is a banana", None),
        ("", None),
    ],
)
def test_choice(text, expected):
    assert choice(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("yes", "yes"),
        ("No. Mitochondria play no role.", "no"),
        ("Yes, although there is no proof.", "yes"),
        ("There is no proof, but the answer is: yes", "yes"),
        ("Maybe", "maybe"),
        ("The results suggest so, yes.", "yes"),
        ("nothing known", None),  # not a whole word
        ("It may be yes or no.", None),
        ("", None),
    ],
)
def test_yes_no(text, expected):
    assert EXTRACTORS["yes_no"](text) == expected


def test_one_of_prefers_the_longer_word():
    extract = one_of(["true", "not true"])
    assert extract("This is not true") == "not true"
    with pytest.raises(ValueError, match="at least one"):
        one_of([])


def test_exact():
    assert exact(" The\n same  Words. ") == exact("the same words") == "the same words"
    assert exact("") is None and exact(" ... ") is None


def test_code_of():
    assert code_of("Here:\n```python\nx = 1\n```\nand\n```bash\nls\n```") == "x = 1\n"
    assert code_of("```\nx = 1\n```") == "x = 1\n"
    assert code_of("x = 1") == "x = 1"
    assert code_of("cut off ```python\nx = 1") == "x = 1"


TESTS = "assert add(2, 3) == 5\nassert add(-1, 1) == 0"


@pytest.mark.parametrize(
    ("code", "passes"),
    [
        ("def add(a, b):\n    return a + b", True),
        ("Sure!\n```python\ndef add(a, b):\n    return a + b\n```\nDone.", True),
        ("def add(a, b):\n    return a - b", False),
        ("def add(a, b:\n    return a", False),
        ("raise SystemExit(0)", False),  # leaving early is no pass
        ("import os; os._exit(0)", False),
        ("def add(a, b):\n    return bytearray(2**31) and 5", False),
        ("import socket, subprocess\ndef add(a, b):\n    return a + b", True),
    ],
)
def test_code_against_its_tests(code, passes):
    assert passes_tests(code, TESTS) is passes


def test_code_that_does_not_end_is_ended_and_all_it_started():
    start = time.time()
    assert not passes_tests("while True:\n    pass", "", seconds=1)
    child = "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\nwhile True: pass"
    assert not passes_tests(child, "", seconds=1)
    assert time.time() - start < 8


def test_code_sees_nothing_of_this_process(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    assert passes_tests(
        "import os\nassert 'SECRET_TOKEN' not in os.environ\nassert os.listdir('.') == ['program.py']", ""
    )
