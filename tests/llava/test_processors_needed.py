"""What a user without torchvision would lose with transformers' own processors: every question of every family."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from families import FAMILIES
from family_checkpoints import write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
# An interpreter that finds no torchvision; transformers looks for it once, when it is imported.
ASK = """
import importlib.util, json, sys

own = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.partition(".")[0] == "torchvision" else own(name, *rest)

from PIL import Image
from transformers import AutoConfig, AutoProcessor
from llava.model.processors import Limits, load_processor

found = {}
for folder in sys.argv[1:]:
    try:
        AutoProcessor.from_pretrained(folder)
        theirs = "built"
    except (ImportError, ValueError) as error:
        theirs = str(error)
    made = load_processor(folder, AutoConfig.from_pretrained(folder), Limits())
    shown = made("What?", [Image.new("RGB", (120, 70))], conv_mode="llava_v1")
    found[folder] = [theirs, sum(shown.visual), int((shown.input_ids == made.placeholder_id(False)).sum())]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> dict[str, list]:
    """Family -> [what transformers says, visual tokens of an image by ours, placeholders in its prompt]."""
    root = tmp_path_factory.mktemp("checkpoints")
    folders = {family: str(write_checkpoint(family, root / family)) for family in FAMILIES}
    command = [sys.executable, "-c", ASK, *folders.values()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return {family: found[folder] for family, folder in folders.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_builds_none_without_torchvision(asked, family):
    """Where this fails, transformers' own processor can take the place of that family's in `llava.model.processors`."""
    assert "torchvision" in asked[family][0].lower()


@pytest.mark.parametrize("family", FAMILIES)
def test_ours_ask_all_the_same(asked, family):
    _, visual, placeholders = asked[family]
    assert visual == placeholders > 0
