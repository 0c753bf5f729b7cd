"""Answer open-ended questions about videos: ``python -m llava.eval.video_qa``.

Flags and files as in Video-LLaVA's own program; every family that sees videos can answer. A line of the output holds
id, question, answer and pred. A video that cannot be read is listed in the run record and costs only its questions.
"""

import argparse
import sys
from pathlib import Path

from apet.eval.benchmarks.video_qa import VideoQa
from llava.eval.family_answerer import FRAMES
from llava.eval.program import main, question_parser


def parser():
    """The program's flags."""
    flags = question_parser("llava.eval.video_qa", __doc__.partition(":")[0], "test_q.json", "llava_v1", 1024)
    flags.set_defaults(benchmark="msvd", temperature=0.0, on_error="skip")
    same = {"type": str, "default": argparse.SUPPRESS}
    flags.add_argument("--gt_file_question", dest="question_file", help="the same as --question-file", **same)
    flags.add_argument("--video_dir", dest="image_folder", help="the same as --image-folder: folder of videos", **same)
    flags.add_argument("--gt_file_answers", type=str, default="test_a.json", help="answers to the questions")
    flags.add_argument("--output_dir", type=str, default=None, help="folder of the answers; with --output_name, in")
    flags.add_argument("--output_name", type=str, default=None, help="place of --answers-file: <dir>/<name>.json")
    flags.add_argument("--num_frames", type=int, default=FRAMES, help="frames taken from a video, first and last too")
    flags.add_argument("--cache_dir", type=str, default=None, help="accepted for old scripts; has no effect")
    flags.add_argument("--model_max_length", type=int, default=2048, help="accepted for old scripts; has no effect")
    return flags


def complete(args: argparse.Namespace) -> None:
    """The answers file of `--output_dir` and `--output_name`.

    Raises:
        ValueError: Only one of the two is given.
    """
    if (args.output_dir is None) != (args.output_name is None):
        raise ValueError("give --output_dir and --output_name together, or --answers-file instead of both")
    if args.output_dir is not None:
        args.answers_file = str(Path(args.output_dir) / f"{args.output_name}.json")


def read(benchmark, args):
    """Questions with their answers.

    Raises:
        ValueError: A benchmark without videos.
    """
    if not isinstance(benchmark, VideoQa):
        raise ValueError(f"--benchmark {benchmark.name} is about images; answer it with llava.eval.model_vqa_loader")
    return benchmark.read(args.question_file, args.gt_file_answers)


if __name__ == "__main__":
    sys.exit(main(parser(), None, read, complete))
