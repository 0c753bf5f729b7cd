"""Every selection rule against the plain implementation of brute_force.py, on random blocks."""

import itertools

import numpy as np
import pytest
import torch

from apet.methods import get_method, token_sizes
from apet.methods._greedy import greedy_coverage
from apet.methods._select import cosine
from methods import brute_force as brute
from methods.synthetic import HEADS, LAYER, Inputs, noise, run

SHAPES = [((5, 6), 8), ((7, 7), 5), ((1, 23), 9)]
shapes = pytest.mark.parametrize(("grid", "dim"), SHAPES)
BATCH = 2


def problem(grid, dim, seed=0):
    n = grid[0] * grid[1]
    return noise(BATCH, n, dim, seed=seed), Inputs.random(BATCH, n, dim, seed=seed)


def budgets(n):
    return sorted({1, 2, 3, n // 3, n // 2, n - 2, n - 1})


def agrees(result, expected):
    """Whether a result holds the expected rows {position: row} of each sample, in ascending order."""
    for sample, kept in enumerate(expected):
        assert result.indices[sample].tolist() == sorted(kept)
        wanted = torch.tensor(np.array([kept[i] for i in sorted(kept)])).float()
        torch.testing.assert_close(result.tokens[sample].float(), wanted, atol=2e-5, rtol=2e-5)


def compare(name, tokens, inputs, grid, oracle, stage=None, **options):
    """`oracle(sample, x, keep)` against the method for several budgets."""
    for keep in budgets(tokens.shape[1]):
        result = run(name, tokens, keep, stage=stage, grid=grid, inputs=inputs, **options)
        agrees(result, [oracle(b, tokens[b].double().numpy(), keep) for b in range(BATCH)])


def of(inputs, name, sample):
    return inputs.tensors[name][sample].double().numpy()


@shapes
def test_uniform_and_grid(grid, dim):
    tokens, _ = problem(grid, dim)
    compare("uniform", tokens, None, grid, lambda b, x, keep: brute.uniform(x, keep))
    compare("grid", tokens, None, grid, lambda b, x, keep: brute.grid(x, keep, grid))
    compare("grid", tokens, None, None, lambda b, x, keep: brute.uniform(x, keep))


@shapes
def test_avg_pool(grid, dim):
    tokens, _ = problem(grid, dim)
    compare("avg_pool", tokens, None, grid, lambda b, x, keep: brute.avg_pool(x, keep, grid))
    compare("avg_pool", tokens, None, None, lambda b, x, keep: brute.avg_pool(x, keep, (1, len(x))))


def test_natural_grids_of_an_image_of_576_tokens():
    tokens = noise(1, 576, 3)
    for keep, cells in ((192, (12, 16)), (128, (8, 16)), (64, (8, 8)), (144, (12, 12))):
        result = run("avg_pool", tokens, keep, grid=(24, 24))
        image = tokens[0].T.unflatten(1, (24, 24))
        pooled = torch.nn.functional.adaptive_avg_pool2d(image, cells)
        torch.testing.assert_close(result.tokens[0], pooled.flatten(1).T)
        sizes = token_sizes(result)[0]
        assert sizes.sum() == 576 and ((sizes - 576 / keep).abs() < 1).all()


@shapes
def test_norm(grid, dim):
    tokens, _ = problem(grid, dim)
    compare("norm", tokens, None, grid, lambda b, x, keep: brute.by_score(x, keep, np.linalg.norm(x, axis=1)))
    smallest = {"smallest": True}
    compare("norm", tokens, None, grid, lambda b, x, k: brute.by_score(x, k, -np.linalg.norm(x, axis=1)), **smallest)


@shapes
def test_tome(grid, dim):
    tokens, _ = problem(grid, dim)
    compare("tome", tokens, None, grid, lambda b, x, keep: brute.tome(x, keep)[0])
    result = run("tome", tokens, 6)
    for b in range(BATCH):
        sizes = brute.tome(tokens[b].double().numpy(), 6)[1]
        assert token_sizes(result)[b].tolist() == [sizes[i] for i in sorted(sizes)]


def test_tome_weights_by_the_sizes_it_is_given():
    tokens = noise(1, 2, 4)
    result = run("tome", tokens, 1, sizes=torch.tensor([[3.0, 1.0]]))
    torch.testing.assert_close(result.tokens[0, 0], (3 * tokens[0, 0] + tokens[0, 1]) / 4)


@shapes
@pytest.mark.parametrize(("name", "layer"), [("fastv", LAYER - 1), ("pyramiddrop", LAYER), ("vscan", LAYER)])
def test_last_token_attention(name, layer, grid, dim):
    tokens, inputs = problem(grid, dim)
    row = f"attention_row {layer}"
    compare(
        name,
        tokens,
        inputs,
        None,
        lambda b, x, keep: brute.by_score(x, keep, of(inputs, row, b).mean(0)),
        stage="llm",
    )


@shapes
def test_divprune(grid, dim):
    tokens, _ = problem(grid, dim)
    compare("divprune", tokens, None, grid, lambda b, x, keep: brute.divprune(x, keep))


@shapes
def test_cenprune(grid, dim):
    tokens, _ = problem(grid, dim)
    compare("cenprune", tokens, None, grid, lambda b, x, keep: brute.cenprune(x, keep))


@pytest.mark.parametrize("relevance", ["none", "clip", "embeddings"])
def test_cenprune_on_a_determinantal_point_process(relevance):
    tokens, inputs = problem((3, 4), 14)

    def oracle(b, x, keep):
        if relevance == "none":
            return brute.cenprune_dpp(x, keep, np.ones(len(x)))
        if relevance == "clip":
            score = -of(inputs, "clip_relevance", b)
        else:
            text = of(inputs, "text_embeddings", b)[of(inputs, "text mask", b) > 0]
            score = np.array([np.mean([brute.cos(v, t) for t in text]) for v in x])
        return brute.cenprune_dpp(x, keep, (score - score.min() + 1e-6) / (score.max() - score.min()))

    for keep in (1, 5, 8):
        result = run("cenprune", tokens, keep, inputs=inputs, form="dpp", relevance=relevance)
        agrees(result, [oracle(b, tokens[b].double().numpy(), keep) for b in range(BATCH)])


def test_cenprune_does_not_see_a_common_offset():
    """What all tokens share hides their differences from plain cosines, not from centred ones."""
    tokens = noise(1, 60, 16)
    offset = 30 * noise(1, 1, 16, seed=1)
    similarity = cosine(tokens + offset - (tokens + offset).mean(1, keepdim=True))
    torch.testing.assert_close(similarity, cosine(tokens - tokens.mean(1, keepdim=True)), atol=1e-4, rtol=1e-4)
    assert cosine(tokens + offset).min() > 0.9 > similarity.masked_fill(torch.eye(60) > 0, -1).max()


def test_relevance_of_cenprune_needs_the_form_that_reads_it():
    with pytest.raises(ValueError, match="needs form='dpp'"):
        get_method("cenprune", relevance="clip")


@shapes
@pytest.mark.parametrize("rank", [1, 4])
def test_lrcp(grid, dim, rank):
    tokens, _ = problem(grid, dim)
    compare("lrcp", tokens, None, grid, lambda b, x, keep: brute.lrcp(x, keep, rank), rank=rank)


@shapes
@pytest.mark.parametrize("scale", [0.6, 1.0])
def test_stacktok(grid, dim, scale):
    """Texts near the image tokens are sharp questions, with a small share of coverage; others are vague ones."""
    tokens, inputs = problem(grid, dim)
    tokens, inputs = tokens.double(), inputs.to(torch.float64)
    inputs.tensors["text_embeddings"] = scale * inputs.tensors["text_embeddings"] + (1 - scale) * tokens[:, :6]

    def oracle(b, x, keep):
        return brute.stacktok(x, keep, of(inputs, "text_embeddings", b)[of(inputs, "text mask", b) > 0])

    compare("stacktok", tokens, inputs, grid, oracle)


@shapes
def test_evocut(grid, dim):
    tokens, inputs = problem(grid, dim)
    inputs = inputs.to(torch.float64)

    def oracle(b, x, keep):
        return brute.evocut(x, keep, list(of(inputs, "vision_states", b)))

    compare("evocut", tokens, inputs, grid, oracle)


@shapes
def test_visionzip(grid, dim):
    tokens, inputs = problem(grid, dim)
    compare(
        "visionzip",
        tokens,
        inputs,
        grid,
        lambda b, x, keep: brute.visionzip(x, keep, of(inputs, "cls_attention -2", b), of(inputs, "vision_keys -2", b)),
    )


def test_visionzip_adds_the_mean_to_its_target():
    """Equal tokens: a contextual row has twice their norm (a row of ToMe once), and 64 tokens split into 54 + 10."""
    tokens = noise(1, 1, 6).repeat(1, 100, 1)
    inputs = Inputs.random(1, 100, 6)
    result = run("visionzip", tokens, 64, inputs=inputs)
    factors = result.tokens[0].norm(dim=-1) / tokens[0, 0].norm()
    several = token_sizes(result)[0] > 1
    torch.testing.assert_close(factors, torch.where(several, 2.0, 1.0))
    assert 0 < several.sum() <= 10
    appended = run("visionzip", tokens, 64, inputs=inputs, legacy_order=True)
    assert (appended.indices[0, :54].diff() > 0).all() and (appended.indices[0, 54:].diff() > 0).all()
    assert appended.indices[0].sort().values.tolist() == result.indices[0].tolist()


@shapes
@pytest.mark.parametrize("options", [{}, {"important": 0.75, "step": 3}])
def test_vispruner(grid, dim, options):
    tokens, inputs = problem(grid, dim)
    compare(
        "vispruner",
        tokens,
        inputs,
        grid,
        lambda b, x, keep: brute.vispruner(x, keep, of(inputs, "cls_attention -2", b), **options),
        **options,
    )


@shapes
@pytest.mark.parametrize("options", [{}, {"neighbours": 4}])
def test_prumerge_plus(grid, dim, options):
    """Per-head attention rows must give back the attention of all heads as one."""
    tokens, inputs = problem(grid, dim)
    logits = 2 * noise(BATCH, HEADS, 1 + tokens.shape[1], seed=9)
    inputs.tensors["cls_attention -1"] = logits.softmax(-1)[..., 1:]

    def oracle(b, x, keep):
        return brute.prumerge_plus(x, keep, logits[b].double().numpy(), of(inputs, "vision_keys -1", b), **options)

    compare("prumerge_plus", tokens, inputs, grid, oracle, **options)


def test_prumerge_plus_puts_its_extra_row_last_in_the_published_order():
    tokens, inputs = problem((5, 6), 8)
    inputs.tensors["cls_attention -1"] = torch.cat([torch.zeros(BATCH, HEADS, 24), torch.ones(BATCH, HEADS, 6) / 7], -1)
    plain = run("prumerge_plus", tokens, 13, inputs=inputs)
    legacy = run("prumerge_plus", tokens, 13, inputs=inputs, legacy_order=True)
    # The last tokens are all kept, so the extra row stands in front of them.
    assert (legacy.indices[:, -1] < plain.indices[:, -1]).all()
    assert legacy.indices.sort(-1).values.tolist() == plain.indices.tolist()
    for b in range(BATCH):
        extra = plain.indices[b].tolist().index(legacy.indices[b, -1].item())
        assert torch.equal(plain.tokens[b, extra], legacy.tokens[b, -1])


@shapes
@pytest.mark.parametrize("inside", ["attention", "score"])
def test_holov(grid, dim, inside):
    tokens, inputs = problem(grid, dim)
    compare(
        "holov",
        tokens,
        inputs,
        grid,
        lambda b, x, keep: brute.holov(x, keep, of(inputs, "cls_attention -2", b), inside=inside)[0],
        inside=inside,
    )


def test_holov_quotas_are_the_attention_mass_of_the_crops():
    """The variance term cancels: quotas are those of the attention alone, up to rounding of the shares."""
    tokens, inputs = noise(1, 160, 8), Inputs.random(1, 160, 8)
    attention = of(inputs, "cls_attention -2", 0)
    kept = run("holov", tokens, 48, inputs=inputs).indices[0].numpy()
    counts = np.bincount(kept // 10, minlength=16)
    quota = brute.holov(tokens[0].double().numpy(), 48, attention)[1]
    assert counts.tolist() == np.minimum(quota, 10).tolist()
    share = attention.mean(0).reshape(16, 10).sum(1)
    floors = np.floor(48 * share / share.sum())
    assert (np.abs(counts - floors) <= 1).all()


def test_holov_in_the_published_order():
    tokens, inputs = problem((7, 7), 5)
    legacy = run("holov", tokens, 20, inputs=inputs, legacy_order=True)
    attention = inputs.tensors["cls_attention -2"].mean(1)
    assert legacy.indices.sort(-1).values.tolist() == run("holov", tokens, 20, inputs=inputs).indices.tolist()
    crop = [next(p for p, group in enumerate(brute.crops_of(49, 16)) if i in group) for i in range(49)]
    for b in range(BATCH):
        keys = [(crop[i], -attention[b, i].item()) for i in legacy.indices[b].tolist()]
        assert keys == sorted(keys)


@pytest.mark.parametrize(
    ("grid", "dim", "keep"), [((8, 9), 6, 40), ((12, 12), 6, 70), ((7, 11), 4, 60), ((1, 50), 4, 33)]
)
def test_vscan_vision(grid, dim, keep):
    tokens, inputs = problem(grid, dim)
    for count in (1, keep, grid[0] * grid[1] - 1):
        result = run("vscan", tokens, count, grid=grid, inputs=inputs)
        rows = [(of(inputs, "cls_attention 5", b), of(inputs, "cls_attention -2", b)) for b in range(BATCH)]
        agrees(result, [brute.vscan_vision(tokens[b].double().numpy(), count, *rows[b], grid) for b in range(BATCH)])


@pytest.mark.parametrize(("relevance", "theta"), [("clip", None), ("clip", 0.5), ("embeddings", None)])
def test_cdpruner(relevance, theta):
    tokens, inputs = problem((3, 4), 14)
    for keep in (1, 5, 8):
        result = run("cdpruner", tokens, keep, inputs=inputs, relevance=relevance, theta=theta)
        expected = []
        for b in range(BATCH):
            x = tokens[b].double().numpy()
            if relevance == "clip":
                score = -of(inputs, "clip_relevance", b)
            else:
                text = of(inputs, "text_embeddings", b)[of(inputs, "text mask", b) > 0]
                score = np.array([np.mean([brute.cos(v, t) for t in text]) for v in x])
            expected.append(brute.cdpruner(x, keep, score, theta))
        agrees(result, expected)


def test_cdpruner_beyond_the_width_of_the_features():
    """With 4 dimensions the fifth pick starts anew among the tokens left, instead of taking them in order."""
    tokens, inputs = problem((3, 8), 4)
    small = run("cdpruner", tokens, 4, inputs=inputs).indices
    kept = run("cdpruner", tokens, 8, inputs=inputs).indices
    for b in range(BATCH):
        rest = [i for i in range(24) if i not in small[b].tolist()]
        x, r = tokens[b].double().numpy(), -of(inputs, "clip_relevance", b)
        r = (r - r.min() + 1e-6) / (r.max() - r.min())
        kernel = np.array([[r[i] * brute.cos(x[i], x[j]) * r[j] for j in rest] for i in rest])
        again = [rest[p] for p in brute.log_det_greedy(kernel, 4)]
        assert kept[b].tolist() == sorted([*small[b].tolist(), *again])


@shapes
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_scope(grid, dim, alpha):
    tokens, inputs = problem(grid, dim)
    compare(
        "scope",
        tokens,
        inputs,
        grid,
        lambda b, x, keep: brute.scope(x, keep, of(inputs, "cls_attention -2", b), alpha),
        alpha=alpha,
    )


@shapes
def test_coverage_alone(grid, dim):
    """Without attention mutual neighbours gain the same: every pick must be one of the best, whichever it is."""
    tokens, _ = problem(grid, dim)
    similarity = cosine(tokens.double())
    picks = greedy_coverage(similarity, 12)
    kept = run("scope", tokens.double(), 12, alpha=0.0).indices
    assert kept.tolist() == picks.sort(-1).values.tolist()
    for b in range(BATCH):
        chosen = []
        for pick in picks[b].tolist():
            gains = [brute.coverage(similarity[b].numpy(), [*chosen, i]) for i in range(tokens.shape[1])]
            assert pick not in chosen and gains[pick] >= max(gains) - 1e-9
            chosen.append(pick)


@shapes
@pytest.mark.parametrize("text", [True, False])
def test_mmtok(grid, dim, text):
    tokens, inputs = problem(grid, dim)

    def oracle(b, x, keep):
        words = of(inputs, "text_embeddings", b)[of(inputs, "text mask", b) > 0]
        return brute.mmtok(x, keep, of(inputs, "vision_features", b), words if text else [])

    compare("mmtok", tokens, inputs, grid, oracle, text=text)


@pytest.mark.parametrize("name", ["scope", "mmtok"])
def test_greedy_coverage_keeps_its_guarantee(name):
    """At least 1 - 1/e of the best set, found by trying all of them."""
    tokens, inputs = noise(1, 12, 5), Inputs.random(1, 12, 5)
    option = {"alpha": 0.0} if name == "scope" else {"text": False}
    kept = run(name, tokens, 3, inputs=inputs, **option).indices[0].tolist()
    x = tokens[0].double().numpy() if name == "scope" else of(inputs, "vision_features", 0)
    matrix = np.array([[brute.cos(a, b) for b in x] for a in x])
    if name == "mmtok":
        matrix = np.array([brute.softmax(row / 0.2) for row in matrix])
    best = max(brute.coverage(matrix, subset) for subset in itertools.combinations(range(12), 3))
    assert brute.coverage(matrix, kept) >= (1 - 1 / np.e) * best


@shapes
@pytest.mark.parametrize("pivots", [(4, 4), (2, 0), (1, 6)])
def test_dart(grid, dim, pivots):
    tokens, inputs = problem(grid, dim)
    options = dict(zip(("image_pivots", "text_pivots"), pivots, strict=True))
    scale = 1 + np.arange(dim) / 10

    def oracle(b, x, keep):
        real = of(inputs, "text mask", b) > 0
        return brute.dart(
            x,
            keep,
            of(inputs, f"keys {LAYER - 1}", b),
            of(inputs, f"text_keys {LAYER - 1}", b)[:, real],
            of(inputs, "text_hidden", b)[real],
            lambda row: row * scale / np.sqrt(np.mean(row**2)),
            **options,
        )

    compare("dart", tokens, inputs, None, oracle, **options)


def test_dart_without_any_text():
    tokens, inputs = problem((5, 6), 8)
    for name in ("text_embeddings", "text_hidden", "text mask"):
        inputs.tensors[name] = inputs.tensors[name][:, :0]
    inputs.tensors["text_keys 1"] = inputs.tensors["text_keys 1"][:, :, :0]
    assert torch.equal(
        run("dart", tokens, 12, inputs=inputs).indices, run("dart", tokens, 12, inputs=inputs, text_pivots=0).indices
    )


@pytest.mark.parametrize(("grid", "dim"), [((5, 6), 8), ((7, 7), 5), ((9, 9), 6)])
@pytest.mark.parametrize("recycle", [True, False])
def test_sparsevlm(grid, dim, recycle):
    tokens, inputs = problem(grid, dim)

    def oracle(b, x, keep):
        real = of(inputs, "text mask", b) > 0
        text, attention = of(inputs, "text_embeddings", b)[real], of(inputs, f"text_attention {LAYER}", b)[:, real]
        scores = brute.sparsevlm_scores(of(inputs, "image_embeddings", b), text, attention)
        return brute.sparsevlm(x, keep, scores) if recycle else brute.by_score(x, keep, scores)

    compare("sparsevlm", tokens, inputs, None, oracle, recycle=recycle)


def test_sparsevlm_appends_recycled_rows_in_the_published_order():
    tokens, inputs = problem((9, 9), 6)
    plain, legacy = (run("sparsevlm", tokens, 20, inputs=inputs, legacy_order=order) for order in (False, True))
    assert legacy.indices.sort(-1).values.tolist() == plain.indices.tolist()
    own = get_method("sparsevlm")._own_rows(81, 20)
    assert own < 20 and (token_sizes(legacy)[:, own:] >= 1).all() and (token_sizes(legacy)[:, :own] == 1).all()


def test_sparsevlm_rates_with_all_text_where_none_stands_out():
    tokens, inputs = problem((5, 6), 8)
    inputs.tensors["text_embeddings"] = torch.zeros_like(inputs.tensors["text_embeddings"])
    mask = inputs.tensors["text mask"]
    rows = inputs.tensors[f"text_attention {LAYER}"].mean(1)
    scores = (rows * mask.unsqueeze(-1)).sum(1) / mask.sum(-1, keepdim=True)
    result = run("sparsevlm", tokens, 9, inputs=inputs, recycle=False)
    assert result.indices.tolist() == scores.topk(9).indices.sort(-1).values.tolist()
