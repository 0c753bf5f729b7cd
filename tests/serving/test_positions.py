"""Positions of random prompts as the two model runners of vLLM ask for them, against transformers."""

import random
from dataclasses import dataclass

import pytest
import torch
from families import END, FAMILIES, IMAGE, START, VIDEO

from apet.serving.positions import extent, fill_marks, from_channels, grid_positions, prompt_positions, to_channels

PROMPTS = 3000
TEMPO = 2.0  # positions per step of a video: `tokens_per_second` of the tiny model, one second per step


@dataclass
class Prompt:
    """A prompt before and after its pictures were shortened.

    Attributes:
        ids: Of the whole prompt.
        grids: Per picture (time, height, width) in tokens.
        spans: Per picture its first column and its columns in the shortened prompt.
        kept: Per picture which of its tokens survive.
        columns: Old column of every new one.
    """

    ids: list[int]
    grids: list[tuple[int, int, int]]
    spans: list[tuple[int, int]]
    kept: list[list[int]]
    columns: list[int]

    def tempo(self, picture: int) -> float:
        return TEMPO if self.grids[picture][0] > 1 else 1.0


def random_prompt(dice: random.Random) -> Prompt:
    """Up to five pictures, any text in front, between and behind (at least what marks a picture)."""
    prompt = Prompt([], [], [], [], [])

    def text(count: int) -> None:
        prompt.columns.extend(range(len(prompt.ids), len(prompt.ids) + count))
        prompt.ids.extend(dice.randrange(3, 90) for _ in range(count))

    text(dice.choice([0, 1, 4, 40, dice.randrange(200)]))
    for _ in range(dice.randrange(6)):
        grid = (1, dice.randrange(1, 9), dice.randrange(1, 9))
        if dice.random() < 0.3:
            # Not longer in time than in space: only there do transformers and vLLM agree on the text behind.
            grid = (dice.choice([2, 3]), dice.randrange(5, 9), dice.randrange(1, 5))
        tokens = grid[0] * grid[1] * grid[2]
        kept = sorted(dice.sample(range(tokens), dice.randrange(1, tokens + 1)))
        for mark in (START, None, END):
            if mark is not None:
                prompt.columns.append(len(prompt.ids))
                prompt.ids.append(mark)
                continue
            prompt.spans.append((len(prompt.columns), len(kept)))
            prompt.columns.extend(len(prompt.ids) + one for one in kept)
            prompt.ids.extend([VIDEO if grid[0] > 1 else IMAGE] * tokens)
        prompt.grids.append(grid)
        prompt.kept.append(kept)
        text(dice.choice([0, 0, 1, 7, dice.randrange(60)]))
    text(1 if not prompt.ids else 0)
    return prompt


@pytest.fixture(scope="module")
def model():
    return FAMILIES["qwen2_5_vl"].build("sdpa").model


def wanted(model, prompt: Prompt) -> tuple[torch.Tensor, int]:
    """What transformers gives the columns that stay, and the position of the first answered token."""
    ids = torch.tensor([prompt.ids])
    sizes = {}
    for name, kind in (("image", False), ("video", True)):
        grids = [(t, 2 * h, 2 * w) for t, h, w in prompt.grids if (t > 1) == kind]
        sizes[f"{name}_grid_thw"] = torch.tensor(grids) if grids else None
    types = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    positions, delta = model.get_rope_index(ids, types, **sizes)
    return positions[-3:, 0, prompt.columns], len(prompt.ids) + int(delta)


def channels(prompt: Prompt, picture: int) -> torch.Tensor:
    """What the embeddings of a picture bring along, in the precision most checkpoints have."""
    places = grid_positions(prompt.grids[picture], prompt.tempo(picture))[prompt.kept[picture]]
    return to_channels(places).bfloat16()


def laid_out(prompt: Prompt) -> torch.Tensor:
    extents = [extent(grid, prompt.tempo(number)) for number, grid in enumerate(prompt.grids)]
    return prompt_positions(len(prompt.columns), prompt.spans, extents)[0]


