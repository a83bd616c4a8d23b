"""Rows of instruction, question-answer and chat datasets as a prompt and a response.

    instruction, input, output       Alpaca                  question, answer      GSM8K
    prompt, completion | response    texts or chat turns     messages              chat; the last turn is the response
    instruction, context, response   Dolly                   conversations         from / value turns (ShareGPT)

Which one a dataset has is seen by its columns; ``columns={"prompt": ..., "response": ...}`` says it instead.
"""

import csv
import json
from collections.abc import Iterable
from pathlib import Path

from hf_sparse.data import check_source

__all__ = ["Messages", "load_rows", "read_row", "row_reader"]

Messages = list[dict[str, str]]
# (columns of the prompt, joined by an empty line where they are not empty; column of the response)
_PAIRS = [
    (("instruction", "input"), "output"),
    (("instruction", "context"), "response"),
    (("instruction",), "output"),
    (("instruction",), "response"),
    (("question",), "answer"),
    (("prompt",), "completion"),
    (("prompt",), "response"),
    (("problem",), "solution"),
]
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}


def load_rows(source: str, split: str = "train", limit: int | None = None):
    """A ``datasets.Dataset`` of a file of JSON lines, CSV or Parquet, or of a Hub dataset (``name`` or ``name:configuration``).

    Args:
        split: of a Hub dataset. limit: only the first rows.

    Raises:
        FileNotFoundError, ValueError: a source that cannot be read, or has no rows.
    """
    import datasets

    path = Path(source)
    if limit is not None and limit < 1:
        raise ValueError(f"limit is a number of rows, at least 1; got {limit}")
    if path.suffix == ".parquet":
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {source}")
        rows = datasets.Dataset.from_parquet(str(path))
    elif path.suffix == ".csv" and path.exists():
        check_source(source)
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = datasets.Dataset.from_list(list(csv.DictReader(file)))
    elif path.exists() or path.suffix in (".jsonl", ".json"):
        check_source(source)
        rows = datasets.Dataset.from_list(_json(path))
    else:
        check_source(source)
        name, _, configuration = source.partition(":")
        try:
            rows = datasets.load_dataset(name, configuration or None, split=split)
        except Exception as error:
            raise ValueError(f"{source!r} is neither a file here nor a dataset that can be loaded: {error}") from error
    if not len(rows):
        raise ValueError(f"{source} has no rows")
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def _json(path: Path) -> list[dict]:
    """The objects of a file: one a line, or one list of them."""
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        rows = []
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not a JSON object a line: {error}") from error
    if wrong := next((row for row in rows if not isinstance(row, dict)), None):
        raise ValueError(f"{path}: a row is an object with named columns, got {wrong!r}"[:300])
    return rows


def row_reader(column_names: Iterable[str], columns: dict[str, str] | None = None):
    """A function ``row -> (prompt turns, response text)`` for a dataset with these columns.

    Args:
        columns: ``{"prompt": column, "response": column}``, to override what is recognised.

    Raises:
        ValueError: no known form, or columns that are not there.
    """
    names = list(column_names)
    if columns is not None:
        if set(columns) != {"prompt", "response"}:
            raise ValueError(
                f"columns names the prompt and the response column, e.g. {{'prompt': 'q', 'response': 'a'}}; got {columns}"
            )
        if missing := [name for name in columns.values() if name not in names]:
            raise ValueError(f"the dataset has no column {missing[0]!r}; it has {', '.join(names)}")
        return lambda row: read_row(row, (columns["prompt"],), columns["response"])
    for chat in ("messages", "conversations"):
        if chat in names:
            return lambda row: _last_turn(_turns(row[chat]))
    for prompt, response in _PAIRS:
        if response in names and all(name in names for name in prompt):
            return lambda row: read_row(row, prompt, response)
    raise ValueError(
        f"cannot tell which of the columns {', '.join(names)} are prompt and response; say "
        "columns={'prompt': ..., 'response': ...}"
    )


def read_row(row: dict, prompt: tuple[str, ...], response: str) -> tuple[Messages, str]:
    """``(prompt turns, response text)`` of a row whose columns are known."""
    given, answer = row[prompt[0]], row[response]
    if isinstance(answer, list):
        answer = _turns(answer)[-1]["content"]
    if isinstance(given, list):
        return _checked(_turns(given), answer)
    text = "\n\n".join(str(row[name]).strip() for name in prompt if row[name] and str(row[name]).strip())
    return _checked([{"role": "user", "content": text}], answer)


def _turns(turns: list[dict]) -> Messages:
    result = []
    for turn in turns:
        role, content = (turn.get(a, turn.get(b)) for a, b in (("role", "from"), ("content", "value")))
        if role not in _ROLES or not isinstance(content, str):
            raise ValueError(f"a turn has a role ({', '.join(sorted(_ROLES))}) and a text as content; got {turn}")
        result.append({"role": _ROLES[role], "content": content})
    return result


def _last_turn(turns: Messages) -> tuple[Messages, str]:
    if not turns or turns[-1]["role"] != "assistant":
        raise ValueError(f"the last turn of a chat must be the assistant's response; got {turns[-1:] or 'no turns'}")
    return _checked(turns[:-1], turns[-1]["content"])


def _checked(prompt: Messages, response) -> tuple[Messages, str]:
    if not prompt or prompt[-1]["role"] != "user" or not prompt[-1]["content"].strip():
        raise ValueError(f"a prompt ends with a user turn that is not empty; got {prompt}")
    if not isinstance(response, str) or not response.strip():
        raise ValueError(
            f"a response is a text that is not empty; got {response!r} for the prompt {prompt[-1]['content'][:60]!r}"
        )
    return prompt, response.strip()
