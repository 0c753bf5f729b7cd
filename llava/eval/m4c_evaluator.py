"""The two names third-party scripts import from here: the EvalAI answer processor and the TextVQA evaluator.

Both are faces of `apet.eval.metrics`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from apet.eval import metrics


class EvalAIAnswerProcessor:
    """The EvalAI normal form of an answer; an instance is called on the text."""

    word_tokenize = staticmethod(metrics.vqa_word_tokenize)
    process_punctuation = staticmethod(metrics.vqa_process_punctuation)
    process_digit_article = staticmethod(metrics.vqa_process_digit_article)

    def __call__(self, item: str) -> str:
        """All steps."""
        return metrics.vqa_normalize(item)


class TextVQAAccuracyEvaluator:
    """Mean VQA soft accuracy over predictions with ten ground truths each."""

    def __init__(self) -> None:
        self.answer_processor = EvalAIAnswerProcessor()

    def eval_pred_list(self, pred_list: Iterable[Mapping[str, Any]]) -> float:
        """Mean accuracy in [0, 1].

        Args:
            pred_list: Mappings with "pred_answer" (str) and "gt_answers" (ten strings).

        Raises:
            ValueError: An empty list, or an entry without exactly ten ground truths.
        """
        scores = [self._score(number, entry) for number, entry in enumerate(pred_list, start=1)]
        if not scores:
            raise ValueError("pred_list is empty: there is nothing to score")
        return sum(scores) / len(scores)

    def _score(self, number: int, entry: Mapping[str, Any]) -> float:
        truths: Sequence[str] = entry["gt_answers"]
        if len(truths) != 10:
            raise ValueError(f"entry {number} of pred_list has {len(truths)} gt_answers, expected 10")
        processed = [self.answer_processor(truth) for truth in truths]
        return metrics.soft_accuracy(self.answer_processor(entry["pred_answer"]), processed)
