"""The registry, and what every registered method promises: budget, order, finite values, the same answer each time."""

import re
from dataclasses import dataclass

import pytest
import torch
from core import noise

import apet
from apet import ApetConfig
from apet.config import FamilyPreset, StagePreset
from apet.methods import Method, base, get_method, method_names, register, selector

ROWS, COLUMNS, DIM, HEADS = 5, 6, 16, 2
TOKENS = ROWS * COLUMNS
PRESET = FamilyPreset()
KNOWN = method_names()
STAGES = [(name, stage) for name in KNOWN for stage in get_method(name).stages]


class Inputs:
    """Everything a method may ask for, made from each sample's own tokens."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens.float()

    def _heads(self, rows: int = HEADS) -> torch.Tensor:
        return self.tokens @ noise(DIM, rows, seed=1)

    def attention_row(self, layer: int) -> torch.Tensor:
        return self._heads().transpose(1, 2).softmax(-1)

    def text_attention(self, layer: int) -> torch.Tensor:
        return torch.stack([self._heads().transpose(1, 2).softmax(-1)] * 3, 2)

    def keys(self, layer: int) -> torch.Tensor:
        return self.tokens.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def text_keys(self, layer: int) -> torch.Tensor:
        return self.keys(layer)[:, :, :3]

    def text_embeddings(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.tokens[:, :3], torch.ones(len(self.tokens), 3, dtype=torch.bool)

    def clip_relevance(self) -> torch.Tensor:
        return self._heads(1).squeeze(-1).tanh()

    def text_hidden(self) -> torch.Tensor:
        return self.tokens[:, :3]

    def vision_features(self) -> torch.Tensor:
        return self.tokens

    def vision_states(self) -> torch.Tensor:
        return torch.stack([self.tokens, self.tokens.tanh(), self.tokens.cos()], 1)

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden / hidden.norm(dim=-1, keepdim=True)

    cls_attention, vision_keys, image_embeddings = attention_row, keys, vision_features


def run(name: str, stage: str, tokens: torch.Tensor, keep: int, **options) -> apet.CompressedTokens:
    select = selector(ApetConfig(method=name, **options), stage, PRESET.stage(stage), layer=2, num_layers=8)
    return select(tokens, keep, grid=(ROWS, COLUMNS), inputs=Inputs(tokens))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_every_method(name, stage, dtype):
    tokens = noise(3, TOKENS, DIM).to(dtype)
    before = tokens.clone()
    for keep in (1, 2, 7, TOKENS - 1):
        result = run(name, stage, tokens, keep)
        assert result.tokens.shape == (3, keep, DIM) and result.tokens.dtype == dtype
        assert result.tokens.isfinite().all()
        assert result.indices.shape == (3, keep) and (result.indices.diff() > 0).all()
        assert (0 <= result.indices).all() and (result.indices < TOKENS).all()
        assert result.sources.shape == result.errors.shape == (3, TOKENS)
        assert (-1 <= result.sources).all() and (result.sources < keep).all()
        assert torch.equal(tokens, before)
        torch.manual_seed(keep)
        again = run(name, stage, tokens, keep)
        assert all(torch.equal(a, b) for a, b in zip(result, again, strict=True))
        for sample in range(3):
            alone = run(name, stage, tokens[sample : sample + 1], keep)
            assert torch.equal(alone.indices[0], result.indices[sample])
            assert torch.equal(alone.sources[0], result.sources[sample])
            torch.testing.assert_close(alone.tokens[0], result.tokens[sample])


def test_apet_passes_preset_and_options_on():
    tokens = noise(2, TOKENS, DIM)
    options = {"basis_token_num": 4, "basis_selection": "fps", "fps_start": 3}
    preset = StagePreset(slots="error", insertion="blend", ridge=0.1)
    result = selector(ApetConfig(method="apet", **options), "llm", preset)(tokens, 9)
    expected = apet.compress(tokens, 9, basis=4, start=3, slots="error", insertion="blend", ridge=0.1)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    default = selector(ApetConfig(), "vision", PRESET.vision)(tokens, 9)
    assert torch.equal(default.tokens, apet.compress(tokens, 9).tokens)
    peaks = selector(ApetConfig(basis_selection="dpc"), "vision", PRESET.vision)(tokens, 9)
    assert torch.equal(peaks.tokens, apet.compress(tokens, 9, basis_selection="dpc").tokens)


@pytest.mark.parametrize("options", [{"method": "random"}, {"method": "apet", "basis_selection": "random"}])
def test_the_seed_decides_a_random_choice(options):
    tokens = noise(2, TOKENS, DIM)

    def choose(seed: int, stage: str = "vision") -> list[list[int]]:
        select = selector(ApetConfig(seed=seed, **options), stage, PRESET.stage(stage))
        result = select(tokens, 9)
        return (result.basis if options["method"] == "apet" else result.indices).tolist()

    assert choose(0) == choose(0) != choose(1)
    assert choose(1)[0] == choose(1)[1]
    if options["method"] == "random":
        assert choose(0) != choose(0, "llm") != choose(1)


def test_random_keeps_tokens_as_they_are():
    tokens = noise(2, TOKENS, DIM)
    result = run("random", "vision", tokens, 9)
    for x, rows, indices, sources in zip(tokens, result.tokens, result.indices, result.sources, strict=True):
        assert torch.equal(rows, x[indices])
        assert sources[indices].tolist() == list(range(9)) and (sources == -1).sum() == TOKENS - 9


@pytest.fixture
def registry(monkeypatch):
    """A copy of the registry, thrown away afterwards."""
    monkeypatch.setattr(base, "_METHODS", dict(base._METHODS))
    return base._METHODS


def make(name: str, stages: tuple[str, ...] = ("vision", "llm")) -> type[Method]:
    return dataclass(frozen=True)(type("Made", (Method,), {"name": name, "stages": stages}))


def test_a_registered_method_is_found(registry):
    made = register(make("made"))
    assert isinstance(get_method("made"), made)
    assert method_names() == sorted([*KNOWN, "made"])


def test_a_name_is_taken_once(registry):
    register(make("made"))
    for name in ("made", "apet"):
        with pytest.raises(ValueError, match=f"method name '{name}' is already taken by"):
            register(make(name))


def test_names_are_lower_case(registry):
    with pytest.raises(ValueError, match="method name 'MadeUp' must be lower case"):
        register(make("MadeUp"))
    assert "MadeUp" not in method_names()


def test_unknown_names_get_the_nearest_and_all():
    with pytest.raises(
        ValueError, match=re.escape("unknown method 'apte'. Did you mean 'apet'? Available: ")
    ) as caught:
        get_method("apte")
    assert all(name in str(caught.value) for name in method_names())
    with pytest.raises(ValueError, match="unknown method 'qqqqqq'. Available: "):
        selector(ApetConfig(method="qqqqqq"), "vision", PRESET.vision)


def test_a_stage_a_method_does_not_have_is_refused(registry):
    register(make("made", stages=("llm",)))
    config = ApetConfig(method="made")
    selector(config, "llm", PRESET.llm)
    with pytest.raises(ValueError, match=r"method 'made' has no vision stage \(it runs at: llm\)"):
        selector(config, "vision", PRESET.vision)


def test_a_method_must_select():
    with pytest.raises(NotImplementedError):
        make("made")().select(noise(1, 4, 2), 2, None)
