"""The lossless tower stage: which patches their neighbours predict, and what the model computes without them."""

import pytest
import torch
from families import FAMILIES
from test_patch_tower_packed import deep, tower_loop
from test_patch_tower_stage import DEPTH, attend, entering
from tiny import MIXED_ROWS, PATCHES, batch, images, tiny_llava

import apet
from apet import ApetConfig
from apet.adapters import host
from apet.adapters.tower_pixels import patches_of, unpredicted

pytestmark = pytest.mark.host

LOSSLESS = ApetConfig(tower_mode="lossless")


def kept(grid) -> list[int]:
    """Patches (rows, columns, V) to keep, patch by patch and value by value."""
    rows, columns = len(grid), len(grid[0])
    left_over = []
    for row in range(rows):
        for column in range(columns):
            same = row + column > 0
            for index, value in enumerate(grid[row][column].tolist()):
                a = grid[row][column - 1][index].item() if column else None
                b = grid[row - 1][column][index].item() if row else None
                if a is None or b is None:
                    guess = b if a is None else a
                else:
                    c = grid[row - 1][column - 1][index].item()
                    guess = min(a, b) if c >= max(a, b) else max(a, b) if c <= min(a, b) else a + b - c
                same = same and guess == value
            if not same:
                left_over.append(row * columns + column)
    return left_over


def page(seed: int = 0) -> torch.Tensor:
    """(3, 70, 70) a white page with a dark bar, a line of noise and a grey margin."""
    pixels = torch.ones(3, 70, 70)
    pixels[:, 14:28, 14:42] = 0.25
    pixels[:, 42:56, 28:42] = images(1, seed)[0, :, :14, :14]
    pixels[:, :, 56:] = 0.5
    return pixels


def test_kept_patches_are_those_of_the_loop():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        grid = torch.randint(0, 3, (4, 5, 2), generator=generator).float()
        assert unpredicted(grid[None]).flatten().nonzero().flatten().tolist() == kept(grid)
    ramp = torch.arange(5.0).view(1, 5, 1) - torch.arange(4.0).view(4, 1, 1)  # such a plane is predicted inside
    assert unpredicted(ramp[None])[0, 1:, 1:].sum() == 0 == len([one for one in kept(ramp) if one % 5 and one > 5])
    assert unpredicted(torch.zeros(1, 3, 3, 4)).sum() == 1
    assert unpredicted(torch.randn(1, 3, 3, 4)).all()


def test_patches_of_a_crop():
    pixels = images(2)
    patches = patches_of(pixels, 14)
    assert patches.shape == (2, 5, 5, 3 * 14 * 14)
    assert torch.equal(patches[1, 2, 3].view(3, 14, 14), pixels[1, :, 28:42, 42:56])


@torch.no_grad()
def test_a_page_equals_the_tower_as_a_loop_without_these_patches():
    model = tiny_llava("sdpa", depth=DEPTH)
    pixels = torch.stack([page(), images(1)[0], page(1), torch.zeros(3, 70, 70)])
    tower = model.model.vision_tower
    with apet.patched(model, LOSSLESS):
        output = model.model.get_image_features(pixels)
        found, cut = torch.stack(list(output.pooler_output)), output.apet.cuts[0]
    counts = []
    for crop, hidden in enumerate(entering(tower, pixels)):
        places = kept(patches_of(pixels[crop : crop + 1], 14)[0])
        hidden = torch.cat([hidden[:1], hidden[1:][places]])
        for layer in host.tower_layers(tower)[: DEPTH - 1]:
            hidden = attend(layer, hidden, hidden, torch.ones(len(hidden)))
        expected = torch.zeros(found[crop].shape)
        expected[places] = model.model.multi_modal_projector(hidden[1:])
        torch.testing.assert_close(found[crop], expected, atol=2e-4, rtol=1e-4)
        assert cut.of(slice(crop, crop + 1))[0].tolist() == places
        counts.append(len(places))
    assert counts[0] < 15 and counts[1] == PATCHES and counts[3] == 1


