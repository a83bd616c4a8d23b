"""Instruction sets and multiple-choice tasks made of plain public files, for ``self_data_distillation.py``.

Two sets to fine-tune on, rows of ``prompt`` and ``completion`` as chat turns, a part of each held out:

    gsm8k      grade-school mathematics: the question and its worked answer (without the calculator notes)
    general    restaurants put into words (E2E), biomedical questions with their abstract (PubMedQA, the first half), sections
               of Wikipedia articles to write (WikiText-2), Python functions to complete (HumanEval)

Four tasks for the evaluation harness, four choices each (PubMedQA three), the right one at a random place. None of their
items is trained on:

    arithmetic   a worked answer up to its last "=": which number follows?               held-out part of gsm8k
    restaurant   facts of a restaurant: which description says them? The wrong ones are of the same restaurant if possible
    pubmedqa     yes, no or maybe, given the abstract                                    the second half of PubMedQA
    next         a sentence of an encyclopedia's paragraph: which one follows? The wrong ones follow others of the same text

Without files of its own the small excerpts in ``examples/data`` serve: ``general`` from them, tasks ``restaurant`` and
``next``.
"""

import csv
import json
import random
import re
from collections import defaultdict
from pathlib import Path

__all__ = ["FILES", "make_sets", "make_tasks"]

FILES = {
    "gsm8k": "gsm8k_train.jsonl",
    "pubmedqa": "pubmedqa_labeled.json",
    "e2e": "e2e_dev.csv",
    "wikitext": "wikitext2_valid.txt",
    "wikitext_test": "wikitext2_test.txt",
    "humaneval": "humaneval.jsonl",
}
_EXCERPTS = {"e2e": "e2e_excerpt/devset.csv", "wikitext": "wikitext2_excerpt.txt"}
_EXCERPTS["wikitext_test"] = "wikitext2_test_excerpt.txt"
_TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
{metrics}
metadata:
  version: 1.0
"""
_METRIC = """  - metric: {name}
    aggregation: mean
    higher_is_better: true"""
_METRICS = {"pubmedqa": ["acc"]}  # of single words the longest would win if lengths were made up for


def make_sets(folder: Path | None, seed: int = 0) -> dict[str, dict[str, list[dict]]]:
    """``{set: {"train": rows, "held_out": rows}}`` of the files in ``folder`` (names of :data:`FILES`), or of the excerpts."""
    find = _finder(folder)
    sets = {}
    if gsm8k := find("gsm8k"):
        from hf_sparse.distillation.answers import without_calculator_notes

        rows = [{"prompt": r["question"], "completion": without_calculator_notes(r["answer"])} for r in _lines(gsm8k)]
        rows = _turns(rows)
        sets["gsm8k"] = {"train": rows[:-400], "held_out": rows[-400:]}
    rows = [*_restaurants(find("e2e"), 1500, seed), *_sections(find("wikitext"), 1500, seed)]
    if pubmedqa := find("pubmedqa"):
        rows += [
            {"prompt": f"{' '.join(row['CONTEXTS'])}\n\n{row['QUESTION']}", "completion": row["LONG_ANSWER"]}
            for row in list(json.loads(pubmedqa.read_text(encoding="utf-8")).values())[:500]
        ]
    if humaneval := find("humaneval"):
        rows += [
            {
                "prompt": f"Complete this Python function:\n\n```python\n{row['prompt'].strip()}\n```",
                "completion": f"```python\n{row['prompt'].strip()}\n{row['canonical_solution'].rstrip()}\n```",
            }
            for row in _lines(humaneval)
        ]
    rows = _turns(rows)
    random.Random(seed).shuffle(rows)
    held = min(400, len(rows) // 10)
    return sets | {"general": {"train": rows[held:], "held_out": rows[:held]}}


def make_tasks(
    folder: Path | None, held_out: dict[str, list[dict]], directory: Path, limit: int, seed: int = 0
) -> list:
    """Writes the tasks as YAML and JSON lines into ``directory``; returns their names.

    Args:
        held_out: the held-out rows of each set. limit: items a task, at most.
    """
    find = _finder(folder)
    chooser = random.Random(seed)
    tasks = {"next": _next_sentence(find("wikitext_test"), chooser)}
    tasks["restaurant"] = _which_description(find("e2e"), chooser)
    if "gsm8k" in held_out:
        tasks["arithmetic"] = [item for row in held_out["gsm8k"] if (item := _last_number(row, chooser))]
    if pubmedqa := find("pubmedqa"):
        tasks["pubmedqa"] = [
            {
                "question": f"Abstract: {' '.join(row['CONTEXTS'])}\nQuestion: {row['QUESTION']}\nAnswer:",
                "choices": [" yes", " no", " maybe"],
                "gold": ["yes", "no", "maybe"].index(row["final_decision"]),
            }
            for row in list(json.loads(pubmedqa.read_text(encoding="utf-8")).values())[500:]
        ]
    directory.mkdir(parents=True, exist_ok=True)
    for name, items in tasks.items():
        chooser.shuffle(items)
        file = directory / f"{name}.jsonl"
        file.write_text("".join(json.dumps(item) + "\n" for item in items[:limit]), encoding="utf-8")
        metrics = "\n".join(_METRIC.format(name=metric) for metric in _METRICS.get(name, ["acc", "acc_norm"]))
        (directory / f"{name}.yaml").write_text(
            _TASK.format(name=name, file=file.absolute(), metrics=metrics), encoding="utf-8"
        )
    return list(tasks)


def _finder(folder: Path | None):
    """A function from a name to its file, None if there is none."""
    if folder is None:
        here = Path(__file__).resolve().parent / "data"
        return lambda name: here / _EXCERPTS[name] if name in _EXCERPTS else None
    needed = [FILES[name] for name in _EXCERPTS if not (folder / FILES[name]).is_file()]
    if needed:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(needed)}; it may also hold the other of {list(FILES.values())}"
        )
    return lambda name: folder / FILES[name] if (folder / FILES[name]).is_file() else None


def _turns(rows: list[dict]) -> list[dict]:
    """As chats: plain strings would be trained on without the model's chat template, unlike what the model writes."""
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in rows
    ]


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _descriptions(path: Path) -> dict[str, list[str]]:
    """``{facts: descriptions}`` of an E2E file."""
    found = defaultdict(list)
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            found[re.sub(r"\[([^\]]*)\]", r": \1", row["mr"])].append(row["ref"].strip())
    return found


