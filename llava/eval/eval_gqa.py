"""Score GQA predictions with the question file alone: `python -m llava.eval.eval_gqa --tier testdev_balanced`.

Takes the flags of the official script; `{tier}` in a file pattern is replaced. Files this scorer does not need (scene
graphs, choices, attentions) may be named and are not opened.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from apet.eval.benchmarks.gqa import Gqa
from apet.eval.scoring_cli import Parser, add_score_flags, publish, run


def main(argv: Sequence[str] | None = None) -> int:
    """Print the official report; exit status 0, or 1 with one line on stderr."""
    parser = Parser(prog="eval_gqa", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", default="val", help="split; fills {tier} below")
    parser.add_argument("--questions", default="{tier}_questions.json", help="id -> question")
    parser.add_argument(
        "--predictions", default="{tier}_predictions.json", help="list of questionId and prediction, or answers .jsonl"
    )
    for flag, file in (("scenes", "sceneGraphs"), ("choices", "choices"), ("attentions", "attentions")):
        parser.add_argument(
            f"--{flag}", default=f"{{tier}}_{file}.json", help="of the official script, not opened here"
        )
    for flag in ("consistency", "grounding"):
        parser.add_argument(f"--{flag}", action="store_true", help="of the official script, refused: needs its files")
    parser.add_argument("--objectFeatures", action="store_true", help="of the official script, no effect here")
    parser.add_argument("--mapSize", type=int, default=7, help="of the official script, no effect here")
    add_score_flags(parser)
    return run(parser, _score, argv)


def _score(args: argparse.Namespace) -> None:
    asked = [name for name in ("consistency", "grounding") if getattr(args, name)]
    if asked:
        raise ValueError(
            f"--{asked[0]} needs the official script and its scene graphs; leave it out for the accuracies"
        )
    score = Gqa().score(
        questions=args.questions.replace("{tier}", args.tier),
        predictions=args.predictions.replace("{tier}", args.tier),
        duplicates=args.duplicates,
    )
    publish(score, args.output_json)


if __name__ == "__main__":
    sys.exit(main())
