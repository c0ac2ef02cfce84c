"""Mean ROUGE-L with any number of references per text: rouge-score behind the interface of ``evaluate``."""

import datasets
import evaluate
from rouge_score import rouge_scorer


class RougeL(evaluate.Metric):
    """``compute(predictions=[text], references=[[text, ...]])`` gives ``{"rouge_l": 0..100}``.

    A text scores the F-measure against its closest reference.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=RougeL.__doc__,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        scorer = rouge_scorer.RougeScorer(["rougeL"])
        scores = [scorer.score_multi(refs, text)["rougeL"].fmeasure for text, refs in zip(predictions, references)]
        return {"rouge_l": 100 * sum(scores) / len(scores)}
