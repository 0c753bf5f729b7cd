"""What every method must keep, whatever its idea: shape, order, dtype, determinism, batches, ties, merging.

The list of methods is written out here, so that a method cannot be registered without being tested.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from apet.config import ApetConfig, StagePreset
from apet.core import similarity
from apet.methods import INPUTS, get_method, method_names, selector, token_sizes
from methods.synthetic import Inputs, noise, run

N, GRID, DIM = 77, (7, 11), 13

# Method, stage and options.
CASES = [
    ("apet", "vision", {}),
    ("apet", "llm", {}),
    ("apet_plus", "vision", {}),
    ("apet_plus", "llm", {}),
    ("apet_plus", "vision", {"rounds": 4, "normalise": "unit", "sinks": "merge"}),
    ("apet_plus", "vision", {"normalise": "centre_unit", "merge": False, "quota": 0.0, "ridge": 0.01}),
    ("apet_plus", "vision", {"quota": 1.0, "start": "norm", "sinks": "keep", "similarity_floor": None}),
    ("apet_plus", "vision", {"text": 1.0}),
    ("apet_plus", "vision", {"text": 0.5, "outlier": 1.0}),
    ("apet_plus", "vision", {"normalise": "centre_unit", "outlier": 1.0}),
    ("apet_plus", "llm", {"text": 0.5, "rounds": 3, "quota": 0.7}),
    ("avg_pool", "vision", {}),
    ("avg_pool", "llm", {}),
    ("cdpruner", "vision", {}),
    ("cdpruner", "vision", {"relevance": "embeddings", "theta": 0.5}),
    ("cenprune", "vision", {}),
    ("cenprune", "llm", {}),
    ("cenprune", "vision", {"form": "dpp"}),
    ("cenprune", "vision", {"form": "dpp", "relevance": "clip"}),
    ("cenprune", "vision", {"form": "dpp", "relevance": "embeddings"}),
    ("dart", "llm", {}),
    ("dart", "llm", {"text_pivots": 0}),
    ("divprune", "vision", {}),
    ("divprune", "llm", {}),
    ("evocut", "vision", {}),
    ("evocut", "vision", {"updates": 3, "clusters": 2}),
    ("fastv", "llm", {}),
    ("grid", "vision", {}),
    ("grid", "llm", {}),
    ("holov", "vision", {}),
    ("holov", "vision", {"inside": "score"}),
    ("lrcp", "vision", {}),
    ("lrcp", "llm", {"rank": 8}),
    ("mmtok", "vision", {}),
    ("mmtok", "vision", {"text": False}),
    ("norm", "vision", {}),
    ("norm", "llm", {"smallest": True}),
    ("prumerge_plus", "vision", {}),
    ("pyramiddrop", "llm", {}),
    ("random", "vision", {}),
    ("random", "llm", {}),
    ("scope", "vision", {}),
    ("scope", "vision", {"alpha": 0.0}),
    ("sparsevlm", "llm", {}),
    ("sparsevlm", "llm", {"recycle": False}),
    ("stacktok", "vision", {}),
    ("tome", "vision", {}),
    ("tome", "llm", {}),
    ("uniform", "vision", {}),
    ("uniform", "llm", {}),
    ("vispruner", "vision", {}),
    ("vispruner", "vision", {"important": 1.0}),
    ("visionzip", "vision", {}),
    ("vscan", "vision", {}),
    ("vscan", "llm", {}),
]
every = pytest.mark.parametrize(("name", "stage", "options"), CASES)

# Methods whose rows can be other than tokens of the input, those that take equal tokens in order, and those where every
# token ends up in exactly one row.
SYNTHETIC = {"apet", "apet_plus", "avg_pool", "lrcp", "prumerge_plus", "sparsevlm", "tome", "visionzip", "vscan"}
IN_ORDER = {"cdpruner", "cenprune", "divprune", "evocut", "fastv", "mmtok", "norm", "pyramiddrop", "scope", "stacktok"}
LOSSLESS = ("apet", "avg_pool", "lrcp", "prumerge_plus", "tome", "visionzip")


def call(name, stage, options, tokens, keep, inputs=None):
    inputs = inputs or Inputs.random(*tokens.shape)
    return run(name, tokens, keep, stage=stage, grid=GRID, inputs=inputs, **options)


def check(result, tokens, keep):
    """Exactly `keep` unique ascending rows, a source map that fits them, finite values of the input's dtype."""
    batch, n, dim = tokens.shape
    assert result.tokens.shape == (batch, keep, dim) and result.tokens.dtype == tokens.dtype
    assert result.tokens.isfinite().all()
    assert result.indices.shape == (batch, keep) and result.indices.dtype == torch.int64
    assert (result.indices.diff() > 0).all() and (result.indices >= 0).all() and (result.indices < n).all()
    assert result.errors.shape == (batch, n) and result.errors.dtype == torch.float32
    assert result.errors.isfinite().all()
    assert result.sources.shape == (batch, n) and result.sources.dtype == torch.int64
    assert (result.sources >= -1).all() and (result.sources < keep).all()
    own = result.sources.gather(1, result.indices)
    assert torch.equal(own, torch.arange(keep).expand(batch, keep))


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_matrix_is_the_registry():
    runnable = {(name, stage) for name in method_names() for stage in get_method(name).stages}
    assert {(name, stage) for name, stage, _ in CASES} == runnable
    assert get_method("none").stages == ()


