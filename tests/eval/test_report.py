"""The table of scored runs: percentages, averages, what must not be compared, files written, broken inputs."""

import csv
import json
import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from apet.report.__main__ import main

COMPRESSION = {
    "visual_token_num": 576, "image_token_ratio": None, "layer_list": [], "image_token_list": [],
    "image_token_ratio_list": [], "basis_token_num": 10, "method": "apet", "fps_start": "farthest",
}  # fmt: skip
KEPT_64 = {"visual_token_num": 96, "layer_list": [16], "image_token_list": [32]}
KEPT_192 = {"visual_token_num": 288, "layer_list": [16], "image_token_list": [96]}


@pytest.fixture
def add(tmp_path):
    """`add("gqa", 60.0, visual_token_num=96)` writes a scored run below tmp_path; returns its score file."""
    count = iter(range(100))

    def write(benchmark, value, *, n=100, tokens=576.0, digest="", settings=(), record=(), **compression):
        stem = tmp_path / benchmark / f"run{next(count)}"
        stem.parent.mkdir(exist_ok=True)
        score = {
            "name": benchmark,
            "metric": "accuracy",
            "value": value,
            "n_questions": n,
            "details": {},
            "per_sample": {},
        }
        fields = {
            "model_path": "x/llava", "model_id": "llava", "conv_mode": "vicuna_v1", "dtype": "float16",
            "sample_weights": None, "generation": {"temperature": 0, "max_new_tokens": 128},
            "compression": COMPRESSION | compression, "question_file_sha256": digest or f"digest of {benchmark}",
        }  # fmt: skip
        content = {
            "status": "complete", "settings": fields | dict(settings),
            "environment": {"device": "cpu", "batch_size": 1},
            "counts": {"answers": n, "seconds": 50.0}, "layer_averaged_tokens": tokens, "samples_per_second": n / 50,
            "failures": [],
        }  # fmt: skip
        stem.with_suffix(".run.json").write_text(json.dumps(content | dict(record)))
        path = stem.with_suffix(".score.json")
        path.write_text(json.dumps(score))
        return path

    return write


