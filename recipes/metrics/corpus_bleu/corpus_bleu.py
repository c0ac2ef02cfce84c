"""Corpus BLEU with any number of references per text: sacrebleu behind the interface of ``evaluate``."""

import datasets
import evaluate
import sacrebleu


class CorpusBleu(evaluate.Metric):
    """``compute(predictions=[text], references=[[text, ...]])`` gives ``{"bleu": 0..100}``."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=CorpusBleu.__doc__,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        # sacrebleu takes one stream per reference number; None marks a text that has fewer references.
        width = max(map(len, references))
        streams: list = [[refs[i] if i < len(refs) else None for refs in references] for i in range(width)]
        return {"bleu": sacrebleu.corpus_bleu(predictions, streams).score}
