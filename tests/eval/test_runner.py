"""The evaluation loop with an answerer that needs no model: shards, resume, failures, records."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from apet.eval.answerer import Answer
from apet.eval.benchmarks import get_benchmark
from apet.eval.run_record import RunRecord
from apet.eval.runner import RunOptions, merge_chunks, run, split_balanced

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class ShapePreparer:
    """Prepares (text, image size)."""

    def prepare(self, question, images):
        return question.prompt, images[0].size


class ShapeAnswerer:
    """Answers with the picture's size; counts the batches it got."""

    model_id, device = "shape", "cpu"

    def __init__(self, delay: float = 0.0, **settings) -> None:
        self.preparer, self.batches, self.delay, self.extra = ShapePreparer(), [], delay, settings

    def answer(self, prepared):
        self.batches.append(len(prepared))
        time.sleep(self.delay)
        return [Answer(f"{text[:9]} is {size[0]}x{size[1]}", 3, 64.0) for text, size in prepared]

    def settings(self):
        return {"model_path": "shape", **self.extra}


@pytest.fixture
def data(tmp_path) -> Path:
    """Ten questions over ten pictures; question lengths vary."""
    (tmp_path / "images").mkdir()
    with open(tmp_path / "questions.jsonl", "w") as file:
        for index in range(10):
            Image.new("RGB", (index + 1, 5)).save(tmp_path / "images" / f"{index}.png")
            row = {
                "question_id": index,
                "image": f"{index}.png",
                "text": f"Picture {index}?" + " long" * (index * 7 % 5),
            }
            file.write(json.dumps(row) + "\n")
    return tmp_path


def options(data: Path, name: str = "answers.jsonl", **changes) -> RunOptions:
    return RunOptions(str(data / "questions.jsonl"), str(data / name), str(data / "images"), **changes)


def answer(data: Path, answerer=None, name: str = "answers.jsonl", **changes) -> list[dict]:
    """Run and read the answers, ids of answers removed."""
    benchmark = get_benchmark("vqa")
    chosen = options(data, name, **changes)
    run(benchmark, answerer or ShapeAnswerer(), chosen, benchmark.read(chosen.question_file))
    return read(data / name)


