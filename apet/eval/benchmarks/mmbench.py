"""MMBench and MMBench-CN: multiple choice with the images inside a TSV, scored in circles.

A question comes several times with its options rotated (index + k * 1,000,000) and counts only if every pass is right;
that reproduces the published dev numbers without the server. Answers that name no letter count as wrong and are
reported (the server asks an LLM about them).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from apet.eval.benchmarks.base import OPTION_LETTER, Benchmark, Question, Score, register
from apet.eval.benchmarks.files import PathLike, index_unique, listing, read_jsonl, replacing, require_complete
from apet.eval.benchmarks.mmbench_table import LETTERS, options_of, read_table
from apet.eval.metrics import mean, mmbench_letter

_SINGLE_PRED = {"en": OPTION_LETTER, "cn": "请直接回答选项字母。"}
_PASS = 1_000_000  # index distance between the passes of a question
_DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")
_PREDICTION_COLUMN = 6
_ILLEGAL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f]")  # no xlsx cell may hold these


@register
class MmBench(Benchmark):
    """MMBench dev 20230712: 4,377 rows of 1,176 questions."""

    name = "mmbench"
    lang: ClassVar[str] = "en"
    leading_fields = ("round_id",)

    def read(
        self,
        question_file: PathLike,
        lang: str | None = None,
        all_rounds: bool = False,
        single_pred_prompt: bool = False,
    ) -> list[Question]:
        """Read the TSV.

        Args:
            question_file: Columns index, question, hint, A, B, C, D, image (base64); others are ignored.
            lang: "en" or "cn", the language of the instruction; None takes the benchmark's own.
            all_rounds: Ask every question once per option, options rotated left by one each time.
            single_pred_prompt: Add the instruction to answer with a letter (asked, not saved).
        """
        lang = lang or self.lang
        if lang not in _SINGLE_PRED:
            raise ValueError(f"lang={lang!r} is not one of {', '.join(_SINGLE_PRED)}")
        instruction = f"\n{_SINGLE_PRED[lang]}" if single_pred_prompt else ""
        questions = []
        for index, row in read_table(question_file, ("question", "hint", *LETTERS, "image")).items():
            if not row["image"]:
                raise ValueError(f"{question_file}: the row with index {index} has no image")
            letters, options = list(options_of(row)), list(options_of(row).values())
            for round_id in _rounds(row, all_rounds):
                turned = options[round_id:] + options[:round_id]
                text = _prompt(row, turned)
                option_char = letters[round_id:] + letters[:round_id]
                fields = {"round_id": round_id, "options": turned, "option_char": option_char}
                questions.append(Question(index, text, text + instruction, image_base64=row["image"], fields=fields))
        return questions

    def score(self, *, annotation_file: PathLike, result_file: PathLike, duplicates: str = "error") -> Score:
        """Circular and plain accuracy of an answers file over a TSV that has the `answer` column.

        Args:
            annotation_file: The TSV the questions came from.
            result_file: The answers file, of one round or of all.
            duplicates: "error", or "last" to let a later answer to a question and round win.
        """
        rows = read_table(annotation_file, ("question", *LETTERS, "answer"))
        unlabelled = [index for index, row in rows.items() if row["answer"] not in LETTERS or not row["answer"]]
        if unlabelled:
            raise ValueError(
                f"{annotation_file} has no answer for {len(unlabelled)} of {len(rows)} rows: {listing(unlabelled)}; "
                "test splits are scored by the server, see scripts/convert_mmbench_for_submission.py"
            )
        answers = _read_answers(result_file, duplicates)
        all_rounds = any(key != _key(row["question_id"], 0) for key, row in answers.items())
        asked = {_key(index, round_id): index for index, row in rows.items() for round_id in _rounds(row, all_rounds)}
        require_complete(asked, answers, result_file, annotation_file)
        letters = {key: _letter(answers[key], rows[index]) for key, index in asked.items()}
        correct = {key: float(letters[key] == rows[index]["answer"]) for key, index in asked.items()}
        circular: dict[int, float] = {}
        for key, index in asked.items():
            circular[index % _PASS] = min(correct[key], circular.get(index % _PASS, 1.0))
        details = {
            "circular": mean(circular.values()),
            "plain": mean(correct.values()),
            "rows": len(correct),
            "unparsable": sum(letter is None for letter in letters.values()),
            **_groups(rows, circular),
        }
        return Score(
            name=self.name,
            metric="circular accuracy",
            value=100 * details["circular"],
            n_questions=len(circular),
            details=details,
            per_sample={str(key): value for key, value in circular.items()},
            report=_report(details, len(circular)),
        )


@register
class MmBenchCn(MmBench):
    """MMBench-CN dev 20231003: the same questions in Chinese."""

    name = "mmbench_cn"
    lang = "cn"


def _prompt(row: Mapping[str, str], options: Sequence[str]) -> str:
    hint = [row["hint"]] if row["hint"] else []
    lines = (f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    return "\n".join([*hint, row["question"], *lines])


def _rounds(row: Mapping[str, str], all_rounds: bool) -> range:
    return range(max(1, len(options_of(row))) if all_rounds else 1)


def _key(index: object, round_id: object) -> str:
    return f"{index}, round {round_id}"


def _read_answers(path: PathLike, duplicates: str) -> dict[str, dict[str, Any]]:
    rows = read_jsonl(path, ("question_id", "text"))
    keyed = ((number, _key(row["question_id"], row.get("round_id", 0)), row) for number, row in rows)
    return index_unique(keyed, path, duplicates)


def _letter(answer: Mapping[str, Any], row: Mapping[str, str]) -> str | None:
    """The original letter an answer names; in a rotated round the letters shown are A.. again."""
    options = options_of(row)
    original = answer.get("option_char") or list(options)
    shown = {letter: options.get(source, "") for letter, source in zip(LETTERS, original, strict=False)}
    named = mmbench_letter(answer["text"], shown)
    return dict(zip(LETTERS, original, strict=False)).get(named, named)


def _groups(rows: Mapping[int, Mapping[str, str]], circular: Mapping[int, float]) -> dict[str, dict[str, float]]:
    """Circular accuracy per category and per l2-category, where the table has those columns."""
    tables: dict[str, dict[str, list[float]]] = {}
    first = {index % _PASS: row for index, row in reversed(list(rows.items()))}
    for base in sorted(first):
        for column in ("category", "l2-category"):
            if column in first[base]:
                tables.setdefault(column, {}).setdefault(first[base][column], []).append(circular[base])
    return {column: {name: mean(table[name]) for name in sorted(table)} for column, table in tables.items()}


def _report(details: Mapping[str, Any], n_questions: int) -> str:
    lines = [
        f"Circular accuracy: {100 * details['circular']:.2f}% ({n_questions} questions)",
        f"Plain accuracy: {100 * details['plain']:.2f}% ({details['rows']} answers)",
        f"Answers that name no option (counted wrong): {details['unparsable']}",
    ]
    if details["rows"] == n_questions:
        lines.append("Note: every question was asked in one pass only, so circular and plain accuracy are the same")
    for column in ("category", "l2-category"):
        if column in details:
            lines += ["", f"Circular accuracy / {column}:"]
            lines += [f"  {name}: {100 * value:.2f}%" for name, value in details[column].items()]
    return "\n".join(lines) + "\n"


def convert(annotation_file: PathLike, result_file: PathLike, upload_file: PathLike, duplicates: str = "error") -> None:
    """Write the xlsx the submission server takes: the table without bulky columns, with a `prediction` column.

    Raises:
        ValueError: openpyxl is not installed, or the answers (round 0) are not those of the table.
    """
    try:
        import openpyxl
    except ImportError:
        raise ValueError("the MMBench upload is an xlsx file and needs openpyxl: pip install openpyxl") from None
    rows = read_table(annotation_file, ("question", *LETTERS))
    answers = _read_answers(result_file, duplicates)
    keys = {_key(index, 0): index for index in rows}
    require_complete(keys, answers, result_file, annotation_file, exact=False)
    columns = [column for column in next(iter(rows.values())) if column not in _DROPPED]
    columns.insert(_PREDICTION_COLUMN, "prediction")
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.append(columns)
    for line, (key, index) in enumerate(keys.items(), start=2):
        cells = {**rows[index], "prediction": _ILLEGAL.sub("", answers[key]["text"])}
        sheet.cell(line, 1, index)
        for position, column in enumerate(columns[1:], start=2):
            if cells[column]:
                # Typed as text: an answer that starts with "=" is no formula.
                sheet.cell(line, position, cells[column]).data_type = "s"
    with replacing(upload_file) as temporary:
        book.save(temporary)
