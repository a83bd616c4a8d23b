"""What ``hf-sparse export`` does."""

from typing import Any

from hf_sparse import commands

__all__ = ["run_export"]


def run_export(arguments) -> dict[str, Any]:
    from hf_sparse.export import export, exporter

    if arguments.list:
        return _list(arguments)
    given = (("PATH", arguments.path), ("--to TARGET", arguments.to), ("--output OUT", arguments.output))
    if missing := [name for name, value in given if not value]:
        raise ValueError(f"give {', '.join(missing)}; hf-sparse export --list shows the targets")
    options: dict[str, str] = {}
    for entry in arguments.option or []:
        name, separator, value = entry.partition("=")
        if not separator or not name:
            raise ValueError(f"--option takes NAME=VALUE, got {entry!r}")
        options[name.replace("-", "_")] = value
    if clash := {"overwrite", "verify", "source", "target", "output"} & set(options):
        known = ", ".join(exporter(arguments.to).options) or "none"
        raise ValueError(f"{arguments.to} has no option {min(clash)!r}; its options: {known}")
    verify = False if arguments.no_verify else None
    result = export(
        arguments.path, arguments.to, arguments.output, overwrite=arguments.overwrite, verify=verify, **options
    )
    if not arguments.json:
        _show(result)
    return result


def _list(arguments) -> dict[str, Any]:
    from hf_sparse.export import TARGETS, exporter

    found = {name: exporter(name) for name in TARGETS}
    if not arguments.json:
        from rich.table import Table

        table = Table(show_header=False, show_lines=True)
        for name, each in found.items():
            told = [each.what, f"Zeros today: {each.zeros}", f"Checked: {each.checked}."]
            told += [f"--option {option}=...: {what}" for option, what in each.options.items()]
            table.add_row(name, "\n".join(told))
        commands.console().print(table)
    return {
        name: {
            "what": each.what,
            "zeros": each.zeros,
            "checked": each.checked,
            "output": each.output,
            "options": each.options,
        }
        for name, each in found.items()
    }


def _show(result: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(show_header=False)
    size = f"{result['bytes'] / 1e6:.2f} MB, {result['bytes'] / max(result['dense_bytes'], 1):.0%} of the dense tensors"
    files = ", ".join(result["files"][:8]) + (", …" if len(result["files"]) > 8 else "")
    rows = {
        "target": result["target"],
        "output": result["output"],
        "files": files,
        "size": size,
        "tensors": str(result["tensors"]),
        "sparsity": f"{result['sparsity']:.2%} of the weights that could be sparse are zero",
        "zeros": f"{result['zeros']} (checked {result['checked']})",
        "verified": result["verified"],
        "notes": "\n".join(result["notes"]),
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    commands.console().print(table)
