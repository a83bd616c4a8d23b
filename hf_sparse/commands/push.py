"""``hf-sparse push`` and ``hf-sparse card``: a model and what is known of it, to the Hub or into its card."""

from typing import Any

from hf_sparse import commands

__all__ = ["run_card", "run_push"]


def run_push(arguments) -> dict[str, Any]:
    from hf_sparse.hub_cards.push import push

    url = push(
        arguments.path,
        arguments.repo,
        packed=arguments.packed,
        private=arguments.private or None,
        revision=arguments.revision,
        message=arguments.message,
    )
    if not arguments.json:
        commands.console().print(f"pushed {arguments.path}: {url}")
    return {"url": url, "repo": arguments.repo, "packed": arguments.packed}


def run_card(arguments) -> dict[str, Any]:
    from hf_sparse.hub_cards.sparsity_card import MARK, SparsityCard

    card = SparsityCard(arguments.path, license=arguments.license)
    path = card.facts.directory / "README.md"
    if arguments.show:
        text = card.render()
        if not arguments.json:
            commands.console().print(text)
        return {"card": text}
    if path.is_file() and MARK not in path.read_text(encoding="utf-8"):
        raise ValueError(f"{path} was not written by hf_sparse and is left alone; move it away, or use --print")
    card.save()
    if not arguments.json:
        commands.console().print(f"saved {path}, of {', '.join(sorted(card.facts.reports)) or 'the config alone'}")
    return {"card": str(path), "kinds": card.facts.kinds, "reports": sorted(card.facts.reports)}
