"""``hf-sparse pack`` and ``hf-sparse unpack``."""

from typing import Any

from hf_sparse import commands

__all__ = ["run_pack", "run_unpack"]


def run_pack(arguments) -> dict[str, Any]:
    from hf_sparse.formats import pack_checkpoint

    report = pack_checkpoint(
        arguments.path, arguments.output, min_saving=arguments.min_saving, overwrite=arguments.overwrite
    )
    _renew_card(arguments.output)
    return _show_packing(report, arguments)


def run_unpack(arguments) -> dict[str, Any]:
    from hf_sparse.formats import unpack_checkpoint

    report = unpack_checkpoint(arguments.path, arguments.output, overwrite=arguments.overwrite)
    _renew_card(arguments.output)
    return _show_packing(report, arguments)


def _renew_card(directory: str) -> None:
    """A card of ours says how the model loads, which has changed; one written by hand stays."""
    from hf_sparse.hub_cards.sparsity_card import renew_card

    renew_card(directory)


def _show_packing(report, arguments) -> dict[str, Any]:
    if not arguments.json:
        commands.console().print(f"saved {arguments.output}: {report}")
    return {
        "output": arguments.output,
        "dense_bytes": report.dense_bytes,
        "packed_bytes": report.packed_bytes,
        "ratio": report.ratio,
        "packed_tensors": {name: str(header) for name, header in report.tensors.items()},
    }
