"""VizWiz: questions blind people asked about their own photographs; the test answers are with the server only."""

from __future__ import annotations

from apet.eval.benchmarks.base import Benchmark, Submission, register
from apet.eval.benchmarks.files import LooseAnswers, PathLike, read_jsonl, require_complete
from apet.eval.metrics import vqa_normalize


@register
class VizWiz(Benchmark):
    """VizWiz test: 8,000 questions. Their trailing spaces are part of the file and of the prompt."""

    name = "vizwiz"

    def submission(self, *, annotation_file: PathLike, result_file: PathLike) -> Submission:
        """The upload: `[{"image", "answer"}]` in the order of the question file, answers in the EvalAI normal form.

        As in the published converter, lines that are not JSON are counted and the later of two answers wins. A
        question without an answer is an error.
        """
        answers = LooseAnswers.read(result_file)
        questions = {
            str(row["question_id"]): row["image"] for _, row in read_jsonl(annotation_file, ("question_id", "image"))
        }
        require_complete(questions, answers.by_id, result_file, annotation_file, exact=False)
        rows = [
            {"image": image, "answer": vqa_normalize(answers.by_id[key]["text"])} for key, image in questions.items()
        ]
        return Submission(rows, answers.report(len(questions)), "; ".join(answers.notes()))
