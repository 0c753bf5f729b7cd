"""Benchmarks from parquet files: what is written is what the programs read."""

import json
from pathlib import Path

import pytest

from apet.eval import hub, suite
from apet.eval.benchmarks.pope import Pope

pandas = pytest.importorskip("pandas")
pytest.importorskip("datasets")

POPE = Path(__file__).parents[2] / "data/sample/eval/pope"
PICTURE = b"\xff\xd8 a picture's own bytes"


def labels(split: str) -> list[dict]:
    return [json.loads(line) for line in (POPE / f"coco/coco_pope_{split}.json").read_text().splitlines()][:8]


@pytest.fixture
def parquet(tmp_path, monkeypatch) -> Path:
    """The sample's first questions as a data set on the hub has them, in two files."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "parquet"
    folder.mkdir()
    for split in ("random", "popular", "adversarial"):
        rows = [
            {
                "question": one["text"], "answer": one["label"], "category": split,
                "image_source": Path(one["image"]).stem, "image": {"bytes": PICTURE, "path": None},
            }
            for one in labels(split)
        ]  # fmt: skip
        pandas.DataFrame(rows).to_parquet(folder / f"{split}.parquet")
    return folder


def test_pope_is_written_as_it_is_read_and_scored(parquet, tmp_path):
    folder = hub.write_benchmark("pope", tmp_path / "eval", str(parquet))
    questions = Pope().read(folder / "llava_pope_test.jsonl")
    sample = [json.loads(line) for line in (POPE / "llava_pope_test.jsonl").read_text().splitlines()]
    known = {(one["image"], one["text"], one["category"]) for one in sample}
    written = [json.loads(line) for line in (folder / "llava_pope_test.jsonl").read_text().splitlines()]
    assert len(questions) == 24 and {(one["image"], one["text"], one["category"]) for one in written} <= known
    assert all((folder / "val2014" / one.image).read_bytes() == PICTURE for one in questions)
    right = {(one["image"], one["text"]): one["label"] for split in ("random", "popular", "adversarial")
             for one in labels(split)}  # fmt: skip
    answers = tmp_path / "answers.jsonl"
    lines = [{"question_id": one.question_id, "text": right[one.image, one.text.split("\n")[0]]} for one in questions]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    score = Pope().score(
        annotation_dir=folder / "coco", question_file=folder / "llava_pope_test.jsonl", result_file=answers
    )
    assert score.value == 100 and score.n_questions == 24


def test_what_cannot_be_read_is_a_sentence(parquet, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="'gqa' is not read from data sets; known: pope"):
        hub.write_benchmark("gqa", tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="has no parquet file"):
        hub.write_benchmark("pope", tmp_path, str(tmp_path / "none"))
    table = pandas.read_parquet(parquet / "random.parquet")
    (tmp_path / "odd").mkdir()
    table.drop(columns="category").to_parquet(tmp_path / "odd/a.parquet")
    with pytest.raises(ValueError, match="has no column category; it has question, answer"):
        hub.write_benchmark("pope", tmp_path, str(tmp_path / "odd"))
    table.assign(image_source="../up").to_parquet(tmp_path / "odd/a.parquet")
    with pytest.raises(ValueError, match="'../up' cannot be part of a file name"):
        hub.write_benchmark("pope", tmp_path / "eval", str(tmp_path / "odd"))
    table.assign(answer="perhaps").to_parquet(tmp_path / "odd/a.parquet")
    with pytest.raises(ValueError, match="answer 'perhaps' must be yes or no"):
        hub.write_benchmark("pope", tmp_path / "eval", str(tmp_path / "odd"))
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install .apet"):
        hub.write_benchmark("pope", tmp_path)


def test_the_command_fills_data_and_goes_on_as_always(parquet, tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr(suite, "execute", lambda run: runs.append(run) or 0)
    sample = Path(__file__).parents[2] / "data/sample/model/llava-v1.5-sample"
    words = ["llava1_5", "pope", "--dataset", str(parquet), "--data", str(tmp_path / "eval"), "--model", str(sample)]
    assert suite.main(words) == 0
    (run,) = runs
    assert run.steps.questions == tmp_path / "eval/pope/llava_pope_test.jsonl"
    assert all(path.exists() for path in run.steps.needs)
