"""The tower stage of Qwen2-VL and Qwen2.5-VL against towers written as loops: frames, windows, groups of patches."""

import pytest
import torch
from families import FAMILIES
from tiny import randomise

import apet
from apet import ApetConfig
from apet.adapters import host

pytestmark = pytest.mark.host

UNIT = 4
MERGE = ApetConfig(tower_layer_list=[1], tower_token_list=[4], basis_token_num=2)
TWICE = ApetConfig(tower_layer_list=[1, 2], tower_token_list=[0.7, 3], basis_token_num=2)
RESTORE = ApetConfig(tower_mode="restore", tower_layer_list=[1], tower_token_list=[0.4], tower_key_layers=1)
STAGES = {"merge": MERGE, "twice": TWICE, "restore": RESTORE}
NAMES = ("qwen2_vl", "qwen2_5_vl")


def changed(config: ApetConfig, **fields) -> ApetConfig:
    return ApetConfig.from_dict(config.to_dict() | fields)


@pytest.fixture(scope="module", params=NAMES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def model(family):
    return deep(family, "sdpa")


def deep(family, attention: str):
    """A model of the family whose tower has four layers, the second one of full attention."""
    model = family.make(attention)
    config = model.config
    config.vision_config.depth = 4
    model = randomise(type(model)._from_config(config, attn_implementation=attention)).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


# Towers as loops


def rotated(rows, cos, sin):
    half = rows.shape[-1] // 2
    turned = torch.cat([-rows[..., half:], rows[..., :half]], -1)
    return rows * cos.unsqueeze(1) + turned * sin.unsqueeze(1)


def parts_of(layer, rows, rotary):
    """Queries, keys and values (n, heads, d) of rows."""
    heads = layer.attn.num_heads
    queries, keys, values = layer.attn.qkv(layer.norm1(rows)).view(len(rows), 3, heads, -1).unbind(1)
    return rotated(queries, *rotary), rotated(keys, *rotary), values


def attend(layer, rows, rotary, segments, seen, seen_rotary, seen_segments, sizes):
    """What a layer makes of rows whose segments have numbers; they see the rows `seen` of their own segment."""
    queries = parts_of(layer, rows, rotary)[0]
    _, keys, values = parts_of(layer, seen, seen_rotary)
    out = []
    for query, segment in zip(queries, segments, strict=True):
        own = seen_segments == segment
        heads = []
        for head in range(query.shape[0]):
            logits = keys[own, head] @ query[head] * query.shape[1] ** -0.5
            weights = logits.exp() * sizes[own]
            heads.append(weights / weights.sum() @ values[own, head])
        out.append(torch.cat(heads))
    hidden = rows + layer.attn.proj(torch.stack(out))
    return hidden + layer.mlp(layer.norm2(hidden))


def tower_loop(tower, pixels, grid, config, left=None):
    """(tokens, D) behind the merger, zeros for those dropped, and the tokens left; `left` are those encoded at all."""
    calls = []
    handles = [
        block.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
        for block in tower.blocks
    ]
    tower(pixels, grid_thw=grid)  # for the segments and rotary embeddings of every layer
    for handle in handles:
        handle.remove()
    hidden, order = calls[0][0][0], host.packed_order(tower, grid)
    frames = [h * w // UNIT for t, h, w in grid.tolist() for _ in range(t)]
    frame_of = torch.arange(len(frames)).repeat_interleave(torch.tensor(frames))
    alive = list(range(sum(frames)))  # groups, in the order of the sequence
    if left is not None:
        alive = [group for group in alive if order[group] in left]
    sizes, near, saved = torch.ones(sum(frames)), {}, None
    budgets = dict(zip(config.tower_layer_list, config.tower_token_list, strict=True))
    for number, (layer, (_, given)) in enumerate(zip(tower.blocks, calls, strict=True), start=1):
        borders, rotary = given["cu_seqlens"], given["position_embeddings"]
        segment = torch.bucketize(torch.arange(len(hidden)), borders[1:].long(), right=True)
        rows = torch.tensor([group * UNIT + patch for group in alive for patch in range(UNIT)])
        others = [group for group in range(sum(frames)) if group not in alive]
        seen = rows
        if config.tower_mode == "restore" and saved is not None and number - 1 < 1 + config.tower_key_layers:
            seen = torch.arange(len(hidden))
        before = hidden
        new = attend(
            layer, hidden[rows], tuple(part[rows] for part in rotary), segment[rows], hidden[seen],
            tuple(part[seen] for part in rotary), segment[seen], sizes.repeat_interleave(UNIT)[seen],
        )  # fmt: skip
        hidden = hidden.clone()
        hidden[rows] = new
        if saved is not None:
            for group in others:
                moves = [grouped(hidden)[other] - grouped(saved)[other] for other in near[group]]
                grouped(hidden)[group] = grouped(saved)[group] + torch.stack(moves).mean(0)
        if number not in budgets:
            continue
        left = []
        for frame in range(len(frames)):
            own = [group for group in alive if frame_of[group] == frame]
            budget = budgets[number]
            keep = min(len(own), budget if isinstance(budget, int) else max(1, int(budget * len(own))))
            if keep == len(own):
                left += own
            elif config.tower_mode == "restore":
                change = (grouped(hidden) - grouped(before)).norm(dim=-1)
                chosen = sorted(sorted(own, key=lambda group: -change[group])[:keep])
                for group in set(own) - set(chosen):
                    far = {other: (grouped(hidden)[group] - grouped(hidden)[other]).norm() for other in chosen}
                    near[group] = sorted(chosen, key=far.get)[:10]
                left += chosen
            else:
                found = apet.compress(grouped(hidden)[own][None], keep, basis=config.basis_token_num, insertion="blend")
                counts = torch.zeros(keep)
                for group, row in zip(own, found.sources[0].tolist(), strict=True):
                    if row >= 0:
                        counts[row] += sizes[group]
                chosen = [own[index] for index in found.indices[0].tolist()]
                for group, row, count in zip(chosen, found.tokens[0], counts, strict=True):
                    grouped(hidden)[group], sizes[group] = row, count
                left += chosen
        alive = left
        saved = hidden.clone() if config.tower_mode == "restore" else None
    merged = torch.zeros(len(order), tower.merger(hidden).shape[1])
    shown = range(len(order)) if config.tower_mode == "restore" else alive
    for group in shown:
        merged[order[group]] = tower.merger(hidden)[group]
    tokens = order[torch.tensor(alive)].sort().values
    return merged, tokens


def grouped(hidden):
    return hidden.view(len(hidden) // UNIT, -1)


def pictures(family, prompts, kind):
    inputs = family.inputs(prompts)
    if kind == "image":
        return inputs["pixel_values"], inputs["image_grid_thw"]
    return inputs["pixel_values_videos"], inputs["video_grid_thw"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("name", list(STAGES))
@torch.no_grad()
def test_a_stage_equals_the_tower_as_a_loop(family, name, kind, attention):
    model, config = deep(family, attention), STAGES[name]
    rows = [family.prompts[index] for index in ((0, 1) if kind == "image" else (3, 4))]
    pixels, grid = pictures(family, rows, kind)
    expected, alive = tower_loop(model.model.visual, pixels, grid, config)
    with apet.patched(model, config):
        found = getattr(model.model, f"get_{kind}_features")(pixels, grid)
        features, encoding = torch.cat(list(found.pooler_output)), found.apet
    if name == "restore":
        alive = torch.arange(len(features))
    torch.testing.assert_close(features[alive], expected[alive], atol=2e-4, rtol=1e-4)
    counts, first = [len(one) for one in found.pooler_output], 0
    for item, count in zip(encoding.items, counts, strict=True):
        own = [token - first for token in alive.tolist() if first <= token < first + count]
        lines = [-1] * count if item.lines is None else item.lines.tolist()
        assert [token for token, line in enumerate(lines) if line == -1] == own
        first += count


@torch.no_grad()
def test_keeping_everything_and_removing_are_bit_identical(model, family):
    inputs = family.inputs(family.prompts)
    untouched = model(**inputs).logits
    for config in STAGES.values():
        with apet.patched(model, changed(config, tower_token_list=[1000] * len(config.tower_layer_list))):
            assert torch.equal(model(**inputs).logits, untouched)
        with apet.patched(model, config):
            assert not torch.equal(model(**inputs).logits[:, -1], untouched[:, -1])
        assert torch.equal(model(**inputs).logits, untouched)


@pytest.mark.parametrize("behind", [{}, {"image_token_ratio": 0.3, "layer_list": [2], "image_token_ratio_list": [0.5]}])
@pytest.mark.parametrize("name", list(STAGES))
@torch.no_grad()
def test_a_batch_gives_what_its_rows_give_alone(model, family, name, behind):
    with apet.patched(model, changed(STAGES[name], **behind)):
        together = model(**family.inputs(family.prompts)).logits[:, -1]
        result = apet.last_result(model)
        for index, row in enumerate(family.prompts):
            alone = model(**family.inputs([row])).logits[0, -1]
            torch.testing.assert_close(alone, together[index], atol=1e-4, rtol=0)
            own = apet.last_result(model)
            for one, many in zip(own.tower, result.tower, strict=bool(own.tower)):
                assert [kept.tolist() for kept in one.kept[0]] == [kept.tolist() for kept in many.kept[index]]
            for one, many in zip(own.stages, result.stages, strict=True):
                assert [kept.tolist() for kept in one.kept[0]] == [kept.tolist() for kept in many.kept[index]]


@torch.no_grad()
def test_the_vision_stage_chooses_among_the_tokens_left(model, family):
    inputs = family.inputs(family.prompts)
    with apet.patched(model, MERGE):
        model(**inputs)
        plain = apet.last_result(model)
    with apet.patched(model, changed(MERGE, visual_token_num=3)):
        model(**inputs)
        cut = apet.last_result(model)
    with apet.patched(model, changed(MERGE, image_token_ratio=0.9)):
        model(**inputs)
        whole = apet.last_result(model)
    for sample in range(len(family.prompts)):
        rows = zip(
            plain.tower[0].kept[sample], plain.tower[0].sources[sample], plain.stages[0].kept[sample],
            cut.stages[0].kept[sample], whole.stages[0].kept[sample], strict=True,
        )  # fmt: skip
        for left, sources, kept, fewer, share in rows:
            assert left.tolist() == kept.tolist() == share.tolist()
            assert set(fewer.tolist()) < set(left.tolist()) and len(fewer) == 3
            assert sources[left].tolist() == list(range(len(left))) and sources.min() == 0
    assert [stage.name for stage in plain.stages] == ["vision"]


@torch.no_grad()
def test_sizes_go_on_into_the_decoder(model, family):
    inputs = family.inputs(family.prompts[:2])
    found = []
    for bias in (False, True):
        with apet.patched(model, changed(MERGE, visual_token_num=3, size_bias=bias)):
            found.append(model(**inputs).logits[:, -1])
    assert not torch.allclose(*found)


@torch.no_grad()
def test_generation_with_beams_and_caches(model, family):
    with apet.patched(model, changed(MERGE, image_token_ratio=0.5)):
        inputs = family.inputs([family.prompts[0], family.prompts[2]])
        options = {"max_new_tokens": 4, "do_sample": False}
        cached = model.generate(**inputs, **options)
        assert torch.equal(model.generate(**inputs, **options, use_cache=False), cached)
        beams = model.generate(**inputs, **options, num_beams=2)
        assert beams.shape == cached.shape


def test_flash_attention_is_refused_where_it_cannot_follow(family):
    model = deep(family, "sdpa")
    model.model.visual.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="takes all segments at once"):
        apet.apply_patch(model, RESTORE)
    with apet.patched(model, MERGE):
        assert apet.active_config(model) == MERGE


def test_layers_that_the_tower_does_not_have(model):
    with pytest.raises(ValueError, match=r"can stand after layers 1\.\.3"):
        apet.apply_patch(model, ApetConfig(tower_layer_list=[4], tower_token_list=[2]))


def test_a_block_of_another_build_is_refused(family):
    model = deep(family, "sdpa")
    block = model.model.visual.blocks[0]
    block.add_module("renamed", block._modules.pop("norm1"))
    with pytest.raises(host.UnknownHostError, match="has no 'norm1'"):
        apet.apply_patch(model, MERGE)
