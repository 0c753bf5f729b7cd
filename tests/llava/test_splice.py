"""The layout of multimodal sequences against recorded LLaVA, with symbols in place of features."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llava.model.llava_arch import LlavaMetaForCausalLM

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "llava" / "splice.json").read_text(encoding="utf-8"))
CASES = {case["name"]: case for case in GOLDEN["cases"]}
KINDS = ["pad", "t", "v", "nl"]  # a feature is (index into KINDS, value); padding is the zero vector


class Tower:
    """2 x 2 patches of 28 pixels."""

    num_patches, num_patches_per_side, select_feature = 4, 2, "patch"
    config = SimpleNamespace(image_size=28, patch_size=14)


class Symbolic(LlavaMetaForCausalLM):
    """The mix-in over embeddings that show where they come from."""

    def __init__(self, **config):
        self.config = SimpleNamespace(**config)
        self.encoded = 0

    def get_model(self):
        newline = torch.tensor([KINDS.index("nl"), -7.0])
        return SimpleNamespace(embed_tokens=self.embed, image_newline=newline, get_vision_tower=Tower)

    def embed(self, ids):
        assert (ids >= 0).all(), "a placeholder was looked up as a token"
        return torch.stack([torch.full_like(ids, KINDS.index("t")), ids], -1).float()

    def encode_images(self, images):
        self.encoded += len(images)
        numbers = 1000 * (torch.arange(len(images)) + 1).view(-1, 1) + torch.arange(4)
        return torch.stack([torch.full_like(numbers, KINDS.index("v")), numbers], -1).float()


def tensor(values):
    return None if values is None else torch.tensor(values)


def pixels(shape):
    """Images of a golden shape: nested lists are a list of images."""
    if shape is None:
        return None
    return [torch.zeros(one) for one in shape] if isinstance(shape[0], list) else torch.zeros(shape)


def symbols(embeds) -> list:
    return [[[KINDS[int(kind)], int(value)] for kind, value in row] for row in embeds.tolist()]


def call(model, case, **changes):
    """prepare_inputs_labels_for_multimodal on a golden case."""
    given = {name: tensor(case[name]) for name in ("input_ids", "attention_mask", "labels")} | {"position_ids": None}
    given |= {"past_key_values": None, "images": pixels(case["images_shape"])} | changes
    return model.prepare_inputs_labels_for_multimodal(
        given["input_ids"], given["position_ids"], given["attention_mask"], given["past_key_values"], given["labels"],
        given["images"], image_sizes=case["image_sizes_wh"],
    )  # fmt: skip


def padded(case) -> list[list[int]]:
    """The mask that belongs to a golden sequence."""
    return [[int(kind != "pad") for kind, _ in row] for row in case["sequence"]]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.get("sequence")])
def test_recorded_sequences(name):
    case, cache = CASES[name], object()
    ids, positions, mask, past, embeds, labels = call(Symbolic(**case["config"]), case, past_key_values=cache)
    assert ids is None and positions is None and past is cache
    assert symbols(embeds) == case["sequence"]
    # Where none was given the original returned none, also over padding; the real one is returned here.
    assert mask.long().tolist() == (case["attention_mask_out"] or padded(case)) == padded(case)
    assert mask.dtype == (torch.bool if case["attention_mask"] is None else torch.int64)
    assert (None if labels is None else labels.tolist()) == case["labels_out"]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.get("input_ids_out")])
def test_nothing_to_splice(name):
    case, cache, model = CASES[name], object(), Symbolic()
    mask = torch.ones(1, len(case["input_ids"][0]))
    result = call(model, case, past_key_values=cache, attention_mask=mask)
    assert result[0].tolist() == case["input_ids_out"]
    assert result[1:] == (None, mask, cache, None, None) and model.encoded == 0


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "error" in case])
def test_recorded_errors(name):
    case = CASES[name]
    with pytest.raises(Exception) as caught:  # noqa: B017, PT011  the class is in the golden file
        call(Symbolic(**case["config"]), case)
    assert caught.type.__name__ == case["error"] and len(str(caught.value)) > 20


def test_every_case_is_tested():
    assert len(CASES) == len(GOLDEN["cases"]) == 20
    for case in CASES.values():
        assert ("error" in case) + bool(case.get("sequence")) + bool(case.get("input_ids_out")) == 1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.get("sequence")])
def test_roles_of_columns_for_a_patch(name, side):
    case = CASES[name]
    model = Symbolic(**case["config"])
    prompt = model.splice(
        tensor(case["input_ids"]), tensor(case["attention_mask"]), None, pixels(case["images_shape"]),
        case["image_sizes_wh"], padding_side=side,
    )  # fmt: skip
    for row, items, mask in zip(symbols(prompt.inputs_embeds), prompt.visual_items, prompt.attention_mask, strict=True):
        kinds = [kind for kind, _ in row]
        width = kinds.count("pad")
        assert ("pad" in (kinds[width:] if side == "left" else kinds[: len(kinds) - width])) is False
        assert [int(item) for item in items.clamp(max=0)] == [{"t": -1, "pad": -2}.get(kind, 0) for kind in kinds]
        assert mask.tolist() == [kind != "pad" for kind in kinds]


def test_the_rows_number_their_images_through():
    ids = torch.tensor([[1, -200, 5, -200], [1, 4, 5, 6], [-200, 2, 3, 4]])
    prompt = Symbolic().splice(ids, None, None, torch.zeros(4, 3, 28, 28), None, padding_side="left")
    assert [sorted(set(row[row >= 0].tolist())) for row in prompt.visual_items] == [[0, 1], [], [3]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_given_positions_are_made_anew(side):
    case = CASES["batch right padded (default)"]
    model = Symbolic(tokenizer_padding_side=side)
    _, positions, mask, *_ = call(model, case, position_ids=torch.arange(6).expand(2, -1))
    for row, real in zip(positions, mask.bool(), strict=True):
        assert row[real].tolist() == list(range(int(real.sum()))) and (row[~real] == 0).all()


def test_padding_columns_of_the_ids_are_dropped_wherever_they_are():
    ids = torch.tensor([[0, 0, 1, -200, 7], [1, -200, 8, 9, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    prompt = Symbolic().splice(ids, mask, None, torch.zeros(2, 3, 28, 28), None, padding_side="left")
    texts = [[value for kind, value in row if kind == "t"] for row in symbols(prompt.inputs_embeds)]
    assert texts == [[1, 7], [1, 8, 9]]


def test_labels_follow_their_tokens_through_padding_and_truncation():
    ids = torch.tensor([[1, -200, 11, 12], [1, 21, 22, 0]])
    labels = torch.tensor([[-100, -100, 11, 12], [-100, 21, 22, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    model = Symbolic(tokenizer_model_max_length=6)
    *_, labels = model.prepare_inputs_labels_for_multimodal(ids, None, mask, None, labels, torch.zeros(2, 3, 28, 28))
    assert labels.tolist() == [[-100] * 5 + [11], [-100, 21, 22, -100, -100, -100]]


@pytest.mark.parametrize(
    ("images", "sizes", "message"),
    [
        (torch.zeros(3, 28, 28), None, r"got \[3, 28, 28\]"),
        ([torch.zeros(28, 28)], None, r"got \[\[28, 28\]\]"),
        ([torch.zeros(3, 3, 28, 28)] * 2, [(50, 20)], "1 entries for 2 images"),
        ([torch.zeros(3, 3, 28, 28)], None, "image_sizes"),
    ],
)
def test_images_of_another_shape_are_refused(images, sizes, message):
    model = Symbolic(**CASES["5-D spatial_unpad wide"]["config"])
    with pytest.raises(ValueError, match=message):
        model.prepare_inputs_labels_for_multimodal(torch.tensor([[1, -200]]), None, None, None, None, images, sizes)


def test_more_placeholders_than_images_names_the_row():
    ids = torch.tensor([[1, -200], [-200, -200]])
    with pytest.raises(IndexError, match=r"2 images given \(row 1\)"):
        Symbolic().splice(ids, None, None, torch.zeros(2, 3, 28, 28), None, padding_side="left")
