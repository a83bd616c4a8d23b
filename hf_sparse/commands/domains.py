"""The domains of calibration text, or of rankings, as ``hf-sparse prune --pattern expert`` takes them.

--calibration code=code.txt math=math.jsonl     a mix: --samples in all, split evenly
--calibration code:96=code.txt math=math.jsonl  96 segments of code; --samples are split among the others
--calibration text.txt                          one text without a name
--scores code=a.jsonl math=b.jsonl              rankings of an earlier run or of another tool, instead
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Source", "load_texts", "parse_sources", "read_scores"]


class Source(NamedTuple):
    """One file of calibration text or scores. ``name`` is None for a file that was given without one."""

    name: str | None
    file: str
    samples: int | None = None

    @property
    def label(self) -> str:
        return self.name or "calibration"


def parse_sources(flag: str, entries: list[str] | None, samples: int | None = None) -> list[Source]:
    """The files of ``--calibration`` or ``--scores``, each checked; for text, ``samples`` shared out."""
    found = []
    for entry in entries or []:
        labelled = re.fullmatch(r"([A-Za-z0-9][\w.-]*)(?::(\d+))?=(.+)", entry)
        if labelled is None and "=" in entry and not Path(entry).exists():
            raise ValueError(
                f"{flag} takes FILE, NAME=FILE or NAME:SEGMENTS=FILE, with a NAME of letters; got {entry!r}"
            )
        name, number, file = (None, None, entry) if labelled is None or Path(entry).exists() else labelled.groups()
        if number is not None and (samples is None or int(number) < 1):
            raise ValueError(f"{flag} {entry}: NAME:SEGMENTS is for --calibration and at least 1")
        found.append(Source(name, file, None if number is None else int(number)))
    names = [source.name for source in found]
    if len(found) > 1 and None in names:
        raise ValueError(f"several files need names, {flag} NAME=FILE: {found[names.index(None)].file} has none")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{flag} names {name!r} twice; join its files, or give each a name of its own")
    for source in found:
        _check_file(flag, source, text=samples is not None)
    return found if samples is None else _shared_out(found, samples)


def _check_file(flag: str, source: Source, text: bool) -> None:
    from hf_sparse.data import check_source

    try:
        if text:
            check_source(source.file)
        elif not Path(source.file).is_file():
            raise FileNotFoundError(f"no such file: {source.file}")
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{flag} {source.name}: {error}" if source.name else str(error)) from error


def _shared_out(found: list[Source], samples: int) -> list[Source]:
    sharing = sum(source.samples is None for source in found)
    if samples < sharing:
        raise ValueError(f"--samples {samples} leaves none for some of {sharing} texts; give at least {sharing}")
    shares = iter(samples // sharing + (i < samples % sharing) for i in range(sharing))
    return [source._replace(samples=next(shares)) if source.samples is None else source for source in found]


def read_scores(sources: list[Source], saliency: str | None) -> dict[str, Any]:
    from hf_sparse.pruning.expert_scores import ExpertScores

    read = {source.label: ExpertScores.load(source.file) for source in sources}
    for scores in read.values():
        scores.saliency = saliency or scores.saliency
    if len({scores.saliency for scores in read.values()}) > 1:
        raise ValueError("the files of --scores were ranked by different saliencies; say which one with --saliency")
    return read


def load_texts(texts: list[Source], tokenizer, sequence_length: int, shuffle: int | None) -> dict[str, Any]:
    """``{domain: its segments}``."""
    from hf_sparse.data import load_segments

    loaded = {}
    for source in texts:
        try:
            segments = load_segments(source.file, tokenizer, source.samples, sequence_length, shuffle)
        except ValueError as error:
            raise ValueError(f"--calibration {source.name}: {error}" if source.name else str(error)) from error
        loaded[source.label] = segments
    return loaded