@torch.no_grad()
def test_photographs_are_bit_identical_and_batches_are_their_rows():
    model = tiny_llava("sdpa", depth=DEPTH)
    photographs = batch(MIXED_ROWS)
    untouched = model(**photographs).logits
    with apet.patched(model, LOSSLESS):
        assert torch.equal(model(**photographs).logits, untouched)
        assert apet.last_result(model).tower == ()
    pages = photographs | {"pixel_values": torch.stack([page(), page(1), images(1)[0], page(2), page(3), page(4)])}
    with apet.patched(model, ApetConfig(visual_token_num=6, tower_mode="lossless")):
        together = model(**pages).logits[:, -1]
        result, first = apet.last_result(model), 0
        for index, (row, count) in enumerate(MIXED_ROWS):
            own = batch([(row, count)])
            if count:
                own["pixel_values"] = pages["pixel_values"][first : first + count]
            first += count
            torch.testing.assert_close(model(**own).logits[0, -1], together[index], atol=1e-4, rtol=0)
            alone = apet.last_result(model)
            assert [one.tolist() for one in alone.origin()[0]] == [one.tolist() for one in result.origin()[index]]
    for left, chosen in zip(result.tower[0].kept, result.stages[0].kept, strict=True):
        assert all(set(some.tolist()) <= set(one.tolist()) for one, some in zip(left, chosen, strict=True))
    assert torch.equal(model(**photographs).logits, untouched)
    with apet.patched(model, LOSSLESS):
        assert "lossless" in apet.describe(model).tower


def screens(family, grids) -> dict:
    """Inputs with pictures of these grids (rows, columns in tokens), mostly of one colour."""
    prompts = [[2, ("image", *grid), 3] for grid in grids]
    inputs = family.inputs(prompts)
    values, first = inputs["pixel_values"], 0
    for rows, columns in grids:
        count = rows * columns * 4
        own = values[first : first + count]
        own[8:] = 0.5
        own[count // 2 : count // 2 + 4] = 1.0
        first += count
    return inputs


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
@torch.no_grad()
def test_groups_of_qwen_equal_the_loop(name):
    family = FAMILIES[name]
    model = deep(family, "sdpa")
    grids = [(4, 5), (3, 3), (2, 6)]
    inputs = screens(family, grids)
    left, first = [], 0
    for rows, columns in grids:
        own = inputs["pixel_values"][first * 4 : (first + rows * columns) * 4]
        left += [first + group for group in kept(own.view(rows, columns, -1))]
        first += rows * columns
    pixels, grid = inputs["pixel_values"], inputs["image_grid_thw"]
    expected, alive = tower_loop(model.model.visual, pixels, grid, LOSSLESS, left)
    with apet.patched(model, LOSSLESS):
        found = model.model.get_image_features(pixels, grid)
        features = torch.cat(list(found.pooler_output))
        together = model(**inputs).logits[:, -1]
        result = apet.last_result(model)
        for index, one in enumerate(grids):
            own = screens(family, [one])
            torch.testing.assert_close(model(**own).logits[0, -1], together[index], atol=1e-4, rtol=0)
    assert alive.tolist() == left
    torch.testing.assert_close(features[left], expected[left], atol=2e-4, rtol=1e-4)
    counts = [len(kept_) for sample in result.stages[0].kept for kept_ in sample]
    assert sum(counts) == len(left) and result.stages[0].tokens_in == tuple(
        (rows * columns,) for rows, columns in grids
    )


def test_it_takes_no_layers():
    with pytest.raises(ValueError, match="in front of the first layer"):
        ApetConfig(tower_mode="lossless", tower_layer_list=[2], tower_token_list=[5])
    with pytest.raises(ValueError, match="not possible for llava_onevision"):
        apet.apply_patch(FAMILIES["llava_onevision"].build("sdpa"), LOSSLESS)
