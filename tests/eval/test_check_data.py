"""What is said about data folders and checkpoints, the exit status, and that data/README.md is of the same table."""

import base64
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from apet.eval import check_data, data_check
from apet.eval.benchmarks import available_benchmarks
from apet.eval.data_check import DATA, check_benchmark, complete, find_data
from apet.eval.recipes import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests/golden/end_to_end"
QUESTIONS = [{"question_id": index, "image": f"{index // 2}.jpg", "text": f"Question {index}?"} for index in range(4)]


@pytest.fixture
def check(command):
    """`check("--data", folder, ...)` -> (status, stdout, stderr)."""
    return lambda *argv: command(check_data.main, *argv)


@pytest.fixture
def gqa(save, tmp_path):
    """A small GQA folder; returns the folder that DATA names."""
    save("eval/gqa/llava_gqa_testdev_balanced.jsonl", QUESTIONS)
    save("eval/gqa/testdev_balanced_questions.json", {str(index): {} for index in range(4)})
    pictures(tmp_path / "eval/gqa/images", "0.jpg", "1.jpg")
    return tmp_path / "eval"


def pictures(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / name)


def states(name: str, root: Path) -> list[str]:
    return [finding.state for finding in check_benchmark(find_data(name), root)]


def test_a_small_folder_is_complete_only_if_size_does_not_matter(gqa, check):
    status, out, _ = check("--data", gqa, "--benchmarks", "gqa")
    assert status == 1 and "4 rows, the published file has 12,578" in out and "not complete: gqa" in out
    status, out, _ = check("--data", gqa, "--benchmarks", "gqa", "--any-size")
    assert status == 0 and "complete: gqa" in out and "2 images of 4 questions" in out


def test_the_published_size_is_complete(gqa, monkeypatch):
    entry = find_data("gqa")
    small = replace(entry, files=tuple(replace(file, rows=(9, 4)) for file in entry.files))
    findings = check_benchmark(small, gqa)
    assert [finding.state for finding in findings] == ["ok", "ok", "ok"] and complete(findings)
    assert findings[0].found == "4 rows"


def test_a_missing_file_is_named_with_its_source(gqa, check):
    (gqa / "gqa/testdev_balanced_questions.json").unlink()
    status, out, _ = check("--data", gqa, "--benchmarks", "gqa", "--any_size")
    line = next(line for line in out.splitlines() if "testdev_balanced_questions.json" in line)
    assert status == 1 and "missing" in line and "GQA website" in line


def test_missing_images_are_counted_and_named(gqa):
    (gqa / "gqa/images/1.jpg").unlink()
    finding = check_benchmark(find_data("gqa"), gqa)[-1]
    assert (finding.state, finding.found) == ("incomplete", "1 of 2 missing: '1.jpg'")


def test_either_image_folder_will_do(gqa):
    (gqa / "gqa/data").mkdir()
    (gqa / "gqa/images").rename(gqa / "gqa/data/images")
    assert states("gqa", gqa)[-1] == "ok"


@pytest.mark.parametrize("text", ['{"question_id": 1, "image"', "", "[]", '{"question_id": 1}\n'], ids=repr)
def test_a_broken_question_file_is_found(gqa, text):
    (gqa / "gqa/llava_gqa_testdev_balanced.jsonl").write_text(text)
    assert "broken" in states("gqa", gqa)


def test_videos_are_looked_for_with_every_extension(save, tmp_path):
    asked = [{"video_name": name, "question": "x?", "question_id": name} for name in "abc"]
    folder = "eval/GPT_Zero_Shot_QA/Activitynet_Zero_Shot_QA"
    save(f"{folder}/test_q.json", asked)
    save(f"{folder}/test_a.json", [{"answer": "x"}] * 3)
    for name in ("v_a.mp4", "v_b.mkv", "c.mp4"):
        save(f"{folder}/all_test/{name}", "")
    finding = check_benchmark(find_data("activitynet"), tmp_path / "eval")[-1]
    assert (finding.state, finding.found) == ("incomplete", "1 of 3 missing: 'v_c'")
    save(f"{folder}/all_test/v_c.avi", "")
    finding = check_benchmark(find_data("activitynet"), tmp_path / "eval")[-1]
    assert (finding.state, finding.found) == ("ok", "3 videos of 3 questions")


def test_nothing_there(tmp_path, check):
    status, out, _ = check("--data", tmp_path)
    scripted = [entry for entry in DATA if entry.script]
    assert status == 1 and out.count("| missing |") == sum(len(entry.files) + bool(entry.images) for entry in scripted)
    assert "complete: none" in out


