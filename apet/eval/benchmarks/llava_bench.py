"""LLaVA-Bench (in the wild): free answers, judged in pairs against a reference answer by an LLM outside this program.

The judge writes one review per question with two marks out of ten, the reference's first. The number papers quote is
the ratio of the means, in percent.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from apet.eval.benchmarks.base import Benchmark, Score, register
from apet.eval.benchmarks.files import PathLike, listing, read_jsonl, user_path

_RULE = "================================="


@register
class LlavaBench(Benchmark):
    """LLaVA-Bench in the wild: 60 questions on 24 images."""

    name = "llava_bench"

    def score(self, *, review_file: PathLike) -> Score:
        """Summarise a review file.

        Args:
            review_file: JSON lines with `tuple` (or `score`), two marks, and `category` where there are categories.

        Raises:
            ValueError: A review without two marks above zero (the judge's failures are saved as -1, -1).
        """
        marks: dict[str, list[tuple[float, float]]] = defaultdict(list)
        failed: list[int] = []
        per_sample: dict[str, float] = {}
        for number, row in read_jsonl(review_file, ("question_id",)):
            pair = row.get("tuple", row.get("score"))
            if not isinstance(pair, list) or len(pair) != 2 or min(pair) <= 0:
                failed.append(number)
                continue
            for category in {"all", row.get("category", "all")}:
                marks[category].append((pair[0], pair[1]))
            per_sample[f"{row['question_id']} | {row.get('id', number)}"] = pair[1] / 10
        if failed:
            raise ValueError(
                f"{review_file} has {len(failed)} reviews without two marks above zero, on lines {listing(failed)}; "
                "delete those lines and have the judge write them again"
            )
        rows = {category: _row(marks[category]) for category in sorted(marks)}
        lines = [experiment(review_file), *(" ".join(map(str, (name, *row))) for name, row in rows.items()), _RULE]
        return Score(
            name=self.name,
            metric="relative score",
            value=rows["all"][0],
            n_questions=len(per_sample),
            details={
                name: dict(zip(("relative", "reference", "model"), row, strict=True)) for name, row in rows.items()
            },
            per_sample=per_sample,
            report="\n".join(lines) + "\n",
        )


def _row(marks: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Relative score in percent, and ten times the two mean marks, rounded to one decimal."""
    reference, model = (sum(column) / len(marks) for column in zip(*marks, strict=True))
    return round(100 * model / reference, 1), round(10 * reference, 1), round(10 * model, 1)


def experiment(review_file: PathLike) -> str:
    """Name of the experiment a review file belongs to: its file name without the judge's prefix and suffix."""
    return Path(review_file).name.removesuffix(".jsonl").removeprefix("gpt4_text_")


def review_files(folder: PathLike) -> list[Path]:
    """The review files of a folder: `gpt4_text_*`, `review_*` and `reviews_*`, sorted; all files of a review folder."""
    folder = user_path(folder)
    prefixes = ("" if "review" in folder.name else "gpt4_text_", "reviews_", "review_")
    return sorted(path for path in folder.glob("*.jsonl") if path.name.startswith(prefixes))
