"""A compressed prefill reads nothing on the device between the start of its encoder and its end.

Every wait of tiny models on the counted device: what would hold the host up on a GPU. Figures that are not zero are
stated with their reason.
"""

from collections import Counter

import counted_device
import pytest
import torch
from counted_device import back, counted, there
from families import FAMILIES
from test_patch_llava_next import inputs as next_inputs
from test_patch_llava_next import make as make_llava_next
from tiny import MIXED_ROWS, batch, tiny_llava

import apet
from apet.adapters import adapter_for

pytestmark = pytest.mark.host

BOTH = apet.ApetConfig(visual_token_num=6, layer_list=[2], image_token_list=[3], basis_token_num=3)
VISION = apet.ApetConfig(visual_token_num=6, basis_token_num=3)
IN_DECODER = apet.ApetConfig(layer_list=[2], image_token_list=[3], basis_token_num=3)
NAMES = ("llava", "llava_next", *FAMILIES)

# Waits of transformers, or of ours, that are left, and why.
NEWLINES = "how many newlines, or class tokens of a clip's frames, stay depends on which tokens do"
DEEPSTACK = "transformers adds features at a boolean index, twice per layer that adds some"
PACKED = "transformers uploads the lengths of pictures"
LEFT = {
    ("llava_next", "kept_columns"): NEWLINES,
    ("llava_next", "_choices"): NEWLINES,
    ("llava_onevision", "_choices"): NEWLINES,
    ("video_llava", "_choices"): NEWLINES,
    ("llava_next", "pack_image_features"): PACKED,
    ("llava_onevision", "pack_image_features"): PACKED,
    ("qwen3_vl", "_deepstack_process"): DEEPSTACK,
}


def build(name):
    if name == "llava":
        return tiny_llava()
    return make_llava_next("sdpa") if name == "llava_next" else FAMILIES[name].build("sdpa")


def prompts(name, model, rows):
    """A batch: "one" prompt, "two" of different length with padding, the "same" one twice without."""
    if name == "llava":
        return batch({"one": MIXED_ROWS[:1], "two": MIXED_ROWS[:2], "same": MIXED_ROWS[:1] * 2}[rows])
    if name == "llava_next":
        return next_inputs(model, {"one": (0,), "two": (0, 1), "same": (0, 0)}[rows])
    own = FAMILIES[name].prompts
    return FAMILIES[name].inputs({"one": own[:1], "two": own[:2], "same": own[:1] * 2}[rows])


class Marks:
    """How many waits had been counted when the first encoder began, and when the last prefill ended."""

    def __init__(self, model, waits):
        adapter, self.begun, self.ended = adapter_for(model), None, None
        towers = adapter.towers or adapter.reducible_towers or [adapter.base_model.vision_tower]
        self._handles = [tower.register_forward_pre_hook(self._begin) for tower in towers]
        self._handles.append(adapter.base_model.register_forward_hook(self._end))
        self._waits = waits

    def _begin(self, *_):
        self.begun = len(self._waits) if self.begun is None else self.begun

    def _end(self, *_):
        self.ended = len(self._waits) if self.ended is None else self.ended

    def remove(self):
        for handle in self._handles:
            handle.remove()


def waits_of(model, config, call, inputs):
    """Places of the waits between the encoder and the end of the prefill, and what the call gave."""
    model = there(model)
    with torch.no_grad(), apet.patched(model, config), counted() as waits:
        marks = Marks(model, waits)
        output = call(model, there(inputs))
        marks.remove()
    assert marks.begun > 0, "what is read at the beginning is counted"
    return waits.places[marks.begun : marks.ended], back(output)


def forward(model, inputs):
    return model(**inputs).logits


def generate(model, inputs):
    return model.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True, output_logits=True)


def unexplained(name, places):
    """Waits beyond those that are stated, with how often each is made."""
    known = [function for family, function in LEFT if family == name]
    return Counter(place for place in places if not any(f" {function} " in f"{place} " for function in known))


@pytest.fixture(autouse=True)
def device(monkeypatch):
    counted_device.install(monkeypatch)


CASES = [
    (VISION, "two", generate),
    (IN_DECODER, "two", forward),
    (IN_DECODER, "one", generate),
    (BOTH, "one", forward),
    (BOTH, "two", forward),
    (BOTH, "same", forward),
    (BOTH, "two", generate),
    (BOTH, "same", generate),
]


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("name", NAMES)
def test_prefill_does_not_wait(name, case):
    config, rows, call = CASES[case]
    model = build(name)
    inputs = prompts(name, model, rows)
    with torch.no_grad(), apet.patched(model, config):
        expected = call(model, inputs)
    places, found = waits_of(model, config, call, inputs)
    assert not unexplained(name, places)
    if config is BOTH and rows == "two":
        stated = {function for family, function in LEFT if family == name}
        assert stated == {function for function in stated if any(f" {function} " in f"{place} " for place in places)}
    if call is forward:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
