"""VLMEvalKit itself, as the distribution ms-vlmeval has it, started by the script of docs/vlmevalkit.md on local files.

Skipped where it is not installed; scripts/test_vlmeval.sh installs it in an environment of its own.
"""

import base64
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pandas = pytest.importorskip("pandas")

ROOT = Path(__file__).parents[2]
NAME = "llava-1.5-7b-apet-64"  # as the page calls it

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vlmeval") is None, reason="needs ms-vlmeval (scripts/test_vlmeval.sh)"),
]


@pytest.fixture(scope="module")
def tables(tmp_path_factory, questions) -> Path:
    """A folder for the variable LMUData, with an open and a multiple-choice benchmark."""
    folder = tmp_path_factory.mktemp("lmu")
    rows = [
        {"index": index, **one, "image": base64.b64encode(one["image"]).decode()} for index, one in enumerate(questions)
    ]
    pandas.DataFrame(rows).to_csv(folder / "SampleGQA.tsv", sep="\t", index=False)
    choices = [
        one | {"A": "yes", "B": "no", "answer": "A" if one["answer"] == "yes" else "B"}
        for one in rows
        if one["answer"] in ("yes", "no")
    ]
    pandas.DataFrame(choices).to_csv(folder / "SampleChoices.tsv", sep="\t", index=False)
    return folder


@pytest.fixture
def evaluate(sample, tables, tmp_path):
    """Run the page's script; returns the process, and the table of predictions if one was written."""

    def run(budget: str, data: str, *flags: str):
        script = (ROOT / "docs/vlmevalkit.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
        for written, here in (
            ("llava-hf/llava-1.5-7b-hf", str(sample)),
            ("tokens=64", f"{budget}, max_new_tokens=8, device_map='cpu'"),
        ):
            assert script.count(written) == 1
            script = script.replace(written, here)
        (tmp_path / "run_apet.py").write_text(script)
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, "run_apet.py", "--model", NAME, "--data", data, *flags],
            cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False,
            env=os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "LMUData": str(tables)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr  # also of a combination that failed
        written = tmp_path / "outputs" / NAME / f"{NAME}_{data}.xlsx"
        return done, pandas.read_excel(written) if written.is_file() else None

    return run


def test_the_answers_are_those_of_the_compressed_model(evaluate, answers_at_64):
    done, table = evaluate("tokens=64", "SampleGQA", "--mode", "infer")
    assert table is not None, done.stdout + done.stderr
    assert "average             1-12              64" in done.stdout
    assert [str(one) for one in table["prediction"]] == [one.strip() for one in answers_at_64]


def test_multiple_choice_is_scored_and_no_budget_leaves_the_model_as_it_is(evaluate, tmp_path):
    done, table = evaluate("method=None", "SampleChoices", "--judge", "exact_matching")
    assert table is not None and "with apet" not in done.stdout, done.stdout + done.stderr
    right = [row[row["answer"]] == row["prediction"].lower() for _, row in table.iterrows()]
    score = pandas.read_csv(tmp_path / "outputs" / NAME / f"{NAME}_SampleChoices_acc.csv")
    assert len(right) == 3 and score["Overall"].tolist() == pytest.approx([sum(right) / 3])


def test_a_method_without_a_budget_is_refused(evaluate):
    done, table = evaluate("method='apet'", "SampleGQA", "--mode", "infer")
    # VLMEvalKit reports the error, goes on and ends with status 0.
    assert "method=apet has no effect without a budget" in done.stdout + done.stderr and table is None
