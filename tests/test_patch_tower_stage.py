"""The tower stage against towers written as loops: "merge" and "restore", and what follows from them."""

import copy
import dataclasses
import pickle
import threading

import numpy as np
import pytest
import torch
from families import FAMILIES
from test_cost import counted
from test_vis import panels
from tiny import MIXED_ROWS, PATCHES, batch, images, tiny_llava
from transformers.integrations import flash_attention

import apet
from apet import ApetConfig
from apet.adapters import host
from apet.bench.components import tower_stops_early
from apet.bench.presets import get_preset
from apet.cost import prefill_cost
from apet.methods import base
from apet.methods.apet import Apet
from apet.methods.base import Method
from apet.vis import draw
from apet.vis.trace import listening, trace

pytestmark = pytest.mark.host

DEPTH = 7  # layers of the towers here; the sixth is the last in use
MERGE = ApetConfig(tower_layer_list=[2], tower_token_list=[12], basis_token_num=3)
TWICE = ApetConfig(tower_layer_list=[2, 4], tower_token_list=[16, 0.5], basis_token_num=3)
RESTORE = ApetConfig(tower_mode="restore", tower_layer_list=[2], tower_token_list=[12], tower_key_layers=2)
STAGES = {"merge": MERGE, "twice": TWICE, "restore": RESTORE}


def changed(config: ApetConfig, **fields) -> ApetConfig:
    return ApetConfig.from_dict(config.to_dict() | fields)


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request):
    return tiny_llava(request.param, depth=DEPTH)


@pytest.fixture(scope="module")
def sdpa():
    return tiny_llava("sdpa", depth=DEPTH)


# Towers as loops


