"""Perplexity over contiguous windows: ``evaluate.load(path("perplexity")).compute(model=model, predictions=[ids, ...])``."""

import datasets
import evaluate

_DESCRIPTION = "exp of the mean loss over contiguous windows, remainder dropped, as the pruning literature computes it."


class Perplexity(evaluate.Metric):
    """``{"perplexity", ...}``; ``predictions`` are lists of token ids, joined to one run."""

    def _info(self):
        features = datasets.Features({"predictions": datasets.Sequence(datasets.Value("int64"))})
        inputs = "predictions: lists of token ids; model: a causal language model; sequence_length: of a window"
        return evaluate.MetricInfo(description=_DESCRIPTION, citation="", inputs_description=inputs, features=features)

    def _compute(self, predictions, model, sequence_length=2048, max_windows=None):
        import torch

        from hf_sparse.evaluation import perplexity

        tokens = torch.tensor([token for ids in predictions for token in ids])
        return perplexity(model, tokens, min(sequence_length, len(tokens)), max_windows)
