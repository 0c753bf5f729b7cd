"""Answer an MMBench table: ``python -m llava.eval.model_vqa_mmbench``. Images are inside the table."""

import sys

from apet.eval.benchmarks.mmbench import MmBench
from llava.eval.model_vqa_loader import get_chunk, split_list
from llava.eval.program import main, question_parser, require_benchmark

__all__ = ["get_chunk", "parser", "split_list"]


def parser():
    """The program's flags."""
    flags = question_parser(
        "llava.eval.model_vqa_mmbench", __doc__.partition(":")[0], "tables/question.jsonl", "llava_v1", 1024
    )
    flags.set_defaults(benchmark="mmbench")
    flags.add_argument("--all-rounds", action="store_true", help="ask once per option, options rotated")
    flags.add_argument("--single-pred-prompt", action="store_true", help="ask for the option's letter")
    flags.add_argument("--lang", type=str, default="en", help="language of that request: en or cn")
    return flags


def read(benchmark, args):
    """Questions of the table."""
    require_benchmark(benchmark, MmBench)
    return benchmark.read(args.question_file, args.lang, args.all_rounds, args.single_pred_prompt)


if __name__ == "__main__":
    sys.exit(main(parser(), None, read))