def attend(layer, queries, keys, sizes) -> torch.Tensor:
    """What a layer makes of rows (n, D) that attend to `keys` (m, D), which count for `sizes` (m,) patches."""
    attention, normed, seen = layer.self_attn, layer.layer_norm1(queries), layer.layer_norm1(keys)
    heads, out = attention.num_heads, []
    for query in attention.q_proj(normed):
        parts = []
        for head in range(heads):
            own = slice(head * len(query) // heads, (head + 1) * len(query) // heads)
            logits = attention.k_proj(seen)[:, own] @ query[own] * (len(query) // heads) ** -0.5
            weights = (logits.exp() * sizes) / (logits.exp() * sizes).sum()
            parts.append(weights @ attention.v_proj(seen)[:, own])
        out.append(torch.cat(parts))
    hidden = queries + attention.out_proj(torch.stack(out))
    return hidden + layer.mlp(layer.layer_norm2(hidden))


def merged_tower(layers, hidden, config, first, depth):
    """Rows (n, D) behind the layers, the patches they are and how many each stands for."""
    places, sizes = list(range(len(hidden) - first)), torch.ones(len(hidden))
    budgets = dict(zip(config.tower_layer_list, config.tower_token_list, strict=True))
    for number, layer in enumerate(layers[:depth], start=1):
        hidden = attend(layer, hidden, hidden, sizes)
        if number not in budgets:
            continue
        budget, patches = budgets[number], hidden[first:]
        keep = budget if isinstance(budget, int) else int(budget * len(patches))
        found = apet.compress(patches[None], keep, basis=config.basis_token_num)
        own = torch.zeros(keep)
        for patch, row in enumerate(found.sources[0].tolist()):
            if row >= 0:
                own[row] += sizes[first + patch]
        places = [places[index] for index in found.indices[0].tolist()]
        hidden, sizes = torch.cat([hidden[:first], found.tokens[0]]), torch.cat([sizes[:first], own])
    return hidden, places, sizes


def restored_tower(layers, hidden, config, first, depth):
    """All rows (R, D) behind the layers, and the patches that were computed."""
    cut, keep = config.tower_layer_list[0], config.tower_token_list[0]
    for layer in layers[:cut]:
        before, hidden = hidden, attend(layer, hidden, hidden, torch.ones(len(hidden)))
    change = (hidden - before)[first:].norm(dim=-1)
    kept = sorted(sorted(range(len(change)), key=lambda patch: -change[patch])[:keep])
    saved, others = hidden, [patch for patch in range(len(change)) if patch not in kept]
    computed = [*range(first), *(first + patch for patch in kept)]
    near = {
        patch: sorted(kept, key=lambda other: (saved[first + patch] - saved[first + other]).norm())[:10]
        for patch in others
    }
    for number, layer in enumerate(layers[cut:depth]):
        seen = hidden if number < config.tower_key_layers else hidden[computed]
        rows = attend(layer, hidden[computed], seen, torch.ones(len(seen)))
        hidden = hidden.clone()
        hidden[computed] = rows
        for patch in others:
            moves = torch.stack([hidden[first + other] - saved[first + other] for other in near[patch]])
            hidden[first + patch] = saved[first + patch] + moves.mean(0)
    return hidden, kept


def entering(tower, pixels) -> torch.Tensor:
    """(C, R, D) what enters the first layer."""
    hidden = tower.embeddings(pixels)
    return tower.pre_layrnorm(hidden) if hasattr(tower, "pre_layrnorm") else hidden


def features(model, pixels) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack(list(model.model.get_image_features(pixels).pooler_output))


@torch.no_grad()
def expected(model, pixels, config) -> tuple[torch.Tensor, list[list[int]]]:
    """Projected features (C, P, D) and the patches left of every crop, one crop at a time."""
    tower, out, left = model.model.vision_tower, [], []
    for hidden in entering(tower, pixels):
        layers, depth = host.tower_layers(tower), DEPTH - 1
        if config.tower_mode == "restore":
            hidden, places = restored_tower(layers, hidden, config, 1, depth)
            full = model.model.multi_modal_projector(hidden[1:])
        else:
            hidden, places, _ = merged_tower(layers, hidden, config, 1, depth)
            full = torch.zeros(PATCHES, model.config.text_config.hidden_size)
            full[places] = model.model.multi_modal_projector(hidden[1:])
        out.append(full)
        left.append(places)
    return torch.stack(out), left


CASES = {"merge": MERGE, "twice": TWICE} | {
    f"restore {keys}": changed(RESTORE, tower_key_layers=keys) for keys in (0, 2, 7)
}


@pytest.mark.parametrize("name", list(CASES))
def test_a_stage_equals_the_tower_as_a_loop(model, name):
    config, pixels = CASES[name], images(3)
    wanted, left = expected(model, pixels, config)
    with apet.patched(model, config):
        torch.testing.assert_close(features(model, pixels), wanted, atol=2e-4, rtol=1e-4)
        with torch.no_grad():
            model(**batch(MIXED_ROWS))
        result = apet.last_result(model)
    assert [one.layer for one in result.tower] == list(config.tower_layer_list)
    (again, more) = expected(model, batch(MIXED_ROWS)["pixel_values"], config)
    kept = [one.tolist() for sample in result.tower[-1].kept for one in sample]
    assert kept == more and len(again) == 6


def test_siglip_of_a_video_model_is_restored_like_the_loop():
    family = FAMILIES["llava_onevision"]
    model = family.build("sdpa")
    config = ApetConfig(tower_mode="restore", tower_layer_list=[1], tower_token_list=[5])
    inputs = family.inputs([family.prompts[3], family.prompts[1]])
    tower, seen = model.model.vision_tower, []
    handle = model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with apet.patched(model, config), torch.no_grad():
        model(**inputs)
        result = apet.last_result(model)
    handle.remove()
    pictures = inputs["pixel_values"][0, :5]
    for pixels, made in ((inputs["pixel_values_videos"][0], seen), (pictures, seen)):
        found = next(one for one in made if len(one) == len(pixels))
        with torch.no_grad():
            for hidden, row in zip(entering(tower, pixels), found, strict=True):
                wanted, _ = restored_tower(host.tower_layers(tower), hidden, config, 0, 2)
                torch.testing.assert_close(row, wanted, atol=2e-4, rtol=1e-4)
    assert [[len(kept) for kept in sample] for sample in result.tower[0].kept] == [[15], [25]]


def test_video_llava_restores_frames_of_both_towers():
    family = FAMILIES["video_llava"]
    model = family.build("sdpa")
    whole = ApetConfig(visual_token_num=9, video_token_num=9)
    config = changed(whole, tower_mode="restore", tower_layer_list=[1], tower_token_list=[0.5])
    inputs = family.inputs(family.prompts[:4])
    with torch.no_grad():
        untouched = model(**inputs).logits
        with apet.patched(model, config):
            together = model(**inputs).logits[:, -1]
            result = apet.last_result(model)
            for index, row in enumerate(family.prompts[:4]):
                alone = model(**family.inputs([row])).logits[0, -1]
                torch.testing.assert_close(alone, together[index], atol=1e-4, rtol=0)
        with apet.patched(model, whole):
            assert not torch.allclose(model(**inputs).logits[:, -1], together)
        assert torch.equal(model(**inputs).logits, untouched)
    assert [[len(kept) for kept in sample] for sample in result.tower[0].kept] == [[24], [8], [], [8, 24]]


@pytest.mark.parametrize("behind", [{}, {"visual_token_num": 5, "video_token_num": 5, "method": "visionzip"}])
@torch.no_grad()
def test_video_llava_merges_frames_and_its_vision_stage_follows(behind):
    family = FAMILIES["video_llava"]
    model = family.build("sdpa")
    config = ApetConfig(tower_layer_list=[1], tower_token_list=[0.5], basis_token_num=3, **behind)
    prompts = family.prompts[:4]
    with apet.patched(model, config):
        together = model(**family.inputs(prompts)).logits[:, -1]
        result = apet.last_result(model)
        for index, row in enumerate(prompts):
            alone = model(**family.inputs([row])).logits[0, -1]
            torch.testing.assert_close(alone, together[index], atol=1e-4, rtol=0)
    assert [[len(kept) for kept in sample] for sample in result.tower[0].kept] == [[24], [8], [], [8, 24]]
    for left, kept in zip(result.tower[0].kept, result.stages[0].kept, strict=True):
        for patches, columns in zip(left, kept, strict=True):
            if len(patches) == 24:  # three frames, each with its class token in front of 16 patches
                columns = columns[columns % 17 > 0]
                columns = columns // 17 * 16 + columns % 17 - 1
            if behind:
                assert set(columns.tolist()) < set(patches.tolist())
            else:
                assert columns.tolist() == patches.tolist()


# Off, on, off again


@pytest.mark.parametrize("tower", ["clip", "dinov2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keeping_everything_and_removing_are_bit_identical(attention, tower):
    model, inputs = tiny_llava(attention, tower=tower, depth=DEPTH), batch(MIXED_ROWS)
    with torch.no_grad():
        untouched = model(**inputs).logits
        for config in STAGES.values():
            whole = changed(config, tower_token_list=[PATCHES] * len(config.tower_layer_list))
            with apet.patched(model, whole):
                assert torch.equal(model(**inputs).logits, untouched)
                assert apet.last_result(model).tower == ()
            with apet.patched(model, config):
                assert not torch.equal(model(**inputs).logits[:, -1], untouched[:, -1])
            assert torch.equal(model(**inputs).logits, untouched)
    assert not hasattr(host.tower_attention_module(host.tower_layers(model.model.vision_tower)[0]), "apet_plain")


@pytest.mark.parametrize("tower", ["clip", "dinov2"])
@pytest.mark.parametrize("name", list(STAGES))
def test_a_batch_gives_what_its_rows_give_alone(name, tower):
    model = tiny_llava("sdpa", tower=tower, depth=DEPTH)
    config = changed(STAGES[name], visual_token_num=6, layer_list=[2], image_token_list=[3])
    with apet.patched(model, config), torch.no_grad():
        together = model(**batch(MIXED_ROWS)).logits[:, -1]
        kept = apet.last_result(model)
        for index, row in enumerate(MIXED_ROWS):
            alone = model(**batch([row])).logits[0, -1]
            torch.testing.assert_close(alone, together[index], atol=1e-4, rtol=0)
            own = apet.last_result(model)
            for one, many in zip(own.tower, kept.tower, strict=len(own.tower) > 0):
                assert [a.tolist() for a in one.kept[0]] == [b.tolist() for b in many.kept[index]]
            assert [a.tolist() for a in own.origin()[0]] == [b.tolist() for b in kept.origin()[index]]


# What comes behind the tower


@pytest.mark.parametrize("budget", [{}, {"visual_token_num": 12}, {"visual_token_num": 20}, {"image_token_ratio": 0.9}])
def test_a_budget_that_reaches_the_rows_left_keeps_them(sdpa, budget):
    with apet.patched(sdpa, changed(MERGE, **budget)), torch.no_grad():
        sdpa(**batch(MIXED_ROWS))
        result = apet.last_result(sdpa)
    (vision,), (tower,) = result.stages, result.tower
    assert vision.name == "vision" and vision.tokens_in == tuple((PATCHES,) * count for count in (1, 1, 2, 0, 2))
    for left, kept in zip(tower.kept, vision.kept, strict=True):
        assert [one.tolist() for one in left] == [one.tolist() for one in kept]
    assert result.layer_averaged_tokens == [12, 12, 24, 0, 24]


@pytest.mark.parametrize("method", ["apet", "apet_plus", "random", "visionzip", "vispruner", "divprune", "evocut"])
def test_the_vision_stage_chooses_among_the_rows_left(sdpa, method):
    config = changed(MERGE, visual_token_num=7, method=method)
    with apet.patched(sdpa, config), torch.no_grad():
        sdpa(**batch(MIXED_ROWS))
        result = apet.last_result(sdpa)
    for left, kept in zip(result.tower[0].kept, result.stages[0].kept, strict=True):
        for one, other in zip(left, kept, strict=True):
            assert set(other.tolist()) < set(one.tolist()) and len(other) == 7


def test_apet_behind_the_tower_is_apet_on_the_rows_left(sdpa):
    pixels = batch(MIXED_ROWS[:1])["pixel_values"]
    tower = sdpa.model.vision_tower
    hidden, places, _ = merged_tower(host.tower_layers(tower), entering(tower, pixels)[0], MERGE, 1, DEPTH - 1)
    found = apet.compress(hidden[None, 1:], 5, basis=3).indices[0].tolist()
    with apet.patched(sdpa, changed(MERGE, visual_token_num=5)), torch.no_grad():
        sdpa(**batch(MIXED_ROWS[:1]))
        assert apet.last_result(sdpa).stages[0].kept[0][0].tolist() == [places[index] for index in found]


def test_sizes_go_on_into_the_vision_stage_and_the_decoder(sdpa, monkeypatch):
    heard = []
    select = Apet.select

    def listen(self, tokens, keep, context):
        heard.append((context.stage, None if context.sizes is None else context.sizes.sum(-1).tolist()))
        return select(self, tokens, keep, context)

    monkeypatch.setattr(Apet, "select", listen)
    config = changed(TWICE, visual_token_num=5)
    with apet.patched(sdpa, config), torch.no_grad():
        plain = sdpa(**batch(MIXED_ROWS[:1])).logits[:, -1]
    assert heard == [("tower", [25.0]), ("tower", [25.0]), ("vision", [25.0])]
    with apet.patched(sdpa, changed(config, size_bias=True)), torch.no_grad():
        assert not torch.allclose(sdpa(**batch(MIXED_ROWS[:1])).logits[:, -1], plain)


class TestWhatMethodsSee:
    """Inputs of methods that read the tower, behind a stage."""

    @pytest.fixture
    def heard(self, monkeypatch):
        found = []

        @dataclasses.dataclass(frozen=True)
        class Spy(Method):
            name = "spy"

            def needs(self, stage):
                return {"cls_attention": (-2, 0), "vision_keys": (-2,), "vision_states": (), "vision_features": ()}

            def select(self, tokens, keep, context):
                asked = {(name, layer): context.ask(self, name, *(() if layer is None else (layer,)))
                         for name, layers in self.needs("vision").items() for layer in layers or (None,)}  # fmt: skip
                found.append({"tokens": tokens} | asked)
                rows = torch.arange(keep).expand(len(tokens), -1)
                errors = torch.zeros(tokens.shape[:2])
                return apet.CompressedTokens(tokens[:, :keep], rows, errors, rows[:, :0], errors.long())

        monkeypatch.setitem(base._METHODS, "spy", Spy)
        return found

    def listened(self, model, heard, stage):
        """What the method heard of one picture, the tower's layers, and what enters the first of them."""
        pixels = images(1)
        with apet.patched(model, changed(stage, visual_token_num=4, method="spy")):
            model.model.get_image_features(pixels)
        (said,) = heard
        tower = model.model.vision_tower
        return said, host.tower_layers(tower), entering(tower, pixels)[0]

    @torch.no_grad()
    def test_merged_rows_count_and_rows_merged_away_are_not_seen(self, sdpa, heard):
        said, layers, first = self.listened(sdpa, heard, MERGE)
        hidden, places, sizes = merged_tower(layers, first, MERGE, 1, DEPTH - 2)
        layer = layers[-2].self_attn
        normed = layers[-2].layer_norm1(hidden)
        query, keys = layer.q_proj(normed[0]).view(2, 12), layer.k_proj(normed).view(-1, 2, 12)
        logits = torch.einsum("hd,nhd->hn", query, keys) * 12**-0.5 + sizes.log()
        torch.testing.assert_close(said["cls_attention", -2][0], logits.softmax(-1)[:, 1:], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(said["vision_keys", -2][0].transpose(0, 1), keys[1:], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(said["vision_states", None][0, -2], hidden[1:], atol=1e-4, rtol=1e-4)
        behind = attend(layers[-2], hidden, hidden, sizes)[1:]
        torch.testing.assert_close(said["vision_features", None][0], behind, atol=1e-4, rtol=1e-4)
        # In front of the stage every patch is there, and the method hears of those left.
        whole = layers[0].self_attn.k_proj(layers[0].layer_norm1(first)).view(-1, 2, 12)
        query = layers[0].self_attn.q_proj(layers[0].layer_norm1(first))[0].view(2, 12)
        logits = torch.einsum("hd,nhd->hn", query, whole) * 12**-0.5
        torch.testing.assert_close(
            said["cls_attention", 0][0], logits.softmax(-1)[:, 1:][:, places], atol=1e-4, rtol=1e-4
        )

    @torch.no_grad()
    def test_restored_rows_are_seen_in_every_layer(self, sdpa, heard):
        said, layers, first = self.listened(sdpa, heard, RESTORE)
        hidden, _ = restored_tower(layers, first, RESTORE, 1, DEPTH - 2)
        torch.testing.assert_close(said["vision_states", None][0, -2], hidden[1:], atol=1e-4, rtol=1e-4)
        assert said["cls_attention", -2].shape == (1, 2, PATCHES)
        last, _ = restored_tower(layers, first, RESTORE, 1, DEPTH - 1)
        torch.testing.assert_close(said["tokens"][0], last[1:], atol=1e-4, rtol=1e-4)


# How it hangs on the model


@pytest.mark.parametrize("name", list(STAGES))
def test_threads_and_copies_do_not_mix(sdpa, name):
    rows = [MIXED_ROWS[0], MIXED_ROWS[1], MIXED_ROWS[2]]
    with apet.patched(sdpa, changed(STAGES[name], visual_token_num=5)):
        with torch.no_grad():
            alone = [sdpa(**batch([row])).logits[0, -1] for row in rows]
        found = {}

        def ask(index):
            with torch.no_grad():
                for _ in range(5):
                    found[index] = sdpa(**batch([rows[index]])).logits[0, -1]

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        twins = [copy.deepcopy(sdpa)]
    fresh = apet.apply_patch(tiny_llava("sdpa", depth=DEPTH), changed(STAGES[name], visual_token_num=5))
    twins.append(pickle.loads(pickle.dumps(fresh)))  # a model that has run holds a hook of the host's
    assert all(torch.equal(found[index], alone[index]) for index in range(3))
    with torch.no_grad():
        assert all(torch.equal(twin(**batch(rows[:1])).logits[0, -1], alone[0]) for twin in twins)


def test_a_tower_called_outside_of_an_encoder_call_is_whole(sdpa):
    tower, pixels = sdpa.model.vision_tower, images(2)
    with torch.no_grad():
        untouched = tower(pixels, output_hidden_states=True)
        with apet.patched(sdpa, MERGE):
            patched = tower(pixels, output_hidden_states=True)
    assert all(torch.equal(a, b) for a, b in zip(patched.hidden_states, untouched.hidden_states, strict=True))


def test_features_encoded_before_and_a_tower_that_did_not_run(sdpa):
    inputs = batch(MIXED_ROWS[:1])
    with apet.patched(sdpa, MERGE), torch.no_grad():
        direct = sdpa(**inputs).logits
        with apet.patch.expecting_images(sdpa) as encoding:
            state, _ = host.tower_state(sdpa.model.vision_tower, inputs["pixel_values"], -2)
            again = sdpa.model.multi_modal_projector(state[:, 1:])
        assert len(encoding.cuts) == 1 and (again.abs().sum(-1) > 0).sum() == 12
        assert torch.equal(sdpa(**inputs).logits, direct)
        with pytest.raises(ValueError, match="has not run, once, on the 2 crops"), apet.patch.expecting_images(sdpa):
            host.tower_state(sdpa.model.vision_tower, inputs["pixel_values"], -2)
            sdpa.model.multi_modal_projector(torch.cat([state[:, 1:]] * 2))
        with pytest.raises(ValueError, match="vision_feature_layer=1 is not the layer"):
            sdpa.model.get_image_features(inputs["pixel_values"], vision_feature_layer=1)


@pytest.mark.parametrize("name", ["merge", "restore"])
def test_flash_attention_keeps_its_kernels(monkeypatch, name):
    """With a stand-in for the kernels: they are asked for by their own name, with heads of a size they take."""
    model, asked = tiny_llava("sdpa", depth=DEPTH), []
    with apet.patched(model, STAGES[name]):
        wanted = features(model, images(2))

    def kernels(query, key, value, mask, query_length, is_causal, softmax_scale, attn_implementation, **more):
        asked.append((attn_implementation, is_causal, mask, query.shape[-1], key.shape[1] - query.shape[1]))
        states = [one.transpose(1, 2) for one in (query, key, value)]
        return torch.nn.functional.scaled_dot_product_attention(*states, scale=softmax_scale).transpose(1, 2)

    monkeypatch.setattr(flash_attention, "_flash_attention_forward", kernels)
    model.model.vision_tower.config._attn_implementation = "flash_attention_2"
    with apet.patched(model, STAGES[name]):
        torch.testing.assert_close(features(model, images(2)), wanted, atol=1e-5, rtol=1e-5)
    assert {call[:3] for call in asked} == {("flash_attention_2", False, None)}
    assert {call[3:] for call in asked} == ({(12, 0), (16, 0)} if name == "merge" else {(12, 0), (12, PATCHES - 12)})


@pytest.mark.parametrize("name", ["merge", "restore"])
def test_a_compiled_model_computes_the_same(name):
    model = tiny_llava("sdpa", layers=1, depth=DEPTH)
    inputs = batch(MIXED_ROWS[:2])
    with apet.patched(model, STAGES[name]), torch.no_grad():
        plain = model(**inputs).logits
        torch.testing.assert_close(torch.compile(model, backend="eager")(**inputs).logits, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite(dtype):
    model = tiny_llava("sdpa", depth=DEPTH).to(dtype)
    for config in STAGES.values():
        with apet.patched(model, config):
            assert features(model, images(2).to(dtype)).isfinite().all()


# What is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tower_layer_list": [6], "tower_token_list": [5]}, "so a stage can stand after layers 1..5"),
        ({"tower_mode": "restore"}, "no effect without a tower_layer_list"),
        ({"tower_key_layers": 3}, "no effect without tower_mode='restore'"),
        (MERGE.to_dict() | {"visual_token_num": 5, "method": "mmtok"}, "chooses among the embedded tokens"),
        ({"tower_layer_list": [2], "tower_token_list": []}, "one entry per layer"),
        ({"tower_layer_list": [2, 2], "tower_token_list": [5, 5]}, "2 does not follow 2"),
        ({"tower_layer_list": [1, 2], "tower_token_list": [5, 9]}, "budgets must not grow"),
        ({"tower_layer_list": [2], "tower_token_list": [1.5]}, "1.5 is neither"),
        ({"tower_layer_list": [2], "tower_token_list": [0]}, "0 is neither"),
        ({"tower_mode": "shrink"}, "choose merge, restore, lossless"),
        (RESTORE.to_dict() | {"tower_layer_list": [1, 2], "tower_token_list": [9, 5]}, "takes one layer"),
        (MERGE.to_dict() | {"method_options": {"quota": 0}, "method": "apet_plus"}, "no effect without a budget"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(sdpa, fields, message):
    with pytest.raises(ValueError, match=message):
        apet.apply_patch(sdpa, ApetConfig.from_dict(fields))
    assert apet.active_config(sdpa) is None


@pytest.mark.parametrize("name", ["qwen3_vl", "internvl", "llava_onevision"])
def test_families_that_cannot(name):
    model = FAMILIES[name].build("sdpa")
    with pytest.raises(ValueError, match=f"not possible for {name}"):
        apet.apply_patch(model, ApetConfig(tower_layer_list=[1], tower_token_list=[4]))
    assert apet.active_config(model) is None


def test_towers_that_are_not_known(monkeypatch):
    model = tiny_llava("sdpa", depth=DEPTH)
    layer = host.tower_layers(model.model.vision_tower)[0]
    layer.self_attn.add_module("renamed", layer.self_attn._modules.pop("k_proj"))
    with pytest.raises(host.UnknownHostError, match="has no 'k_proj'"):
        apet.apply_patch(model, MERGE)
    layer.self_attn.add_module("k_proj", layer.self_attn._modules.pop("renamed"))
    model.model.vision_tower.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="attention 'flex_attention' takes other keys"):
        apet.apply_patch(model, MERGE)
    model.model.vision_tower.config._attn_implementation = "sdpa"
    model.config.vision_feature_layer = [-2, -3]
    with pytest.raises(ValueError, match="joins the features of several tower layers"):
        apet.apply_patch(model, MERGE)
    assert apet.active_config(model) is None


def test_a_mask_for_the_tower_is_refused(sdpa):
    layer = host.tower_layers(sdpa.model.vision_tower)[3]
    handle = layer.register_forward_pre_hook(lambda _, args: (args[0], torch.zeros(1, 1, 1, 1)))
    try:
        with apet.patched(sdpa, MERGE), pytest.raises(host.UnknownHostError, match="given an attention mask"):
            features(sdpa, images(1))
    finally:
        handle.remove()


# Predictions and pictures


@pytest.mark.parametrize("name", list(STAGES))
@pytest.mark.parametrize("vision", [None, 40])
def test_flops_are_those_of_a_run(name, vision, monkeypatch):
    def first_rows(self, tokens, keep, context):  # without the matrix products of a selection
        rows = torch.arange(keep).expand(len(tokens), -1)
        sources = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
        sources = torch.where(sources < keep, sources, -1)
        return apet.CompressedTokens(tokens[:, :keep], rows, tokens.new_zeros(tokens.shape[:2]), rows[:, :0], sources)

    monkeypatch.setattr(Apet, "select", first_rows)
    preset = get_preset("llava-1.5-7b").shrunk()
    shape = preset.config()
    shape.vision_config.num_hidden_layers = DEPTH
    model = tiny_from(shape)
    layers = STAGES[name].tower_layer_list
    config = changed(STAGES[name], tower_token_list=[100, 0.5][: len(layers)], visual_token_num=vision)
    inputs = preset.inputs(1, 9, torch.device("cpu"), torch.float32)
    with torch.inference_mode(), apet.patched(model, config):
        early = tower_stops_early(model, lambda: model(**inputs))  # not before transformers 5.23
        real = counted(lambda: model(**inputs, use_cache=True, logits_to_keep=1))
        visual = apet.last_result(model).tokens_per_layer[0]
        predicted = apet.cost.tokens_per_layer(config, 576, len(visual))
    assert predicted == visual
    cost = prefill_cost(
        apet.cost.ModelDims.of(shape), visual, text_tokens=9, dtype=torch.float32, early_exit=early, config=config
    )
    assert cost.flops == real


def tiny_from(config):
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration._from_config(config, attn_implementation="eager").eval()


def test_a_description_says_what_happens_in_the_tower(sdpa):
    with apet.patched(sdpa, changed(MERGE, visual_token_num=5)):
        inside = apet.describe(sdpa)
    with apet.patched(sdpa, ApetConfig(visual_token_num=5)):
        outside = apet.describe(sdpa)
    assert inside.flops[1] < outside.flops[1] and inside.flops[0] == outside.flops[0]
    assert inside.tower == "in the vision tower: merge, 12 of 25 patches behind layer 2" and outside.tower == ""
    assert inside.tower in str(inside)
    with apet.patched(sdpa, MERGE):
        assert apet.describe(sdpa).tokens_per_layer == [12] * 4


@pytest.mark.parametrize("name", list(STAGES))
def test_pictures_show_the_tower(sdpa, name):
    config = changed(STAGES[name], visual_token_num=5)
    with apet.patched(sdpa, config), listening("apet") as decisions, torch.no_grad():
        sdpa(**batch(MIXED_ROWS[:1]))
        result = apet.last_result(sdpa)
    one = trace("apet", result, decisions, "yes")
    *towers, vision = one.stages
    assert [stage.name for stage in towers] == [f"tower layer {layer}" for layer in config.tower_layer_list]
    assert sorted(set(vision.groups)) == list(range(5))  # apet merges everything
    np.testing.assert_array_equal(vision.groups[vision.kept], range(5))
    for stage in towers:
        np.testing.assert_array_equal(stage.groups[stage.kept], range(len(stage.kept)))
        if name == "restore":
            assert (stage.groups < 0).sum() == PATCHES - len(stage.kept)
            continue
        for row in range(len(stage.kept)):  # together in the tower, together behind it
            assert len(set(vision.groups[stage.groups == row])) == 1
    figure = draw.draw(np.full((10, 10, 3), 200, dtype=np.uint8), (5, 5), [one], "why?")
    assert "apet\nafter tower layer 2: 12 kept" in panels(figure) or name == "twice"
