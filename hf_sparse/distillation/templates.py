"""Templates: how a model is asked to put a reference answer into its own words.

A template is a text file with up to three sections, each a turn of a chat:

    [system]
    what the model is to do
    [user]
    {prompt}                  the last user turn of the row; {reference}: its response; {any_column}: that column of the row

    Known answer:
    {reference}
    [assistant]
    a beginning of the response, which the model goes on from; it counts as part of the response

Earlier turns of a row go before the user turn. Only this request holds the reference: training sees the prompt alone. The
files beside this module are named by their stem (``instruction``, ``math``, ``question``, ``code``); any path works as well.
The idea and the sections are those of Self-Distillation Fine-Tuning (arxiv.org/abs/2402.13669); the words are our own.
"""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Template", "load_template"]

_FOLDER = Path(__file__).parent / "templates"
_SECTION = re.compile(r"^\[(system|user|assistant)\][ \t]*$", re.M)
_FIELD = re.compile(r"\{(\w+)\}")

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Template:
    """``system`` and ``assistant`` may be empty; ``user`` has ``{prompt}`` and ``{reference}``."""

    name: str
    system: str
    user: str
    assistant: str

    def messages(self, prompt: Messages, reference: str, row: dict | None = None) -> Messages:
        """The chat to send: system, the earlier turns, the user turn with the reference, perhaps the response's beginning.

        Raises:
            KeyError: the template names a column that the row does not have.
        """
        values = {**(row or {}), "prompt": prompt[-1]["content"], "reference": reference}
        system = _fill(self.system, values, self.name)
        given = [turn for turn in prompt[:-1] if turn["role"] == "system"]
        if given:  # the row's own system turn stays in force
            system = "\n\n".join([*(turn["content"] for turn in given), system])
        chat = [{"role": "system", "content": system}] if system else []
        chat += [turn for turn in prompt[:-1] if turn["role"] != "system"]
        chat.append({"role": "user", "content": _fill(self.user, values, self.name)})
        if self.assistant:
            chat.append({"role": "assistant", "content": _fill(self.assistant, values, self.name)})
        return chat


def _fill(text: str, values: dict, name: str) -> str:
    """Replaces {fields} in one go, so that braces in what is filled in stay what they are."""

    def one(match):
        if match[1] not in values:
            raise KeyError(f"template {name} asks for {{{match[1]}}}; the row has {', '.join(sorted(values))}")
        return str(values[match[1]])

    return _FIELD.sub(one, text)


def load_template(source: str | Path | None) -> Template:
    """The template of a name or file; None is the plain prompt, without the reference: the model answers for itself.

    Raises:
        ValueError: a file without a user section that has ``{prompt}`` and ``{reference}``, or with text outside sections.
        FileNotFoundError: neither a known name nor a file; the message has the near match.
    """
    if source is None:
        return Template("answer", "", "{prompt}", "")
    names = {file.stem: file for file in sorted(_FOLDER.glob("*.txt"))}
    path = names.get(str(source), Path(source))
    if not path.is_file():
        near = difflib.get_close_matches(str(source), names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise FileNotFoundError(
            f"no template {str(source)!r}: known are {', '.join(names)}, or the path of a text file{hint}"
        )
    pieces = _SECTION.split(path.read_text(encoding="utf-8"))
    if pieces[0].strip():
        raise ValueError(f"{path} begins with text outside its sections; it should begin with [system] or [user]")
    parts = dict(zip(pieces[1::2], (text.strip("\n") for text in pieces[2::2]), strict=True))
    user = parts.get("user", "")
    missing = [field for field in ("prompt", "reference") if f"{{{field}}}" not in user]
    if missing:
        raise ValueError(f"the [user] section of {path} must have {{{missing[0]}}}")
    return Template(path.stem, parts.get("system", ""), user, parts.get("assistant", ""))
