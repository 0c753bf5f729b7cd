"""Answer ScienceQA questions, with and without a picture: ``python -m llava.eval.model_vqa_science``."""

import sys

from apet.eval.benchmarks.scienceqa import ScienceQa
from llava.eval.model_vqa_loader import get_chunk, split_list
from llava.eval.program import main, question_parser, require_benchmark

__all__ = ["get_chunk", "parser", "split_list"]


def parser():
    """The program's flags."""
    flags = question_parser(
        "llava.eval.model_vqa_science", __doc__.partition(":")[0], "tables/question.json", "llava_v0", 1024
    )
    flags.set_defaults(benchmark="scienceqa")
    flags.add_argument("--single-pred-prompt", action="store_true", help="ask for the option's letter")
    flags.add_argument("--answer-prompter", action="store_true", help="accepted for old scripts; has no effect")
    return flags


def read(benchmark, args):
    """Questions of the file."""
    require_benchmark(benchmark, ScienceQa)
    return benchmark.read(args.question_file, args.single_pred_prompt)


if __name__ == "__main__":
    sys.exit(main(parser(), None, read))
