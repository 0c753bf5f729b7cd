"""The results page is what its run folder says: every figure of it follows from a file there."""

import csv
import json
import shutil
from collections import defaultdict
from pathlib import Path
from statistics import mean

import make_docs
import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/sample_runs.md"


def scores(folder: Path) -> dict[str, list[float]]:
    """Score values of the runs by method and budget, as their folders are called; seeds together."""
    found = defaultdict(list)
    for path in sorted(folder.rglob("*.score.json")):
        found[path.parent.name.split("-seed")[0]].append(json.loads(path.read_text(encoding="utf-8"))["value"])
    return found


def test_the_page_is_that_of_the_folder():
    assert PAGE.read_text(encoding="utf-8") == make_docs.runs_page()


def test_another_score_makes_another_page(tmp_path, monkeypatch):
    folder = Path(shutil.copytree(make_docs.RUNS, tmp_path / "runs"))
    monkeypatch.setattr(make_docs, "RUNS", folder)
    assert make_docs.runs_page() == PAGE.read_text(encoding="utf-8")
    path = next(iter(sorted(folder.rglob("*apet-64*.score.json"))))
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | {"value": 12.34}))
    assert "12.34" in make_docs.runs_page() and "12.34" not in PAGE.read_text(encoding="utf-8")


def test_the_table_of_the_comparison_is_of_these_runs():
    found = scores(make_docs.RUNS)
    with (make_docs.RUNS / "table.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(found)
    values = sorted(mean(values) for values in found.values())
    assert sorted(float(row["score"]) for row in rows) == pytest.approx(values)


def test_readers_find_no_folder_of_a_machine():
    for path in make_docs.RUNS.rglob("*"):
        if path.is_file():
            assert '"/' not in path.read_text(encoding="utf-8"), path  # a string that is an absolute path
