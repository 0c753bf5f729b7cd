"""MMBench: prompts and rounds, circular score and upload file, against golden runs of the published tools."""

import csv
import io
import json
import sys

import openpyxl
import pytest

from apet.eval import benchmarks, metrics
from apet.eval.benchmarks import mmbench, mmbench_table
from llava.eval import eval_mmbench

HEADER = "index question hint A B C D answer category image source l2-category comment split".split()


def table(*rows):
    """A TSV of rows given as dicts; cells not given are empty, the image is "aW1n"."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, HEADER, delimiter="\t", restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({"image": "aW1n", **row} for row in rows)
    return stream.getvalue()


ROW = {"index": 3, "question": "Which?", "hint": "Look up.", "A": "cat", "B": "dog", "C": "cow", "answer": "B"}


@pytest.fixture
def files(golden, save):
    content = golden("mmbench")["files"]
    return {
        "annotation_file": save("mmbench_toy.tsv", content["mmbench_toy.tsv"]),
        "result_file": save("answers/toy.jsonl", content["toy.jsonl"]),
    }


def test_scores_are_the_published_tools(files, golden, command, tmp_path):
    expected = golden("mmbench")
    argv = ["--annotation-file", files["annotation_file"], "--result-file", files["result_file"]]
    status, out, err = command(eval_mmbench.main, *argv, "--output-json", tmp_path / "s.json")
    assert (status, err) == (0, "")
    assert out.startswith("Circular accuracy: 75.00% (8 questions)\nPlain accuracy: 90.91% (22 answers)\n")
    details = json.loads((tmp_path / "s.json").read_text())["details"]
    assert details["circular"] == expected["circular"]["overall"]
    assert details["category"] == expected["circular"]["category"]
    assert details["l2-category"] == expected["circular"]["l2_category"]
    assert details["plain"] == expected["vanilla_per_row_accuracy"]


def test_inferred_letters(files, golden):
    rows = mmbench_table.read_table(files["annotation_file"], ())
    answers = [json.loads(line) for line in files["result_file"].read_text().splitlines()]
    letters = [
        metrics.mmbench_letter(row["text"], mmbench_table.options_of(rows[row["question_id"]])) for row in answers
    ]
    assert letters == golden("mmbench")["inferred_letter"]


def test_upload_has_the_published_columns_and_rows(files, golden, script, command, tmp_path):
    main = script("convert_mmbench_for_submission")
    argv = ["--annotation-file", files["annotation_file"], "--result-dir", files["result_file"].parent]
    argv += ["--upload-dir", tmp_path / "up", "--experiment", "toy"]
    assert command(main, *argv) == (0, "", "")
    columns, *rows = openpyxl.load_workbook(tmp_path / "up" / "toy.xlsx").active.iter_rows(values_only=True)
    assert list(columns) == golden("mmbench")["xlsx"]["columns"]
    assert [list(row) for row in rows] == golden("mmbench")["xlsx"]["rows"]


def test_upload_keeps_answers_text_and_needs_openpyxl(save, tmp_path, monkeypatch):
    annotations = save("t.tsv", table(ROW))
    answers = save("a.jsonl", [{"question_id": 3, "text": "=1+1\x07"}])
    mmbench.convert(annotations, answers, tmp_path / "u.xlsx")
    cell = openpyxl.load_workbook(tmp_path / "u.xlsx").active["G2"]
    assert (cell.value, cell.data_type) == ("=1+1", "s")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(ValueError, match="pip install openpyxl"):
        mmbench.convert(annotations, answers, tmp_path / "u.xlsx")


def test_prompt_and_answer_line(save):
    path = save("t.tsv", table(ROW))
    benchmark = benchmarks.get_benchmark("mmbench")
    (question,) = benchmark.read(path, single_pred_prompt=True)
    assert question.text == "Look up.\nWhich?\nA. cat\nB. dog\nC. cow"
    assert question.prompt == question.text + "\nAnswer with the option's letter from the given choices directly."
    line = benchmark.answer_line(question, "B", answer_id="x", model_id="toy")
    assert list(line) == ["question_id", "round_id", "prompt", "text", "options", "option_char", "answer_id",
                          "model_id", "metadata"]  # fmt: skip
    assert (line["question_id"], line["round_id"], line["option_char"]) == (3, 0, ["A", "B", "C"])
    chinese = benchmarks.get_benchmark("mmbench_cn").read(path, single_pred_prompt=True)[0]
    assert chinese.prompt.endswith("\n请直接回答选项字母。")
    assert benchmark.read(path, lang="cn", single_pred_prompt=True) == [chinese]
    with pytest.raises(ValueError, match="lang='fr' is not one of en, cn"):
        benchmark.read(path, lang="fr")


def test_rounds_rotate_the_options_and_all_must_be_right(save):
    path = save("t.tsv", table(ROW))
    benchmark = benchmarks.get_benchmark("mmbench")
    rounds = benchmark.read(path, all_rounds=True)
    assert [question.fields["option_char"] for question in rounds] == [list("ABC"), list("BCA"), list("CAB")]
    assert rounds[1].text == "Look up.\nWhich?\nA. dog\nB. cow\nC. cat"
    letters = ["B", "A", "C"]  # where "dog" stands in each round
    lines = [
        benchmark.answer_line(question, letter, answer_id="x", model_id="toy")
        for question, letter in zip(rounds, letters, strict=True)
    ]
    score = benchmark.score(annotation_file=path, result_file=save("a.jsonl", lines))
    assert (score.value, score.details["rows"]) == (100, 3)
    wrong = [*lines[:2], {**lines[2], "text": "B"}]
    score = benchmark.score(annotation_file=path, result_file=save("a.jsonl", wrong))
    assert (score.value, score.details["plain"]) == (0, pytest.approx(2 / 3))
    with pytest.raises(ValueError, match="no answer for 1 of the 3 questions.*'3, round 2'"):
        benchmark.score(annotation_file=path, result_file=save("a.jsonl", lines[:2]))


@pytest.mark.parametrize(("empty", "kept"), [("", 2), ("nan", 2), ("None", 2), ("NONE", 2), ("N/A", 2), ("nothing", 3)])
def test_options_end_at_the_first_empty_one(save, empty, kept):
    path = save("t.tsv", table({**ROW, "C": empty, "hint": "nan"}))
    (question,) = benchmarks.get_benchmark("mmbench").read(path)
    assert len(question.fields["options"]) == kept
    assert question.text.startswith("Which?")


def test_cells_may_hold_images_quotes_tabs_and_line_ends(save):
    image = "A" * 300_000
    limit = csv.field_size_limit()
    path = save("t.tsv", table({**ROW, "question": 'a "b"\tc\nd', "image": image}))
    (question,) = benchmarks.get_benchmark("mmbench").read(path)
    assert question.image_base64 == image
    assert 'a "b"\tc\nd\nA. cat' in question.text
    assert csv.field_size_limit() == limit


def test_broken_inputs(save, files):
    benchmark = benchmarks.get_benchmark("mmbench")
    for content, message in [
        ("", "no column index, question"),
        ("index\tquestion\n1\tq\n", "no column hint, A, B, C, D, image .columns: index, question"),
        (table(), "is empty: it has no row"),
        (table(ROW, ROW), "line 3: index 3 is there twice"),
        (table({**ROW, "index": "x"}), "line 2: index 'x' is not a number"),
        (table(ROW) + "4\tq\n", "line 3: the row has another number of cells"),
        (table({**ROW, "image": ""}), "index 3 has no image"),
    ]:
        with pytest.raises(ValueError, match=message):
            benchmark.read(save("bad.tsv", content))
    answers = files["result_file"].read_text()
    first = answers.splitlines()[0]
    for content, message in [
        ("", "is empty"),
        (first, "no answer for 21 of the 22"),
        (answers + first, "'11, round 0' is answered twice, at 1 and 23"),
        (first.replace("11", "99"), "answers none of the 22 questions"),
    ]:
        with pytest.raises(ValueError, match=message):
            benchmark.score(annotation_file=files["annotation_file"], result_file=save("bad.jsonl", content))
    with pytest.raises(ValueError, match="no answer for 1 of 1 rows.*scored by the server"):
        unlabelled = save("test.tsv", table({**ROW, "answer": ""}))
        benchmark.score(annotation_file=unlabelled, result_file=files["result_file"])
