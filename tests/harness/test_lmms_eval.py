"""lmms-eval itself, with the installed entry point, on a task of local files.

Skipped where lmms-eval is not installed; scripts/test_lmms_eval.sh installs it in an environment of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from family_checkpoints import write_checkpoint

pytest.importorskip("lmms_eval")
pandas = pytest.importorskip("pandas")

ROOT = Path(__file__).parents[2]
QUESTIONS = 6
TASK = """
task: sample_gqa
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {parquet}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 8
  temperature: 0
process_results: !function utils.process_results
metric_list:
  - metric: exact
    aggregation: mean
    higher_is_better: true
"""
UTILS = """
import io
from PIL import Image

def doc_to_visual(doc):
    return [Image.open(io.BytesIO(doc["image"])).convert("RGB")]

def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def process_results(doc, results):
    return {"exact": float(results[0].strip().lower().rstrip(".") == doc["answer"].lower())}
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory, questions) -> Path:
    folder = tmp_path_factory.mktemp("task")
    pandas.DataFrame(questions).to_parquet(folder / "gqa.parquet")
    (folder / "sample_gqa.yaml").write_text(TASK.format(parquet=folder / "gqa.parquet"))
    (folder / "utils.py").write_text(UTILS)
    return folder


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> str:
    """A folder with the distribution's metadata as setup.py writes it, so that the entry point is there."""
    folder = tmp_path_factory.mktemp("egg")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)], cwd=ROOT, check=True,
        capture_output=True,
    )  # fmt: skip
    return str(folder)


def evaluate(model: str, arguments: str, task: Path, installed: str, out: Path, *flags: str):
    """Run lmms-eval; returns the process, and the answers it logged if it wrote any."""
    paths = os.pathsep.join([str(ROOT), installed, os.environ.get("PYTHONPATH", "")])
    command = [
        sys.executable, "-m", "lmms_eval", "--model", model, "--model_args", arguments, "--tasks", "sample_gqa",
        "--include_path", str(task), "--batch_size", "1", "--output_path", str(out), "--log_samples", *flags,
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=task, capture_output=True, text=True, timeout=500,
        env=os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "HF_HOME": str(task / "home")},
    )  # fmt: skip
    samples = [json.loads(line) for file in out.rglob("*samples*.jsonl") for line in file.read_text().splitlines()]
    answers = [one["filtered_resps"] for one in sorted(samples, key=lambda one: one["doc_id"])]
    return done, answers


@pytest.mark.slow
def test_llava_answers_as_the_compressed_model_does(sample, answers_at_64, task, installed, tmp_path):
    arguments = f"pretrained={sample},device=cpu,device_map=cpu,dtype=float32,tokens=64,method=apet"
    done, answers = evaluate("apet_llava_hf", arguments, task, installed, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "vision               1-6              96   16.7%" in done.stdout and "|sample_gqa|" in done.stdout
    assert answers == answers_at_64 and len(answers) == QUESTIONS


@pytest.mark.slow
def test_llava_with_prompts_as_texts_and_without_a_budget(sample, task, installed, tmp_path):
    arguments = f"pretrained={sample},device=cpu,device_map=cpu,dtype=float32"
    done, answers = evaluate("apet_llava_hf", arguments, task, installed, tmp_path, "--force_simple")
    assert done.returncode == 0, done.stderr
    assert len(answers) == QUESTIONS and all(answers) and "with apet" not in done.stdout


@pytest.mark.slow
def test_qwen(task, installed, tmp_path):
    checkpoint = write_checkpoint("qwen2_5_vl", tmp_path / "qwen")
    arguments = f"pretrained={checkpoint},device=cpu,device_map=cpu,min_pixels=3136,max_pixels=12544,ratio=0.2"
    done, answers = evaluate("apet_qwen2_5_vl", arguments, task, installed, tmp_path / "out")
    assert done.returncode == 0 and "qwen2_5_vl with apet" in done.stdout, done.stdout + done.stderr
    assert len(answers) == QUESTIONS


@pytest.mark.slow
def test_a_method_without_a_budget_is_refused(sample, task, installed, tmp_path):
    arguments = f"pretrained={sample},device=cpu,device_map=cpu,method=apet"
    done, answers = evaluate("apet_llava_hf", arguments, task, installed, tmp_path)
    # lmms-eval reports the error and ends with status 0.
    assert "method=apet has no effect without a budget" in done.stdout + done.stderr and answers == []
