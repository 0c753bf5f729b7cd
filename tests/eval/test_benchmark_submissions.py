"""VizWiz, VQAv2, MM-Vet, SEED-Bench and LLaVA-Bench: uploads and scores, against golden runs of the published tools."""

import json

import pytest

from apet.eval import benchmarks
from llava.eval import eval_vqav2, summarize_gpt_review


def submission_case(golden, name):
    return next(case for case in golden("submission_converters")["cases"] if case["name"] == name)


# --- VizWiz -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def vizwiz(golden, save, tmp_path):
    files = submission_case(golden, "vizwiz")["files"]
    annotations = save("llava_test.jsonl", files["llava_test.jsonl"])
    answers = save("a.jsonl", files["answers_raw_text"])
    return {"--annotation-file": annotations, "--result-file": answers, "--result-upload-file": tmp_path / "up/u.json"}


def flat(flags):
    return [word for pair in flags.items() for word in pair]


def test_vizwiz_upload(vizwiz, golden, script, command):
    found = submission_case(golden, "vizwiz")
    status, out, err = command(script("convert_vizwiz_for_submission"), *flat(vizwiz))
    assert (status, out) == (0, found["stdout"])
    assert err == "note: 1 answers are followed by another to the same question and left out\n"
    assert json.loads(vizwiz["--result-upload-file"].read_text()) == found["upload"]


def test_vizwiz_missing_answer_writes_nothing(vizwiz, golden, script, command, save):
    found = submission_case(golden, "vizwiz_missing_answer")
    lines = vizwiz["--result-file"].read_text().splitlines(keepends=True)
    missing = f'"question_id": {found["missing_question_id"]},'
    vizwiz["--result-file"] = save("b.jsonl", "".join(line for line in lines if missing not in line))
    status, out, err = command(script("convert_vizwiz_for_submission"), *flat(vizwiz))
    assert (status, out) == (1, "") and "no answer for 1 of the 14 questions" in err
    assert not vizwiz["--result-upload-file"].exists()


# --- VQAv2 ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def vqav2(golden, save, tmp_path):
    found = submission_case(golden, "vqav2")
    for name, content in found["files"].items():
        if name.endswith(".jsonl"):
            path = save(name, content)
            if name.endswith("merge.jsonl"):
                path.write_text(path.read_text() + found["files"]["extra_bad_line"] + "\n")
    return ["--dir", tmp_path, "--ckpt", "toy", "--split", "SPL"]


def test_vqav2_upload(vqav2, golden, script, command, tmp_path):
    found = submission_case(golden, "vqav2")
    status, out, err = command(script("convert_vqav2_for_submission"), *vqav2)
    assert (status, out) == (0, found["stdout"])
    assert "7 of 14 questions have no answer and go in empty" in err and "SPL.jsonl is not there" in err
    assert json.loads((tmp_path / found["upload_path"]).read_text()) == found["upload"]


def test_vqav2_split_file_catches_lost_chunks(vqav2, golden, save, script, command, tmp_path):
    rows = submission_case(golden, "vqav2")["files"]["llava_vqav2_mscoco_test2015.jsonl"]
    save("SPL.jsonl", rows[::2])
    status, _, err = command(script("convert_vqav2_for_submission"), *vqav2)
    assert status == 0 and "is not there" not in err
    save("SPL.jsonl", rows[:3])
    status, _, err = command(script("convert_vqav2_for_submission"), *vqav2)
    assert status == 1 and "no answer for 1 of the 3 questions" in err
    save("answers/SPL/toy/merge.jsonl", [{"question_id": -1, "text": "x"}])
    (tmp_path / "SPL.jsonl").unlink()
    status, _, err = command(script("convert_vqav2_for_submission"), *vqav2)
    assert status == 1 and "answers none of the 14 questions" in err


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_vqav2_local_accuracy(golden, save, command, tmp_path, suffix):
    found = golden("vqa_accuracy")
    annotations = save("val.json", {"annotations": found["annotations"]})
    key = "text" if suffix == "jsonl" else "answer"
    rows = [{"question_id": row["question_id"], key: row["answer"]} for row in found["results"]]
    argv = ["--annotation-file", annotations, "--result-file", save(f"r.{suffix}", rows)]
    status, out, _ = command(eval_vqav2.main, *argv, "--output-json", tmp_path / "s.json")
    assert status == 0 and out.startswith("Overall accuracy: 58.33% (18 questions)\n")
    saved = json.loads((tmp_path / "s.json").read_text())
    for name in ("overall", "perQuestionType", "perAnswerType"):
        assert saved["details"][name] == found[name]
    assert {key: round(100 * value, 2) for key, value in saved["per_sample"].items()} == found["per_question"]


def test_vqav2_normalises_only_where_annotators_disagree(golden, save):
    row = {**golden("vqa_accuracy")["annotations"][0], "question_id": 1}
    score = benchmarks.get_benchmark("vqav2").score
    for truths, expected in [(["Yes."] * 10, 0), (["Yes."] * 9 + ["no"], 1)]:
        answers = [{"answer": truth} for truth in truths]
        annotations = save("val.json", {"annotations": [{**row, "answers": answers}]})
        results = save("r.json", [{"question_id": 1, "answer": "yes"}])
        assert score(annotation_file=annotations, result_file=results).per_sample["1"] == expected


