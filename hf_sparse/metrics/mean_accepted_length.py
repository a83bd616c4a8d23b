"""Tokens per forward of the target in speculative decoding:
``evaluate.load(path("mean_accepted_length")).compute(predictions=accepted, references=drafted)``."""

import datasets
import evaluate

_DESCRIPTION = (
    "Mean accepted length (accepted + 1 a step, the target's own token included) and acceptance rate, over all steps."
)


class MeanAcceptedLength(evaluate.Metric):
    """``{"mean_accepted_length", "acceptance"}`` of accepted tokens (predictions) and drafted tokens (references) per step."""

    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        inputs = "predictions: accepted tokens of each step; references: drafted tokens of each step"
        return evaluate.MetricInfo(description=_DESCRIPTION, citation="", inputs_description=inputs, features=features)

    def _compute(self, predictions, references):
        if wrong := next(
            (i for i, (a, d) in enumerate(zip(predictions, references, strict=True)) if not 0 <= a <= d), None
        ):
            raise ValueError(f"step {wrong}: {predictions[wrong]} accepted of {references[wrong]} drafted")
        return {
            "mean_accepted_length": sum(predictions) / len(predictions) + 1,
            "acceptance": sum(predictions) / max(1, sum(references)),
        }
