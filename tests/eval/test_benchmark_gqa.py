"""GQA: converter, report and refusals, against the golden runs of the public evaluator."""

import json

import pytest

from apet.eval.benchmarks.gqa import Gqa
from llava.eval import eval_gqa

CASES = ["plain", "duplicate_answer_last_wins", "missing_balanced_prediction", "missing_unbalanced_prediction",
         "no_global_group"]  # fmt: skip


@pytest.fixture
def case(golden, save):
    """`case(name)` -> (golden case, questions file, answers file)."""

    def load(name):
        found = next(case for case in golden("gqa")["cases"] if case["name"] == name)
        questions = save("testdev_balanced_questions.json", found["files"]["testdev_balanced_questions.json"])
        return found, questions, save("merge.jsonl", found["files"]["merge.jsonl"])

    return load


def test_every_golden_case_is_known(golden):
    assert [case["name"] for case in golden("gqa")["cases"]] == CASES


@pytest.mark.parametrize("name", CASES)
def test_converter(case, script, command, tmp_path, name):
    found, _, answers = case(name)
    status, _, _ = command(script("convert_gqa_for_eval"), "--src", answers, "--dst", tmp_path / "p.json")
    assert status == 0
    assert json.loads((tmp_path / "p.json").read_text()) == found["predictions_json"]


@pytest.mark.parametrize("name", ["plain", "duplicate_answer_last_wins"])
def test_report_is_the_official_one(case, save, command, monkeypatch, tmp_path, name):
    found, _, _ = case(name)
    save("testdev_balanced_predictions.json", found["predictions_json"])
    monkeypatch.chdir(tmp_path)
    argv = ["--tier", "testdev_balanced", "--duplicates", "last", "--output-json", "s.json"]
    assert command(eval_gqa.main, *argv) == (0, found["report"], "")
    saved = json.loads((tmp_path / "s.json").read_text())
    assert {key: round(value, 2) for key, value in saved["details"]["summary"].items()} == found["summary"]
    assert saved["metric"] == "accuracy" and round(saved["value"], 2) == found["summary"]["Accuracy"]
    assert saved["n_questions"] == len(saved["per_sample"])
    assert 100 * sum(saved["per_sample"].values()) / saved["n_questions"] == pytest.approx(saved["value"])


def test_answers_file_can_be_scored_without_converting(case):
    found, questions, answers = case("plain")
    assert Gqa().score(questions=questions, predictions=answers).report == found["report"]


def test_a_repeated_answer_is_refused_by_default(case):
    _, questions, answers = case("duplicate_answer_last_wins")
    with pytest.raises(ValueError, match="answered twice.*--duplicates last"):
        Gqa().score(questions=questions, predictions=answers)


def test_a_missing_answer_is_named(case, command):
    _, questions, answers = case("missing_balanced_prediction")
    status, out, err = command(eval_gqa.main, "--questions", questions, "--predictions", answers)
    assert (status, out) == (1, "")
    assert "no answer for 1 of the 8 questions" in err and err.count("\n") == 1


def test_an_unbalanced_question_need_not_be_answered(case):
    _, questions, answers = case("missing_unbalanced_prediction")
    score = Gqa().score(questions=questions, predictions=answers)
    balanced = [row for row in json.loads(questions.read_text()).values() if row["isBalanced"]]
    assert score.n_questions == len(balanced)


def test_distribution_without_global_groups_is_undefined_not_a_crash(case):
    _, questions, answers = case("no_global_group")
    score = Gqa().score(questions=questions, predictions=answers)
    assert score.details["summary"]["Distribution"] is None
    assert "Distribution: n/a" in score.report


def test_broken_inputs(case, save, command):
    _, questions, answers = case("plain")
    rows = json.loads(questions.read_text())
    key = next(iter(rows))
    unbalanced = {key: {**rows[key], "isBalanced": False}}
    no_types = {key: {**rows[key], "types": {}}}
    for content, message in [
        ("{", "is not JSON"),
        ("[]", "expected a JSON object"),
        (unbalanced, "none of the 1 questions has isBalanced"),
        (no_types, f"question '{key}' types: no 'structural' and no 'semantic'"),
    ]:
        with pytest.raises(ValueError, match=message):
            Gqa().score(questions=save("bad.json", content), predictions=answers)
    other = save("other.json", [{"questionId": "9", "prediction": "x"}])
    with pytest.raises(ValueError, match="none of the .* another split"):
        Gqa().score(questions=questions, predictions=other)
    with pytest.raises(ValueError, match="entry 1: no 'prediction'"):
        Gqa().score(questions=questions, predictions=save("p.json", [{"questionId": "9"}]))
    status, _, err = command(eval_gqa.main, "--questions", questions, "--predictions", "nowhere.json")
    assert status == 1 and "nowhere.json" in err
    status, _, err = command(eval_gqa.main, "--questions", questions, "--predictions", answers, "--grounding")
    assert status == 1 and "--grounding" in err
