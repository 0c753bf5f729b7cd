"""The vision tower of a patched model stops after the layer whose output is used."""

import pytest
import torch
from tiny import TOWERS, images, tiny_llava

import apet
from apet.adapters import host
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower


@pytest.fixture(params=TOWERS)
def model(request):
    return tiny_llava(tower=request.param)


def runs(model, call) -> list[int]:
    """Layers of the tower that changed their input during a call."""
    seen = []
    handles = [
        layer.register_forward_hook(
            lambda _, args, output, index=index: None if torch.equal(args[0], output) else seen.append(index)
        )
        for index, layer in enumerate(host.tower_layers(model.model.vision_tower))
    ]
    call()
    for handle in handles:
        handle.remove()
    return seen


def test_layers_behind_the_selected_one_do_not_run(model):
    tower, pixels = model.model.vision_tower, images(2)
    count = len(host.tower_layers(tower))
    expected = tower(pixels, output_hidden_states=True).hidden_states
    with apet.patched(model, apet.ApetConfig(visual_token_num=4)):
        for state in (-2, 1, -1):
            needed = list(range(state % (count + 1)))
            assert runs(model, lambda s=state: tower(pixels, output_hidden_states=s)) == needed
            assert torch.equal(tower(pixels, output_hidden_states=state).hidden_states[state], expected[state])
        assert runs(model, lambda: tower(pixels, output_hidden_states=True)) == list(range(count))
        assert runs(model, lambda: tower(pixels)) == list(range(count))
    assert runs(model, lambda: tower(pixels, output_hidden_states=-2)) == list(range(count))
    assert all("forward" not in vars(layer) for layer in host.tower_layers(tower))


def test_llava_asks_for_its_layer_only(model):
    pixels = images(1)
    tower = CLIPVisionTower(model.model.vision_tower, None, model.config)
    expected = tower(pixels)
    with apet.patched(model, apet.ApetConfig(visual_token_num=4)):
        layers = len(host.tower_layers(model.model.vision_tower))
        assert runs(model, lambda: tower(pixels)) == list(range(layers - 1))
        assert torch.equal(tower(pixels), expected)
