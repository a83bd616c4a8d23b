"""Measuring a model: count its zeros, check its patterns, weigh its bytes. The same for models in memory and on disk."""

import torch
from torch import nn

from hf_sparse.flops import active_share, macs_per_token
from hf_sparse.formats.pack import choose
from hf_sparse.patterns import NM, Pattern, parse
from hf_sparse.report import ParameterReport, SparsityReport
from hf_sparse.targets import Target, find_targets

__all__ = ["measure", "measure_parameter"]

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
    kept = int((matrix != 0).sum())
    dense_bytes = stored.numel() * stored.element_size()
    return ParameterReport(
        name=target.name,
        kind=target.kind,
        shape=list(target.shape),
        pattern=str(pattern),
        density=kept / target.numel,
        conforms=pattern.check(matrix),
        two_four=_TWO_FOUR.check(matrix),
        bytes_dense=dense_bytes,
        bytes_packed=min(dense_bytes, packing.nbytes) if (packing := choose(stored)) else dense_bytes,
        macs_per_token=kept * share,
        error=error,
        note=note,
    )


def measure(
    model: nn.Module,
    targets: dict[str, Target],
    patterns: dict[str, Pattern] | None = None,
    errors: dict[str, float] | None = None,
    notes: dict[str, str] | None = None,
) -> SparsityReport:
    """The report of a model in memory.

    Args:
        targets: the parameters to list (:func:`hf_sparse.targets.find_targets`).
        patterns: what each was pruned to; unstructured where missing.
        errors, notes: what the run knows beside the weights.
    """
    patterns, errors, notes = patterns or {}, errors or {}, notes or {}
    parameters = []
    for name, target in targets.items():
        share = active_share(model, target)
        pattern = patterns.get(name, parse("unstructured"))
        parameters.append(
            measure_parameter(target, model.get_parameter(name), pattern, share, errors.get(name), notes.get(name))
        )
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
