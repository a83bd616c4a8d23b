"""The tokenizer's part of a GGUF file: byte-level BPE, as in GPT-2, SmolLM2, Llama 3 and Qwen.

llama.cpp splits text by code of its own before it merges bytes, and a file names which split (``tokenizer.ggml.pre``). The
pre-tokenizer of the tokenizer that transformers loads tells: the few that are known here are recognised by their structure,
others are an error rather than a model that reads text differently from the one that was trained.
"""

import json
from typing import Any

from hf_sparse.export.source import Source

__all__ = ["check_tokenizer", "write_tokenizer"]

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {_WORDS % r"\p{N}{1,3}": "llama-bpe", _WORDS % r"\p{N}": "qwen2"}
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # gguf.TokenType


def check_tokenizer(source: Source, tokenizer: str, pre: str) -> None:
    """Raises:
    ValueError: there is a tokenizer and it is none that can be written.
    """
    if tokenizer not in ("auto", "none"):
        raise ValueError(f"tokenizer is auto or none, got {tokenizer!r}")
    file = source.path / "tokenizer.json"
    if tokenizer == "none" or not any((source.path / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    model = content.get("model", {})
    if (
        model.get("type") != "BPE"
        or model.get("byte_fallback")
        or "ByteLevel" not in json.dumps(content["pre_tokenizer"])
    ):
        raise ValueError(
            "only byte-level BPE tokenizers are written; tokenizer=none leaves it out (llama.cpp then reads ids only)"
        )
    if pre == "auto" and _pre_tokenizer(content) is None:
        raise ValueError(
            "the pre-tokenizer is none of those recognised; name llama.cpp's with pre=... (such as llama-bpe, qwen2, gpt-2): "
            f"{json.dumps(content['pre_tokenizer'])[:300]}"
        )


def write_tokenizer(writer: Any, source: Source, tokenizer: str, pre: str) -> list[str]:
    """Adds the tokenizer's metadata to a ``gguf.GGUFWriter``; returns notes."""
    loaded = None if tokenizer == "none" else source.tokenizer()
    if loaded is None:
        writer.add_tokenizer_model("none")
        why = "asked for" if tokenizer == "none" else "there is none beside the weights"
        return [f"no tokenizer is in the file ({why}): llama.cpp reads token ids only"]
    content = _content(loaded)
    tokens, types = _vocabulary(content, source.config["vocab_size"])
    chosen = _pre_tokenizer(content) if pre == "auto" else pre
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(chosen)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]])
    for kind in ("bos", "eos", "unk", "pad"):
        if (number := getattr(loaded, f"{kind}_token_id")) is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    ids = loaded("a").input_ids
    writer.add_add_bos_token(len(ids) > 1 and ids[0] == loaded.bos_token_id)
    if isinstance(loaded.chat_template, str):
        writer.add_chat_template(loaded.chat_template)
    return [f"pre-tokenizer {chosen}"]


def _content(tokenizer: Any) -> dict:
    """The tokenizer as a tokenizer.json: what transformers made of the files, which is what the model is used with."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return {} if backend is None else json.loads(backend.to_str())


def _vocabulary(content: dict, size: int) -> tuple[list[str], list[int]]:
    """Every token by its id, with its type; ids that the embedding has and the tokenizer has not are named ``[PADn]``."""
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [_UNUSED] * size
    for token, number in content["model"]["vocab"].items():
        tokens[number], types[number] = token, _NORMAL
    for added in content["added_tokens"]:
        if added["id"] < size:
            tokens[added["id"]] = added["content"]
            types[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    return tokens, types


def _pre_tokenizer(content: dict) -> str | None:
    """llama.cpp's name for the pre-tokenizer of a tokenizer.json; None if it is not recognised."""
    parts = content["pre_tokenizer"]
    parts = parts["pretokenizers"] if parts["type"] == "Sequence" else [parts]
    kinds = [part["type"] for part in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and parts[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not parts[1].get("use_regex", True):
        return _SPLITS.get(parts[0]["pattern"].get("Regex"))
    return None
