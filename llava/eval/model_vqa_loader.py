"""Answer a JSON-lines question file about images: ``python -m llava.eval.model_vqa_loader``.

Input lines hold question_id, image and text; answer lines question_id, prompt, text, answer_id, model_id, metadata.
"""

import sys
from collections.abc import Sequence

from apet.eval.runner import split_balanced
from llava.eval.program import main, question_parser


def split_list(lst: Sequence, n: int) -> list[Sequence]:
    """`n` consecutive slices whose lengths differ by at most one; some are empty when there are fewer items."""
    return split_balanced(lst, n)


def get_chunk(lst: Sequence, n: int, k: int) -> Sequence:
    """Slice `k` of `split_list`."""
    return split_list(lst, n)[k]


def parser(program: str = "llava.eval.model_vqa_loader"):
    """The program's flags."""
    return question_parser(program, __doc__.partition(":")[0], "tables/question.jsonl", "llava_v1", 128)


if __name__ == "__main__":
    sys.exit(main(parser(), None))
