"""Score answers about videos: `python -m llava.eval.eval_video_qa --pred_path merge.jsonl --output_json results.json`.

Without `--judge`, predictions are compared with the answers as text. With it, a model behind an OpenAI-compatible
server says of every answer whether it is right; its key is read from the environment.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from apet.eval.benchmarks import get_benchmark
from apet.eval.benchmarks.video_qa import VideoQa
from apet.eval.endpoint import JUDGE_KEY_VARIABLE, Endpoint
from apet.eval.judge import judge
from apet.eval.scoring_cli import Parser, publish, run

URL_VARIABLE = "OPENAI_BASE_URL"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the score; exit status 0, or 1 with one line on stderr."""
    return run(parser(), _score, argv)


def parser() -> Parser:
    """The program's flags."""
    flags = Parser(prog="eval_video_qa", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--pred_path", required=True, help="answers of llava.eval.video_qa")
    flags.add_argument("--benchmark", default="msvd", help="msvd, msrvtt, tgif or activitynet")
    flags.add_argument("--output_json", help="write the score, its details and the per-sample correctness here")
    flags.add_argument("--judge", metavar="MODEL", help=f"ask this model; its key is in {JUDGE_KEY_VARIABLE}")
    flags.add_argument("--api_base", default=os.environ.get(URL_VARIABLE), help=f"its server (default: {URL_VARIABLE})")
    flags.add_argument("--output_dir", help="folder of the judgements, one file each; those that are there are kept")
    flags.add_argument("--num_tasks", type=int, default=8, help="requests under way at a time")
    return flags


def _score(args: argparse.Namespace) -> None:
    benchmark = get_benchmark(args.benchmark)
    if not isinstance(benchmark, VideoQa):
        raise ValueError(f"--benchmark {args.benchmark} is about images; it has a scorer of its own")
    if args.judge is None:
        publish(benchmark.score(pred_path=args.pred_path), args.output_json)
        return
    if not args.api_base or not args.output_dir:
        raise ValueError(f"--judge needs --output_dir, and --api_base or {URL_VARIABLE}")
    endpoint = Endpoint(args.api_base, concurrency=args.num_tasks, key_variable=JUDGE_KEY_VARIABLE)
    publish(judge(benchmark.name, args.pred_path, args.output_dir, endpoint, args.judge), args.output_json)


if __name__ == "__main__":
    sys.exit(main())
