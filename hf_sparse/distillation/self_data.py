"""Self-data distillation: a model rewrites the answers that it, once pruned, is to be fine-tuned on.

    dataset = self_distill(original, dataset, processing_class=tokenizer, template="math", extractor="number")
    SFTTrainer(pruned, train_dataset=dataset, ...).train()

For an instruction x with reference answer y the original, unpruned model writes y~ given both (:mod:`.templates`); training
sees x and y~ only. So the pruned model learns the task in words that its parent would use, and forgets less of the rest
(arxiv.org/abs/2410.09982, after Self-Distillation Fine-Tuning, arxiv.org/abs/2402.13669). A row's response is

    y~   if it came to an end, says nothing of a given answer, and answers what y answers (:mod:`.answers`)
    y    otherwise, so that no row is lost

Rows are written one by one as they are made, to ``output_dir/rows-<process>.jsonl``; a run that was killed goes on with the
rows that are missing. Processes started by accelerate share the rows.
"""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hf_sparse.atomic import atomic_write_text
from hf_sparse.distillation.answers import EXTRACTORS, number, without_calculator_notes
from hf_sparse.distillation.generation import choose_backend, respond
from hf_sparse.distillation.rows import row_reader
from hf_sparse.distillation.templates import load_template
from hf_sparse.instruments import progress_bar, versions

__all__ = ["BANNED", "RUN_FILE", "process_share", "self_distill", "verdict", "wait_for_all"]

# a response that speaks of the answer it was given; the first five and the last are those of Self-Distillation Fine-Tuning
BANNED = (
    "reference answer",
    "your response",
    "my response",
    "your own response",
    "now it's your turn",
    "known answer",
    "known solution",
    "known program",
    "answer that was given",
    "solution that was given",
)
_BANNED_BEGINNINGS = ("Your turn",)
RUN_FILE = "run.json"


def verdict(
    response: str,
    reference: str,
    finished: bool = True,
    *,
    extractor: Callable[[str], Any] | None = None,
    check: Callable[[str], bool] | None = None,
    banned: tuple[str, ...] = BANNED,
) -> str | None:
    """Why a rewritten response is not taken, or None if it is.

    Args:
        finished: whether the model came to an end of its own.
        extractor: from text to its answer, which must be that of the reference; None: any answer will do.
        check: a further condition on the response, e.g. that its code passes the row's tests.
    """
    if not response.strip():
        return "empty"
    if not finished:
        return "cut off"
    low = response.casefold()
    for phrase in banned:
        if phrase.casefold() in low:
            return f"says {phrase!r}"
    if response.lstrip().startswith(_BANNED_BEGINNINGS):
        return f"begins with {_BANNED_BEGINNINGS[0]!r}"
    if extractor is not None:
        expected, found = extractor(reference), extractor(response)
        if expected is None:
            return "the reference gives no answer"
        if found is None:
            return "no answer"
        if found != expected:
            return "another answer"
    if check is not None and not check(response):
        return "fails its check"
    return None


def self_distill(
    model,
    dataset,
    *,
    processing_class=None,
    template: str | Path | None = "instruction",
    extractor: str | Callable[[str], Any] | None = None,
    check: Callable[[str, dict], bool] | None = None,
    banned: tuple[str, ...] = BANNED,
    columns: dict[str, str] | None = None,
    clean: Callable[[str], str] | None = None,
    output_dir: str | Path | None = None,
    backend: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    tokens_per_batch: int = 16384,
    revision: str | None = None,
    progress: bool = True,
    **server: Any,
):
    """Rewrites a dataset's responses with the original model.

    Args:
        model: the unpruned model, or the address of an OpenAI-compatible server that runs it.
        dataset: a ``datasets.Dataset`` of instructions, questions or chats (:mod:`hf_sparse.distillation.rows`).
        processing_class: the model's tokenizer; not needed for a server.
        template: a name (``instruction``, ``math``, ``question``, ``code``, ``rewrite``, ``rewrite_math``) or the path of a
            text file; None: the model sees the prompt alone and answers for itself, as a drafter should learn to.
        extractor: ``number``, ``choice``, ``yes_no``, ``exact``, or a function from text to an answer or None.
        check: called with (response, row); False keeps the reference. For code:
            ``lambda response, row: passes_tests(response, row["test"])``.
        banned: phrases that give a rewritten response away.
        columns: ``{"prompt": column, "response": column}`` if they are not recognised.
        clean: applied to the reference before all else. Default: GSM8K's calculator notes go if the extractor is ``number``.
        output_dir: keeps the rows; called again with the same arguments, a run goes on there. Needed with several processes.
        backend, max_new_tokens, temperature, top_p, seed, tokens_per_batch, server: :func:`.generation.respond`.
        revision: of the model, for the record.
        progress: show a bar with tokens per second and the share of responses taken.

    Returns:
        A ``datasets.Dataset`` in the order of the given one, in TRL's conversational prompt-completion format: ``prompt``,
        ``completion``, and per row ``source`` (``model`` or ``reference``), ``reason`` (why the reference stayed, else
        empty), ``tokens`` generated, ``model``, ``revision``, ``settings`` (JSON).

    Raises:
        ValueError: before any generation: rows that cannot be read, an unknown template, extractor or backend, an
            ``output_dir`` of another run, several processes without one.
    """
    import datasets

    reader = row_reader(dataset.column_names, columns)
    form = load_template(template)
    extract = _extractor(extractor)
    clean = clean or (without_calculator_notes if extract is number else str)
    share, shares = process_share()
    if shares > 1 and output_dir is None:
        raise ValueError("several processes share the rows through output_dir; give one that all of them see")
    settings = {
        "backend": backend or choose_backend(model),
        "template": form.name,
        "extractor": None if extractor is None else getattr(extractor, "__name__", str(extractor)),
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "versions": versions(),
    }
    name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "") or type(model).__name__
    name = Path(name).name if Path(name).exists() else name  # a path says something about a machine
    record = {
        "model": name,
        "revision": revision or getattr(getattr(model, "config", None), "_commit_hash", None) or "",
    }

    rows, chats = [], []
    for index, row in enumerate(dataset):
        try:
            prompt, reference = reader(row)
            reference = clean(reference)
            chats.append(form.messages(prompt, reference, row))
        except (ValueError, KeyError) as error:
            raise ValueError(f"row {index}: {error}") from error
        rows.append((prompt, reference))
    store = _Rows(output_dir, _mark(chats, settings, record, form), share)
    # by number, not by what is missing: processes that start at different moments see different rows done
    mine = [index for index in range(share, len(rows), shares) if index not in store.done]

    accepted, tokens, started = Counter(), 0, time.perf_counter()
    options = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    results = respond(
        model, processing_class, [chats[index] for index in mine], backend=backend, tokens_per_batch=tokens_per_batch,
        **options, **server,
    )  # fmt: skip
    with progress_bar(progress, "rewriting", len(mine)) as step:
        for place, response in results if mine else ():
            index = mine[place]
            prompt, reference = rows[index]
            text = _joined(form.assistant, response.text)
            test = None if check is None else lambda answer, row=dataset[index]: check(answer, row)
            reason = verdict(text, reference, response.finished, extractor=extract, check=test, banned=banned)
            kept = reason is None
            accepted[kept] += 1
            tokens += response.tokens
            store.add(
                {
                    "index": index,
                    "prompt": prompt,
                    "completion": [{"role": "assistant", "content": text if kept else reference}],
                    "source": "model" if kept else "reference",
                    "reason": reason or "",
                    "tokens": response.tokens,
                }
            )
            rate = tokens / (time.perf_counter() - started)
            step(f"{rate:.0f} tokens/s, {accepted[True] / accepted.total():.0%} taken")
    wait_for_all(shares)
    finished = store.all(len(rows))
    record["settings"] = json.dumps(
        {k: v for k, v in settings.items() if k != "versions"} | settings["versions"], sort_keys=True
    )
    return datasets.Dataset.from_list([{k: v for k, v in row.items() if k != "index"} | record for row in finished])


