"""``hf-sparse bench speculative``: a target with drafters and policies, on prompts from files."""

import json
from pathlib import Path
from typing import Any

from hf_sparse import commands

__all__ = ["run_bench_speculative"]


def run_bench_speculative(arguments) -> dict[str, Any]:
    import importlib.util

    from hf_sparse.atomic import atomic_write_text
    from hf_sparse.speculative.policies import parse_policies

    drafters = _named(arguments.drafter)
    policies = parse_policies(arguments.policies, arguments.max_draft)
    files = _named(arguments.prompts)
    for name in ("max_new_tokens", "max_draft"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is at least 1, got {getattr(arguments, name)}")
    if arguments.temperature < 0:
        raise ValueError(f"--temperature is 0 (greedy) or more, got {arguments.temperature:g}")
    for file in (arguments.output, arguments.plot):
        commands.check_parent(file)
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("--plot needs matplotlib: pip install 'hf-sparse[plot]'")
    commands.check_device(arguments.device)
    rows = [(name, row) for name, file in files.items() for row in _rows(file, arguments.limit)]

    from hf_sparse.loading import load_model, load_tokenizer
    from hf_sparse.speculative.bench import benchmark

    tokenizer = load_tokenizer(arguments.target, arguments.trust_remote_code)
    prompts = [_ids(row, tokenizer) for _, row in rows]
    load = lambda path: load_model(path, arguments.dtype, arguments.trust_remote_code).to(arguments.device or "cpu")  # noqa: E731
    target = load(arguments.target)
    models, tokenizers = {}, {}
    for name, path in drafters.items():
        models[name] = load(path)
        own = load_tokenizer(path, arguments.trust_remote_code)
        sizes = {model.config.get_text_config().vocab_size for model in (target, models[name])}
        if own.get_vocab() != tokenizer.get_vocab() or len(sizes) > 1:
            tokenizers[name] = (tokenizer, own)
    report = benchmark(
        target,
        models,
        policies,
        prompts,
        groups=[name for name, _ in rows],
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
        tokenizers=tokenizers,
        progress=not arguments.json,
    )
    short = lambda path: Path(path).name if Path(path).exists() else path  # noqa: E731
    report.facts |= {
        "command": arguments.command_line,
        "target": short(arguments.target),
        "drafters": {name: short(path) for name, path in drafters.items()},
    }
    if arguments.output:
        atomic_write_text(arguments.output, json.dumps(report.to_dict(), indent=1) + "\n")
    if arguments.plot:
        report.plot(arguments.plot)
    if not arguments.json:
        out = commands.console()
        out.print(*report.tables(out.width))
        if report.equal and (different := {run: count for run, count in report.equal.items() if count < len(prompts)}):
            out.print(
                f"note: {len(prompts) - min(different.values())} of {len(prompts)} texts differ from the target's own at most: "
                "its rounding over several tokens is not that over one (none differ in float32)"
            )
    return report.to_dict()


def _named(entries: list[str]) -> dict[str, str]:
    """``{name: path}`` of NAME=PATH or PATH."""
    found: dict[str, str] = {}
    for entry in entries:
        name, separator, path = entry.partition("=")
        name, path = (name, path) if separator else (Path(entry).stem or entry, entry)
        if not name or not path:
            raise ValueError(f"NAME=PATH or PATH is expected, got {entry!r}")
        if name in found:
            raise ValueError(f"two are called {name}: {found[name]} and {path}; name them, e.g. other={path}")
        found[name] = path
    return found


def _rows(file: str, limit: int | None) -> list[Any]:
    """Prompts of a file: chats, texts, or rows of a known form."""
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {file}")
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line) if path.suffix in (".jsonl", ".json") else {"prompt": line}
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number}: not a JSON object a line: {error}") from error
        key = next((key for key in ("messages", "prompt", "question", "instruction", "text") if key in row), None)
        if key is None:
            raise ValueError(
                f"{file}, line {number}: a prompt is under messages, prompt, question, instruction or text; the row has "
                f"{', '.join(row)}"
            )
        prompts.append(row[key])
        if limit is not None and len(prompts) == limit:
            break
    if not prompts:
        raise ValueError(f"{file} has no prompts")
    return prompts


def _ids(prompt, tokenizer) -> list[int]:
    if isinstance(prompt, str) and getattr(tokenizer, "chat_template", None) is None:
        return tokenizer(prompt)["input_ids"]
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if chat[-1]["role"] == "assistant":
        chat = chat[:-1]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
