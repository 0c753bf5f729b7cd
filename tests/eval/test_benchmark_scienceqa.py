"""ScienceQA: letters, accuracies and analysis files, against golden runs; reading and converting questions."""

import json

import pytest

from apet.eval.benchmarks.scienceqa import ScienceQa
from llava.eval import eval_science_qa


@pytest.fixture
def files(golden, save):
    content = golden("scienceqa")["files"]
    base = [save(name, content[name]) for name in ("pid_splits.json", "problems.json")][0].parent
    return {"base_dir": base, "result_file": save("a.jsonl", content["a.jsonl"])}


def argv(files, *more):
    return ["--base-dir", files["base_dir"], "--result-file", files["result_file"], *more]


@pytest.mark.parametrize("number", [0, 1])
def test_scores_and_files_are_upstreams(files, golden, command, tmp_path, number):
    run = golden("scienceqa")["runs"][number]
    more = ["--split", run["split"], "--output-file", tmp_path / "o.json", "--output-result", tmp_path / "r.json"]
    status, out, err = command(eval_science_qa.main, *argv(files, *more, "--missing", "wrong"))
    assert (status, err) == (0, "")
    line, note = out[: out.index("\n") + 1], out[out.index("\n") + 1 :]
    assert line == run["stdout"]
    assert ("1 questions have no answer and count as wrong: '9999'" in note) == (run["split"] == "test")
    assert json.loads((tmp_path / "r.json").read_text()) == run["result_json"]
    analysis = json.loads((tmp_path / "o.json").read_text())
    records = analysis["correct"] + analysis["incorrect"]
    assert records[0] == run["first_analysis_record"]
    assert {record["question_id"]: record["parsed_ans"] for record in records} == run["parsed"]
    multimodal = [record for record in records if record["is_multimodal"]]
    assert len(multimodal) == run["n_multimodal"]
    assert sum(record in analysis["correct"] for record in multimodal) == run["n_multimodal_correct"]


def test_a_missing_answer_is_an_error_by_default(files, command):
    status, out, err = command(eval_science_qa.main, *argv(files))
    assert (status, out) == (1, "")
    assert "no answer for 1 of the 22 questions" in err and "'9999'" in err


def test_without_pictures_the_headline_is_the_plain_accuracy(files, golden, save):
    assert golden("scienceqa")["text_only_split"]["exit_code"] == 1
    save("pid_splits.json", {"text": ["4", "10"]})
    score = ScienceQa().score(**files, split="text")
    assert score.metric == "accuracy" and score.details["img_accuracy"] is None
    assert "IMG-Accuracy: n/a" in score.report


def test_broken_inputs(files, save):
    answers = [json.loads(line) for line in files["result_file"].read_text().splitlines()]
    for change, message in [
        ({"split": "val"}, "has no split 'val'; it has 'test', 'minitest'"),
        ({"missing": "skip"}, "missing='skip' is not one of error, wrong"),
        ({"result_file": save("e.jsonl", "")}, "e.jsonl is empty"),
        ({"result_file": save("d.jsonl", [*answers, answers[0]])}, "'4' is answered twice, at 1 and 22"),
        ({"result_file": save("x.jsonl", [{**answers[0], "question_id": "0"}]), "missing": "wrong"}, "none of the 22"),
    ]:
        with pytest.raises(ValueError, match=message):
            ScienceQa().score(**{**files, **change})
    for ids, message in [([], "has no ids"), (["4", "none"], "problems.json does not have: 'none'")]:
        save("pid_splits.json", {"test": ids})
        with pytest.raises(ValueError, match=message):
            ScienceQa().score(**files)


def turns(value):
    return [{"from": "human", "value": value}, {"from": "gpt", "value": "A"}]


def test_reading_questions(save):
    rows = [
        {"id": "4", "image": "4/image.png", "conversations": turns("<image>\nq?\nA. x\nB. y")},
        {"id": "5", "conversations": turns("q?\nA. x\nB. y ")},
        {"id": "6", "image": "image.png", "conversations": turns("q?\n<image>")},
    ]
    path = save("llava_test_CQM-A.json", rows)
    pictured, plain, bare = ScienceQa().read(path)
    assert (pictured.text, pictured.prompt) == ("<image>\nq?\nA. x\nB. y", "q?\nA. x\nB. y")
    assert (pictured.image, plain.image, bare.image) == ("4/image.png", None, "6/image.png")
    assert plain.text == plain.prompt == "q?\nA. x\nB. y"
    instruction = "\nAnswer with the option's letter from the given choices directly."
    asked = ScienceQa().read(path, single_pred_prompt=True)[0]
    assert (asked.text, asked.prompt) == (pictured.text + instruction, pictured.prompt + instruction)
    for content, message in [
        ([], "non-empty JSON list"),
        ([rows[0], rows[0]], "entry 2: id '4' is there twice"),
        ([{"id": "1"}], "entry 1: no 'conversations'"),
        ([{"id": "1", "conversations": []}], "entry 1: conversations must start with a question"),
    ]:
        with pytest.raises(ValueError, match=message):
            ScienceQa().read(save("bad.json", content))


PROBLEM = {"question": "Why?", "choices": ["x", "y"], "answer": 1, "hint": "", "image": "image.png",
           "lecture": "Long ago.", "solution": "It is  y."}  # fmt: skip


@pytest.mark.parametrize(
    ("form", "asked", "told"),
    [
        ("CQM-A", "Context: N/A\nQuestion: Why?\nOptions: (A) x (B) y", "The answer is B."),
        ("QCM-LEA", "Why?\nContext: N/A\nOptions: (A) x (B) y", "Long ago. It is y. The answer is B."),
        ("QCMLE-AL", "Why?\nContext: N/A\nOptions: (A) x (B) y\nBECAUSE: Long ago. It is y.",
         "The answer is B. BECAUSE: It is y."),
        ("QCM-AE", "Why?\nContext: N/A\nOptions: (A) x (B) y", "The answer is B. BECAUSE: Long ago."),
    ],
)  # fmt: skip
def test_convert_to_llava(save, script, command, tmp_path, form, asked, told):
    save("problems.json", {"7": PROBLEM, "8": {**PROBLEM, "image": None, "hint": "See."}})
    save("pid_splits.json", {"val": ["7", "8"]})
    argv = ["convert_to_llava", "--base-dir", tmp_path, "--split", "val", "--prompt-format", form]
    assert command(script("convert_sqa_to_llava"), *argv)[0] == 0
    first, second = json.loads((tmp_path / f"llava_val_{form}.json").read_text())
    assert first["image"] == "7/image.png" and "image" not in second
    assert [turn["value"] for turn in first["conversations"]] == [asked + "\n<image>", told]
    assert second["conversations"][0]["value"] == asked.replace("N/A", "See.")
    assert [question.image for question in ScienceQa().read(tmp_path / f"llava_val_{form}.json")][0] == "7/image.png"


def test_convert_to_llava_refuses_unknown_formats(save, script, command, tmp_path):
    save("problems.json", {"7": PROBLEM})
    save("pid_splits.json", {"val": ["7"]})
    for form in ("QCM", "QC-A", "QQCM-A", "QCM-X"):
        argv = ["--base-dir", tmp_path, "--split", "val", "--prompt-format", form]
        status, _, err = command(script("convert_sqa_to_llava"), *argv)
        assert status == 1 and f"prompt format {form!r}: expected" in err
