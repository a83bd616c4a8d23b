"""To the Hub in one commit: weights dense or packed, a card of what was measured, the reports it was made from.

    url = push("smollm2-50", "me/smollm2-50")
    url = push("smollm2-50", "me/smollm2-50-packed", packed=True)

Nothing is made on the Hub before everything here is in order. Files go up in one commit, so a repository never holds half of a
model; when the connection breaks, the same call goes on with what is missing (weights that have arrived are not sent again).
Stock ``model.push_to_hub`` keeps working; what it lacks are the reports and the card.
"""

import contextlib
import json
import tempfile
from pathlib import Path

from hf_sparse.hub_cards.sparsity_card import renew_card

__all__ = ["push"]


def push(
    model_dir: str | Path,
    repo_id: str,
    *,
    packed: bool = False,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    message: str | None = None,
) -> str:
    """Uploads a model directory; returns the address of the commit.

    Args:
        model_dir: a directory with config.json and safetensors weights, dense or packed; everything in it goes up but hidden
            files and checkpoints of a training.
        repo_id: ``name`` or ``user/name``; made if it is not there.
        packed: pack the weights on the way (the directory stays as it is).
        private: of a new repository. revision: a branch other than main. message: of the commit.
        token: default: the one that is logged in.

    Raises:
        FileNotFoundError, ValueError: before anything is sent: no model in the directory, a repo_id that cannot be.
        PermissionError: the Hub does not let this token write there. ConnectionError: it did not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id

    folder = Path(model_dir)
    _check(folder)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no repository id, such as user/name: {error}") from None
    api = HfApi(token=token)
    with contextlib.ExitStack() as stack:
        if packed and not (folder / "configuration_hf_sparse.py").is_file():
            from hf_sparse.formats import pack_checkpoint

            place = stack.enter_context(tempfile.TemporaryDirectory(prefix="hf-sparse-push-"))
            pack_checkpoint(folder, Path(place) / "packed")
            folder = Path(place) / "packed"
            renew_card(folder)
        operations = _operations(folder, repo_id)
        try:
            name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None:
                api.create_branch(name, branch=revision, exist_ok=True)
            commit = api.create_commit(
                name,
                operations,
                commit_message=message or f"Upload {folder_name(model_dir)} with hf_sparse",
                revision=revision,
            )
        except HfHubHTTPError as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status in (401, 403):
                raise PermissionError(
                    f"the Hub refused to write to {repo_id} ({status}): log in with a token that may (`hf auth login`, or "
                    f"token=)"
                ) from None
            raise ConnectionError(f"the Hub did not take {repo_id} ({status}): {_without(str(error), token)}") from None
        except Exception as error:
            if not _is_of_the_line(error):
                raise
            raise ConnectionError(
                f"the upload to {repo_id} broke off; the same call goes on with what is missing: {_without(str(error), token)}"
            ) from None
    return str(commit.commit_url)


def folder_name(path: str | Path) -> str:
    return Path(path).resolve().name


def _check(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"no such directory: {folder}")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json and so is no model directory")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        missing = {
            file for file in json.loads(index.read_text())["weight_map"].values() if not (folder / file).is_file()
        }
        if missing:
            raise FileNotFoundError(f"{index} names files that are not there: {', '.join(sorted(missing))}")
    elif not list(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} has no safetensors weights")


def _operations(folder: Path, repo_id: str) -> list:
    """One upload per file, the card with the repository's name in it."""
    from huggingface_hub import CommitOperationAdd

    operations = []
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        hidden = any(part.startswith(".") and part != ".eval_results" for part in inside.parts)
        if file.is_file() and not hidden and not inside.parts[0].startswith("checkpoint-"):
            content: str | bytes = str(file)
            if str(inside) == "README.md":
                content = file.read_text(encoding="utf-8").replace("PATH_OR_REPO", repo_id).encode()
            operations.append(CommitOperationAdd(str(inside), content))
    return operations


def _is_of_the_line(error: BaseException | None) -> bool:
    """Whether the connection failed; huggingface_hub wraps that in errors of its own."""
    while error is not None:
        if isinstance(error, OSError) or type(error).__module__.split(".")[0] in (
            "httpx",
            "httpx2",
            "httpcore",
            "requests",
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def _without(text: str, token: str | None) -> str:
    return text if not token else text.replace(token, "hf_***")
