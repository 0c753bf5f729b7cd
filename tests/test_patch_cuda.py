"""A patched model on a GPU: the tokens and choices of the CPU, alone and in a batch with padding."""

import pytest
import torch
from families import FAMILIES, SUPPRESSED
from tiny import IMAGE_ID, MIXED_ROWS, batch, tiny_llava

import apet

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def answers(model, inputs, config):
    """New tokens, and what every stage kept of every image."""
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    with torch.inference_mode(), apet.patched(model, config):
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False, suppress_tokens=[*SUPPRESSED, IMAGE_ID])
        stages = apet.last_result(model).stages
    kept = [one.cpu().tolist() for stage in stages for row in stage.kept for one in row]
    return tokens.cpu(), kept


@pytest.mark.parametrize("method", ["apet", "random"])
def test_llava_chooses_and_answers_as_on_the_cpu(method):
    config = apet.ApetConfig(
        visual_token_num=12, layer_list=[2], image_token_list=[6], basis_token_num=3, method=method
    )
    for rows in (MIXED_ROWS[:1], MIXED_ROWS):
        tokens, kept = answers(tiny_llava(), batch(rows), config)
        cuda_tokens, cuda_kept = answers(tiny_llava().cuda(), batch(rows), config)
        assert cuda_kept == kept
        assert torch.equal(cuda_tokens, tokens)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_families_choose_as_on_the_cpu(name):
    config = apet.ApetConfig.from_dict(
        {"image_token_ratio": 0.5, "layer_list": [2], "image_token_ratio_list": [0.6], "basis_token_num": 2}
    )
    family = FAMILIES[name]
    inputs = family.inputs(family.prompts)
    _, kept = answers(family.build("sdpa"), inputs, config)
    _, cuda_kept = answers(family.build("sdpa").cuda(), inputs, config)
    assert cuda_kept == kept
