"""The wrapper for VLMEvalKit, held to the interface that VLMEvalKit's guide for developers describes.

These tests do not run VLMEvalKit (test_vlmevalkit.py does): the package `vlmeval` here is written by the test and
has only what the guide names. Where a real one is installed they leave it alone.
"""

import importlib
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import apet

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


@pytest.fixture
def stand_in(tmp_path) -> Path:
    """A folder with a package `vlmeval` that has just the documented interface, and a `run.py`."""
    folder = tmp_path / "kit"
    (folder / "vlmeval/vlm").mkdir(parents=True)
    (folder / "vlmeval/__init__.py").touch()
    (folder / "vlmeval/vlm/__init__.py").touch()
    (folder / "vlmeval/vlm/base.py").write_text(BASE)
    (folder / "vlmeval/config.py").write_text('supported_VLM = {"taken": None}\n')
    (folder / "run.py").write_text(RUN)  # in a clone
    (folder / "vlmeval/run.py").write_text(RUN)  # in ms-vlmeval
    return folder


@pytest.fixture
def wrapper(stand_in, monkeypatch):
    """The wrapper, imported beside the stand-in and forgotten afterwards."""
    monkeypatch.syspath_prepend(str(stand_in))
    yield importlib.import_module("apet.harness.vlmeval")
    for name in [name for name in sys.modules if name.split(".")[0] == "vlmeval" or name == "apet.harness.vlmeval"]:
        del sys.modules[name]


@pytest.mark.slow
def test_the_answers_are_those_of_the_compressed_model(wrapper, sample, ask_at_64, capsys):
    wrapper.register("mine", sample, tokens=64, max_new_tokens=8, device_map="cpu")
    model = wrapper.supported_VLM["mine"]()
    assert "average             1-12              64" in capsys.readouterr().out
    picture = PICTURES / "n000193.jpg"
    message = [{"type": "image", "value": str(picture)}, {"type": "text", "value": QUESTION}]
    wanted = ask_at_64(QUESTION, picture.read_bytes()).strip()
    assert model.generate(message) == model.generate([str(picture), QUESTION]) == wanted
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
@pytest.mark.parametrize(
    "start", ['run_module("vlmeval.run"', 'run_path("VLMEvalKit/run.py"'], ids=["installed", "clone"]
)
def test_the_script_of_the_page_starts_run_py(stand_in, sample, start, tmp_path):
    page = (ROOT / "docs/vlmevalkit.md").read_text(encoding="utf-8")
    assert page.count(start) == 1
    script = page.split("```python\n")[1].split("```")[0]
    script = script.replace('run_module("vlmeval.run"', start.replace("VLMEvalKit", str(stand_in)))
    for written, here in (
        ("llava-hf/llava-1.5-7b-hf", str(sample)),
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
    with pytest.raises(ImportError, match="VLMEvalKit is not installed .* pip install ms-vlmeval, or clone"):
        importlib.import_module("apet.harness.vlmeval")