def test_vqav2_broken_inputs(golden, save):
    found = golden("vqa_accuracy")
    score = benchmarks.get_benchmark("vqav2").score
    annotations = save("val.json", {"annotations": found["annotations"]})
    for content, message in [
        ({}, "expected a non-empty JSON list"),
        ([{"question_id": 1}], "entry 1: no 'answer'"),
        (found["results"][1:], "no answer for 1 of the 18"),
        ([*found["results"], found["results"][0]], "answered twice, at 1 and 19"),
    ]:
        with pytest.raises(ValueError, match=message):
            score(annotation_file=annotations, result_file=save("r.json", content))
    for content, message in [
        ({"annotations": []}, 'non-empty list under "annotations"'),
        ({"annotations": found["annotations"][:1] * 2}, "1 question ids are there twice"),
    ]:
        with pytest.raises(ValueError, match=message):
            score(annotation_file=save("bad.json", content), result_file=save("r.json", found["results"]))


# --- MM-Vet and SEED --------------------------------------------------------------------------------------------------


def test_mmvet(golden, save, script, command, tmp_path):
    found = golden("mmvet_seed_llavabench")["mmvet"]
    argv = ["--src", save("a.jsonl", found["answers"]), "--dst", tmp_path / "o.json"]
    assert command(script("convert_mmvet_for_eval"), *argv) == (0, "", "")
    written = json.loads((tmp_path / "o.json").read_text())
    assert written == found["out"] and list(written) == list(found["out"])
    argv[1] = save("twice.jsonl", found["answers"][:1] * 2)
    status, _, err = command(script("convert_mmvet_for_eval"), *argv)
    assert status == 1 and "answered twice" in err


@pytest.fixture
def seed(golden, save, tmp_path):
    found = golden("mmvet_seed_llavabench")["seed"]
    return {
        "--annotation-file": save("SEED-Bench.json", found["files"]["SEED-Bench.json"]),
        "--result-file": save("merge.jsonl", found["files"]["merge.jsonl"]),
        "--result-upload-file": tmp_path / "up.jsonl",
    }


def test_seed(golden, seed, script, command):
    found = golden("mmvet_seed_llavabench")["seed"]
    assert command(script("convert_seed_for_submission"), *flat(seed)) == (found["exit_code"], found["stdout"], "")
    lines = seed["--result-upload-file"].read_text().splitlines()
    assert [json.loads(line) for line in lines] == found["upload"]


def test_seed_broken_inputs(golden, seed, save, script, command):
    content = golden("mmvet_seed_llavabench")["seed"]["files"]
    answers, annotations = content["merge.jsonl"], content["SEED-Bench.json"]
    for flag, path, message in [
        ("--result-file", save("a.jsonl", answers[1:]), "no answer for 1 of the 12"),
        ("--result-file", save("b.jsonl", [*answers, answers[0]]), "answered twice"),
        ("--annotation-file", save("c.json", {"questions": []}), "expected a JSON object with"),
        (
            "--annotation-file",
            save("d.json", {**annotations, "questions": annotations["questions"] * 2}),
            "12 question",
        ),
    ]:
        status, out, err = command(script("convert_seed_for_submission"), *flat({**seed, flag: path}))
        assert (status, out) == (1, "") and message in err
    images = [row for row in annotations["questions"] if row["data_type"] == "image"]
    images = [{**row, "question_id": int(row["question_id"])} for row in images if row["question_id"].isdigit()]
    ids = {str(row["question_id"]) for row in images}
    score = benchmarks.get_benchmark("seed").score(
        annotation_file=save("images.json", {**annotations, "questions": images}),
        result_file=save("images.jsonl", [row for row in answers if str(row["question_id"]) in ids]),
    )
    assert "video accuracy: n/a" in score.report and score.n_questions == len(images)


# --- LLaVA-Bench ------------------------------------------------------------------------------------------------------


def test_llava_bench_summary(golden, save, command, tmp_path):
    found = golden("mmvet_seed_llavabench")["llavabench_summary"]
    path = save("reviews/toy.jsonl", found["reviews"])
    assert command(summarize_gpt_review.main, "-f", path, "--output-json", tmp_path / "s.json") == (
        0,
        found["stdout"],
        "",
    )
    assert json.loads((tmp_path / "s.json").read_text())["value"] == 100.0
    assert command(summarize_gpt_review.main, "-d", path.parent)[:2] == (0, found["stdout"])
    save("reviews/other.jsonl", found["reviews"])
    assert command(summarize_gpt_review.main, "-d", path.parent, "-i", "other")[:2] == (0, found["stdout"])
    assert command(summarize_gpt_review.main, "-d", path.parent, "-s", "toy")[:2] == (0, found["stdout"])
    status, _, err = command(summarize_gpt_review.main, "-d", path.parent, "-v", "v9")
    assert status == 1 and "no review file is left" in err
    status, _, err = command(summarize_gpt_review.main)
    assert status == 1 and "--files" in err


def test_failed_reviews_are_named(golden, save, command):
    reviews = golden("mmvet_seed_llavabench")["llavabench_summary"]["reviews"]
    path = save("r.jsonl", [reviews[0], {**reviews[1], "tuple": [-1, -1]}, {"question_id": 3}])
    status, out, err = command(summarize_gpt_review.main, "-f", path)
    assert (status, out) == (1, "") and "2 reviews without two marks above zero, on lines 2, 3" in err