@every
@pytest.mark.parametrize("keep", [1, 2, 3, 10, 63, 64, N - 2, N - 1])
def test_rows(name, stage, options, keep):
    tokens = noise(3, N, DIM)
    before = tokens.clone()
    result = call(name, stage, options, tokens, keep)
    check(result, tokens, keep)
    assert torch.equal(tokens, before)
    if name not in SYNTHETIC:
        assert torch.equal(result.tokens, tokens.gather(1, result.indices.unsqueeze(-1).expand(-1, -1, DIM)))


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(name, stage, options, dtype):
    tokens = noise(2, N, DIM).to(dtype)
    inputs = Inputs.random(2, N, DIM).to(dtype)
    result = call(name, stage, options, tokens, 20, inputs)
    check(result, tokens, 20)
    if dtype != torch.float64:
        full = call(name, stage, options, tokens.float(), 20, inputs.to(torch.float32))
        assert torch.equal(result.indices, full.indices)
        torch.testing.assert_close(result.tokens, full.tokens.to(dtype))


@every
def test_the_same_twice_and_in_any_batch(name, stage, options):
    tokens, inputs = noise(4, N, DIM), Inputs.random(4, N, DIM)
    together = call(name, stage, options, tokens, 21, inputs)
    torch.rand(3)
    assert same(together, call(name, stage, options, tokens, 21, inputs))
    for part in (slice(0, 1), slice(1, 4), slice(3, 4)):
        alone = call(name, stage, options, tokens[part], 21, inputs.rows(part))
        assert torch.equal(alone.indices, together.indices[part])
        assert torch.equal(alone.sources, together.sources[part])
        torch.testing.assert_close(alone.tokens, together.tokens[part])


@every
@pytest.mark.parametrize("keep", [5, N - 1])
def test_equal_tokens_are_ties(name, stage, options, keep):
    """Blocks of equal tokens with equal inputs: still unique ascending rows, and none is other than the token."""
    tokens = noise(1, 1, DIM).repeat(2, N, 1)
    inputs = Inputs.random(2, N, DIM).shuffled(torch.zeros(N, dtype=torch.int64))
    result = call(name, stage, options, tokens, keep, inputs)
    check(result, tokens, keep)
    assert same(result, call(name, stage, options, tokens, keep, inputs))
    if name not in ("visionzip", "prumerge_plus", "sparsevlm"):  # their rows are sums
        torch.testing.assert_close(result.tokens, tokens[:, :keep])
    if name in (
        "norm",
        "fastv",
        "pyramiddrop",
        "divprune",
        "scope",
        "mmtok",
        "cdpruner",
        "cenprune",
        "stacktok",
        "evocut",
    ):
        assert result.indices.tolist() == [list(range(keep))] * 2


@every
def test_zero_tokens_are_no_trouble(name, stage, options):
    tokens = torch.zeros(1, N, DIM)
    check(call(name, stage, options, tokens, 9), tokens, 9)


@every
def test_nothing_waits_for_the_device(name, stage, options, monkeypatch):
    """Fake tensors have no values: a method that reads one on the host, or whose shapes depend on one, fails here."""
    monkeypatch.setattr(similarity, "MAY_LOOK", ())  # as on any device but the CPU
    tokens, inputs = noise(2, N, DIM), Inputs.random(2, N, DIM)
    with FakeTensorMode() as mode:
        result = call(name, stage, options, mode.from_tensor(tokens), 20, inputs.faked(mode))
        assert result.tokens.shape == (2, 20, DIM) and result.indices.shape == (2, 20)


@pytest.mark.parametrize(
    ("name", "stage", "options"),
    [
        *(case for case in CASES if case[0] in LOSSLESS),
        ("apet_plus", "vision", {"similarity_floor": None}),
        ("apet_plus", "llm", {"similarity_floor": None, "sinks": "merge"}),
        ("vscan", "vision", {}),
    ],
)
@pytest.mark.parametrize("keep", [7, 21, N - 1])
def test_every_token_goes_into_one_row(name, stage, options, keep):
    tokens = noise(2, N, DIM)
    result = call(name, stage, options, tokens, keep)
    assert (result.sources >= 0).all()
    assert token_sizes(result).sum(-1).tolist() == [N, N]