@pytest.fixture
def report_of(tmp_path, capsys):
    """Run the program on tmp_path: (status, cells of the table's rows by heading, whole stdout, stderr)."""

    def call(*flags, place=None):
        status = main([str(place or tmp_path), *map(str, flags)])
        captured = capsys.readouterr()
        lines = [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in captured.out.splitlines()
            if line[:1] == "|"
        ]
        rows = [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
        return status, rows, captured.out, captured.err

    return call


@pytest.fixture
def usual(add):
    """Two benchmarks, uncompressed and with two budgets."""
    add("gqa", 60.0)
    add("gqa", 57.0, tokens=64.0, **KEPT_64)
    add("gqa", 59.4, tokens=192.0, **KEPT_192)
    add("pope", 80.0, n=300)
    add("pope", 82.0, n=300, tokens=64.0, **KEPT_64)
    add("pope", 80.0, n=300, tokens=192.0, **KEPT_192)


def test_scores_percentages_means_tokens_and_speed(usual, report_of):
    status, rows, out, _ = report_of()
    assert status == 0 and [row["budget"] for row in rows] == ["all", "288, 96 after layer 16", "96, 32 after layer 16"]
    assert rows[0] | {"model": ""} == {
        "model": "", "method": "none", "budget": "all", "tokens": "576.0", "gqa, accuracy": "60.00",
        "pope, accuracy": "80.00", "% of uncompressed": "100.0", "questions/s": "4.00",
    }  # fmt: skip
    assert (rows[2]["gqa, accuracy"], rows[2]["pope, accuracy"]) == ("57.00 (95.0%)", "82.00 (102.5%)")
    assert (rows[2]["% of uncompressed"], rows[2]["tokens"]) == ("98.8", "64.0")
    assert "NOTE" not in out


def test_csv_has_every_run_in_full(usual, report_of, tmp_path):
    assert report_of("--csv", tmp_path / "table.csv")[0] == 0
    with open(tmp_path / "table.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 6
    line = next(line for line in lines if line["benchmark"] == "gqa" and line["budget"].startswith("96"))
    assert float(line["percent_of_uncompressed"]) == 95 and float(line["mean_percent_of_uncompressed"]) == 98.75
    assert (line["questions"], line["device"]) == ("100", "cpu") and Path(line["file"]).is_file()


def test_png_is_a_picture(usual, report_of, tmp_path):
    pytest.importorskip("matplotlib")
    assert report_of("--png", tmp_path / "curve.png")[0] == 0
    with Image.open(tmp_path / "curve.png") as image:
        assert image.format == "PNG" and image.width > 1000
        assert len(set(image.convert("L").resize((60, 20)).tobytes())) > 5


def test_png_without_matplotlib_says_so(usual, report_of, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, _, error = report_of("--png", tmp_path / "curve.png")
    assert status == 1 and "pip install matplotlib" in error


def test_png_without_tokens_says_so(add, report_of, tmp_path):
    add("gqa", 60.0, tokens=None)
    status, _, _, error = report_of("--png", tmp_path / "curve.png")
    assert status == 1 and "none of the runs recorded" in error


class TestNotCompared:
    def test_a_missing_benchmark_leaves_the_mean_to_the_others(self, usual, add, report_of):
        add("gqa", 48.0, tokens=64.0, method="random", **KEPT_64)
        row = next(row for row in report_of()[1] if row["method"] == "random")
        assert (row["pope, accuracy"], row["% of uncompressed"]) == ("", "80.0 (of 1)")

    @pytest.mark.parametrize(
        ("change", "heading"),
        [({"n": 90}, "90 questions"), ({"digest": "another file"}, "file anothe")],
        ids=["count", "file"],
    )
    def test_other_questions_are_another_column(self, add, report_of, change, heading):
        add("gqa", 60.0)
        add("gqa", 30.0, tokens=64.0, **KEPT_64, **change)
        _, rows, out, _ = report_of()
        assert rows[1][next(name for name in rows[1] if heading in name)] == "30.00"
        assert "columns of their own" in out and "no percentage: run1" in out

    @pytest.mark.parametrize(
        "settings",
        [{"dtype": "float32"}, {"conv_mode": "llava_v1"}, {"generation": {"temperature": 0.2, "max_new_tokens": 128}}],
        ids=str,
    )
    def test_other_settings_have_no_percentage(self, add, report_of, settings):
        add("gqa", 60.0, settings=settings)
        add("gqa", 30.0, tokens=64.0, **KEPT_64)
        _, rows, out, _ = report_of()
        assert rows[1]["gqa, accuracy"] == "30.00" and "no percentage" in out
        name = "temperature" if "generation" in settings else next(iter(settings))
        assert name in rows[0]["method"] and name in rows[1]["method"]

    def test_other_checkpoints_are_other_rows(self, add, report_of):
        for model in ("llava", "other"):
            add("gqa", 60.0, settings={"model_id": model})
        assert [row["model"] for row in report_of()[1]] == ["llava", "other"]

    def test_programs_may_differ_in_answer_length(self, add, report_of):
        add("gqa", 60.0)
        add("mmbench", 60.0, settings={"generation": {"temperature": 0, "max_new_tokens": 1024}})
        assert len(report_of()[1]) == 1

    def test_options_of_a_method_set_rows_apart(self, add, report_of):
        for basis in (5, 10):
            add("gqa", 50.0 + basis, tokens=64.0, basis_token_num=basis, **KEPT_64)
        add("gqa", 40.0, tokens=64.0, method="random", **KEPT_64)
        methods = [row["method"] for row in report_of()[1]]
        assert methods == ["apet (basis_token_num=10)", "apet (basis_token_num=5)", "random"]

    def test_an_option_with_the_name_of_a_field_sets_rows_apart(self, add, report_of):
        for options in ({}, {"size_bias": True}):
            add("gqa", 50.0, tokens=64.0, method="apet_plus", **KEPT_64, method_options=options, size_bias=False)
        methods = [row["method"] for row in report_of()[1]]
        assert methods == ["apet_plus (size_bias=False)", "apet_plus (size_bias=True)"]

    def test_two_runs_of_the_same_settings_are_refused(self, add, report_of):
        first, second = add("gqa", 60.0), add("gqa", 61.0)
        status, _, _, error = report_of()
        assert status == 1 and str(first) in error and str(second) in error and "leave one out" in error

    def test_a_folder_named_twice_counts_once(self, usual, report_of, tmp_path):
        assert len(report_of(tmp_path / "gqa")[1]) == 3


class TestNotes:
    def test_random_weights(self, add, report_of):
        add("gqa", 1.0, settings={"sample_weights": "random"})
        assert "random weights" in report_of()[2]

    def test_a_run_that_is_not_finished(self, add, report_of):
        add("gqa", 60.0, record={"status": "running"})
        assert "not finished (status running)" in report_of()[2]

    def test_questions_without_an_answer(self, add, report_of):
        add("gqa", 60.0, record={"failures": [{"question_id": 7, "error": "truncated"}]})
        assert "1 questions have no answer: 7" in report_of()[2]

    def test_answers_newer_than_the_score(self, add, report_of):
        path = add("gqa", 60.0)
        path.with_name("run0.jsonl").write_text("{}\n")
        os.utime(path)
        assert "NOTE" not in report_of()[2]
        os.utime(path, (1, 1))
        assert "older than its answers" in report_of()[2]

    def test_other_hardware(self, add, report_of):
        add("gqa", 60.0)
        add("gqa", 59.0, tokens=64.0, record={"environment": {"device": "cuda:0", "batch_size": 1}}, **KEPT_64)
        assert "different devices" in report_of()[2]

    def test_zero_has_no_percentage(self, add, report_of):
        add("gqa", 0.0)
        add("gqa", 0.0, tokens=64.0, **KEPT_64)
        status, rows, _, _ = report_of()
        assert status == 0 and rows[1]["gqa, accuracy"] == "0.00" and rows[1]["% of uncompressed"] == ""


@pytest.mark.parametrize(
    ("compression", "method", "budget"),
    [
        ({}, "none", "all"),
        ({"visual_token_num": None}, "none", "all"),
        ({"visual_token_num": 4000}, "none", "all"),
        ({"visual_token_num": 640, "budget_per": "image"}, "apet", "640"),
        ({"visual_token_num": None, "image_token_ratio": 1.0}, "none", "all"),
        ({"visual_token_num": None, "image_token_ratio": 0.25}, "apet", "0.25"),
        ({"visual_token_num": 1}, "apet", "1"),
        ({"visual_token_num": [96, 48]}, "apet", "[96, 48]"),
        ({"layer_list": [16], "image_token_list": [32]}, "apet", "32 after layer 16"),
        ({"layer_list": [4], "image_token_ratio_list": [0.5], "visual_token_num": 96}, "apet", "96, 0.5 after layer 4"),
    ],
    ids=str,
)
def test_budgets_in_words(add, report_of, compression, method, budget):
    add("gqa", 60.0, **compression)
    row = report_of()[1][0]
    assert (row["method"], row["budget"]) == (method, budget)


class TestBrokenInput:
    def test_no_score(self, report_of, tmp_path):
        status, _, _, error = report_of()
        assert status == 1 and str(tmp_path) in error and "no *.score.json" in error

    def test_no_record(self, add, report_of):
        path = add("gqa", 60.0)
        path.with_name("run0.run.json").unlink()
        assert "no run record run0.run.json" in report_of()[3]

    @pytest.mark.parametrize(
        ("name", "text", "words"),
        [
            ("run0.score.json", '{"name": "gqa"', ["not JSON"]),
            ("run0.score.json", "[1]", ["JSON object", "list"]),
            ("run0.score.json", '{"name": "gqa", "metric": "x", "n_questions": 3}', ["'value'"]),
            ("run0.score.json", '{"name": "gqa", "metric": "x", "n_questions": 3, "value": null}', ["None", "number"]),
            ("run0.run.json", "", ["not JSON"]),
            ("run0.run.json", '{"status": "complete"}', ["'settings'"]),
        ],
        ids=lambda value: str(value)[:24],
    )
    def test_broken_files_are_named(self, add, report_of, name, text, words):
        path = add("gqa", 60.0).with_name(name)
        path.write_text(text)
        status, _, _, error = report_of()
        assert status == 1 and str(path) in error and all(word in error for word in words)


def test_budgets_of_videos_are_budgets(add, report_of):
    """576 tokens are everything for LLaVA-1.5 only; a budget for videos alone is a compression."""
    family = {"settings": {"family": "video_llava"}}
    nothing = {"visual_token_num": None}
    add("msvd", 50.0, tokens=2056.0, **family, **nothing)
    add("msvd", 49.0, tokens=264.0, video_token_num=22, **family, **nothing)
    add("msvd", 48.0, tokens=200.0, video_token_num=192, video_budget_per="clip", **family, **nothing)
    add("msvd", 47.0, tokens=576.0, **family)
    _, rows, _, _ = report_of()
    found = [(row["method"], row["budget"], row["msvd, accuracy"]) for row in rows]
    assert set(found) == {
        ("apet", "video 192 per clip", "48.00 (96.0%)"),
        ("apet", "video 22", "49.00 (98.0%)"),
        ("apet", "576", "47.00 (94.0%)"),
        ("none", "all", "50.00"),
    }
