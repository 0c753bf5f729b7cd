"""MM-Vet: open questions that the benchmark's own grader judges; here the answers only get the form it takes."""

from __future__ import annotations

from apet.eval.benchmarks.base import Benchmark, register
from apet.eval.benchmarks.files import PathLike, read_answers


@register
class MmVet(Benchmark):
    """MM-Vet: 218 questions on 200 images, free answers."""

    name = "mmvet"

    def submission(self, result_file: PathLike, duplicates: str = "error") -> dict[str, str]:
        """`{"v1_<question id>": answer}`."""
        return {f"v1_{key}": row["text"] for key, row in read_answers(result_file, duplicates).items()}
