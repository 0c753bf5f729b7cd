"""Answer a JSON-lines question file with long answers (up to 1024 tokens): ``python -m llava.eval.model_vqa``."""

import sys

from llava.eval.model_vqa_loader import get_chunk, split_list
from llava.eval.program import main, question_parser

__all__ = ["get_chunk", "parser", "split_list"]


def parser():
    """The program's flags."""
    return question_parser("llava.eval.model_vqa", __doc__.partition(":")[0], "tables/question.jsonl", "llava_v1", 1024)


if __name__ == "__main__":
    sys.exit(main(parser(), None))
