"""POPE: splits, mean F1 and the join of answers to labels, against golden runs of the upstream scorer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from apet.eval.benchmarks.pope import Pope
from llava.eval import eval_pope


@pytest.fixture
def case(golden, save, tmp_path):
    """`case(name)` -> (golden case, keyword arguments of score)."""

    def load(name, labels=None):
        found = next(case for case in golden("pope")["cases"] if case["name"] == name)
        for file, rows in (labels or found["files"]["coco"]).items():
            save(f"coco/{file}", "".join(json.dumps(row) + "\n" for row in rows))
        files = {
            "annotation_dir": tmp_path / "coco",
            "question_file": save("llava_pope_test.jsonl", found["files"]["llava_pope_test.jsonl"]),
            "result_file": save("ans.jsonl", found["files"]["ans.jsonl"]),
        }
        return found, files

    return load


def argv(files):
    return [word for key, path in files.items() for word in (f"--{key.replace('_', '-')}", path)]


def test_numbers_and_blocks_are_upstreams(case, command):
    found, files = case("edge_texts")
    score = Pope().score(**files)
    for split, numbers in found["per_category"].items():
        assert score.details["splits"][split] == numbers
    assert score.details["mean_F1"] == found["mean_F1"]
    assert score.value == 100 * found["mean_F1"]
    assert list(score.details["splits"]) == ["random", "popular", "adversarial"]
    status, out, err = command(eval_pope.main, *argv(files))
    assert (status, err) == (0, "")
    blocks = out.split("Category: ")[1:]
    assert "Category: " + blocks[2].split("Mean of")[0] == found["stdout_sample"].split("Category: random")[0]
    assert out.endswith("Mean of random, popular, adversarial: F1 60.14, accuracy 55.71\n")


def test_per_sample_correctness_gives_the_accuracies(case):
    _, files = case("edge_texts")
    score = Pope().score(**files)
    rows = [json.loads(line) for line in files["question_file"].read_text().splitlines()]
    assert set(score.per_sample) == {str(row["question_id"]) for row in rows}
    for split, numbers in score.details["splits"].items():
        right = [score.per_sample[str(row["question_id"])] for row in rows if row["category"] == split]
        assert sum(right) / len(right) == numbers["Accuracy"]


def test_order_of_answers_and_labels_does_not_matter(case, save):
    found, files = case("edge_texts")
    expected = Pope().score(**files)
    shuffled = {name: rows[::-1] for name, rows in found["files"]["coco"].items()}
    case("edge_texts", labels=shuffled)
    files["result_file"] = save("reversed.jsonl", found["files"]["ans.jsonl"][::-1])
    assert Pope().score(**files).details == expected.details


def test_no_positive_prediction_gives_zero_with_a_note(case):
    found, files = case("all_no_zero_division")
    score = Pope().score(**files)
    numbers = score.details["splits"]["random"]
    assert numbers["TP_FP_TN_FN"] == found["per_category"]["random"]["TP_FP_TN_FN"]
    assert numbers["F1 score"] == 0 and numbers["Accuracy"] == pytest.approx(1 / 3)
    assert "no answer reads as yes" in score.report
    assert "not in the mean: popular, adversarial" in score.report


def test_a_missing_answer_is_an_error_on_the_command_line(case):
    _, files = case("one_answer_missing_shifts_labels")
    command = [sys.executable, "-m", "llava.eval.eval_pope", *map(str, argv(files))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 1 and done.stdout == ""
    assert "no answer for 1 of the 20 questions" in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_imange_joins_image_and_stray_files_are_ignored(case, save):
    found, _ = case("edge_texts")
    labels = {
        name: [{**row, "text": row["text"].replace("in the image", "in the imange")} for row in rows]
        for name, rows in found["files"]["coco"].items()
    }
    _, files = case("edge_texts", labels=labels)
    save("coco/.DS_Store", "x")
    save("coco/notes.txt", "x")
    assert Pope().score(**files).details["mean_F1"] == found["mean_F1"]


def test_labels_without_a_question_are_said_and_not_scored(case):
    """The label file of the random split has 3,000 lines in newer releases, the question file 2,910."""
    found, _ = case("edge_texts")
    labels = dict(found["files"]["coco"])
    extra = {"question_id": 999, "image": "other.jpg", "text": "Is there a cat in the image?", "label": "yes"}
    labels["coco_pope_random.json"] = [*labels["coco_pope_random.json"], extra]
    _, files = case("edge_texts", labels=labels)
    score = Pope().score(**files)
    assert score.details["mean_F1"] == found["mean_F1"]
    assert "coco_pope_random.json: 1 of 25 labels have no question" in score.report


def test_broken_inputs(case, save, tmp_path):
    found, files = case("edge_texts")
    answers = found["files"]["ans.jsonl"]
    questions = found["files"]["llava_pope_test.jsonl"]
    broken = [
        ({"result_file": save("a1.jsonl", "")}, "a1.jsonl is empty"),
        ({"result_file": save("a2.jsonl", [*answers, answers[0]])}, "'1' is answered twice, at 1 and 76"),
        ({"result_file": save("a3.jsonl", [*answers, {**answers[0], "question_id": -1}])}, "does not have: '-1'"),
        ({"result_file": save("a4.jsonl", [{"question_id": -1, "text": "x"}])}, "none of the 75 questions"),
        ({"question_file": save("q1.jsonl", [*questions, questions[0]])}, "line 76: question_id '1' is already on"),
        ({"question_file": save("q2.jsonl", [{**q, "category": "x"} for q in questions])}, "questions .* are of 'x'"),
        ({"question_file": save("q3.jsonl", [{**q, "image": "z.jpg"} for q in questions])}, "different POPE versions"),
        ({"annotation_dir": save("empty/x", "").parent}, "for the splits none, but"),
    ]
    for change, message in broken:
        with pytest.raises(ValueError, match=message):
            Pope().score(**{**files, **change})
    with pytest.raises(OSError):
        Pope().score(**{**files, "annotation_dir": tmp_path / "nowhere"})


def test_labels_must_be_yes_or_no_and_agree(case):
    found, _ = case("edge_texts")
    for change, message in [({"label": "maybe"}, "line 2: label 'maybe'"), ({"label": "yes"}, "carries both labels")]:
        rows = found["files"]["coco"]["coco_pope_adversarial.json"]
        assert rows[0]["label"] == "no"
        labels = {**found["files"]["coco"], "coco_pope_adversarial.json": [rows[0], {**rows[0], **change}, *rows[1:]]}
        _, files = case("edge_texts", labels=labels)
        with pytest.raises(ValueError, match=message):
            Pope().score(**files)