def seen(prompt: Prompt, cuts: list[int], keeps_tensor: bool) -> tuple[torch.Tensor, int]:
    """Positions the decoder is given when the columns from the first cut on run chunk by chunk, and the one behind.

    The first runner (`keeps_tensor`) asks in every step and writes into the tensor it was given; the second one asks
    where embeddings enter, and keeps the numbers elsewhere.
    """
    buffer = laid_out(prompt)
    marks, end, parts = buffer.clone(), None, []
    for first, last in zip(cuts, cuts[1:], strict=False):
        offsets = []
        for number, (start, columns) in enumerate(prompt.spans):
            inside = slice(max(first - start, 0), max(min(last - start, columns), 0))
            if inside.start < inside.stop:
                offsets.append(from_channels(channels(prompt, number)[inside]))
        if offsets or keeps_tensor:
            filled, end = fill_marks(buffer, marks if keeps_tensor else buffer, first, offsets)
            buffer.copy_(filled)
        parts.append(buffer[:, first:last].clone())
    return torch.cat(parts, dim=1), end


def ways(dice: random.Random, length: int) -> dict[str, list[int]]:
    """Cuts of a prompt: at once, in chunks, and behind a prefix that the cache has (never the last column)."""
    size = max(1, length // dice.choice([2, 3, 5, 9]))
    hit = dice.randrange(length)
    return {
        "one chunk": [0, length],
        "chunked": [*range(0, length, size), length],
        "prefix hit": [hit, length],
        "prefix hit, chunked": [*range(hit, length, size), length],
    }


@pytest.mark.slow
def test_positions_of_random_prompts_are_those_of_transformers(model):
    dice = random.Random(7)
    for number in range(PROMPTS):
        prompt = random_prompt(dice)
        full, behind = wanted(model, prompt)
        for way, cuts in ways(dice, len(prompt.columns)).items():
            pictures = any(start + columns > cuts[0] for start, columns in prompt.spans)
            keeps_tensor = number % 2 == 0
            found, end = seen(prompt, cuts, keeps_tensor)
            assert torch.equal(found, full[:, cuts[0] :]), (number, way, cuts, keeps_tensor)
            # The second runner asks for the position behind only where a picture enters.
            assert end == (behind if pictures or keeps_tensor else None), (number, way, keeps_tensor)


def test_a_prompt_that_was_evicted_and_starts_again_has_the_same_positions(model):
    prompt = random_prompt(random.Random(3))
    assert len(prompt.grids) > 1
    buffer = laid_out(prompt)
    marks = buffer.clone()
    offsets = [from_channels(channels(prompt, number)) for number in range(len(prompt.grids))]
    for entering in (offsets[:1], offsets):
        buffer.copy_(fill_marks(buffer, marks, 0, entering)[0])
    assert torch.equal(buffer, wanted(model, prompt)[0])


def test_pictures_that_touch_or_end_a_prompt():
    grids, kept = [(1, 2, 3), (1, 1, 2), (1, 4, 1)], [[0, 5], [1], [2, 3]]
    marks, end = prompt_positions(6, [(1, 2), (3, 1), (4, 2)], [extent(grid, 1.0) for grid in grids])
    places = [grid_positions(grid, 1.0)[one] for grid, one in zip(grids, kept, strict=True)]
    found, behind = fill_marks(marks, marks, 0, places)
    assert found.tolist() == [[0, 1, 1, 4, 6, 6], [0, 1, 2, 4, 8, 9], [0, 1, 3, 5, 6, 6]]
    assert end == behind == 10


def test_a_look_ahead_of_one_column_changes_nothing_that_is_filled():
    marks, _ = prompt_positions(5, [(1, 3)], [extent((1, 2, 2), 1.0)])
    places = grid_positions((1, 2, 2), 1.0)[[0, 1, 3]]
    filled, _ = fill_marks(marks, marks, 1, [places])
    # A drafter of the first runner reads columns 2 and 3, and says that one column is computed.
    assert torch.equal(fill_marks(filled, marks, 1, [places[1:]])[0], filled)


def test_more_embeddings_than_columns_are_refused():
    marks, _ = prompt_positions(5, [(1, 2)], [2])
    with pytest.raises(ValueError, match="3 embeddings enter a prompt that has 2 columns of pictures from column 0"):
        fill_marks(marks, marks, 0, [torch.zeros(3, 3, dtype=torch.long)])