def _restaurants(path: Path, count: int, seed: int) -> list[dict]:
    """Facts to be put into words; the last fifth of the facts is left to the task."""
    facts = _descriptions(path)
    rows = [
        {"prompt": f"Describe this restaurant in one or two sentences.\n{fact}", "completion": text}
        for fact in list(facts)[: len(facts) * 4 // 5]
        for text in facts[fact]
    ]
    return random.Random(seed).sample(rows, min(count, len(rows)))


def _sections(path: Path, count: int, seed: int) -> list[dict]:
    """Paragraphs of encyclopedia articles, to be written from the titles of article and section and the first words."""
    rows, article, section = [], "", ""
    for line in path.read_text(encoding="utf-8").splitlines():
        line = line.strip()
        if heading := re.fullmatch(r"(= )+(.*?)( =)+", line):
            if line.count("= ") == 1:
                article, section = heading[2], "introduction"
            else:
                section = heading[2]
        elif len(line.split()) >= 60 and line.split()[:140].count("<unk>") <= 2:  # words that the corpus left out
            words = _plain(line).split()
            prompt = (
                f'Write a paragraph for the section "{section}" of an encyclopedia article on {article}. '
                f'Begin with: "{" ".join(words[:8])}"'
            )
            rows.append({"prompt": prompt, "completion": " ".join(words[:120])})
    return random.Random(seed).sample(rows, min(count, len(rows)))


def _plain(text: str) -> str:
    """WikiText's spacing undone."""
    text = re.sub(r" @(.)@ ", r"\1", text)
    text = re.sub(r" ([,.;:!?)\]])", r"\1", text)
    return re.sub(r"([(\[]) ", r"\1", text).replace(" <unk>", "").replace(" 's", "'s")


def _next_sentence(path: Path, chooser: random.Random) -> list[dict]:
    pairs = []
    for line in path.read_text(encoding="utf-8").splitlines():
        sentences = re.split(r"(?<=[.!?]) (?=[A-Z])", _plain(line.strip().replace("<unk>", "<left out>")))
        good = [8 <= len(s.split()) <= 40 and "<left out>" not in s for s in sentences]
        starts = [place for place in range(len(good) - 2) if all(good[place : place + 3])]
        pairs += [(" ".join(sentences[place : place + 2]), sentences[place + 2]) for place in starts[::3]]
    items = []
    for place, (context, following) in enumerate(pairs):
        others = [pairs[index][1] for index in chooser.sample(range(len(pairs)), 4) if index != place][:3]
        items.append(_item(context, following, others, chooser))
    return items


def _which_description(path: Path, chooser: random.Random) -> list[dict]:
    facts = _descriptions(path)
    names = defaultdict(list)
    for fact in facts:
        names[fact.split(",")[0]].append(fact)
    items = []
    for fact in list(facts)[len(facts) * 4 // 5 :]:
        near = [other for other in names[fact.split(",")[0]] if other != fact]
        far = [other for other in facts if other != fact and other not in near]
        wrong = (chooser.sample(near, min(3, len(near))) + chooser.sample(far, min(3, len(far))))[:3]
        for text in facts[fact][:4]:
            items.append(
                _item(f"{fact}\nDescription:", text, [chooser.choice(facts[other]) for other in wrong], chooser)
            )
    return items


def _last_number(row: dict, chooser: random.Random) -> dict | None:
    """The last calculation of a worked answer, its result left out."""
    body = row["completion"][0]["content"].split("####")[0]
    found = list(re.finditer(r"=\s*\$?(\d+)(?![\d.,%/])", body))
    if not found:
        return None
    right = int(found[-1][1])
    wrong = {right + 1, right + 10, right * 2, abs(right - 2), right * 10, right + 5} - {right}
    wrong = chooser.sample(sorted(wrong), 3)
    context = f"Question: {row['prompt'][0]['content']}\nAnswer: {body[: found[-1].start()]}="
    return _item(context, str(right), [str(number) for number in wrong], chooser)


def _item(question: str, right: str, wrong: list[str], chooser: random.Random) -> dict:
    choices = [right, *wrong]
    chooser.shuffle(choices)
    return {"question": question, "choices": [f" {choice}" for choice in choices], "gold": choices.index(right)}
