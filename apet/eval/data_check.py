"""Which file of a benchmark goes where, and whether it is there and whole.

`DATA` is the one table of it: `apet check-data` compares it with a folder, `data/README.md` is written from it.
Counts are those of the published files. An image is looked for, not decoded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apet.eval.benchmarks import get_benchmark
from apet.eval.benchmarks.files import iterate_jsonl, listing, read_json, read_text, user_path
from apet.eval.benchmarks.mmbench_table import read_table
from apet.eval.benchmarks.mme import truth_files
from apet.eval.images import ImageError
from apet.eval.videos import find_video
from apet.tables import markdown_table

_EVAL_ZIP = "eval.zip of the LLaVA repository (docs/Evaluation.md)"
_OPEN_COMPASS = "the MMBench website (OpenCompass)"
_COCO = "the COCO download page (cocodataset.org)"
_VIDEO_QA = "the Video-LLaVA repository, TRAIN_AND_VALIDATE.md (GPT_Zero_Shot_QA)"


@dataclass(frozen=True)
class DataFile:
    """A file (or folder) a benchmark needs beside its images.

    Attributes:
        path: Below the benchmark's folder.
        content: What it holds.
        source: Where it comes from, by name.
        kind: How its rows are counted: "jsonl", "json", "table" (MMBench), "truth" (MME), or "parse" for no count.
        rows: Published numbers of rows, any of them is right; empty if there is none.
    """

    path: str
    content: str
    source: str
    kind: str
    rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class BenchmarkData:
    """Everything a benchmark needs on disk.

    Attributes:
        name: Name of the script, or of the registered benchmark where there is no script.
        folder: Below the data folder.
        files: The question file first.
        images: Folders below `folder` where images (or videos) may be, the first that is there counts; none if the
            question file holds its images.
        image_source: Where they come from, by name.
        benchmark: Registered benchmark that reads the question file.
        script: Whether there is a script for a model family.
        videos: Whether the questions are about videos; their answers are in the second file.
    """

    name: str
    folder: str
    files: tuple[DataFile, ...]
    images: tuple[str, ...] = ()
    image_source: str = ""
    benchmark: str = ""
    script: bool = True
    videos: bool = False

    @property
    def media(self) -> str:
        """What the folders hold."""
        return "videos" if self.videos else "images"


def _pope_labels(split: str, rows: tuple[int, ...]) -> DataFile:
    source = "the POPE repository, output/coco (the state of August 2023 has 2,910 random questions)"
    return DataFile(f"coco/coco_pope_{split}.json", f"labels, {split}", source, "jsonl", rows)


def _video_qa(name: str, folder: str, videos: str, rows: tuple[int, ...]) -> BenchmarkData:
    files = (
        DataFile("test_q.json", "questions", _VIDEO_QA, "json", rows),
        DataFile("test_a.json", "answers", _VIDEO_QA, "json", rows),
    )
    return BenchmarkData(name, f"GPT_Zero_Shot_QA/{folder}_Zero_Shot_QA", files, (videos,), _VIDEO_QA, videos=True)


DATA = (
    BenchmarkData(
        "gqa", "gqa",
        (
            DataFile("llava_gqa_testdev_balanced.jsonl", "questions", _EVAL_ZIP, "jsonl", (12_578,)),
            DataFile("testdev_balanced_questions.json", "answers", "the GQA website, questions1.2.zip", "json",
                     (12_578,)),
        ),
        ("images", "data/images"), "the GQA website, images.zip",
    ),
    BenchmarkData(
        "mmbench", "mmbench",
        (DataFile("mmbench_dev_20230712.tsv", "questions, images, answers", _OPEN_COMPASS, "table", (4_377,)),),
    ),
    BenchmarkData(
        "mmbench_cn", "mmbench",
        (DataFile("mmbench_dev_cn_20231003.tsv", "questions, images, answers", _OPEN_COMPASS, "table", (4_329,)),),
    ),
    BenchmarkData(
        "mme", "MME",
        (
            DataFile("llava_mme.jsonl", "questions", _EVAL_ZIP, "jsonl", (2_374,)),
            DataFile("MME_Benchmark_release_version", "ground truth, <category>/*.txt",
                     "the MME team, on request (Awesome-Multimodal-Large-Language-Models, branch Evaluation)", "truth",
                     (2_374,)),
        ),
        ("MME_Benchmark_release_version/MME_Benchmark", "MME_Benchmark_release_version"), "the same archive",
    ),
    BenchmarkData(
        "pope", "pope",
        (
            DataFile("llava_pope_test.jsonl", "questions", _EVAL_ZIP, "jsonl", (8_910,)),
            _pope_labels("random", (2_910, 3_000)),
            _pope_labels("popular", (3_000,)),
            _pope_labels("adversarial", (3_000,)),
        ),
        ("val2014",), f"{_COCO}, val2014.zip (500 of its images are asked about)",
    ),
    BenchmarkData(
        "sqa", "scienceqa",
        (
            DataFile("llava_test_CQM-A.json", "questions", _EVAL_ZIP, "json", (4_241,)),
            DataFile("problems.json", "answers", "the ScienceQA repository, data/scienceqa", "json", (21_208,)),
            DataFile("pid_splits.json", "splits", "the ScienceQA repository, data/scienceqa", "parse"),
        ),
        ("images/test",), "the ScienceQA repository, test.zip", benchmark="scienceqa",
    ),
    BenchmarkData(
        "textvqa", "textvqa",
        (
            DataFile("llava_textvqa_val_v051_ocr.jsonl", "questions with OCR tokens", _EVAL_ZIP, "jsonl", (5_000,)),
            DataFile("TextVQA_0.5.1_val.json", "answers", "the TextVQA website, dataset page", "json", (5_000,)),
        ),
        ("train_images",), "the TextVQA website, train_val_images.zip",
    ),
    BenchmarkData(
        "vizwiz", "vizwiz",
        (DataFile("llava_test.jsonl", "questions", _EVAL_ZIP, "jsonl", (8_000,)),),
        ("test",), "the VizWiz VQA website, test.zip",
    ),
    BenchmarkData(
        "vqav2", "vqav2",
        (
            DataFile("llava_vqav2_mscoco_test-dev2015.jsonl", "questions", _EVAL_ZIP, "jsonl", (107_394,)),
            DataFile("llava_vqav2_mscoco_test2015.jsonl", "list of all test questions", _EVAL_ZIP, "jsonl", (447_793,)),
        ),
        ("test2015",), f"{_COCO}, test2015.zip",
    ),
    _video_qa("msvd", "MSVD", "videos", (13_157,)),
    _video_qa("msrvtt", "MSRVTT", "videos/all", (72_821,)),
    _video_qa("tgif", "TGIF", "mp4", ()),
    _video_qa("activitynet", "Activitynet", "all_test", (8_000,)),
    BenchmarkData(
        "mmvet", "mm-vet",
        (DataFile("llava-mm-vet.jsonl", "questions", _EVAL_ZIP, "jsonl", (218,)),),
        ("images",), "the MM-Vet repository, mm-vet.zip", script=False,
    ),
    BenchmarkData(
        "seed", "seed_bench",
        (
            DataFile("llava-seed-bench.jsonl", "questions", _EVAL_ZIP, "jsonl", (19_242,)),
            DataFile("SEED-Bench.json", "answers", "the SEED-Bench data page", "json", (19_242,)),
        ),
        (".",), "the SEED-Bench data page: SEED-Bench-image, and frames in SEED-Bench-video-image", script=False,
    ),
    BenchmarkData(
        "llava_bench", "llava-bench-in-the-wild",
        (
            DataFile("questions.jsonl", "questions", "the LLaVA-Bench data page", "jsonl", (60,)),
            DataFile("context.jsonl", "descriptions of the images", "the LLaVA-Bench data page", "jsonl", (24,)),
        ),
        ("images",), "the LLaVA-Bench data page", script=False,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """What was found about one file or image folder.

    Attributes:
        state: "ok", "missing", "incomplete" (images), "broken", or "other size" than the published file.
        path: Where it is or should be.
        found: Rows or images, and remarks.
        source: What it is and where it comes from.
    """

    state: str
    path: str
    found: str
    source: str


def find_data(name: str) -> BenchmarkData:
    """The table's entry of a benchmark.

    Raises:
        ValueError: No such entry; the message has the known names.
    """
    for entry in DATA:
        if name in (entry.name, entry.benchmark or entry.name):
            return entry
    raise ValueError(f"unknown benchmark {name!r}; known: {', '.join(entry.name for entry in DATA)}")


def check_benchmark(data: BenchmarkData, root: str | os.PathLike[str]) -> list[Finding]:
    """Findings about the files and images of a benchmark below `root`, the folder that scripts call DATA."""
    folder = user_path(root) / data.folder
    findings = [_check_file(file, folder) for file in data.files]
    if data.images:
        findings.append(_check_images(data, folder, readable=findings[0].state in ("ok", "other size")))
    return findings


def _check_file(file: DataFile, folder: Path) -> Finding:
    path = folder / file.path
    source = f"{file.content}: {file.source}"
    if not path.exists():
        return Finding("missing", str(path), "", source)
    try:
        rows = _COUNTERS[file.kind](path)
    except (ValueError, OSError) as error:
        return Finding("broken", str(path), str(error), source)
    if not file.rows or rows in file.rows:
        return Finding("ok", str(path), f"{rows:,} rows" if file.rows else "", source)
    return Finding("other size", str(path), f"{rows:,} rows, the published file has {_counts(file)}", source)


def _counts(file: DataFile) -> str:
    return " or ".join(f"{count:,}" for count in file.rows)


def _check_images(data: BenchmarkData, folder: Path, readable: bool) -> Finding:
    """Compare the image folder with the question file; without a `readable` one only the folder is looked for."""
    found = next((folder / name for name in data.images if (folder / name).is_dir()), folder / data.images[0])
    source = f"{data.media}: {data.image_source}"
    if not found.is_dir():
        return Finding("missing", str(found), "", source)
    if not readable:
        return Finding("ok", str(found), "not compared: there are no questions", source)
    try:
        files = data.files[:2] if data.videos else data.files[:1]
        questions = get_benchmark(data.benchmark or data.name).read(*(folder / file.path for file in files))
    except (ValueError, KeyError, TypeError) as error:
        return Finding("broken", str(found), f"the question file cannot be read: {error}", source)
    shown = (question.video if data.videos else question.image for question in questions)
    names = dict.fromkeys(name for name in shown if name is not None)
    absent = [name for name in names if not _is_there(found / name, data.videos)]
    if absent:
        remark = f"{len(absent):,} of {len(names):,} missing: {listing(absent, 3)}"
        return Finding("incomplete", str(found), remark, source)
    return Finding("ok", str(found), f"{len(names):,} {data.media} of {len(questions):,} questions", source)


def _is_there(path: Path, video: bool) -> bool:
    if not video:
        return path.is_file()
    try:
        return find_video(path).is_file()
    except ImageError:
        return False


def _count_json(path: Path) -> int:
    """Entries of a list, of the list a mapping holds (TextVQA, SEED), or of a mapping."""
    content: Any = read_json(path)
    if isinstance(content, dict):
        content = next((content[key] for key in ("data", "questions") if isinstance(content.get(key), list)), content)
    if not isinstance(content, list | dict):
        raise ValueError(f"{path}: expected a JSON list or object, got {type(content).__name__}")
    return len(content)


def _count_truth(path: Path) -> int:
    """Lines of MME's ground truth, in any of its layouts."""
    return sum(bool(line.strip()) for _, file in truth_files(path) for line in read_text(file).splitlines())


_COUNTERS = {
    "jsonl": lambda path: sum(1 for _ in iterate_jsonl(path)),
    "json": _count_json,
    "parse": _count_json,
    "table": lambda path: len(read_table(path, ("question", "image"))),
    "truth": _count_truth,
}


def complete(findings: Sequence[Finding], any_size: bool = False) -> bool:
    """Whether nothing is wrong; `any_size` accepts files of another size than the published ones, such as samples."""
    return all(finding.state == "ok" or (any_size and finding.state == "other size") for finding in findings)


def layout_table(entries: Sequence[BenchmarkData]) -> str:
    """Which file of these benchmarks goes where, as a Markdown table."""
    rows = []
    for entry in entries:
        for file in entry.files:
            rows.append((entry.name, f"`{entry.folder}/{file.path}`", file.content, _counts(file), file.source))
        if entry.images:
            folders = " or ".join(f"`{entry.folder}/{name}/`".replace("/./", "/") for name in entry.images)
            rows.append((entry.name, folders, entry.media, "", entry.image_source))
    return markdown_table(("benchmark", "file or folder", "content", "rows", "where it comes from"), rows)