def _joined(beginning: str, text: str) -> str:
    """The response with the beginning that was put into the model's mouth."""
    if not beginning:
        return text.strip()
    return f"{beginning.strip()} {text.strip()}" if text.strip() else ""


def _extractor(extractor):
    if extractor is None or callable(extractor):
        return extractor
    if extractor not in EXTRACTORS:
        raise ValueError(f"unknown extractor {extractor!r}; known are {', '.join(EXTRACTORS)}, or give a function")
    return EXTRACTORS[extractor]


def process_share() -> tuple[int, int]:
    """This process's number and how many there are."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def wait_for_all(shares: int) -> None:
    """Returns when every process is here."""
    if shares > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def _mark(chats, settings: dict, record: dict, form) -> dict[str, str]:
    """What tells one run from another; a change of versions or of the backend is none."""
    told = {key: value for key, value in settings.items() if key not in ("versions", "backend")}
    digest = lambda content: hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()  # noqa: E731
    return {"data and template": digest(chats), "settings": digest(told), "model": digest(record)}


class _Rows:
    """Finished rows, in memory or in ``output_dir``: a file per process, a line per row, each written once and whole."""

    def __init__(self, path: str | Path | None, mark: dict[str, str], share: int):
        self.path = None if path is None else Path(path)
        self.rows: dict[int, dict] = {}
        self.file = None
        if self.path is None:
            self.done = set()
            return
        run = self.path / RUN_FILE
        if run.is_file():
            earlier = json.loads(run.read_text())
            if different := [key for key, value in mark.items() if earlier.get(key) != value]:
                raise ValueError(
                    f"{self.path} holds the rows of another run: its {' and '.join(different)} differ. Repeat that run's "
                    "arguments to continue it, or choose another output_dir"
                )
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.glob("rows-*.jsonl"))):
            raise ValueError(f"{self.path} holds rows of an unknown run; choose another output_dir")
        self.path.mkdir(parents=True, exist_ok=True)
        if not run.is_file():
            atomic_write_text(run, json.dumps(mark, indent=1) + "\n")
        own = self.path / f"rows-{share:05d}.jsonl"
        if own.is_file():
            _cut_to_whole_lines(own)
        self.done = {row["index"] for row in self._read()}
        self.file = open(own, "a", encoding="utf-8")  # noqa: SIM115

    def _read(self) -> Iterator[dict]:
        for file in sorted(self.path.glob("rows-*.jsonl")):
            with open(file, encoding="utf-8") as lines:
                for line in lines:
                    if line.endswith("\n"):  # the last line of another process may be under way
                        yield json.loads(line)

    def add(self, row: dict) -> None:
        if self.file is None:
            self.rows[row["index"]] = row
            return
        self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def all(self, count: int) -> list[dict]:
        if self.file is not None:
            self.file.close()
            self.rows = {row["index"]: row for row in self._read()}
        if missing := [index for index in range(count) if index not in self.rows]:
            raise RuntimeError(
                f"{len(missing)} of {count} rows are missing, e.g. row {missing[0]}: another process ended early"
            )
        return [self.rows[index] for index in range(count)]


def _cut_to_whole_lines(file: Path) -> None:
    """Removes what a killed process left of a line."""
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with open(file, "r+b") as handle:
            handle.truncate(whole)
