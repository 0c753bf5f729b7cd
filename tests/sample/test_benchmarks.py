"""The benchmark files: LLaVA's rows, the official annotation structures, balanced answers, pictures that exist."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.sample_vlm import benchmarks
from examples.sample_vlm.questions import OCR_LINE, SUFFIX
from examples.sample_vlm.scenes import LARGE, PATCH

COMMITTED = Path(__file__).parents[2] / "data" / "sample" / "eval"


def _rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_same_seed_same_files(small_benchmarks, tmp_path):
    benchmarks.main(["--out", str(tmp_path), "--scale", "0.02"])
    files = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(small_benchmarks) for p in small_benchmarks.rglob("*") if p.is_file())
    for name in files:
        assert (tmp_path / name).read_bytes() == (small_benchmarks / name).read_bytes(), name


@pytest.fixture(params=["generated", "committed"])
def root(request, small_benchmarks):
    return small_benchmarks if request.param == "generated" else COMMITTED


@pytest.mark.parametrize(
    ("name", "questions", "images"),
    [
        ("gqa", "llava_gqa_testdev_balanced.jsonl", "images"),
        ("pope", "llava_pope_test.jsonl", "val2014"),
        ("textvqa", "llava_textvqa_val_v051_ocr.jsonl", "train_images"),
        ("MME", "llava_mme.jsonl", "MME_Benchmark_release_version"),
    ],
)
def test_question_files(root, name, questions, images):
    rows = _rows(root / name / questions)
    assert rows
    for row in rows:
        assert list(row) == ["question_id", "image", "text", "category"]
        assert row["text"].endswith(SUFFIX)
    for image in {row["image"] for row in rows}:
        with Image.open(root / name / images / image) as picture:
            assert picture.size == (336, 336) and picture.mode == "RGB"


def test_gqa_annotations(root):
    rows = _rows(root / "gqa" / "llava_gqa_testdev_balanced.jsonl")
    annotations = json.loads((root / "gqa" / "testdev_balanced_questions.json").read_text())
    assert [row["question_id"] for row in rows] == list(annotations)
    for row in rows:
        entry = annotations[row["question_id"]]
        assert entry["question"] + SUFFIX == row["text"] and f"{entry['imageId']}.jpg" == row["image"]
        assert entry["isBalanced"] and entry["answer"] == entry["answer"].lower()
        assert entry["types"]["structural"] in {"verify", "query", "choose", "logical", "compare"}
        assert entry["types"]["semantic"] in {"obj", "attr", "cat", "rel", "global"}
        assert row["question_id"] in entry["entailed"]
        assert all(set(step) == {"operation", "dependencies", "argument"} for step in entry["semantic"])


def test_pope_labels(root):
    rows = _rows(root / "pope" / "llava_pope_test.jsonl")
    labels = {c: _rows(root / "pope" / "coco" / f"coco_pope_{c}.json") for c in benchmarks.POPE_CATEGORIES}
    ordered = [label for c in benchmarks.POPE_CATEGORIES for label in labels[c]]
    assert [(r["question_id"], r["image"], r["text"]) for r in rows] == [
        (entry["question_id"], entry["image"], entry["text"] + SUFFIX) for entry in ordered
    ]
    for entries in labels.values():
        answers = Counter(entry["label"] for entry in entries)
        assert answers["yes"] == answers["no"]


def test_textvqa_annotations_and_empty_ocr_line(root):
    rows = _rows(root / "textvqa" / "llava_textvqa_val_v051_ocr.jsonl")
    data = json.loads((root / "textvqa" / "TextVQA_0.5.1_val.json").read_text())["data"]
    known = {(entry["image_id"], entry["question"].lower()): entry["answers"] for entry in data}
    assert len(known) == len(rows)
    for row in rows:
        question, ocr, _ = row["text"].split("\n")
        assert "\n" + ocr == OCR_LINE
        assert len(known[row["question_id"], question.lower()]) == 10


def test_mme_truth(root):
    folder = root / "MME"
    by_image = {}
    for row in _rows(folder / "llava_mme.jsonl"):
        by_image.setdefault(row["image"], []).append(row["text"].removesuffix(SUFFIX) + " Please answer yes or no.")
    for image, texts in by_image.items():
        truth = folder / "MME_Benchmark_release_version" / Path(image).with_suffix(".txt")
        lines = [line.split("\t") for line in truth.read_text().splitlines()]
        assert [line[0] for line in lines] == texts
        assert sorted(line[1] for line in lines) == ["No", "Yes"]


def test_committed_sizes():
    count = {name: len(_rows(next((COMMITTED / name).glob("llava_*.jsonl")))) for name in ("gqa", "pope", "textvqa")}
    assert count["gqa"] >= 1000 and count["pope"] == 900 and count["textvqa"] == 300
    assert len(list((COMMITTED / "gqa" / "images").iterdir())) >= 200
    pictures = [p.stat().st_size for p in COMMITTED.rglob("*.jpg")]
    assert sum(pictures) <= 20e6


def test_train_pictures_are_others(small_benchmarks, tmp_path):
    """Settings are chosen on pictures of photographs, digits and words that the benchmarks do not have."""
    benchmarks.main(["--out", str(tmp_path), "--scale", "0.02", "--split", "train"])
    name = "gqa/llava_gqa_testdev_balanced.jsonl"
    assert (tmp_path / name).read_text() != (small_benchmarks / name).read_text()


def test_the_large_style_draws_things_of_five_to_seven_patches(tmp_path):
    rng, pictures = np.random.default_rng(1), benchmarks.Pictures(style=LARGE)
    scenes = [pictures.draw(rng, good=lambda scene: scene.of("shape") and scene.of("digit")) for _ in range(3)]
    sides = [max(thing.box[2:]) for scene in scenes for thing in scene.of("shape") + scene.of("digit")]
    assert len(sides) >= 6 and all(4 * PATCH <= side <= 8 * PATCH for side in sides)
    benchmarks.main(["--out", str(tmp_path), "--scale", "0.02", "--style", "large"])
    assert {path.name for path in tmp_path.iterdir()} == set(benchmarks.WRITERS)
    with pytest.raises(SystemExit):
        benchmarks.main(["--out", str(tmp_path), "--style", "huge"])
