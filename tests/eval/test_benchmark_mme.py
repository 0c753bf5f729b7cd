"""MME: converter and scores, against golden runs of the published converter and calculation."""

import json

import pytest

from apet.eval.benchmarks.mme import RELEASE, Mme
from llava.eval import eval_mme


@pytest.fixture
def case(golden):
    (found,) = golden("mme")["cases"]
    return found


@pytest.fixture
def folder(case, save, tmp_path):
    """An MME folder with ground truth and the answers of experiment `toy`."""
    for name, text in case["files"]["gt_txt"].items():
        save(name, text)
    save("answers/toy.jsonl", case["files"]["answers/toy.jsonl"])
    return tmp_path


def results(folder, experiment="toy"):
    return folder / "eval_tool" / "answers" / experiment


def test_converter_and_scores_are_the_published_ones(case, folder, script, command, monkeypatch):
    monkeypatch.chdir(folder)
    assert command(script("convert_answer_to_mme"), "--experiment", "toy") == (0, "", "")
    written = {path.stem: path.read_text() for path in results(folder).iterdir()}
    assert written == case["converted_txt"]
    argv = ["--results_dir", results(folder), "--output-json", folder / "s.json"]
    assert command(eval_mme.main, *argv) == (0, case["stdout"], "")
    saved = json.loads((folder / "s.json").read_text())
    assert saved["details"]["scores"] == case["scores"]
    assert (saved["value"], saved["details"]["cognition"]) == (case["perception"], case["cognition"])
    assert saved["n_questions"] == len(saved["per_sample"]) == len(case["files"]["answers/toy.jsonl"])


@pytest.mark.parametrize("layout", ["{c}/questions_answers_YN/{f}", "MME_Benchmark/{c}/{f}"])
def test_other_layouts_of_the_ground_truth(case, save, script, command, tmp_path, layout):
    for name, text in case["files"]["gt_txt"].items():
        category, file = name.split("/")[1], name.split("/")[-1]
        save(f"{RELEASE}/{layout.format(c=category, f=file)}", text)
    save("answers/toy.jsonl", case["files"]["answers/toy.jsonl"])
    assert command(script("convert_answer_to_mme"), "--experiment", "toy", "--dir", tmp_path)[0] == 0
    assert Mme().score(results_dir=results(tmp_path)).value == case["perception"]


@pytest.mark.parametrize("text", ["Yes\tno", "Yes\nno", "Yes\r\nno"])
def test_tabs_and_line_ends_in_answers_do_not_break_the_table(golden, case, folder, save, script, command, text):
    assert golden("mme")["answer_with_tab"]["exit_code"] == golden("mme")["answer_with_newline"]["exit_code"] == 1
    rows = case["files"]["answers/toy.jsonl"]
    assert rows[0]["text"] == "Yes"  # so that the score stays as it is
    save("answers/toy.jsonl", [{**rows[0], "text": text}, *rows[1:]])
    assert command(script("convert_answer_to_mme"), "--experiment", "toy", "--dir", folder)[0] == 0
    assert Mme().score(results_dir=results(folder)).details["scores"] == case["scores"]


def test_broken_answers_are_refused_by_the_converter(golden, case, folder, save, script, command):
    rows = case["files"]["answers/toy.jsonl"]
    assert golden("mme")["odd_number_of_answers"]["exit_code"] == 1
    for content, message in [
        (rows[:-1], "no answer for 1 of the 112 questions"),
        ([*rows, rows[0]], "answered twice, at 1 and 113"),
        ([*rows, {**rows[0], "prompt": "Is it so?"}], "1 questions that .* does not have: 'existence/0000.txt"),
        ([{**rows[0], "question_id": "0000.jpg"}], "line 1: question_id '0000.jpg' is no path"),
        ("", "is empty"),
    ]:
        save("answers/toy.jsonl", content)
        status, out, err = command(script("convert_answer_to_mme"), "--experiment", "toy", "--dir", folder)
        assert (status, out) == (1, "") and not results(folder).exists()
        with pytest.raises(ValueError, match=message):
            raise ValueError(err)
    save("answers/toy.jsonl", [*rows, {**rows[0]}])
    argv = ["--experiment", "toy", "--dir", folder, "--duplicates", "last"]
    assert command(script("convert_answer_to_mme"), *argv)[0] == 0


def test_broken_ground_truth(folder, save, script, command):
    save(f"{RELEASE}/count/0000.txt", "no label here\n")
    status, _, err = command(script("convert_answer_to_mme"), "--experiment", "toy", "--dir", folder)
    assert status == 1 and "0000.txt line 1: expected a question and Yes or No, got 'no label here'" in err
    status, _, err = command(script("convert_answer_to_mme"), "--experiment", "toy", "--dir", folder / "answers")
    assert status == 1 and "has no ground truth" in err


def test_broken_result_tables(case, save, command):
    for category, text in case["converted_txt"].items():
        folder = save(f"res/{category}.txt", text).parent
    good = case["converted_txt"]["count"]
    lines = good.splitlines(keepends=True)
    for text, message in [
        ("", "count.txt is empty"),
        ("".join(lines[:-1]), "count.txt has 7 lines; every picture has two"),
        ("".join(lines[1:] + lines[:1]), "count.txt lines 1 and 2: a pair must be of one picture"),
        (good.replace("\t", " ", 1), "count.txt line 1: expected file, question"),
        (good.replace("\tYes\t", "\tJa\t", 1), "count.txt line 1: expected file, question"),
    ]:
        save("res/count.txt", text)
        with pytest.raises(ValueError, match=message):
            Mme().score(results_dir=folder)
    (folder / "count.txt").unlink()
    status, out, err = command(eval_mme.main, "--results_dir", folder)
    assert (status, out) == (1, "") and "has no 'count.txt'" in err


def test_a_part_of_the_categories_is_scored_only_on_request(tmp_path):
    lines = "a.txt\tIs it? Please answer yes or no.\tYes\tyes\na.txt\tIs it not? Please answer yes or no.\tNo\tyes\n"
    (tmp_path / "count.txt").write_text(lines)
    with pytest.raises(ValueError, match="--present-only"):
        Mme().score(results_dir=tmp_path)
    score = Mme().score(results_dir=tmp_path, present_only=True)
    assert score.value == 50.0 and score.metric == "perception, 1 of 14 categories"
    assert score.report.endswith("not MME scores\n")
    (tmp_path / "count.txt").unlink()
    with pytest.raises(ValueError, match="all 14 files"):
        Mme().score(results_dir=tmp_path, present_only=True)
