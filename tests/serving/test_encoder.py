"""The encoder's budget counts what the encoder does: the manager by itself, and the batches of an engine."""

from types import SimpleNamespace

import pytest
import torch
from vllm.multimodal.inputs import PlaceholderRange

from apet.serving.encoder import EncoderBudget, values_per_token

TOKEN = 3 * 14 * 14


def manager(limit: int, cache_size: int = 10_000) -> EncoderBudget:
    vision = SimpleNamespace(patch_size=14)
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_encoder_input_tokens=limit),
        model_config=SimpleNamespace(hf_config=SimpleNamespace(vision_config=vision)),
    )
    return EncoderBudget.create_manager(cache_size=cache_size, vllm_config=config)


def request(name: str, *works: int, kept: int = 4, fields=None):
    """A request for pictures of which the encoder makes so many tokens; `kept` of each go into the prompt."""
    features = []
    for number, work in enumerate(works):
        data = {"pixel_values": SimpleNamespace(data=torch.empty(work * TOKEN, dtype=torch.uint8))}
        span = PlaceholderRange(offset=10 * number, length=kept)
        features.append(
            SimpleNamespace(data=data if fields is None else fields, identifier=f"{name}-{number}", mm_position=span)
        )
    return SimpleNamespace(request_id=name, mm_features=features, get_num_encoder_embeds=lambda _: kept)


def step(budget: EncoderBudget, requests: list) -> list[str]:
    """Pictures that one step encodes, asked for in the order and the way of vLLM's scheduler."""
    encoded = []
    for one in requests:
        allowed, embeds = [], 0
        for number, feature in enumerate(one.mm_features):
            if budget.check_and_update_cache(one, number):
                continue
            if not budget.can_allocate(one, number, 10**6, embeds):
                break
            embeds += one.get_num_encoder_embeds(number)
            allowed.append(number)
            encoded.append(feature.identifier)
        for number in allowed:
            budget.allocate(one, number)
    budget.get_freed_mm_hashes()
    return encoded


def test_a_step_encodes_as_many_tokens_as_its_budget_has_and_one_picture_at_least():
    budget = manager(1000)
    waiting = [request("a", 400, 400, 400), request("b", 100), request("c", 2500), request("d", 1, 1)]
    assert step(budget, waiting) == ["a-0", "a-1", "b-0", "d-0", "d-1"]
    assert step(budget, waiting) == ["a-2"]
    assert step(budget, waiting) == ["c-0"]
    assert step(budget, waiting) == []


def test_the_cache_and_the_budget_of_the_scheduler_still_count():
    budget = manager(1000, cache_size=6)
    assert step(budget, [request("a", 1, 1)]) == ["a-0"]
    one = request("b", 1)
    assert not manager(1000).can_allocate(one, 0, 3, 0)


def test_a_request_that_was_turned_down_costs_the_next_ones_nothing():
    budget = manager(1000)
    assert budget.can_allocate(request("a", 900), 0, 10**6, 0)  # found no room in the KV cache: never allocated
    assert step(budget, [request("b", 900)]) == ["b-0"]


@pytest.mark.parametrize(
    ("fields", "encoded"), [({"image_embeds": SimpleNamespace(data=torch.empty(4, 8))}, 3), ({"address": None}, 1)]
)
def test_embeddings_cost_nothing_and_what_is_not_seen_gets_a_step_of_its_own(fields, encoded):
    budget = manager(1000)
    assert len(step(budget, [request(name, 1, fields=fields) for name in "abc"])) == encoded


@pytest.mark.parametrize(("vision", "model", "values"), [
    ({"patch_size": 14}, {}, 588),
    ({"patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2}, {}, 4704),
    ({"patch_size": [14, 14]}, {"downsample_ratio": 0.5}, 2352),
])  # fmt: skip
def test_values_behind_a_token(vision, model, values):
    assert values_per_token(SimpleNamespace(vision_config=SimpleNamespace(**vision), **model)) == values
