"""``hf-sparse pack`` and ``hf-sparse unpack``."""

from typing import Any

from hf_sparse import commands

__all__ = ["run_pack", "run_unpack"]


def run_pack(arguments) -> dict[str, Any]:
    from hf_sparse.formats import pack_checkpoint

    report = pack_checkpoint(
        arguments.path, arguments.output, min_saving=arguments.min_saving, overwrite=arguments.overwrite
    )
    return _show_packing(report, arguments)


def run_unpack(arguments) -> dict[str, Any]:
    from hf_sparse.formats import unpack_checkpoint

    return _show_packing(unpack_checkpoint(arguments.path, arguments.output, overwrite=arguments.overwrite), arguments)


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
