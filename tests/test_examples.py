"""The examples run, are short, and say what they promise; the notebook is executed where nbclient is installed."""

import json
from pathlib import Path

import pytest
import transformers
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


# A newcomer's script: ten lines, and none of them differs between the models.
TEN_LINES = """import transformers
from PIL import Image
import apet
model = transformers.AutoModelForImageTextToText.from_pretrained(checkpoint)
processor = transformers.AutoProcessor.from_pretrained(checkpoint)
inputs = processor(images=[Image.open(picture).convert("RGB")], text=[question], return_tensors="pt")
apet.compress_model(model, tokens=8)
ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
print(processor.decode(ids[0], skip_special_tokens=True))
kept = apet.last_result(model)
"""
ASKED = {
    "llava": "<image>\nWhat is it?",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>What is it?",
    "internvl": "<IMG_CONTEXT>\nWhat is it?",
    "video_llava": "<image>\nWhat is it?",
}

INTERNVL_TOKENS = {
    "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}  # fmt: skip


@pytest.mark.parametrize("family", ASKED)
def test_the_same_ten_lines_compress_every_family(family, tmp_path, capsys):
    pytest.importorskip("torchvision", reason="transformers' video processors need it")
    assert len(TEN_LINES.splitlines()) == 10
    folder = tmp_path / family
    checkpoint = (
        export_checkpoint(str(SAMPLE), str(folder), "vicuna_v1")
        if family == "llava"
        else write_checkpoint(family, folder)
    )
    if family == "internvl":  # its processor asks the tokenizer for tokens by name, and has the tokens of a tile
        transformers.AutoTokenizer.from_pretrained(checkpoint, **INTERNVL_TOKENS).save_pretrained(checkpoint)
        transformers.AutoProcessor.from_pretrained(checkpoint, image_seq_length=9).save_pretrained(checkpoint)
    names = {"checkpoint": str(checkpoint), "picture": str(PICTURE), "question": ASKED[family]}
    exec(compile(TEN_LINES, "ten_lines.py", "exec"), names)
    assert "What is it?" in capsys.readouterr().out
    kept = names["kept"]
    assert 0 < kept.layer_averaged_tokens[0] < sum(kept.tokens_in[0]) and names["model"].apet.family.startswith(family)
    if family == "llava":
        assert (kept.layer_averaged_tokens, kept.tokens_in) == ([8], ((576,),))


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
