"""`generate` of a LLaVA checkpoint reads ids and masks in front of the encoder, and splices without a look behind."""

from pathlib import Path

import counted_device
import pytest
import torch
from counted_device import back, counted, there

import apet
from llava.model.builder import load_pretrained_model

pytestmark = pytest.mark.host

TINY = Path(__file__).parents[1] / "golden" / "llava" / "tiny" / "llava-v1.5-tiny"
SOME = apet.ApetConfig(visual_token_num=3, layer_list=[1], image_token_list=[2], basis_token_num=1)
# Prompts of different lengths: the second shows no image, the third shows two.
ROWS = [[1, 300, -200, 340, 271, 290], [1, 304, 271], [1, -200, 301, -200, 259, 265]]
GREEDY = {"do_sample": False, "max_new_tokens": 3, "eos_token_id": None}


@pytest.fixture(autouse=True)
def device(monkeypatch):
    counted_device.install(monkeypatch)


def waits_behind_the_encoder(model, **inputs):
    """Places of the waits between the encoder's start and the end of the prefill, and the answer."""
    begun, ended = [], []
    tower, network = model.get_vision_tower().vision_tower, model.get_model()
    with torch.no_grad(), counted() as waits:
        handles = [
            tower.register_forward_pre_hook(lambda *_: begun.append(len(waits))),
            network.register_forward_hook(lambda *_: ended.append(len(waits))),
        ]
        output = model.generate(**there(inputs), **GREEDY)
        for handle in handles:
            handle.remove()
    return waits.places[begun[0] : ended[0]], back(output)


def left_padded(rows) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    images = sum(max(1, row.count(-200)) for row in rows)
    return {
        "inputs": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
        "images": torch.randn(images, 3, 28, 28, generator=torch.Generator().manual_seed(5)),
    }


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS])
@pytest.mark.parametrize("config", [None, SOME])
def test_splicing_does_not_wait(rows, config):
    model = load_pretrained_model(str(TINY), None, TINY.name, device="cpu")[1]
    if config is not None:
        apet.apply_patch(model, config)
    inputs = left_padded(rows)
    expected = model.generate(**inputs, **GREEDY)
    places, answer = waits_behind_the_encoder(there(model), **inputs)
    assert torch.equal(answer, expected)
    assert [place for place in places if "llava/" in place or "apet/" in place] == []
