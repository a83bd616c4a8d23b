"""E2E, restaurants in data and in words (arXiv 1706.09254): reading, fine-tuning examples, beam search, BLEU.

A row pairs a meaning representation with one of several human references:

    name[Blue Spice], eatType[coffee shop], area[riverside]   ->   At the riverside, there is a coffee shop called ...

As in the LoRA paper (arXiv 2106.09685), whose decoding SPDF uses, the model reads

    name : Blue Spice | Type : coffee shop | area : riverside <end> At the riverside, there is ... <end>

and the loss is on the words only. Beam search has 10 beams, length penalty 0.9 (LoRA's appendix; the commands in its
repository have 0.8) and no 4-gram twice *among the generated tokens*: a name may be in the meaning and in the words.

BLEU is over the whole test set with all references of a meaning, case-insensitive, tokenised as mteval-v13a. sacreBLEU
with ``lowercase=True`` gives the number of the challenge's own script (github.com/tuetschek/e2e-metrics) to all digits.
"""

import csv
import itertools
import re
from pathlib import Path

import torch
from transformers import LogitsProcessor

__all__ = ["FinetuneExamples", "NoRepeatNgram", "bleu", "generate", "grouped", "linearise", "read_pairs"]

FILES = {"train": "trainset.csv", "development": "devset.csv", "test": "testset_w_refs.csv"}
_WORDS = {
    "eatType": "Type",
    "priceRange": "price",
    "familyFriendly": "family friendly",
}  # as the LoRA paper's data has it


def read_pairs(directory: Path, split: str) -> list[tuple[str, str]]:
    """The ``(meaning, reference)`` rows of one split, in the file's order.

    Raises:
        FileNotFoundError, ValueError: the directory lacks the file, or the file lacks the columns.
    """
    path = Path(directory) / FILES[split]
    if not path.is_file():
        raise FileNotFoundError(f"no {FILES[split]} in {directory}; --e2e names the unpacked E2E data set")
    with open(path, encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        if not {"mr", "ref"} <= set(rows.fieldnames or ()):
            raise ValueError(f"{path} has the columns {rows.fieldnames}; E2E's are mr and ref")
        return [(row["mr"], row["ref"]) for row in rows]


def grouped(pairs: list[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Consecutive rows of one meaning together, as the official script groups them: ``[(meaning, references)]``."""
    return [(mr, [ref for _, ref in rows]) for mr, rows in itertools.groupby(pairs, key=lambda pair: pair[0])]


def linearise(meaning: str) -> str:
    """``name[Blue Spice], area[riverside]`` -> ``name : Blue Spice | area : riverside``.

    Raises:
        ValueError: there is no ``slot[value]`` in it.
    """
    slots = re.findall(r"([^,\[\]]+)\[([^\]]*)\]", meaning)
    if not slots:
        raise ValueError(f"a meaning representation is a list of slot[value], got {meaning!r}")
    return " | ".join(f"{_WORDS.get(slot.strip(), slot.strip())} : {value}" for slot, value in slots)


class FinetuneExamples(torch.utils.data.Dataset):
    """``meaning <end> words <end>``, padded on the right to one ``width``: one compiled graph serves all batches.

    Under causal attention nothing looks at what follows, so the padding needs no attention mask; its labels, and the
    meaning's, are -100. ``left_out`` counts the examples that are longer than ``width``.
    """

    def __init__(self, pairs: list[tuple[str, str]], tokenizer, width: int):
        end = tokenizer.eos_token_id
        meanings = tokenizer([linearise(mr) for mr, _ in pairs], add_special_tokens=False).input_ids
        words = tokenizer([" " + ref.strip() for _, ref in pairs], add_special_tokens=False).input_ids
        rows = [(len(a) + 1, [*a, end, *b, end]) for a, b in zip(meanings, words, strict=True)]
        kept = [row for row in rows if len(row[1]) <= width]
        self.left_out = len(rows) - len(kept)
        if not kept:
            raise ValueError(f"all {len(rows)} examples are longer than {width} tokens; give a larger --width")
        self.ids = torch.full((len(kept), width), end)
        self.labels = torch.full((len(kept), width), -100)
        for number, (prompt, ids) in enumerate(kept):
            self.ids[number, : len(ids)] = torch.tensor(ids)
            self.labels[number, prompt : len(ids)] = torch.tensor(ids[prompt:])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


class NoRepeatNgram(LogitsProcessor):
    """Forbids every token that would complete an n-gram already generated after ``start`` tokens of prompt.

    transformers' own processor counts the prompt's n-grams too, which here would forbid names, and loops over rows in
    Python; this one is a comparison of windows, ``[rows, grams, n - 1]``.
    """

    def __init__(self, n: int, start: int):
        self.n, self.start = n, start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        new = input_ids[:, self.start :]
        if new.shape[1] < self.n:
            return scores
        grams = new.unfold(1, self.n, 1)
        begun = (grams[..., :-1] == new[:, None, 1 - self.n :]).all(-1)
        times = torch.zeros_like(scores).scatter_add_(1, grams[..., -1], begun.to(scores.dtype))
        return scores.masked_fill(times > 0, -torch.inf)


@torch.no_grad()
def generate(
    model,
    tokenizer,
    meanings: list[str],
    beams: int,
    length_penalty: float,
    no_repeat: int,
    new_tokens: int,
    batch: int,
    on_batch=None,
) -> list[str]:
    """Words for every meaning, in its order; ``on_batch`` is called with the number of meanings done."""
    end, device = tokenizer.eos_token_id, model.device
    prompts = [[*ids, end] for ids in tokenizer([linearise(m) for m in meanings], add_special_tokens=False).input_ids]
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))  # little padding within a batch
    words = [""] * len(prompts)
    model.eval()
    for first in range(0, len(order), batch):
        chosen = order[first : first + batch]
        width = max(len(prompts[number]) for number in chosen)
        ids = torch.full((len(chosen), width), end)
        seen = torch.zeros_like(ids)
        for row, number in enumerate(chosen):
            ids[row, width - len(prompts[number]) :] = torch.tensor(prompts[number])
            seen[row, width - len(prompts[number]) :] = 1
        outputs = model.generate(
            input_ids=ids.to(device),
            attention_mask=seen.to(device),
            num_beams=beams,
            length_penalty=length_penalty,
            logits_processor=[NoRepeatNgram(no_repeat, width)],
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=end,
            pad_token_id=end,
        )
        texts = tokenizer.batch_decode(outputs[:, width:], skip_special_tokens=True)
        for number, text in zip(chosen, texts, strict=True):
            words[number] = " ".join(text.split())  # one line
        if on_batch is not None:
            on_batch(first + len(chosen))
    return words


def bleu(outputs: list[str], references: list[list[str]]) -> float:
    """Corpus BLEU in percent, case-insensitive, any number of references for each output.

    Raises:
        ValueError: the numbers differ.
        ModuleNotFoundError: sacrebleu is not installed.
    """
    import sacrebleu

    if len(outputs) != len(references):
        raise ValueError(f"{len(outputs)} outputs, but references for {len(references)}")
    streams = itertools.zip_longest(*references)  # stream k holds every output's k-th reference, or None
    return sacrebleu.corpus_bleu(outputs, [list(stream) for stream in streams], lowercase=True, tokenize="13a").score
