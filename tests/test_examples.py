"""The examples run, are short, and say what they promise; the notebook is executed where nbclient is installed."""

import json
from pathlib import Path

import pytest
from clips import write_clip
from family_checkpoints import write_checkpoint

import apet
from examples import llava as llava_example
from examples import qwen2_5_vl as qwen_example
from examples import video as video_example
from llava.model.hugging_face import export_checkpoint

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "data/sample/model/llava-v1.5-sample"
PICTURE = ROOT / "data/sample/eval/gqa/images/n000193.jpg"
EXAMPLES = sorted(path for path in (ROOT / "examples").rglob("*.py") if "sample_vlm" not in path.parts)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_under_forty_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 40


def test_llava(tmp_path, capsys):
    checkpoint = export_checkpoint(str(SAMPLE), str(tmp_path / "hf"), "vicuna_v1")
    question = "What shape is the blue object?\nAnswer the question using a single word or phrase."
    llava_example.main(str(checkpoint), str(PICTURE), question)
    shown = capsys.readouterr().out
    assert (
        "without: square" in shown and "with: square" in shown and "average             1-12              64" in shown
    )


def test_qwen2_5_vl(tmp_path, capsys):
    pytest.importorskip("torchvision", reason="transformers' video processors need it")
    qwen_example.main(str(write_checkpoint("qwen2_5_vl", tmp_path / "qwen")), str(PICTURE))
    kept, of = capsys.readouterr().out.splitlines()[-1].split(" visual")[0].split(" of ")
    assert float(kept) / float(of) == pytest.approx(0.2, abs=0.02)


def test_video(tmp_path, capsys):
    pytest.importorskip("torchvision", reason="transformers' video processors need it")
    clip = write_clip(tmp_path / "clip.mp4", 12)
    video_example.main(str(write_checkpoint("video_llava", tmp_path / "video")), str(clip), "What moves?", 6)
    shown = capsys.readouterr().out
    assert "video_llava with apet: a clip of 8 frames" in shown


def test_the_notebook_runs(monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(Path(apet.__file__).parents[1]))
    book = nbformat.read(ROOT / "examples/quickstart.ipynb", as_version=4)
    done = nbclient.NotebookClient(
        book, timeout=300, resources={"metadata": {"path": str(ROOT / "examples")}}
    ).execute()
    text = json.dumps(done)
    assert "square" in text and "(576 visual tokens)" in text
