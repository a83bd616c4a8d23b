"""The zeros of a model: ``evaluate.load(path("sparsity")).compute(model=model)``."""

import datasets
import evaluate

_DESCRIPTION = (
    "Fraction of zeros in the weights that hf_sparse makes sparse (linear layers, convolutions, experts), counted."
)


class Sparsity(evaluate.Metric):
    """``{"sparsity", "zeros", "weights"}`` of ``model``; ``targets`` as in SparsityConfig."""

    def _info(self):
        features = datasets.Features({})
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description="model: a PyTorch model", features=features
        )

    def compute(self, *, model, targets=None, ignore=()):
        """Counts the zeros of ``model``; there are no predictions."""
        from hf_sparse.targets import find_targets

        weights = [model.get_parameter(name) for name in find_targets(model, targets, ignore)]
        zeros, count = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
        if not count:
            raise ValueError("the model has no weights that could be sparse")
        return {"sparsity": zeros / count, "zeros": zeros, "weights": count}

    def _compute(self, **kwargs):
        return self.compute(**kwargs)
