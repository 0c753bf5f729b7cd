"""TextVQA question file without the "Reference OCR token" lines: LLaVA-1.6 numbers are published without them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import _checkout  # noqa: F401

from apet.eval.benchmarks.files import read_jsonl, write_text_atomic
from apet.eval.benchmarks.textvqa import TextVqa
from apet.eval.scoring_cli import Parser, run


def main(argv: Sequence[str] | None = None) -> int:
    """Write the question file; exit status 0, or 1 with one line on stderr."""
    parser = Parser(prog="textvqa_without_ocr", description=__doc__)
    parser.add_argument("--src", required=True, help="llava_textvqa_val_v051_ocr.jsonl")
    parser.add_argument("--dst", required=True, help="question file to write")
    return run(parser, lambda args: convert(args.src, args.dst), argv)


def convert(src: str, dst: str) -> None:
    """Copy every line of `src`, its text as `TextVqa.read(ocr=False)` gives it."""
    questions = TextVqa().read(src, ocr=False)
    rows = [row | {"text": question.text} for (_, row), question in zip(read_jsonl(src), questions, strict=True)]
    write_text_atomic(dst, "".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