@pytest.mark.parametrize("name", ["apet", "apet_plus", "avg_pool", "tome", "vscan"])
def test_merging_equal_tokens_gives_the_token(name):
    tokens = noise(1, 1, DIM).repeat(1, N, 1)
    result = call(name, "vision", {}, tokens, 12)
    torch.testing.assert_close(result.tokens, tokens[:, :12])


def test_sizes_of_pruning_and_of_rows_that_stood_for_many():
    tokens = noise(2, N, DIM)
    pruned = call("norm", "vision", {}, tokens, 10)
    assert torch.equal(token_sizes(pruned), torch.ones(2, 10))
    merged = call("tome", "vision", {}, tokens, 10)
    counts = torch.arange(1.0, N + 1).expand(2, N)
    expected = [[counts[b][merged.sources[b] == k].sum().item() for k in range(10)] for b in range(2)]
    assert token_sizes(merged, counts).tolist() == expected


POSITION_FREE = [
    ("apet_plus", "vision", {"quota": 0.0}),
    ("apet_plus", "vision", {"quota": 0.0, "rounds": 3, "sinks": "merge", "normalise": "unit"}),
    ("cdpruner", "vision", {}),
    ("cenprune", "vision", {}),
    ("cenprune", "vision", {"form": "dpp"}),
    ("dart", "llm", {}),
    ("divprune", "vision", {}),
    ("evocut", "vision", {}),
    ("fastv", "llm", {}),
    ("lrcp", "vision", {}),
    ("mmtok", "vision", {}),
    ("norm", "vision", {}),
    ("pyramiddrop", "llm", {}),
    ("scope", "vision", {}),
    ("vscan", "llm", {}),
]
POSITION_BOUND = [
    ("apet_plus", "vision", {"quota": 1.0}),
    ("holov", "vision", {}),
    ("tome", "vision", {}),
    ("visionzip", "vision", {}),
    ("vscan", "vision", {}),
]


def permuted(name, stage, options, keep=40):
    """Sets kept with and without shuffling the block's tokens first, both as positions before the shuffle."""
    order = torch.randperm(N, generator=torch.Generator().manual_seed(5))
    tokens, inputs = noise(2, N, DIM), Inputs.random(2, N, DIM)
    plain = call(name, stage, options, tokens, keep, inputs)
    moved = call(name, stage, options, tokens[:, order], keep, inputs.shuffled(order))
    return plain.indices.tolist(), order[moved.indices].sort(-1).values.tolist()


@pytest.mark.parametrize(("name", "stage", "options"), POSITION_FREE)
def test_position_free_methods_follow_a_permutation(name, stage, options):
    plain, moved = permuted(name, stage, options)
    assert plain == moved


@pytest.mark.parametrize(("name", "stage", "options"), POSITION_BOUND)
def test_position_bound_methods_do_not(name, stage, options):
    plain, moved = permuted(name, stage, options)
    assert plain != moved


@every
def test_needs_are_declared_and_their_absence_is_explained(name, stage, options):
    """A method asks for what it declares and nothing else; what is missing is named, with the stage."""
    method = get_method(name, **options)
    tokens, inputs = noise(1, N, DIM), Inputs.random(1, N, DIM)
    asked = set()

    class Watched:
        def __getattr__(self, attribute):
            asked.add(attribute)
            return getattr(inputs, attribute)

    call(name, stage, options, tokens, 20, Watched())
    needs = method.needs(stage)
    assert asked == set(needs)
    assert all(stage in INPUTS[need][0] and bool(layers) == INPUTS[need][1] for need, layers in needs.items())
    for need in needs:
        without = Watched()
        setattr(without, need, None)

        def refuse(*args):
            raise NotImplementedError("the tower has no CLS token")

        for broken, reason in ((None, "does not provide it"), (refuse, "the tower has no CLS token")):
            setattr(without, need, broken)
            with pytest.raises(
                ValueError, match=f"method '{name}' needs {need}.* at the {stage} stage, but .*{reason}"
            ):
                call(name, stage, options, tokens, 20, without)
        config = ApetConfig(method=name)
        others = set(INPUTS) - {need}
        with pytest.raises(ValueError, match=f"method '{name}' needs {need}"):
            selector(config, stage, StagePreset(), options=options, available=others)
    selector(ApetConfig(method=name), stage, StagePreset(), options=options, available=set(needs))


@every
def test_autocast_does_not_reach_the_selection(name, stage, options):
    tokens, inputs = noise(2, N, DIM), Inputs.random(2, N, DIM)
    select = selector(ApetConfig(method=name), stage, StagePreset(), layer=2, num_layers=8, options=options)
    plain = select(tokens, 20, grid=GRID, inputs=inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(plain, select(tokens, 20, grid=GRID, inputs=inputs))
