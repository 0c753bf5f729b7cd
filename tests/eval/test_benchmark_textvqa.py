"""TextVQA: the join through the prompt and the soft accuracy, against golden runs of the upstream scorer."""

import json

import pytest

from apet.eval.benchmarks.textvqa import TextVqa, question_of_prompt
from llava.eval import eval_textvqa


@pytest.fixture
def case(golden, save):
    """`case(name)` -> (golden case, keyword arguments of score)."""

    def load(name="mixed_prompt_styles"):
        found = next(case for case in golden("textvqa")["cases"] if case["name"] == name)
        files = {
            "annotation_file": save("TextVQA_0.5.1_val.json", found["files"]["TextVQA_0.5.1_val.json"]),
            "result_file": save("llava-toy.jsonl", found["files"]["llava-toy.jsonl"]),
        }
        return found, files

    return load


def test_question_of_prompt(golden):
    for prompt, expected in golden("textvqa")["prompt_to_question"]:
        if isinstance(expected, str):
            assert question_of_prompt(prompt) == expected
        else:
            with pytest.raises(ValueError, match="cannot find the question"):
                question_of_prompt(prompt)


@pytest.mark.parametrize("name", ["mixed_prompt_styles", "ocr_after_only"])
def test_scores_are_upstreams(case, command, tmp_path, name):
    found, files = case(name)
    argv = ["--annotation-file", files["annotation_file"], "--result_file", files["result_file"]]
    assert command(eval_textvqa.main, *argv, "--output-json", tmp_path / "s.json") == (0, found["stdout"], "")
    saved = json.loads((tmp_path / "s.json").read_text())
    assert saved["details"]["accuracy"] == found["accuracy"]
    rows = found["files"]["TextVQA_0.5.1_val.json"]["data"]
    assert [saved["per_sample"][str(row["question_id"])] for row in rows] == found["per_item_score"]


def test_result_dir_scores_every_file(case, save, command):
    found, files = case()
    save("dir/b.jsonl", found["files"]["llava-toy.jsonl"])
    folder = save("dir/a.jsonl", found["files"]["llava-toy.jsonl"]).parent
    argv = ["--annotation-file", files["annotation_file"], "--result-dir", folder]
    status, out, _ = command(eval_textvqa.main, *argv)
    expected = found["stdout"]
    assert (status, out) == (0, expected.replace("llava-toy", "a") + expected.replace("llava-toy", "b"))
    status, _, err = command(eval_textvqa.main, *argv, "--output-json", "s.json")
    assert status == 1 and "--output-json takes one score" in err
    status, _, err = command(eval_textvqa.main, *argv[:3], save("none/x.txt", "").parent)
    assert status == 1 and "has no *.jsonl" in err


def test_answers_may_carry_the_annotations_question_id(case, save):
    found, files = case()
    id_of = {row["image_id"]: row["question_id"] for row in found["files"]["TextVQA_0.5.1_val.json"]["data"]}
    answers = [{**row, "question_id": id_of[row["question_id"]]} for row in found["files"]["llava-toy.jsonl"]]
    files["result_file"] = save("by_question_id.jsonl", answers)
    assert TextVqa().score(**files).details["accuracy"] == found["accuracy"]


def test_a_question_asked_twice_of_one_image_needs_two_answers(case, save):
    found, files = case()
    rows = found["files"]["TextVQA_0.5.1_val.json"]["data"]
    answers = found["files"]["llava-toy.jsonl"]
    twin = {**rows[0], "question_id": 999999}
    files["annotation_file"] = save("twin.json", {"data": [*rows, twin]})
    with pytest.raises(ValueError, match="no answer for 1 of the 25 questions.*what time. 0 #2"):
        TextVqa().score(**files)
    files["result_file"] = save("twin.jsonl", [*answers, {**answers[0], "text": "nothing like it"}])
    score = TextVqa().score(**files)
    assert score.per_sample["999999"] == 0 and score.per_sample[str(rows[0]["question_id"])] == 1


def test_reading_with_and_without_ocr_tokens(save):
    text = "what time?\nReference OCR token: Nokia, A1\nAnswer the question using a single word or phrase."
    path = save("q.jsonl", [{"question_id": "img", "image": "img.jpg", "text": text}])
    assert TextVqa().read(path)[0].prompt == text
    plain = TextVqa().read(path, ocr=False)[0]
    assert plain.text == plain.prompt == "what time?\nAnswer the question using a single word or phrase."


def test_broken_inputs(case, save):
    found, files = case()
    rows = found["files"]["TextVQA_0.5.1_val.json"]["data"]
    answers = found["files"]["llava-toy.jsonl"]
    broken = [
        ({"result_file": save("a1.jsonl", "\n")}, "a1.jsonl is empty"),
        ({"result_file": save("a2.jsonl", answers[1:])}, "no answer for 1 of the 24"),
        ({"result_file": save("a3.jsonl", [*answers, answers[2]])}, "answered twice, at 3 and 25"),
        ({"result_file": save("a4.jsonl", [{**answers[0], "prompt": "one line"}])}, "line 1: cannot find the question"),
        ({"result_file": save("a5.jsonl", [*answers, {**answers[0], "question_id": "z"}])}, "that .* does not have"),
        ({"annotation_file": save("g1.json", [])}, "non-empty list under"),
        ({"annotation_file": save("g2.json", {"data": [{**rows[0], "answers": ["x"]}]})}, "entry 1: 1 answers"),
        ({"annotation_file": save("g3.json", {"data": [rows[0], rows[0]]})}, "entry 2: question_id .* twice"),
    ]
    for change, message in broken:
        with pytest.raises(ValueError, match=message):
            TextVqa().score(**{**files, **change})
    last = TextVqa().score(**{**files, "result_file": save("a3.jsonl", [*answers, answers[2]])}, duplicates="last")
    assert last.details["accuracy"] == found["accuracy"]
