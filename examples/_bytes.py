"""Texts as bytes: a language model over 256 symbols needs no tokenizer."""

import torch

__all__ = ["ByteWindows"]


class ByteWindows(torch.utils.data.Dataset):
    """Consecutive windows ``[length]`` of a text's bytes; the remainder is dropped."""

    def __init__(self, text: bytes, length: int):
        count = len(text) // length
        if count < 1:
            raise ValueError(f"the text has {len(text)} bytes, fewer than one sequence of {length}")
        self.rows = torch.frombuffer(bytearray(text[: count * length]), dtype=torch.uint8).view(count, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index].long()
        return {"input_ids": row, "labels": row}
