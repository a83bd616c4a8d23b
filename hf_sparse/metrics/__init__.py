"""Metrics for the evaluate library, loaded from their files; nothing is downloaded.

import evaluate
from hf_sparse import metrics

evaluate.load(metrics.path("sparsity")).compute(model=model)
evaluate.load(metrics.path("perplexity")).compute(model=model, predictions=[ids, ...])
evaluate.load(metrics.path("mean_accepted_length")).compute(predictions=[4, 1, 6], references=[5, 5, 5])
"""

from pathlib import Path

__all__ = ["NAMES", "path"]

NAMES = ("mean_accepted_length", "perplexity", "sparsity")


def path(name: str) -> str:
    """The file of a metric, for ``evaluate.load``.

    Raises:
        ValueError: no such metric.
    """
    if name not in NAMES:
        raise ValueError(f"unknown metric {name!r}; there are {', '.join(NAMES)}")
    return str(Path(__file__).parent / f"{name}.py")
