"""Measuring a model: count its zeros, check its patterns, weigh its bytes. The same for models in memory and on disk."""

import torch
from torch import nn

from hf_sparse.flops import active_share, macs_per_token
from hf_sparse.formats.pack import nbytes_bitmask, nbytes_nm
from hf_sparse.patterns import NM, Pattern, parse
from hf_sparse.report import ParameterReport, SparsityReport
from hf_sparse.targets import Target, find_targets

__all__ = ["measure", "measure_parameter", "remeasure_bytes", "summarize"]

_TWO_FOUR = NM(2, 4)


@torch.no_grad()
def measure_parameter(
    target: Target, stored: torch.Tensor, pattern: Pattern, share: float = 1.0, error: float | None = None, note=None
) -> ParameterReport:
    """One parameter as it is.

    Args:
        target: how to see it as a matrix.
        stored: the parameter in its stored layout.
        pattern: the pattern to check it against.
        share: share of tokens that use it, for the MACs.
    """
    matrix = target.matrix(stored)
    kept = int(matrix.count_nonzero())
    conforms, two_four = pattern.check(matrix), _TWO_FOUR.check(matrix)
    dense_bytes = stored.numel() * stored.element_size()
    shape = tuple(stored.shape)
    packed_bytes = [dense_bytes, nbytes_bitmask(shape, stored.dtype, kept)]
    for fitting in {pattern if isinstance(pattern, NM) and conforms else None, _TWO_FOUR if two_four else None} - {
        None
    }:
        packed_bytes.append(nbytes_nm(shape, stored.dtype, fitting.n, fitting.m))
    return ParameterReport(
        name=target.name,
        kind=target.kind,
        shape=list(target.shape),
        pattern=str(pattern),
        density=kept / target.numel,
        conforms=conforms,
        two_four=two_four,
        bytes_dense=dense_bytes,
        bytes_packed=min(packed_bytes),
        macs_per_token=kept * share,
        error=error,
        note=note,
    )


def measure(model: nn.Module, targets: dict[str, Target], patterns: dict[str, Pattern] | None = None) -> SparsityReport:
    """The report of a model in memory.

    Args:
        targets: the parameters to list (:func:`hf_sparse.targets.find_targets`).
        patterns: the pattern each is checked against; unstructured where missing.
    """
    unstructured = parse("unstructured")
    parameters = []
    for name, target in targets.items():
        pattern = (patterns or {}).get(name, unstructured)
        parameters.append(measure_parameter(target, model.get_parameter(name), pattern, active_share(model, target)))
    return summarize(model, parameters)


@torch.no_grad()
def remeasure_bytes(model: nn.Module, report: SparsityReport) -> None:
    """Brings densities and bytes up to date after a cast of the model: what is saved is what is reported."""
    targets = find_targets(model, ["re:.*"])
    for entry in report.parameters:
        now = measure_parameter(targets[entry.name], model.get_parameter(entry.name), parse(entry.pattern))
        entry.density, entry.bytes_dense, entry.bytes_packed = now.density, now.bytes_dense, now.bytes_packed


def summarize(model: nn.Module, parameters: list[ParameterReport]) -> SparsityReport:
    """The report of parameters already measured, with the totals of the model they are part of."""
    everything = find_targets(model, ["re:.*"])
    densities = {p.name: p.density for p in parameters}
    return SparsityReport(
        model=getattr(model.config, "_name_or_path", "") or type(model).__name__,
        config={},
        parameters=parameters,
        total_parameters=sum(p.numel() for p in model.parameters()),
        macs_dense=macs_per_token(model, everything, {}),
        macs_sparse=macs_per_token(model, everything, densities),
    )