def test_json_lines_named_json_and_two_published_sizes(save, tmp_path):
    save("eval/pope/llava_pope_test.jsonl", [row | {"category": "random"} for row in QUESTIONS])
    for split in ("random", "popular", "adversarial"):
        text = "".join(
            json.dumps({"image": "0.jpg", "text": str(number), "label": "yes"}) + "\n" for number in range(3000)
        )
        save(f"eval/pope/coco/coco_pope_{split}.json", text)
    pictures(tmp_path / "eval/pope/val2014", "0.jpg", "1.jpg")
    assert states("pope", tmp_path / "eval") == ["other size", "ok", "ok", "ok", "ok"]


def test_scienceqa_images_lie_in_folders_of_their_question(save, tmp_path):
    turns = [{"from": "human", "value": "<image>\nWhich?\nA. x"}]
    asked = [{"id": "7", "image": "image.png", "conversations": turns}, {"id": "8", "conversations": turns}]
    save("eval/scienceqa/llava_test_CQM-A.json", asked)
    save("eval/scienceqa/problems.json", {"7": {}, "8": {}})
    save("eval/scienceqa/pid_splits.json", {"test": ["7", "8"]})
    pictures(tmp_path / "eval/scienceqa/images/test", "7/image.png")
    assert states("sqa", tmp_path / "eval") == ["other size", "other size", "ok", "ok"]
    assert find_data("scienceqa") is find_data("sqa")


@pytest.mark.parametrize("deeper", ["", "MME_Benchmark/"])
def test_mme_counts_ground_truth_in_all_layouts(save, tmp_path, deeper):
    release = f"eval/MME/MME_Benchmark_release_version/{deeper}"
    save("eval/MME/llava_mme.jsonl", [{"question_id": "color/1.png", "image": "color/1.png", "text": "Red?"}])
    save(f"{release}color/1.txt", "Red?\tYes\nBlue?\tNo\n")
    save(f"{release}posters/questions_answers_YN/2.txt", "Red?\tYes\n\n")
    pictures(tmp_path / release, "color/1.png")
    findings = check_benchmark(find_data("mme"), tmp_path / "eval")
    assert findings[1].found.startswith("3 rows") and findings[2].state == "ok"


def test_mmbench_holds_its_images(save, tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "JPEG")
    cells = ["5", "Which?", "", "x", "y", "", "", base64.b64encode(picture.getvalue()).decode()]
    save(
        "eval/mmbench/mmbench_dev_20230712.tsv",
        "index question hint A B C D image".replace(" ", "\t") + "\n" + "\t".join(cells),
    )
    assert states("mmbench", tmp_path / "eval") == ["other size"]
    save("eval/mmbench/mmbench_dev_20230712.tsv", "index\tquestion\n1\tx\n")
    assert states("mmbench", tmp_path / "eval") == ["broken"]


class TestCheckpoint:
    @pytest.fixture
    def model(self, tmp_path) -> Path:
        for name in ("llava-v1.5-tiny", "clip-tiny-patch14-336"):
            shutil.copytree(TINY / name, tmp_path / name)
        return tmp_path / "llava-v1.5-tiny"

    def test_complete(self, model, check):
        status, out, _ = check("--benchmarks", "", "--model", model)
        assert status == 0 and f"complete: {model}" in out and "2 shards" in out and "clip-tiny-patch14-336" in out

    @pytest.mark.parametrize(
        ("gone", "words"),
        [
            ("pytorch_model-00002-of-00002.bin", "without pytorch_model-00002-of-00002.bin"),
            ("tokenizer.model", "tokenizer.model"),
            ("tokenizer_config.json", "tokenizer_config.json"),
            ("config.json", "config.json"),
            ("../clip-tiny-patch14-336/config.json", "was not found"),
        ],
    )
    def test_what_is_gone_is_named(self, model, check, gone, words):
        (model / gone).unlink()
        status, out, _ = check("--benchmarks", "", "--model", model)
        assert status == 1 and "missing" in out and words in out

    def test_no_folder_and_broken_config(self, model, check, tmp_path):
        assert check("--benchmarks", "", "--model", tmp_path / "nowhere")[0] == 1
        (model / "config.json").write_text("{")
        status, out, _ = check("--benchmarks", "", "--model", model)
        assert status == 1 and "broken" in out


def test_an_unknown_benchmark_is_answered_with_the_known(check):
    status, _, error = check("--benchmarks", "gqa,pop")
    assert status == 1 and "'pop'" in error and "pope" in error


def test_the_readme_names_every_file():
    written = (ROOT / "data/README.md").read_text(encoding="utf-8")
    for entry in DATA:
        for file in entry.files:
            assert f"`{entry.folder}/{file.path}`" in written


def test_the_table_covers_every_benchmark_and_script():
    assert {entry.benchmark or entry.name for entry in DATA} == set(available_benchmarks()) - {"vqa"}
    scripts = {name for family in FAMILIES.values() for name in family.benchmarks}
    assert {entry.name for entry in DATA if entry.script} == scripts
    assert {file.kind for entry in DATA for file in entry.files} == set(data_check._COUNTERS)