def read(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    ids = [row.pop("answer_id") for row in rows]
    assert len(set(ids)) == len(ids) and all(len(one) == 22 for one in ids)
    return rows


def test_the_answer_line_is_the_published_one(data):
    answer(data, limit=1)
    line = (data / "answers.jsonl").read_text()
    assert list(json.loads(line)) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert json.loads(line)["metadata"] == {} and line.endswith("\n")


@pytest.mark.parametrize(
    "changes", [{"batch_size": 3}, {"batch_size": 64}, {"num_workers": 2, "batch_size": 4}], ids=str
)
def test_answers_do_not_depend_on_batches_and_workers(data, changes):
    expected = answer(data)
    assert [row["question_id"] for row in expected] == list(range(10))
    assert answer(data, name="other.jsonl", **changes) == expected


@pytest.mark.parametrize("count", [1, 3, 4, 10, 13])
def test_chunks_join_to_the_whole(data, count):
    expected = answer(data)
    paths = [data / f"{count}_{index}.jsonl" for index in range(count)]
    for index, path in enumerate(paths):
        answer(data, name=path.name, num_chunks=count, chunk_idx=index)
    merge_chunks(paths, data / "merge.jsonl")
    assert read(data / "merge.jsonl") == expected
    assert RunRecord.read_finished(data / "merge.jsonl").counts["answers"] == 10


@pytest.mark.parametrize(("items", "chunks"), [(10, 3), (9, 4), (7, 8), (0, 2), (12578, 8)])
def test_chunks_are_balanced(items, chunks):
    parts = split_balanced(range(items), chunks)
    sizes = [len(part) for part in parts]
    assert len(parts) == chunks and sum(sizes) == items and max(sizes) - min(sizes) <= 1
    assert [item for part in parts for item in part] == list(range(items))


@pytest.mark.parametrize(
    "changes",
    [{"num_chunks": 2, "chunk_idx": 2}, {"chunk_idx": -1}, {"batch_size": 0}, {"limit": 0}, {"num_workers": -1}],
)
def test_options_out_of_range_are_named(data, changes):
    with pytest.raises(ValueError, match="--"):
        options(data, **changes)


def test_unfinished_chunks_are_not_joined(data):
    answer(data, name="2_0.jsonl", num_chunks=2, chunk_idx=0)
    with pytest.raises(ValueError, match="2_1"):
        merge_chunks([data / "2_0.jsonl", data / "2_1.jsonl"], data / "merge.jsonl")
    assert not (data / "merge.jsonl").exists()


class TestResume:
    def interrupted(self, data: Path, keep: int, tail: str = "") -> None:
        """Leave the file of a run that was killed after some answers, possibly in the middle of a line."""
        answer(data, batch_size=4)
        record = json.loads((data / "answers.run.json").read_text())
        (data / "answers.run.json").write_text(json.dumps(record | {"status": "running"}))
        lines = (data / "answers.jsonl").read_text().splitlines(keepends=True)
        (data / "answers.jsonl").write_text("".join(lines[5 : 5 + keep]) + tail)

    @pytest.mark.parametrize("tail", ["", '{"question_id": 9, "pro', '{"question_id": 9}'])
    def test_only_what_is_missing_is_answered(self, data, tail):
        expected = answer(data, name="whole.jsonl")
        self.interrupted(data, 3, tail)
        answerer = ShapeAnswerer()
        assert answer(data, answerer, resume=True) == expected
        assert sum(answerer.batches) == 7

    def test_a_complete_file_is_left_alone(self, data):
        answer(data)
        before = (data / "answers.jsonl").read_bytes()
        answerer = ShapeAnswerer()
        answer(data, answerer, resume=True)
        assert not answerer.batches and (data / "answers.jsonl").read_bytes() == before

    def test_with_overwrite_the_file_starts_anew(self, data):
        self.interrupted(data, 3)
        answerer = ShapeAnswerer()
        answer(data, answerer, overwrite=True)
        assert sum(answerer.batches) == 10

    def test_other_settings_are_refused(self, data):
        answer(data)
        with pytest.raises(ValueError, match="temperature: None there, 1 now"):
            answer(data, ShapeAnswerer(temperature=1), resume=True)

    def test_a_changed_question_file_is_refused(self, data):
        answer(data)
        lines = (data / "questions.jsonl").read_text().replace("Picture 3", "Image 3")
        (data / "questions.jsonl").write_text(lines)
        with pytest.raises(ValueError, match="question_file_sha256"):
            answer(data, resume=True)

    def test_answers_without_a_record_are_refused(self, data):
        answer(data)
        (data / "answers.run.json").unlink()
        with pytest.raises(ValueError, match="no record"):
            answer(data, resume=True)

    def test_answers_of_another_chunk_are_refused(self, data):
        answer(data, num_chunks=2, chunk_idx=1)
        with pytest.raises(ValueError, match="not among the questions"):
            answer(data, resume=True, num_chunks=2, chunk_idx=0)

    def test_a_broken_line_in_the_middle_is_named(self, data):
        answer(data)
        lines = (data / "answers.jsonl").read_text().splitlines(keepends=True)
        (data / "answers.jsonl").write_text("".join([lines[0], "{broken\n", *lines[2:]]))
        with pytest.raises(ValueError, match="line 2 is not JSON"):
            answer(data, resume=True)

    def test_kill_loses_and_repeats_nothing(self, data):
        expected = answer(data, name="whole.jsonl")
        program = textwrap.dedent(f"""
            import sys
            sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
            from pathlib import Path
            from test_runner import ShapeAnswerer, answer
            answer(Path({str(data)!r}), ShapeAnswerer(delay=0.2), batch_size=2, resume=True)
        """)
        process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
        target = data / "answers.jsonl"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (target.exists() and target.read_text().count("\n") >= 4):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        written = target.read_text().count("\n")
        assert 4 <= written < 10
        answerer = ShapeAnswerer()
        assert answer(data, answerer, batch_size=2, resume=True) == expected
        assert sum(answerer.batches) == 10 - written


class TestBadImages:
    @pytest.fixture(params=["missing", "truncated", "text", "empty"])
    def broken(self, request, data):
        path = data / "images" / "4.png"
        content = path.read_bytes()
        path.unlink()
        if request.param == "truncated":
            path.write_bytes(content[: len(content) // 2])
        elif request.param == "text":
            path.write_text("this is no picture")
        elif request.param == "empty":
            path.write_bytes(b"")
        return data

    @pytest.mark.parametrize("workers", [0, 2])
    def test_stop_names_the_file_and_keeps_the_answers(self, broken, workers):
        with pytest.raises(ValueError, match=r"question 4: .*4\.png.*--on_error skip"):
            answer(broken, num_workers=workers)
        assert len(read(broken / "answers.jsonl")) == 4
        assert json.loads((broken / "answers.run.json").read_text())["status"] == "running"

    def test_skip_lists_the_failure_and_goes_on(self, broken):
        rows = answer(broken, on_error="skip", batch_size=3)
        assert sorted(row["question_id"] for row in rows) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
        record = json.loads((broken / "answers.run.json").read_text())
        assert record["status"] == "complete"
        assert [failure["question_id"] for failure in record["failures"]] == [4]
        assert "4.png" in record["failures"][0]["error"]

    def test_a_mended_image_is_answered_on_resume(self, broken):
        answer(broken, on_error="skip")
        Image.new("RGB", (50, 60)).save(broken / "images" / "4.png")
        answerer = ShapeAnswerer()
        rows = answer(broken, answerer, resume=True)
        assert [row["question_id"] for row in rows] == list(range(10)) and sum(answerer.batches) == 1
        assert RunRecord.read_finished(broken / "answers.jsonl").failures == []


@pytest.mark.parametrize("mode", ["P", "L", "RGBA", "CMYK"])
def test_every_image_mode_becomes_rgb(data, mode):
    name = "4.tiff" if mode == "CMYK" else "4.png"
    Image.new(mode, (7, 5)).save(data / "images" / name)
    (data / "questions.jsonl").write_text((data / "questions.jsonl").read_text().replace("4.png", name))
    assert answer(data)[4]["text"].endswith("is 7x5")


def test_the_record_says_what_was_done(data):
    answer(data, batch_size=4)
    record = json.loads((data / "answers.run.json").read_text())
    assert record["settings"]["model_path"] == "shape" and len(record["settings"]["question_file_sha256"]) == 64
    assert record["counts"]["answers"] == 10 and record["layer_averaged_tokens"] == 64.0
    assert record["samples_per_second"] > 0 and record["environment"]["libraries"]["torch"]
    assert os.path.commonprefix([record["status"], "complete"]) == "complete"
