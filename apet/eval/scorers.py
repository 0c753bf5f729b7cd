"""The programs that score answers, one per benchmark; their published names, `llava.eval.eval_*`, lead here.

Flags are those of the official scripts. What a scorer needs and how it counts is in `apet.eval.benchmarks`.
"""

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from apet.eval.benchmarks import Benchmark, get_benchmark
from apet.eval.benchmarks.files import user_path
from apet.eval.benchmarks.gqa import Gqa
from apet.eval.benchmarks.llava_bench import LlavaBench, experiment, review_files
from apet.eval.benchmarks.mmbench import MmBench, MmBenchCn
from apet.eval.benchmarks.mme import Mme
from apet.eval.benchmarks.pope import Pope
from apet.eval.benchmarks.scienceqa import MISSING_RULES, OPTIONS, ScienceQa, score_records, write_analysis
from apet.eval.benchmarks.textvqa import TextVqa
from apet.eval.benchmarks.video_qa import VideoQa
from apet.eval.benchmarks.vqav2 import VqaV2
from apet.eval.endpoint import JUDGE_KEY_VARIABLE, Endpoint
from apet.eval.judge import judge
from apet.eval.scoring_cli import Parser, Program, add_score_flags, publish, required

URL_VARIABLE = "OPENAI_BASE_URL"
_SAVED = {"help": "write the score, its details and the per-sample correctness here"}


def _scored(benchmark: type[Benchmark], *files: str) -> Callable[[argparse.Namespace], None]:
    """The action of a scorer whose flags are the arguments of `Benchmark.score`."""

    def score(args: argparse.Namespace) -> None:
        publish(benchmark().score(**{name: getattr(args, name) for name in files}), args.output_json)

    return score


def _gqa(args: argparse.Namespace) -> None:
    for name in ("consistency", "grounding"):
        if getattr(args, name):
            raise ValueError(
                f"--{name} needs the official script and its scene graphs; leave it out for the accuracies"
            )
    files = {name: getattr(args, name).replace("{tier}", args.tier) for name in ("questions", "predictions")}
    publish(Gqa().score(**files, duplicates=args.duplicates), args.output_json)


def _mmbench(args: argparse.Namespace) -> None:
    benchmark = MmBenchCn if args.lang == "cn" else MmBench
    _scored(benchmark, "annotation_file", "result_file", "duplicates")(args)


def _scienceqa(args: argparse.Namespace) -> None:
    names = ("base_dir", "result_file", "split", "options", "missing", "duplicates")
    records = ScienceQa().analyse(**{name: getattr(args, name) for name in names})
    write_analysis(records, args.output_file, args.output_result)
    publish(score_records(records), args.output_json)


def _textvqa_flags(flags: Parser) -> None:
    results = flags.add_mutually_exclusive_group(required=True)
    results.add_argument("--result-file", help="one answers file, JSON lines")
    results.add_argument("--result-dir", help="score every *.jsonl of this folder")
    add_score_flags(flags)


def _textvqa(args: argparse.Namespace) -> None:
    files = [Path(args.result_file)] if args.result_file else sorted(user_path(args.result_dir).glob("*.jsonl"))
    if not files:
        raise ValueError(f"--result-dir {args.result_dir} has no *.jsonl file")
    if args.output_json and len(files) > 1:
        raise ValueError(f"--output-json takes one score, --result-dir has {len(files)}: use --result-file")
    for file in files:
        score = TextVqa().score(annotation_file=args.annotation_file, result_file=file, duplicates=args.duplicates)
        publish(score, args.output_json)


def _video_qa(args: argparse.Namespace) -> None:
    benchmark = get_benchmark(args.benchmark)
    if not isinstance(benchmark, VideoQa):
        raise ValueError(f"--benchmark {args.benchmark} is about images; it has a scorer of its own")
    if args.judge is None:
        publish(benchmark.score(pred_path=args.pred_path), args.output_json)
        return
    address = args.api_base or os.environ.get(URL_VARIABLE)
    if not address or not args.output_dir:
        raise ValueError(f"--judge needs --output_dir, and --api_base or {URL_VARIABLE}")
    endpoint = Endpoint(address, concurrency=args.num_tasks, key_variable=JUDGE_KEY_VARIABLE)
    publish(judge(benchmark.name, args.pred_path, args.output_dir, endpoint, args.judge), args.output_json)


def _llava_bench(args: argparse.Namespace) -> None:
    if not args.files and not args.dir:
        raise ValueError("name the review files with --files or their folder with --dir")
    wanted = [*(args.select or []), *([args.version] if args.version else [])]
    files = [
        file
        for file in map(Path, args.files or review_files(args.dir))
        if all(word in experiment(file) for word in wanted)
        and not any(word in experiment(file) for word in args.ignore)
    ]
    if not files:
        raise ValueError(f"no review file is left of {', '.join(args.files) or args.dir}")
    if args.output_json and len(files) > 1:
        raise ValueError(f"--output-json takes one score, there are {len(files)} review files: name one with --files")
    for file in files:
        publish(LlavaBench().score(review_file=file), args.output_json)


def _unread(about: str, **options: object) -> dict[str, object]:
    return {"help": f"of the official script, {about}", **options}


