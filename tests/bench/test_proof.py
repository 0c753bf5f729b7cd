"""The proof on a GPU: its parts, its budget, what it writes when a part fails, and a dry run of the script."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from forking_python import forking_python

from apet.bench import proof
from apet.bench.proof import PARTS, Part, PartFailed, Session, Target, read_results, run_parts

ROOT = Path(__file__).parents[2]


def test_a_dry_run_of_the_script(tmp_path):
    parts = [name for name in PARTS if name != "qwen-b4"]  # on a CPU it repeats qwen-b1
    settings = {"PYTHON": str(forking_python()), "APET_VENV": "none"}
    settings |= {"OUT_DIR": str(tmp_path), "PARTS": " ".join(parts)}
    command = ["bash", "scripts/gpu_proof.sh", "--dry_run"]
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    report = json.loads((tmp_path / "gpu_proof.json").read_text())
    assert {name: part["status"] for name, part in report["parts"].items()} == dict.fromkeys(parts, "done")
    assert all(part["tables"] for part in report["parts"].values())
    calls = report["parts"]["prefill-b1"]["batches"][0]["calls"]
    assert list(calls) == ["none", "random", "apet", "as published"]
    assert calls["apet"]["time"]["count"] == 1
    assert set(report["parts"]["tests"]["results"].values()) == {"PASSED"}
    assert report["parts"]["compress-fp32"]["agreement"][0]["indices"] == 1
    page = (tmp_path / "gpu_proof.md").read_text()
    assert "a dry run with small models" in page
    assert "| selectors' share of the compressed prefill, batch 1 | <= 0.03 |" in re.sub(" +", " ", page)
    assert all(f"## {name}\n" in page for name in parts)


@pytest.fixture
def session(tmp_path) -> Session:
    return Session(tmp_path, 100, torch.device("cpu"), True)


def written(session: Session) -> dict:
    return json.loads((session.out / "gpu_proof.json").read_text())["parts"]


def test_a_part_that_fails_is_recorded_and_the_others_go_on(session, monkeypatch, capsys):
    def broken(session: Session, limit: float) -> dict:
        raise ZeroDivisionError("half way")

    def figures(session: Session, limit: float) -> dict:
        raise PartFailed("two tests failed", {"tables": [], "results": {"a": "FAILED"}})

    def last(session: Session, limit: float) -> dict:
        assert written(session)["last"] == {"status": "running"}  # a run cut short says where
        return {"tables": [], "seen": written(session)["broken"], "limit": limit}

    parts = {"broken": Part(30, broken), "figures": Part(30, figures), "last": Part(30, last)}
    monkeypatch.setattr(proof, "PARTS", parts)
    found = run_parts(session, list(parts))["parts"]
    assert found["broken"]["status"] == "failed"
    assert "in broken" in found["broken"]["traceback"]
    assert found["figures"]["results"] == {"a": "FAILED"}
    assert found["last"]["status"] == "done"
    assert found["last"]["seen"] == found["broken"]
    assert found["last"]["limit"] == 30
    assert "broken: failed" in capsys.readouterr().err
    assert written(session) == found


def test_a_lost_context_skips_what_needs_it(tmp_path, monkeypatch):
    def broken(session: Session, limit: float) -> dict:
        raise RuntimeError("CUDA error: device-side assert triggered")

    def fine(session: Session, limit: float) -> dict:
        return {"tables": []}

    def synchronize(device):
        raise RuntimeError("CUDA error: device-side assert triggered")

    parts = {"broken": Part(30, broken), "next": Part(30, fine), "tests": Part(30, fine, own_process=True)}
    monkeypatch.setattr(proof, "PARTS", parts)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(proof, "check_device", lambda name: torch.device(name))
    assert proof.main(["--out", str(tmp_path), "--parts", ",".join(parts)]) == 1
    found = json.loads((tmp_path / "gpu_proof.json").read_text())["parts"]
    assert {name: part["status"] for name, part in found.items()} == {
        "broken": "failed", "next": "skipped", "tests": "done"
    }  # fmt: skip
    assert "CUDA context is lost" in found["next"]["reason"]


def test_a_failed_part_sets_the_exit_status(tmp_path, monkeypatch):
    def run(session: Session, limit: float) -> dict:
        raise ValueError("no")

    monkeypatch.setattr(proof, "PARTS", {"one": Part(30, run)})
    assert proof.main(["--out", str(tmp_path), "--parts", "one", "--dry_run"]) == 1


def test_what_does_not_fit_is_skipped_with_the_reason(session, monkeypatch):
    monkeypatch.setattr(proof, "PARTS", {"one": Part(30, lambda session, limit: {"tables": []})})
    session.seconds = 5
    assert run_parts(session, ["one"])["parts"] == {"one": {"status": "skipped", "reason": "5 s were left of 5 s"}}
    assert "| one | skipped |" in (session.out / "gpu_proof.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_one_line_says_what_to_do(tmp_path, capsys):
    assert proof.main(["--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "needs a GPU" in error and "--dry_run" in error and error.count("\n") == 1


def test_unknown_parts_and_budgets_are_refused(capsys):
    for words, message in ((["--parts", "tets"], "unknown part 'tets'"), (["--seconds", "0"], "must be above 0")):
        with pytest.raises(SystemExit) as stopped:
            proof.main(words)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_results_are_read_from_what_pytest_prints():
    alone = """
tests/a.py::test_one[{'masked': True}-float32] PASSED                    [ 10%]
tests/a.py::test_two SKIPPED (needs a CUDA device)                       [100%]
=== FAILURES ===
tests/a.py:12: AssertionError
FAILED tests/a.py::test_three - assert 1 == 2
"""
    assert read_results(alone) == {"tests/a.py::test_one[{'masked': True}-float32]": "PASSED",
                                   "tests/a.py::test_two": "SKIPPED"}  # fmt: skip
    beside = "[gw3] [  4%] FAILED tests/b.py::test_one[(2, 5, 3)] \n[gw0] [100%] PASSED tests/b.py::test_two\n"
    assert read_results(beside) == {"tests/b.py::test_one[(2, 5, 3)]": "FAILED", "tests/b.py::test_two": "PASSED"}


def test_targets():
    parts = {"a": {"batches": [{"share": 0.02}]}, "b": {"status": "skipped"}}
    most = Target("share", "a", ("batches", 0, "share"), most=0.03)
    assert most.row(parts) == ["share", "<= 0.03", 0.02, "yes"]
    both = {"a": {"batches": [{"share": 5, "none": 3}]}}
    assert most._replace(beyond=("batches", 0, "none")).row(both) == ["share", "<= 0.03", 2, "no"]
    assert most._replace(most=None, least=2).row(parts) == ["share", ">= 2", 0.02, "no"]
    for part, path in (("a", ("batches", 1, "share")), ("b", ("batches", 0)), ("c", ("batches",))):
        assert Target("share", part, path, most=1).row(parts)[2:] == [None, "not measured"]
