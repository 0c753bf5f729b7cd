"""Files in the form that official tools and servers take: ``python -m apet.eval.convert BENCHMARK ...``.

The published names of these programs, scripts/convert_*.py, lead here; so do their flags.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from apet.eval.benchmarks import mmbench, mme, scienceqa_convert, seed
from apet.eval.benchmarks.files import read_jsonl, user_path, write_json_atomic, write_jsonl_atomic
from apet.eval.benchmarks.gqa import Gqa
from apet.eval.benchmarks.mmvet import MmVet
from apet.eval.benchmarks.textvqa import TextVqa
from apet.eval.benchmarks.vizwiz import VizWiz
from apet.eval.benchmarks.vqav2 import VqaV2
from apet.eval.scoring_cli import Program, add_duplicates_flag, add_score_flags, publish, required, upload

_SRC_DST = {"--src": required("answers file, JSON lines"), "--dst": required("file to write")}


def _mmbench(args: argparse.Namespace) -> None:
    answers, table = (
        Path(folder) / f"{args.experiment}.{suffix}"
        for folder, suffix in ((args.result_dir, "jsonl"), (args.upload_dir, "xlsx"))
    )
    mmbench.convert(args.annotation_file, answers, table, args.duplicates)


def _mme(args: argparse.Namespace) -> None:
    folder = user_path(args.dir)
    answers, tables = folder / "answers" / f"{args.experiment}.jsonl", folder / "eval_tool/answers" / args.experiment
    mme.write_results(folder / mme.RELEASE, answers, tables, args.duplicates)


def _mmvet(args: argparse.Namespace) -> None:
    write_json_atomic(args.dst, MmVet().submission(args.src, args.duplicates), indent=2)


def _seed(args: argparse.Namespace) -> None:
    score = seed.convert(args.annotation_file, args.result_file, args.result_upload_file, args.duplicates)
    publish(score, args.output_json)


def _vizwiz(args: argparse.Namespace) -> None:
    submission = VizWiz().submission(annotation_file=args.annotation_file, result_file=args.result_file)
    upload(submission, args.result_upload_file)


def _vqav2(args: argparse.Namespace) -> None:
    submission = VqaV2().submission(folder=args.dir, ckpt=args.ckpt, split=args.split)
    upload(submission, Path(args.dir) / "answers_upload" / args.split / f"{args.ckpt}.json")


def _without_ocr(args: argparse.Namespace) -> None:
    """Copy every line, its text as `TextVqa.read(ocr=False)` gives it: LLaVA-1.6 is published without OCR tokens."""
    questions = TextVqa().read(args.src, ocr=False)
    rows = [row | {"text": question.text} for (_, row), question in zip(read_jsonl(args.src), questions, strict=True)]
    write_jsonl_atomic(args.dst, rows)


CONVERTERS: Mapping[str, Program] = {
    "gqa": Program(
        "Answers file to official GQA predictions.", _SRC_DST,
        lambda args: write_json_atomic(args.dst, Gqa().submission(args.src)),
    ),
    "mmbench": Program(
        "MMBench answers file to the xlsx of the submission server.",
        {
            "--annotation-file": required("the TSV the questions came from"),
            "--result-dir": required("folder with <experiment>.jsonl"),
            "--upload-dir": required("folder for <experiment>.xlsx"),
            "--experiment": required("name of the answers file without suffix"),
        },
        _mmbench, add_duplicates_flag,
    ),
    "mme": Program(
        "MME answers file to the tables of the MME scorer, eval_tool/answers/<experiment>/<category>.txt.",
        {
            "--experiment": required("name of the answers file in answers/, without suffix"),
            "--dir": {"help": "the MME folder; the published tool runs inside it", "default": "."},
        },
        _mme, add_duplicates_flag,
    ),
    "mmvet": Program(
        "MM-Vet answers file to the file of the MM-Vet grader.", _SRC_DST, _mmvet, add_duplicates_flag,
    ),
    "seed": Program(
        "SEED-Bench answers file to the upload file; prints the accuracies.",
        {
            "--annotation-file": required("SEED-Bench.json"),
            "--result-file": required("answers file, JSON lines"),
            "--result-upload-file": required("upload file to write, JSON lines"),
        },
        _seed, add_score_flags,
    ),
    "sqa": Program(
        "ScienceQA problems to a LLaVA conversation file in the same folder, llava_<split>_<format>.json.",
        {
            "command": {"help": "the published script wants its name", "nargs": "?", "choices": ("convert_to_llava",)},
            "--base-dir": required("folder with problems.json and pid_splits.json"),
            "--split": required("a split of pid_splits.json"),
            "--prompt-format": {"help": "such as QCM-LEA or CQM-A", "default": scienceqa_convert.DEFAULT_FORMAT},
        },
        lambda args: print(f"wrote {scienceqa_convert.convert(args.base_dir, args.split, args.prompt_format)}"),
    ),
    "textvqa": Program(
        'TextVQA question file without the "Reference OCR token" lines.',
        {"--src": required("llava_textvqa_val_v051_ocr.jsonl"), "--dst": required("question file to write")},
        _without_ocr,
    ),
    "vizwiz": Program(
        "VizWiz answers file to the upload file; prints how many results, questions and broken lines there were.",
        {
            "--annotation-file": required("llava_test.jsonl"),
            "--result-file": required("answers file, JSON lines"),
            "--result-upload-file": required("upload file to write"),
        },
        _vizwiz,
    ),
    "vqav2": Program(
        "VQAv2 merged answers to the upload file of the whole test2015 list, answers_upload/<split>/<ckpt>.json.",
        {
            "--dir": {"help": "folder with answers/ and the question files", "default": "data/eval/vqav2"},
            "--ckpt": required("folder of the model below answers/<split>"),
            "--split": required("folder below answers/, such as llava_vqav2_mscoco_test-dev2015"),
        },
        _vqav2,
    ),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the converter that the first word names; exit status as `Program.main`, 2 for an unknown one."""
    first = argparse.ArgumentParser(prog="python -m apet.eval.convert", description=__doc__.partition(":")[0])
    first.add_argument("benchmark", choices=tuple(CONVERTERS), help="whose files")
    first.add_argument("words", nargs=argparse.REMAINDER, metavar="...", help="BENCHMARK --help explains them")
    args = first.parse_args(argv)
    return CONVERTERS[args.benchmark].main(f"{first.prog} {args.benchmark}")(args.words)


if __name__ == "__main__":
    sys.exit(main())