SCORERS: Mapping[str, Program] = {
    "gqa": Program(
        """Score GQA predictions with the question file alone.

`{tier}` in a file pattern is replaced. Files this scorer does not need may be named and are not opened.""",
        {
            "--tier": {"default": "val", "help": "split; fills {tier} below"},
            "--questions": {"default": "{tier}_questions.json", "help": "id -> question"},
            "--predictions": {
                "default": "{tier}_predictions.json", "help": "list of questionId and prediction, or answers .jsonl"
            },
            "--scenes": _unread("not opened here", default="{tier}_sceneGraphs.json"),
            "--choices": _unread("not opened here", default="{tier}_choices.json"),
            "--attentions": _unread("not opened here", default="{tier}_attentions.json"),
            "--consistency": _unread("refused: needs its files", action="store_true"),
            "--grounding": _unread("refused: needs its files", action="store_true"),
            "--objectFeatures": _unread("no effect here", action="store_true"),
            "--mapSize": _unread("no effect here", type=int, default=7),
        },
        _gqa, add_score_flags,
    ),
    "llava_bench": Program(
        "Relative score and mean marks of LLaVA-Bench reviews, per category and file.",
        {
            "-d --dir": {"help": "folder of review files"},
            "-v --version": {"help": "only files whose name has this"},
            "-s --select": {"nargs": "*", "help": "only files whose name has all of these"},
            "-f --files": {"nargs": "*", "default": [], "help": "review files, instead of --dir"},
            "-i --ignore": {"nargs": "*", "default": [], "help": "no files whose name has one of these"},
            "--output-json": {"help": "write the score here (one review file)"},
        },
        _llava_bench,
    ),
    "mmbench": Program(
        "Circular and plain accuracy of MMBench answers, without the server.",
        {
            "--annotation-file": required("the TSV with the questions and their answers"),
            "--result-file": required("answers of the whole TSV, JSON lines"),
            "--lang": {"choices": ("en", "cn"), "default": "en", "help": "names the score mmbench or mmbench_cn"},
        },
        _mmbench, add_score_flags,
    ),
    "mme": Program(
        "Perception, Cognition and the 14 task scores of MME, from the folder that scripts/convert_answer_to_mme.py\n"
        "writes.",
        {
            "--results_dir": {"default": "./LaVIN", "help": "folder with one <category>.txt per category"},
            "--present-only": {"action": "store_true", "help": "score a part of the 14 categories, and say so"},
            "--output-json": _SAVED,
        },
        _scored(Mme, "results_dir", "present_only"),
    ),
    "pope": Program(
        "The three splits of POPE and their means.",
        {
            "--annotation-dir": required("folder with coco_pope_{random,popular,adversarial}.json"),
            "--question-file": required("llava_pope_test.jsonl"),
            "--result-file": required("answers of the whole question file, JSON lines"),
        },
        _scored(Pope, "annotation_dir", "question_file", "result_file", "duplicates"), add_score_flags,
    ),
    "scienceqa": Program(
        "Accuracies of ScienceQA, with the official analysis files where they are asked for.",
        {
            "--base-dir": required("folder with problems.json and pid_splits.json"),
            "--result-file": required("answers file, JSON lines"),
            "--output-file": {"help": "write the correct and incorrect answers here"},
            "--output-result": {"help": "write accuracy, choices and texts by id here"},
            "--split": {"default": "test", "help": "a split of pid_splits.json"},
            "--options": {"type": list, "default": list(OPTIONS), "help": "option letters, such as ABCDE"},
            "--missing": {"choices": MISSING_RULES, "default": "error", "help": "a question without an answer"},
        },
        _scienceqa, add_score_flags,
    ),
    "textvqa": Program(
        "Experiment name, samples and accuracy of every TextVQA answers file.",
        {"--annotation-file": required("TextVQA_0.5.1_val.json")}, _textvqa, _textvqa_flags,
    ),
    "video_qa": Program(
        """Score answers about videos.

Without `--judge`, predictions are compared with the answers as text. With it, a model behind an OpenAI-compatible
server says of every answer whether it is right; its key is read from the environment.""",
        {
            "--pred_path": required("answers of llava.eval.video_qa"),
            "--benchmark": {"default": "msvd", "help": "msvd, msrvtt, tgif or activitynet"},
            "--output_json": _SAVED,
            "--judge": {"metavar": "MODEL", "help": f"ask this model; its key is in {JUDGE_KEY_VARIABLE}"},
            "--api_base": {"help": f"its server (default: {URL_VARIABLE})"},
            "--output_dir": {"help": "folder of the judgements, one file each; those that are there are kept"},
            "--num_tasks": {"type": int, "default": 8, "help": "requests under way at a time"},
        },
        _video_qa,
    ),
    "vqav2": Program(
        "Overall accuracy and its breakdowns of VQAv2 answers on an annotated split.",
        {
            "--annotation-file": required("v2_mscoco_val2014_annotations.json"),
            "--result-file": required("answers file (.jsonl) or upload file (.json)"),
        },
        _scored(VqaV2, "annotation_file", "result_file", "duplicates"), add_score_flags,
    ),
}  # fmt: skip
