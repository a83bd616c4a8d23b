"""Text files as training data: a tokenizer and two flat files of token ids.

The files are cut at paragraph borders into passages of about 16,000 characters, and the passages are shuffled, so that
the training text and the held-out one percent are the same mixture of all files. A passage ends with the end-of-text
token. The ids lie one after the other in ``train.bin`` and ``validation.bin`` (uint16 up to 65,536 entries), and a
training example is a window of ``length`` of them: nothing is padded, and reading one costs nothing but its bytes.

The size V of the vocabulary matters for the cost of a small model: the output head is 2 T d V FLOPs a sequence, a
quarter of GPT-2 Small's at V = 50,257, and it stays dense.
"""

import json
import random
import re
from pathlib import Path

import numpy as np
import torch

from hf_sparse.atomic import atomic_directory, atomic_write_text

__all__ = ["TokenWindows", "load_text", "prepare_text"]

PASSAGE = 16_000  # characters
END_OF_TEXT = "<|endoftext|>"


def prepare_text(
    files: list[Path], directory: Path, tokenizer=None, vocabulary: int = 16_384, seed: int = 0, held_out: float = 0.01
) -> dict:
    """Writes ``tokenizer/``, ``train.bin``, ``validation.bin`` and ``data.json`` into ``directory``, all or nothing.

    Args:
        tokenizer: one to use as it is, e.g. GPT-2's; None: a byte-level BPE of ``vocabulary`` entries is trained.
        held_out: share of the passages kept for validation; at least one.

    Returns:
        What ``data.json`` says: files, characters, tokens, vocabulary, dtype, seed.

    Raises:
        FileNotFoundError, ValueError: a file is missing or not UTF-8, there is too little text, the tokenizer has no
            end-of-text token.
    """
    for file in files:  # said before any work
        if not Path(file).is_file():
            raise FileNotFoundError(f"no such text file: {file}")
    passages = [passage for file in files for passage in _passages(Path(file))]
    if len(passages) < 2:
        raise ValueError(f"the text has {len(passages)} passages of {PASSAGE:,} characters; training needs at least 2")
    random.Random(seed).shuffle(passages)
    tokenizer = tokenizer or _train_tokenizer(passages, vocabulary)
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer names no end-of-text token (eos_token), which separates passages")
    dtype = np.dtype("uint16" if len(tokenizer) <= 2**16 else "uint32")
    held = max(1, round(held_out * len(passages)))
    with atomic_directory(directory) as staging:
        tokens = {
            name: _write(staging / f"{name}.bin", part, tokenizer, dtype)
            for name, part in (("validation", passages[:held]), ("train", passages[held:]))
        }
        tokenizer.save_pretrained(staging / "tokenizer")
        facts = {
            "files": [Path(file).name for file in files],
            "characters": sum(map(len, passages)),
            "tokens": tokens,
            "vocabulary": len(tokenizer),
            "dtype": dtype.name,
            "seed": seed,
        }
        atomic_write_text(staging / "data.json", json.dumps(facts, indent=1) + "\n")
    return facts


def load_text(directory: Path, length: int):
    """``(tokenizer, training windows, validation windows, facts)`` of a directory that :func:`prepare_text` wrote."""
    from transformers import AutoTokenizer

    path = Path(directory) / "data.json"
    if not path.is_file():
        raise FileNotFoundError(f"no training text in {directory}: make it with --stage data --text FILE ...")
    facts = json.loads(path.read_text())
    windows = [
        TokenWindows(Path(directory) / f"{name}.bin", facts["dtype"], length) for name in ("train", "validation")
    ]
    return AutoTokenizer.from_pretrained(Path(directory) / "tokenizer"), *windows, facts


class TokenWindows(torch.utils.data.Dataset):
    """Contiguous windows ``[length]`` of a flat file of token ids; the remainder is dropped."""

    def __init__(self, path: Path, dtype: str, length: int):
        self.ids = np.memmap(path, dtype=dtype, mode="r")
        self.length = length
        if len(self) == 0:
            raise ValueError(f"{path} has {len(self.ids)} tokens, fewer than one window of {length}")

    def __len__(self) -> int:
        return len(self.ids) // self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        ids = torch.from_numpy(self.ids[index * self.length : (index + 1) * self.length].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


def _passages(file: Path):
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error
    passage: list[str] = []
    size = 0
    for paragraph in re.split(r"\n\s*\n", text):
        passage.append(paragraph)
        size += len(paragraph) + 2
        if size >= PASSAGE:
            yield "\n\n".join(passage)
            passage, size = [], 0
    if rest := "\n\n".join(passage).strip():
        yield rest


def _train_tokenizer(passages: list[str], vocabulary: int):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocabulary <= len(alphabet) + 1:
        raise ValueError(f"a byte-level vocabulary needs more than {len(alphabet) + 1} entries, got {vocabulary}")
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(passages, trainer)
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def _write(path: Path, passages: list[str], tokenizer, dtype: np.dtype, batch: int = 256) -> int:
    written = 0
    with open(path, "wb") as file:
        for start in range(0, len(passages), batch):
            for ids in tokenizer(passages[start : start + batch], add_special_tokens=False, verbose=False).input_ids:
                np.asarray([*ids, tokenizer.eos_token_id], dtype=dtype).tofile(file)
                written += len(ids) + 1
    return written
