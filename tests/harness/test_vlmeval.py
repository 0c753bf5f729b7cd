"""The wrapper for VLMEvalKit, held to the interface that VLMEvalKit's guide for developers describes.

These tests do not run VLMEvalKit: the package `vlmeval` here is written by the test and has only what the guide names.
Where a real one is installed they leave it alone.
"""

import importlib
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

import apet
from llava.model.hugging_face import export_checkpoint

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "data/sample/eval/gqa/images"
QUESTION = "What shape is the blue object?\nAnswer the question using a single word or phrase."

pytestmark = pytest.mark.skipif(find_spec("vlmeval") is not None, reason="a real VLMEvalKit is installed")

# A model implements generate_inner; generate takes a list of such parts, or of strings.
BASE = """
import os


class BaseModel:
    INSTALL_REQ = False
    INTERLEAVE = False

    def generate_inner(self, message, dataset=None):
        raise NotImplementedError

    def generate(self, message, dataset=None):
        if isinstance(message[0], str):
            message = [dict(type="image" if os.path.exists(one) else "text", value=one) for one in message]
        return self.generate_inner(message, dataset)
"""
# A model is named as it is in supported_VLM of vlmeval/config.py.
RUN = """
import argparse
import json
from vlmeval.config import supported_VLM

flags = argparse.ArgumentParser()
flags.add_argument("--model")
flags.add_argument("--data")
args = flags.parse_args()
model = supported_VLM[args.model]()
print("ANSWERS", json.dumps([model.generate(message) for message in json.load(open(args.data))]))
"""


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> str:
    return str(
        export_checkpoint(
            str(ROOT / "data/sample/model/llava-v1.5-sample"),
            str(tmp_path_factory.mktemp("sample") / "hf"),
            "vicuna_v1",
        )
    )


@pytest.fixture
def stand_in(tmp_path) -> Path:
    """A folder with a package `vlmeval` that has just the documented interface, and a `run.py`."""
    folder = tmp_path / "kit"
    (folder / "vlmeval/vlm").mkdir(parents=True)
    (folder / "vlmeval/__init__.py").touch()
    (folder / "vlmeval/vlm/__init__.py").touch()
    (folder / "vlmeval/vlm/base.py").write_text(BASE)
    (folder / "vlmeval/config.py").write_text('supported_VLM = {"taken": None}\n')
    (folder / "run.py").write_text(RUN)
    return folder


@pytest.fixture
def wrapper(stand_in, monkeypatch):
    """The wrapper, imported beside the stand-in and forgotten afterwards."""
    monkeypatch.syspath_prepend(str(stand_in))
    yield importlib.import_module("apet.harness.vlmeval")
    for name in [name for name in sys.modules if name.split(".")[0] == "vlmeval" or name == "apet.harness.vlmeval"]:
        del sys.modules[name]


def without_harness(checkpoint: str, picture: Path) -> str:
    model = transformers.AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    processor = transformers.AutoProcessor.from_pretrained(checkpoint)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[Image.open(picture).convert("RGB")], text=text, return_tensors="pt")
    with torch.inference_mode(), apet.compressed(model, tokens=64):
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.slow
def test_the_answers_are_those_of_the_compressed_model(wrapper, sample, capsys):
    wrapper.register("mine", sample, tokens=64, max_new_tokens=8, device_map="cpu")
    model = wrapper.supported_VLM["mine"]()
    assert "average             1-12              64" in capsys.readouterr().out
    picture = PICTURES / "n000193.jpg"
    message = [{"type": "image", "value": str(picture)}, {"type": "text", "value": QUESTION}]
    assert model.generate(message) == model.generate([str(picture), QUESTION]) == without_harness(sample, picture)
    assert model.generate(message, dataset="MME") == "square"
    assert apet.last_result(model.model).layer_averaged_tokens == [64]
    assert isinstance(model.generate([{"type": "text", "value": "What is two plus two?"}]), str)


@pytest.mark.slow
def test_what_cannot_be_is_a_sentence(wrapper, sample):
    with pytest.raises(ValueError, match="VLMEvalKit has a model 'taken'"):
        wrapper.register("taken", sample)
    wrapper.register("pointless", sample, method="apet", device_map="cpu")
    with pytest.raises(ValueError, match="method=apet has no effect without a budget"):
        wrapper.supported_VLM["pointless"]()
    wrapper.register("plain", sample, device_map="cpu")
    model = wrapper.supported_VLM["plain"]()
    with pytest.raises(ValueError, match="a message of type 'video' cannot be asked; known types: image, text"):
        model.generate([{"type": "video", "value": "clip.mp4"}])


@pytest.mark.slow
def test_the_script_of_the_page_starts_run_py(stand_in, sample, tmp_path):
    page = (ROOT / "docs/vlmevalkit.md").read_text(encoding="utf-8")
    script = page.split("```python\n")[1].split("```")[0]
    for written, here in (
        ("llava-hf/llava-1.5-7b-hf", sample),
        ("VLMEvalKit/run.py", str(stand_in / "run.py")),
        ("tokens=64", "tokens=64, max_new_tokens=8, device_map='cpu'"),
    ):
        assert script.count(written) == 1
        script = script.replace(written, here)
    (tmp_path / "run_apet.py").write_text(script)
    messages = [[str(PICTURES / "n000193.jpg"), QUESTION]]
    (tmp_path / "messages.json").write_text(json.dumps(messages))
    done = subprocess.run(
        [sys.executable, tmp_path / "run_apet.py", "--model", "llava-1.5-7b-apet-64", "--data", "messages.json"],
        cwd=tmp_path, env={"PYTHONPATH": f"{stand_in}:{ROOT}", "PATH": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 'ANSWERS ["square"]' in done.stdout and "llava with apet" in done.stdout


def test_a_missing_package_is_named():
    with pytest.raises(ImportError, match="VLMEvalKit is not installed .* clone its repository"):
        importlib.import_module("apet.harness.vlmeval")
