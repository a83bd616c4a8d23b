"""Calibration and evaluation text as token ids.

A source is a text file, a JSON-lines file, or the id of a Hub dataset (``allenai/c4:en`` names one of its configurations;
its train split is read). JSON rows (and dataset rows) may hold

    {"text": "..."}                                         plain text
    {"prompt": "...", "completion": "..."}                  joined; message lists go through the chat template
    {"messages": [{"role": ..., "content": ...}, ...]}      through the chat template

A text file is tokenised in one call; rows are tokenised one by one and joined by the end-of-text token. Either way there is
one long run of tokens, cut into contiguous segments of ``sequence_length``; the first ``samples`` of them are taken, or
randomly chosen ones with ``shuffle``. Nothing is padded, nothing overlaps, the remainder is dropped.
"""

import json
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["TokenizedText", "check_source", "load_segments", "load_tokens"]

_FILE_ENDINGS = (".txt", ".text", ".md", ".jsonl", ".json")  # what no Hub dataset id ends with
_ROW_FORMS = '"text", "prompt" with "completion", or "messages"'


@dataclass
class TokenizedText:
    """Segments of token ids and where they come from.

    Attributes:
        ids: ``[samples, sequence_length]`` int64.
        description: source, samples, sequence length, tokens available, shuffle seed; JSON.
    """

    ids: torch.Tensor
    description: dict[str, Any]


def check_source(source: str) -> None:
    """Raises if a source cannot be read, before any model is loaded.

    Raises:
        FileNotFoundError, ValueError: a missing or unreadable file, an empty one.
    """
    path = Path(source)
    if path.is_dir():
        raise ValueError(f"{source} is a directory; give a text file, a .jsonl file or a Hub dataset id")
    if path.is_file():
        if path.stat().st_size == 0:
            raise ValueError(f"{source} is empty")
        if not os.access(path, os.R_OK):
            raise ValueError(f"{source} cannot be read: permission denied")
        with open(path, "rb") as file:
            head = file.read(1 << 16)
        if b"\0" in head:
            raise ValueError(f"{source} is a binary file; text is expected as UTF-8 (.txt) or JSON lines (.jsonl)")
        if not head.strip() and path.stat().st_size == len(head):
            raise ValueError(f"{source} holds only white space")
    elif (
        path.suffix in (".txt", ".jsonl", ".json", ".md", ".text")
        or source.count("/") > 1
        or source.startswith((".", "/", "~"))
    ):
        raise FileNotFoundError(f"no such file: {source}")


def load_segments(
    source: str, tokenizer, samples: int, sequence_length: int, shuffle: int | None = None, split: str = "train"
) -> TokenizedText:
    """``samples`` contiguous segments of ``sequence_length`` tokens.

    Raises:
        FileNotFoundError, ValueError: the source is missing, unreadable, empty, or too short for that many segments.
    """
    if samples < 1 or sequence_length < 1:
        raise ValueError(f"samples and sequence_length are at least 1, got {samples} and {sequence_length}")
    # of a file all segments are candidates; a dataset may be endless, so its rows are shuffled as they stream in
    whole = shuffle is not None and Path(source).is_file()
    ids = load_tokens(source, tokenizer, None if whole else samples * sequence_length, split, shuffle)
    available = len(ids) // sequence_length
    if available < samples:
        raise ValueError(
            f"{source} has {len(ids)} tokens, enough for {available} segments of {sequence_length}, but {samples} were asked "
            f"for; lower --samples to {available}, or --sequence-length to {len(ids) // samples}"
            if available
            else f"{source} has only {len(ids)} tokens, fewer than one segment of {sequence_length}"
        )
    segments = ids[: available * sequence_length].view(available, sequence_length)
    if shuffle is not None:
        chosen = random.Random(shuffle).sample(range(available), samples)
        segments = segments[chosen]
    description = {
        "source": Path(source).name if Path(source).is_file() else source,
        "samples": samples,
        "sequence_length": sequence_length,
        "shuffle": shuffle,
    }
    return TokenizedText(segments[:samples].clone(), description)


def load_tokens(
    source: str, tokenizer, wanted: int | None = None, split: str = "train", shuffle: int | None = None
) -> torch.Tensor:
    """The token ids of a source in order, ``[tokens]``; at least ``wanted`` of them if there are as many.

    A text file is tokenised whole in one call. Rows are read only until ``wanted`` tokens are there. With ``shuffle``, a
    seed, the rows of a Hub dataset come in random order (of a buffer of 10,000); files are read as they are.
    """
    check_source(source)
    path = Path(source)
    if path.is_file() and path.suffix not in (".jsonl", ".json"):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{source} is not UTF-8 text: {error}") from error
        return _encode(tokenizer, text, special=True)
    rows = _json_rows(path) if path.is_file() else _dataset_rows(source, split, shuffle)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for where, row in rows:
        text, templated = _row_text(row, tokenizer, where)
        ids += _encode(tokenizer, text, special=not templated).tolist() + end  # a chat template writes its own BOS
        if wanted is not None and len(ids) >= wanted:
            break
    return torch.tensor(ids, dtype=torch.long)


def _encode(tokenizer, text: str, special: bool) -> torch.Tensor:
    longest, tokenizer.model_max_length = (
        tokenizer.model_max_length,
        int(1e30),
    )  # no warning: the text is cut afterwards
    try:
        return torch.tensor(tokenizer(text, add_special_tokens=special).input_ids, dtype=torch.long)
    finally:
        tokenizer.model_max_length = longest


def _json_rows(path: Path) -> Iterator[tuple[str, dict]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))  # Windows puts a mark in front
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not UTF-8 text: {error}") from error
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not a JSON object a line: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"{path}, line {number}: a row is an object with {_ROW_FORMS}, got {type(row).__name__}"
                )
            yield f"{path}, line {number}", row


def _dataset_rows(source: str, split: str, shuffle: int | None = None) -> Iterable[tuple[str, dict]]:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{source!r} is no file here; to read it as a Hub dataset install datasets: pip install datasets"
        ) from error
    name, _, configuration = source.partition(":")
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split, streaming=True)
    except Exception as error:
        raise ValueError(f"{source!r} is neither a file here nor a dataset that can be loaded: {error}") from error
    if shuffle is not None:
        rows = rows.shuffle(seed=shuffle, buffer_size=10_000)
    return ((f"{source}, row {number}", row) for number, row in enumerate(rows))


def _row_text(row: dict, tokenizer, where: str) -> tuple[str, bool]:
    """The text of a row, and whether it comes out of the chat template (and so has its special tokens already)."""
    if isinstance(row.get("text"), str):
        return row["text"], False
    if isinstance(row.get("messages"), list):
        return _chat(row["messages"], tokenizer, where), True
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, list) or isinstance(completion, list):
            as_messages = [
                part if isinstance(part, list) else [{"role": role, "content": part}]
                for role, part in (("user", prompt), ("assistant", completion))
            ]
            return _chat(as_messages[0] + as_messages[1], tokenizer, where), True
        return f"{prompt}{completion}", False
    raise ValueError(f"{where}: a row has {_ROW_FORMS}; this one has {', '.join(map(repr, row)) or 'nothing'}")


def _chat(messages: list, tokenizer, where: str) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{where}: chat messages need a tokenizer with a chat template, and this model's has none")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # templates raise what they like: roles that must alternate, no system role, ...
        raise ValueError(f"{where}: the chat template does not take these messages: {error}") from error
