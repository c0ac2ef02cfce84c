"""Accuracy: scikit-learn's behind the interface of ``evaluate``."""

import datasets
import evaluate
import sklearn.metrics


class Accuracy(evaluate.Metric):
    """``compute(predictions=[class], references=[class])`` gives ``{"accuracy": 0..100}``."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=Accuracy.__doc__,
            features=datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": 100 * float(sklearn.metrics.accuracy_score(references, predictions))}
